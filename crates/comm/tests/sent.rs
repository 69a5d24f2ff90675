//! The payload that a rank counts as sent is what its sockets carry, and the same on every transport.

mod common;

use comm::{Group, Op, OpTag, Order, RawSlice, World, bf16, even_ranges};
use common::{Kind, run};
use proptest::prelude::*;
use std::ops::Range;

const TAG: OpTag = OpTag(3);

/// Adjacent ranges over `count` elements, cut where `cuts` says (per mille, ascending).
fn ranges(count: usize, cuts: &[usize]) -> Vec<Range<usize>> {
    let at = |i: usize| if i == 0 { 0 } else { cuts.get(i - 1).map_or(count, |c| count * c / 1000) };
    (0..=cuts.len()).map(|i| at(i)..at(i + 1)).collect()
}

/// Payload counted and bytes given to sockets by one operation, done at once or in the background.
type Bytes = (u64, u64);

fn measure(world: &World, group: &Group, op: Op<'_>, later: bool) -> Bytes {
    let before = (group.sent_bytes(), world.sent_by_socket());
    // SAFETY: the buffers outlive the operation, which is waited for.
    unsafe {
        match later {
            true => drop(group.start(TAG, op).unwrap().wait().unwrap()),
            false => group.run(TAG, op).unwrap(),
        }
    }
    (group.sent_bytes() - before.0, world.sent_by_socket() - before.1)
}

/// What every operation sends, by name; `exact` where the sockets of each rank carry what it counts.
fn all_operations(
    world: &World,
    count: usize,
    cuts: &[usize],
    later: bool,
) -> Vec<(&'static str, bool, Bytes)> {
    let (n, me) = (world.size(), world.rank());
    let reversed: Vec<usize> = (0..n).rev().collect();
    let group = &world.group(&reversed, 5).unwrap();
    let (mut x, mut y) = (vec![bf16::ONE; count], vec![1f64; n * count]);
    let ranges = ranges(count, cuts);
    let here = group.rank();
    // Member i sends member j so many elements.
    let part = |i: usize, j: usize| count / (1 + i + 2 * j);
    let runs = |lens: Vec<usize>| -> Vec<Range<usize>> {
        lens.iter().scan(0, |end, len| Some((*end..*end + len, *end += len).0)).collect()
    };
    let out = runs((0..n).map(|j| part(here, j)).collect());
    let into = runs((0..n).map(|j| part(j, here)).collect());
    let mut z = vec![0f64; n * count];
    let (x, y, z) = (RawSlice::of(&mut x), RawSlice::of(&mut y), RawSlice::of(&mut z));
    let reduce = |order| Op::AllReduce { buffer: x, order };
    let mut rows = vec![
        ("all_reduce", true, measure(world, group, reduce(Order::Tree), later)),
        ("ring", false, measure(world, group, reduce(Order::Ring), later)),
    ];
    for ranges in [ranges, even_ranges(count, n)] {
        let scatter =
            Op::ReduceScatter { input: x, output: None, ranges: (&ranges[..]).into(), order: Order::Tree };
        rows.push(("reduce_scatter", true, measure(world, group, scatter, later)));
        let gather = Op::AllGather { input: None, output: x, ranges: (&ranges[..]).into() };
        rows.push(("all_gather", true, measure(world, group, gather, later)));
    }
    let exchange = Op::AllToAll { input: y, input_ranges: out.into(), output: z, output_ranges: into.into() };
    rows.push(("all_to_all", true, measure(world, group, exchange, later)));
    rows.push(("broadcast", false, measure(world, group, Op::Broadcast { buffer: x, root: n - 1 }, later)));
    let message = match here {
        0 => Op::Send { buffer: x, to: 1, channel: 4 },
        1 => Op::Recv { buffer: x, from: 0, channel: 4 },
        _ => Op::Barrier,
    };
    if n > 1 && here < 2 {
        rows.push(("message", true, measure(world, group, message, later)));
    }
    rows.push(("barrier", true, measure(world, world.all(), Op::Barrier, later)));
    let total: u64 = rows.iter().map(|(_, _, (counted, _))| counted).sum();
    assert_eq!(world.sent(), [(u32::MAX, 0), (5, total)], "rank {me}");
    rows
}

fn counted(ranks: &[Vec<(&'static str, bool, Bytes)>]) -> Vec<Vec<(&'static str, u64)>> {
    ranks.iter().map(|rows| rows.iter().map(|(op, _, (counted, _))| (*op, *counted)).collect()).collect()
}

fn check(n: usize, count: usize, cuts: &[usize], later: bool) {
    let cuts = &cuts[..n - 1];
    let on = |kind| run(kind, n, |world| all_operations(&world, count, cuts, later));
    let tcp = on(Kind::Tcp);
    for (rank, rows) in tcp.iter().enumerate() {
        for (op, exact, (counted, carried)) in rows {
            assert!(!exact || counted == carried, "{op} of rank {rank}: {counted}, but {carried} went out");
        }
    }
    for op in ["ring", "broadcast"] {
        let of_op = || tcp.iter().flatten().filter(|(name, ..)| *name == op);
        let counted: u64 = of_op().map(|(_, _, (counted, _))| counted).sum();
        let carried: u64 = of_op().map(|(_, _, (_, carried))| carried).sum();
        assert_eq!(counted, carried, "{op} of all ranks");
    }
    for kind in [Kind::Threads, Kind::Shm, Kind::Hosts(2)] {
        assert_eq!(counted(&on(kind)), counted(&tcp), "{kind:?}");
    }
}

#[test]
fn an_operation_sends_what_its_definition_says() {
    // 1000 elements of 2 bytes among 3, in aligned shares of 384, 320 and 296.
    let ranks = run(Kind::Tcp, 3, |world| all_operations(&world, 1000, &[100, 100], false));
    let of = |rank: usize, op: &str| ranks[rank].iter().find(|r| r.0 == op).unwrap().2.0;
    // Member 0 of the group is rank 2.
    assert_eq!([2, 1, 0].map(|r| of(r, "all_reduce")), [2 * (616 + 768), 2 * (680 + 640), 2 * (704 + 592)]);
    assert_eq!([2, 1, 0].map(|r| of(r, "reduce_scatter")), [1800, 2000, 200]);
    assert_eq!([2, 1, 0].map(|r| of(r, "all_gather")), [400, 0, 3600]);
    assert_eq!([2, 1, 0].map(|r| of(r, "all_to_all")), [8 * (333 + 200), 8 * (500 + 166), 8 * (333 + 200)]);
    assert_eq!([2, 1, 0].map(|r| of(r, "broadcast")), [0, 0, 4000]);
    assert_eq!([2, 1].map(|r| of(r, "message")), [2000, 0]);
}

#[test]
fn chunks_change_nothing() {
    check(2, 600_000, &[250], false);
    check(3, 200_001, &[0, 900], true);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_shape(
        n in 1usize..6,
        count in 0usize..40_000,
        mut cuts in proptest::collection::vec(0usize..=1000, 5),
        later in any::<bool>(),
    ) {
        cuts.sort_unstable();
        check(n, count, &cuts, later);
    }
}
