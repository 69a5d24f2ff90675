//! What this machine's kernels, messages and cores give, for the planner.
//!
//! Kernels are measured where they are used: short programs of several shapes run on the executor with spans on, alone
//! and side by side, so that caches and memory are as full as in training.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use machine::search::kinds_of;
use machine::table::{Conditions, LinkKey, Message};
use machine::{LinkOp, Machine};
use spec::{Result, RunSpec};
use train::CpuClock;

use crate::record::{partners, side_by_side, strangers};
use crate::tables::{Measured, keep_links};
use crate::{host, programs};

pub use crate::tables::Collective;

/// Rounds in which programs and conditions take turns: machines are slow and fast by the minute.
const ROUNDS: usize = 2;
/// The longest message that is measured, bytes.
pub const LINK_BYTES_MAX: usize = 16 << 20;

/// Starts so many ranks over a transport, times each operation for so long, and gives what they took.
pub type TimeCollectives = dyn Fn(&str, usize, Duration) -> Result<Vec<Collective>>;

/// What a calibration is made of.
pub struct Calibration<'a> {
    /// Fewer shapes and shorter budgets, for a layout now.
    pub quick: bool,
    /// Cores of the machine.
    pub cores: usize,
    /// How to time messages.
    pub collectives: &'a TimeCollectives,
    /// Told what is being measured, how many parts are done, and of how many.
    pub progress: &'a dyn Fn(&str, usize, usize),
}

impl Calibration<'_> {
    /// Measures this machine.
    ///
    /// # Errors
    /// If the memory for a program cannot be had, or ranks cannot be started.
    pub fn measure(&self) -> Result<Machine> {
        let mut measured = Measured::default();
        self.kernels(&mut measured, &programs::alone(self.quick)?)?;
        self.split_kinds(&mut measured)?;
        let crowding = self.crowding()?;
        let links = self.links()?;
        let op_gap_s = measured.op_gap_s();
        let (kernels, spread) = measured.kernels();
        Ok(Machine {
            host: train::host(),
            cpu: train::processor(),
            cores: self.cores,
            // Without the system's word enough not to stand in the way.
            memory_bytes: train::memory_bytes().unwrap_or(usize::MAX >> 1),
            phalanx: env!("CARGO_PKG_VERSION").into(),
            measured: host::iso_date(train::now_us() / 1_000_000),
            op_gap_s,
            spread,
            crowding,
            kernels,
            links,
        })
    }

    /// Measures kinds of op and operations between ranks that a calibration of this machine lacks, and adds them to it. Of
    /// kinds that no program here has nothing is added.
    ///
    /// # Errors
    /// As [`Calibration::measure`].
    pub fn add(&self, machine: &mut Machine, lacks: &BTreeSet<&str>) -> Result<()> {
        if LinkOp::ALL.iter().any(|op| lacks.contains(op.name())) {
            let lacking = |key: &LinkKey| lacks.contains(key.op.as_str());
            machine.links.extend(self.links()?.into_iter().filter(|(key, _)| lacking(key)));
        }
        let mut measured = Measured::default();
        let has = |run: &RunSpec| -> Result<bool> {
            let load = crate::workload(run, 1, "shm");
            Ok(kinds_of(&load)?.iter().any(|kind| lacks.contains(kind)))
        };
        let mut programs = Vec::new();
        for run in programs::alone(true)? {
            if has(&run)? {
                programs.push(run);
            }
        }
        self.kernels(&mut measured, &programs)?;
        self.split_kinds(&mut measured)?;
        let (kernels, _) = measured.kernels();
        machine.kernels.extend(kernels.into_iter().filter(|(key, _)| lacks.contains(key.kind.as_str())));
        Ok(())
    }

    /// For one program under one condition in one round.
    fn budget(&self) -> Duration {
        Duration::from_millis(if self.quick { 60 } else { 120 })
    }

    fn kernels(&self, measured: &mut Measured, programs: &[RunSpec]) -> Result<()> {
        let conditions = conditions(self.cores);
        let all = ROUNDS * programs.len() * conditions.len();
        let turns =
            (0..ROUNDS).flat_map(|_| programs).flat_map(|run| conditions.iter().map(move |at| (run, *at)));
        for (done, (run, at)) in turns.enumerate() {
            let what = format!("width {}, {} x {} threads", run.model.hidden, at.beside, at.threads);
            (self.progress)(&what, done, all);
            let cpu = match at {
                Conditions { threads: 1, .. } => Some(CpuClock::Thread),
                Conditions { beside: 1, .. } => Some(CpuClock::Process),
                // The threads of ranks side by side in this process cannot be told apart.
                _ => None,
            };
            let steppers = strangers(run, at.beside, at.threads, cpu)?;
            for recorded in side_by_side(steppers, self.budget())? {
                measured.keep(&recorded, at, false);
            }
        }
        (self.progress)("", all, all);
        Ok(())
    }

    /// Kinds of op that only ranks in a group run.
    fn split_kinds(&self, measured: &mut Measured) -> Result<()> {
        for run in programs::split()? {
            for recorded in side_by_side(partners(&run)?, self.budget())? {
                measured.keep(&recorded, Conditions { threads: 1, beside: 2 }, true);
            }
        }
        Ok(())
    }

    /// How much slower twice as many ranks as cores are than their share of the cores accounts for.
    fn crowding(&self) -> Result<f64> {
        let run = programs::crowd()?;
        let wall_s = |ranks: usize| -> Result<f64> {
            let all = side_by_side(strangers(&run, ranks, 1, None)?, 2 * self.budget())?;
            Ok(all[0].1.iter().map(|step| step.wall_s).fold(f64::INFINITY, f64::min))
        };
        let (mut full, mut over) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..3 {
            full = full.min(wall_s(self.cores)?);
            over = over.min(wall_s(2 * self.cores)?);
        }
        /// Beyond this something else took the cores.
        const MOST: f64 = 1.3;
        Ok((over / full / 2.0).clamp(1.0, MOST))
    }

    /// Messages between processes, over each transport.
    fn links(&self) -> Result<BTreeMap<LinkKey, Vec<Message>>> {
        let budget = Duration::from_millis(if self.quick { 10 } else { 30 });
        let more = (3..).map(|i| 1 << i).take_while(|n| *n <= self.cores);
        let ranks: Vec<usize> = [2, 4].into_iter().chain(more).collect();
        let mut links = BTreeMap::new();
        for transport in ["shm", "tcp"] {
            for &n in &ranks {
                keep_links(&mut links, transport, n, (self.collectives)(transport, n, budget)?);
            }
        }
        Ok(links)
    }
}

/// One rank with some of the cores and with all, and as many ranks side by side as fill them.
fn conditions(cores: usize) -> Vec<Conditions> {
    let threads = std::iter::successors(Some(1), |t| Some(2 * t)).take_while(|t| *t <= cores);
    threads
        .flat_map(|threads| {
            let side_by_side = Some(cores / threads).filter(|n| *n > 1);
            std::iter::once(1).chain(side_by_side).map(move |beside| Conditions { threads, beside })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_fill_the_cores_alone_and_side_by_side() {
        let check = |cores, expected: &[(usize, usize)]| {
            let found: Vec<_> = conditions(cores).iter().map(|c| (c.threads, c.beside)).collect();
            assert_eq!(found, expected, "{cores} cores");
        };
        check(1, &[(1, 1)]);
        check(2, &[(1, 1), (1, 2), (2, 1)]);
        check(6, &[(1, 1), (1, 6), (2, 1), (2, 3), (4, 1)]);
    }
}
