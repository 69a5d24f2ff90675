//! Experts and sequences that several cards hold: rows to and from experts, keys around a ring, heads that are dealt.

use program::{Axis, Members};
use spec::{Activation, ContextMode, Router};

use super::*;
use crate::cases::mixture;

/// The spread, the fault and the group of a message in which a rank is killed.
pub(super) const KILLED: [(&str, &str, &str); 4] = [
    ("dp", "", "data-parallel"),
    ("dp", "nccl-hang", "data-parallel"),
    ("ep", "nccl-hang", "expert-parallel"),
    ("cp", "", "context-parallel"),
];

/// A small model, spread over two ranks along an axis.
pub(super) fn spread(axis: &str) -> (ModelSpec, Layout) {
    let dp = Layout { dp: 2, ..Layout::default() };
    match axis {
        "ep" => (experts(), Layout { ep: 2, ..dp }),
        "cp" => (model(1), Layout { cp: 2, dp: 1, ..dp }),
        _ => (model(2), dp),
    }
}

fn experts() -> ModelSpec {
    ModelSpec { head_dim: 16, ..mixture(Router::PLAIN, Activation::SwiGlu) }
}

#[test]
fn experts_on_several_cards() {
    let (model, ranks) = spread("ep");
    check_of(&model, &ranks, DType::F32, NCCL);
    let sharded = Layout { dp: 4, zero: Zero::Gradients, ..ranks };
    check_of(&model, &sharded, DType::Bf16, NCCL);
}

#[test]
fn sequences_on_several_cards() {
    let (model, ring) = spread("cp");
    let dealt = Layout { context: ContextMode::Heads, ..ring.clone() };
    for (layout, precision) in [(ring, DType::F32), (dealt, DType::Bf16)] {
        check_of(&model, &layout, precision, NCCL);
        check_of(&model, &Layout { tp: 2, ..layout }, DType::F32, NCCL);
    }
}

/// Around a ring and where heads are dealt every byte is one that the program states, and all is recorded.
#[test]
fn sequences_are_exchanged_as_stated() {
    let (model, ring) = spread("cp");
    for context in [ContextMode::Ring, ContextMode::Heads] {
        let layout = Layout { context, ..ring.clone() };
        let Some((logs, said)) = logged(&model, &layout, |exec| stated(&exec.program)) else { return };
        for (step, calls) in logs.iter().enumerate().skip(1) {
            assert_eq!(sent(calls), said.iter().sum::<u64>(), "step {step} of {layout:?}");
            assert!(step == 1 || calls.iter().any(|c| c.recorded), "step {step} of {layout:?}");
        }
    }
}

/// Of rows of experts as many go as over the host, which knows how many there are.
#[test]
fn rows_are_exchanged_as_counted() {
    let (model, layout) = spread("ep");
    let Some((logs, _)) = logged(&model, &layout, |_| ()) else { return };
    let worlds = World::threads(2).expect("ranks");
    let over_host = each_rank(worlds, &model, &layout, (DType::F32, HOST), |mut exec| {
        let of = |exec: &Executor| {
            let all = exec.mesh().sent_bytes().into_iter();
            all.filter(|(m, _)| *m == Members::Axis(Axis::Ep)).map(|(_, bytes)| bytes).sum::<u64>()
        };
        let mut before = of(&exec);
        let each = (1..4).map(|k| {
            steps(&mut exec, model.vocab, k, k + 1);
            let sent = of(&exec);
            sent - std::mem::replace(&mut before, sent)
        });
        each.collect::<Vec<_>>()
    });
    let mut seen = std::collections::BTreeSet::new();
    for (step, calls) in logs.iter().enumerate().skip(1) {
        let expected: u64 = over_host.iter().map(|rank| rank[step - 1]).sum();
        let mut groups: BTreeMap<&str, Vec<&Called>> = BTreeMap::new();
        calls.iter().for_each(|c| groups.entry(&c.communicator).or_default().push(c));
        let groups: Vec<u64> = groups.into_values().map(sent).collect();
        assert!(groups.contains(&expected), "step {step}: {expected} bytes over the host, {groups:?}");
        seen.insert(expected);
    }
    assert!(seen.len() > 1, "rows are as many in every step: {seen:?}");
}
