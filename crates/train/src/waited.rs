//! How long a rank waited for others in a step: by the host's clock around what an op says, or as a device tells whose calls
//! return before.

use std::collections::BTreeMap;

use program::{Axis, Members, Op};
use spec::Result;

use crate::exec::Executor;

/// On how many axes of the mesh a rank may wait.
pub(crate) const AXES: usize = 6;

/// What a rank may wait on.
const WAITS: [&str; AXES] = ["dp", "tp", "pp", "cp", "ep", "world"];

/// Index into [`WAITS`] of whom an op talks to. Those that hold the same parameters are replicas, whatever axes they
/// differ along.
fn waits_on(op: &Op) -> usize {
    match op.comm.as_ref().map(|c| c.members) {
        Some(Members::Replicas(_) | Members::Shards(_) | Members::Owners(_)) => 0,
        Some(Members::Axis(Axis::Dp)) => 0,
        Some(Members::Axis(Axis::Tp)) => 1,
        Some(Members::Axis(Axis::Pp) | Members::Ends) => 2,
        Some(Members::Axis(Axis::Cp)) => 3,
        Some(Members::Axis(Axis::Ep)) => 4,
        Some(Members::World) | None => 5,
    }
}

impl Executor {
    /// Seconds of the last step in which this rank did nothing but wait for others.
    pub fn exposed_comm_s(&self) -> f64 {
        self.comm_ns.iter().sum::<u64>() as f64 / 1e9
    }

    /// The same by the axis of the mesh on which it waited; axes without a wait are left out.
    pub fn waits_s(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let waits = WAITS.into_iter().zip(self.comm_ns);
        waits.filter(|(_, ns)| *ns > 0).map(|(axis, ns)| (axis, ns as f64 / 1e9))
    }

    /// By axis, the name of the op that this rank has waited in most since this was asked last.
    pub(crate) fn take_waits(&mut self) -> BTreeMap<&'static str, String> {
        let mut most: BTreeMap<&'static str, (u64, &str)> = BTreeMap::new();
        for (block, waits) in self.program.blocks.iter().zip(&mut self.op_waits_ns) {
            for (op, ns) in block.ops.iter().zip(waits) {
                let ns = std::mem::take(ns);
                let longest = most.entry(WAITS[waits_on(op)]).or_default();
                if ns > longest.0 {
                    *longest = (ns, &op.name);
                }
            }
        }
        most.into_iter().map(|(axis, (_, name))| (axis, name.to_owned())).collect()
    }

    /// Notes that this rank waited in an op, unless the device tells: its calls return before.
    pub(crate) fn waited(&mut self, block: usize, i: usize, ns: u64) {
        if !self.tells_waits {
            self.comm_ns[waits_on(&self.program.blocks[block].ops[i])] += ns;
            self.op_waits_ns[block][i] += ns;
        }
    }

    /// Hears from the device where this rank waited, once everything is done.
    pub(crate) fn hear_waits(&mut self) -> Result<()> {
        let Executor { program, device, comm_ns, op_waits_ns, .. } = self;
        let Some(waits) = device.waits_ns()? else { return Ok(()) };
        let ops = program.blocks.iter().zip(op_waits_ns).flat_map(|(block, ns)| block.ops.iter().zip(ns));
        for (op, ns) in ops.filter(|(op, _)| op.comm.is_some()) {
            let waited = waits.remove(&op.id).unwrap_or(0);
            comm_ns[waits_on(op)] += waited;
            *ns += waited;
        }
        waits.clear();
        Ok(())
    }
}
