//! Waits of all ranks put together, now and then.

use journal::Record;
use program::{Axis, Coords, Members, Replication};
use spec::{Error, Result};

use super::{Event, Trainer, now_us};
use crate::straggler::{Collected, Found, Window, Windows};

/// What a rank remembers of waits.
#[derive(Default)]
pub(super) struct Waits {
    now: Collected,
    all: Windows,
}

impl Trainer {
    /// Adds the last step to the window, and says whom the ranks wait for when it is full; collective then.
    ///
    /// # Errors
    /// If a rank is lost.
    pub(super) fn watch_waits(&mut self, step_s: f64, each: &mut dyn FnMut(Event)) -> Result<()> {
        let Some(window) = self.run.run.straggler_window.filter(|_| !self.exec.mesh.is_alone()) else {
            return Ok(());
        };
        self.waits.now.add(step_s, self.exec.waits_s());
        // All ranks are at the same step, whenever each of them came.
        if !self.step.is_multiple_of(window as u64) {
            return Ok(());
        }
        let whole = self.waits.now.len() == window;
        let ops = self.exec.take_waits();
        let program = &self.exec.program;
        let op = |axis: &str| ops.get(axis).cloned().unwrap_or_default();
        let ranks = |axis: &str| members(axis, program.coords, &program.layout);
        let own = std::mem::take(&mut self.waits.now).window(program.coords.pp, op, ranks);
        let own = whole.then_some(own);
        let failed = |e: serde_json::Error| Error::failure(format!("say how long this rank waited: {e}"));
        let said = self.exec.exchange(&serde_json::to_vec(&own).map_err(failed)?)?;
        let all = said.iter().map(|bytes| serde_json::from_slice(bytes).map_err(failed));
        // A window that some rank has not seen all of is none.
        let Some(all) = all.collect::<Result<Option<Vec<Window>>>>()? else { return Ok(()) };
        for found in self.waits.all.add(all) {
            let record = self.straggler(found);
            if self.exec.program.rank == 0 {
                self.note(record, each);
            }
        }
        Ok(())
    }

    fn straggler(&self, found: Found) -> Record {
        let Found { ranks, cause, axis, op, lost_s, share, why } = found;
        Record::Straggler { time_us: now_us(), step: self.step, ranks, cause, axis, op, lost_s, share, why }
    }
}

/// Whom a rank waits for on an axis, as [`crate::Executor::waits_s`] names it.
fn members(axis: &str, coords: Coords, layout: &spec::Layout) -> Vec<usize> {
    let members = match axis {
        "dp" => Members::Replicas(Replication::Data),
        "tp" => Members::Axis(Axis::Tp),
        "pp" => Members::Axis(Axis::Pp),
        "cp" => Members::Axis(Axis::Cp),
        "ep" => Members::Axis(Axis::Ep),
        _ => Members::World,
    };
    members.ranks(coords, layout)
}
