//! How long a job stands still, by what it loses: the timeouts of `elastic`, as its state machines keep them.

use core::time::Duration;

use elastic::crew::Limits;
use elastic::rendezvous::Times;
use sim::recovery::{LOOK, Loss, PlayedJob, Recovered};

fn lose(spares: usize, min_nodes: usize, loss: Loss) -> Recovered {
    PlayedJob::usual(spares, min_nodes).lose(loss).unwrap()
}

/// Noticed within a few looks of what the timeout says; the others keep what they have.
fn check(loss: Loss, low: Duration, high: Duration) {
    for spares in [0, 1] {
        let it = lose(spares, 3, loss);
        let detect = Duration::from_secs_f64(it.detect_s);
        assert!(low <= detect && detect <= high + 4 * LOOK, "{loss:?}: {it:?}");
        assert!(it.meet_s < 1.0, "{loss:?}: {it:?}");
        let lost = usize::from(loss.takes_node());
        assert_eq!(it.nodes, if spares > 0 { PlayedJob::NODES } else { PlayedJob::NODES - lost }, "{loss:?}");
        assert_eq!(it.kept, 2 * PlayedJob::NODES - if lost > 0 { 2 } else { 1 }, "{loss:?}");
    }
}

#[test]
fn losses_are_noticed_when_their_timeouts_say() {
    let (times, limits) = (Times::default(), Limits::default());
    check(Loss::Process, Duration::ZERO, Duration::ZERO);
    check(Loss::Agent, Duration::ZERO, Duration::ZERO);
    check(Loss::Stop, limits.silent, limits.silent);
    check(Loss::Hang, limits.hung, limits.hung);
    // Its last sign of life was up to one interval ago.
    check(Loss::Node, times.dead_after() - times.keep_alive_interval, times.dead_after());
}

#[test]
fn shorter_timeouts_are_kept_too() {
    let mut job = PlayedJob::usual(1, 3);
    job.times.keep_alive_interval = Duration::from_secs(1);
    job.limits.hung = Duration::from_secs(20);
    let silent = job.lose(Loss::Node).unwrap().detect_s;
    assert!((2.0..3.2).contains(&silent), "{silent}");
    let hung = job.lose(Loss::Hang).unwrap().detect_s;
    assert!((20.0..20.5).contains(&hung), "{hung}");
}

/// Without a spare and with no leave to shrink, nobody comes within the time to join, and the job ends.
#[test]
fn a_job_that_may_not_shrink_ends_without_spares() {
    let said = PlayedJob::usual(0, PlayedJob::NODES).lose(Loss::Node).unwrap_err();
    assert!(said.to_string().contains("3 of 4 nodes came within 600 s"), "{said}");
}
