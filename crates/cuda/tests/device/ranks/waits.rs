//! How long ranks wait for each other, as the card tells.

use std::time::{Duration, Instant};

use train::{Executor, StepOutputs};

use super::*;

/// A step, in which some of the time, and not more than all of it, went by in waits.
pub(super) fn step(exec: &mut Executor, vocab: usize, k: u64) -> StepOutputs {
    let since = Instant::now();
    let outputs = steps(exec, vocab, k, k + 1).remove(0);
    let (step_s, waited_s) = (since.elapsed().as_secs_f64(), exec.exposed_comm_s());
    assert!(waited_s > 0.0 && waited_s < step_s, "waited {waited_s} s of {step_s} in step {k}");
    let axes: Vec<_> = exec.waits_s().collect();
    let layout = &exec.program.layout;
    for (axis, ranks) in [("tp", layout.tp), ("pp", layout.pp), ("cp", layout.cp), ("ep", layout.ep)] {
        assert!(ranks == 1 || axes.iter().any(|(name, _)| *name == axis), "no waits on {axis}: {axes:?}");
    }
    outputs
}

/// Whoever is late is waited for by the other, for as long as it is, and does not itself wait meanwhile: call by call, and in
/// graphs.
#[test]
fn a_rank_that_is_late_is_waited_for() {
    let Some(log) = std::env::var_os(LOG).filter(|_| has_cards(2)) else { return };
    let _alone = ALONE.lock();
    // Every message of a tensor-parallel rank holds it up.
    let (model, layout) = (model(1), Layout { tp: 2, ..Layout::default() });
    let barrier = std::sync::Barrier::new(2);
    let worlds = World::threads(2).expect("ranks");
    let each = each_rank(worlds, &model, &layout, (DType::F32, NCCL), |mut exec| {
        let is_late = exec.program.rank == 1;
        let mut one = |k: u64| {
            if barrier.wait().is_leader() {
                called();
            }
            barrier.wait();
            let since = Instant::now();
            let late = if is_late { work_once_awaited(&log, &exec) } else { Duration::ZERO };
            steps(&mut exec, model.vocab, k, k + 1);
            let waited = exec.waits_s().find(|(axis, _)| *axis == "tp").map_or(0.0, |(_, s)| s);
            (late.as_secs_f64(), waited, since.elapsed().as_secs_f64())
        };
        (1..5).map(&mut one).collect::<Vec<_>>()
    });
    for (step, (other, late)) in (1..).zip(each[0].iter().zip(&each[1])) {
        // The card counts by half microseconds, once for each message.
        let (late_s, rounded) = (late.0, 1e-3);
        assert!(other.1 + rounded >= late_s, "step {step}: {late_s} s late, {other:?}");
        assert!(late.2 - late.1 + rounded >= late_s, "step {step}: waits for itself: {late:?}");
    }
}

/// Works for itself from when the other rank is in a message, and says for how long.
fn work_once_awaited(log: &std::ffi::OsStr, exec: &Executor) -> Duration {
    while !std::fs::read_to_string(log).unwrap_or_default().contains(" 0/2 ") {
        std::thread::yield_now();
    }
    let since = Instant::now();
    // Enough to be told from what the card rounds.
    while since.elapsed() < Duration::from_millis(20) {
        weights(exec);
    }
    since.elapsed()
}
