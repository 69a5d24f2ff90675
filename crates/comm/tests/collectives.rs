//! Every collective on every transport against its definition, bit by bit.

mod common;

use comm::{ElementType, Group, Op, OpTag, Order, RawSlice, SharedArena, World, even_ranges};
use common::{Kind, run, summed, summed_bf16, to_bf16, value, values};
use proptest::prelude::*;
use std::ops::Range;

const TAG: OpTag = OpTag(7);

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Uneven ranges with an empty one.
fn ranges(count: usize, n: usize) -> Vec<Range<usize>> {
    let mut cuts: Vec<usize> = (0..=n).map(|i| count * i * i / (n * n)).collect();
    cuts[n] = count;
    cuts.windows(2).map(|w| w[0]..w[1]).collect()
}

/// All collectives of one group on buffers of the caller.
fn check_private(group: &Group, count: usize) {
    let (me, n, ranks) = (group.rank(), group.size(), group.ranks());
    let own = values(ranks[me], count);

    let mut x = own.clone();
    group.all_reduce(TAG, &mut x, Order::Tree).unwrap();
    assert_eq!(bits(&x), bits(&summed(ranks, count)), "all_reduce of {count}");

    let mut x = to_bf16(&own);
    group.all_reduce(TAG, &mut x, Order::Tree).unwrap();
    assert_eq!(x, summed_bf16(ranks, count), "all_reduce of {count} bf16");

    let mut x: Vec<u32> = (0..count as u32).collect();
    group.all_reduce(TAG, &mut x, Order::Ring).unwrap();
    assert!(x.iter().enumerate().all(|(i, x)| *x == (i * n) as u32));

    for ranges in [ranges(count, n), even_ranges(count, n)] {
        let mut x = own.clone();
        group.reduce_scatter(TAG, &mut x, &ranges, Order::Tree).unwrap();
        let mut want = own.clone();
        want[ranges[me].clone()].copy_from_slice(&summed(ranks, count)[ranges[me].clone()]);
        assert_eq!(bits(&x), bits(&want), "reduce_scatter of {count}");

        let mut x = to_bf16(&own);
        group.reduce_scatter(TAG, &mut x, &ranges, Order::Tree).unwrap();
        let (got, want) = (&x[ranges[me].clone()], &summed_bf16(ranks, count)[ranges[me].clone()]);
        assert_eq!(got, want, "reduce_scatter of {count} bf16");

        let mut x = vec![0.0; count];
        x[ranges[me].clone()].copy_from_slice(&own[ranges[me].clone()]);
        group.all_gather(TAG, &mut x, &ranges).unwrap();
        for (member, range) in ranges.iter().enumerate() {
            assert_eq!(
                x[range.clone()],
                values(ranks[member], count)[range.clone()],
                "all_gather of {count}"
            );
        }
    }
    check_all_to_all(group, count);
    for root in [0, n - 1] {
        let mut x = own.clone();
        group.broadcast(TAG, &mut x, root).unwrap();
        assert_eq!(bits(&x), bits(&values(ranks[root], count)), "broadcast of {count}");
    }
    group.barrier(TAG).unwrap();
}

/// Member i sends member j a run of `count / (1 + i + j)` elements.
fn check_all_to_all(group: &Group, count: usize) {
    let (me, n, ranks) = (group.rank(), group.size(), group.ranks());
    let len = |i: usize, j: usize| count / (1 + i + j);
    let runs = |lens: Vec<usize>| {
        let mut end = 0;
        let ranges: Vec<_> = lens.iter().map(|l| (end..end + l, end += l).0).collect();
        (ranges, end)
    };
    let (input_ranges, total) = runs((0..n).map(|j| len(me, j)).collect());
    let input = values(ranks[me], total);
    let (output_ranges, total) = runs((0..n).map(|j| len(j, me)).collect());
    let mut output = vec![0.0; total];
    group.all_to_all(TAG, &input, &input_ranges, &mut output, &output_ranges).unwrap();
    for (member, range) in output_ranges.iter().enumerate() {
        let (theirs, _) = runs((0..n).map(|j| len(member, j)).collect());
        let start = theirs[me].start;
        for (k, x) in output[range.clone()].iter().enumerate() {
            assert_eq!(x.to_bits(), value(ranks[member], start + k).to_bits());
        }
    }
}

/// Reductions and gathers in place on shared memory, started and waited for.
fn check_shared(world: &World, group: &Group, count: usize) {
    let (me, n, ranks) = (group.rank(), group.size(), group.ranks());
    let stride = (count * 4).next_multiple_of(64).max(64);
    let mut arena = world.alloc_shared(3 * stride).unwrap();
    let spans: Vec<RawSlice> =
        (0..3).map(|k| arena.span(k * stride, count, ElementType::F32).unwrap()).collect();
    let own = values(ranks[me], count);
    let ranges = ranges(count, n);
    fill(&mut arena, spans[0], &own);
    fill(&mut arena, spans[1], &own);
    let mut gathered = vec![0.0; count];
    gathered[ranges[me].clone()].copy_from_slice(&own[ranges[me].clone()]);
    fill(&mut arena, spans[2], &gathered);
    let ops = [
        Op::AllReduce { buffer: spans[0], order: Order::Tree },
        Op::ReduceScatter { input: spans[1], output: None, ranges: (&ranges[..]).into(), order: Order::Tree },
        Op::AllGather { input: None, output: spans[2], ranges: (&ranges[..]).into() },
    ];
    // SAFETY: the spans are parts of the arena of their own, left alone until all handles have been waited for.
    let handles: Vec<_> = ops.into_iter().map(|op| unsafe { group.start(TAG, op) }.unwrap()).collect();
    for handle in handles {
        handle.wait().unwrap();
    }
    assert_eq!(bits(&read(&mut arena, spans[0])), bits(&summed(ranks, count)));
    let scattered = read(&mut arena, spans[1]);
    assert_eq!(bits(&scattered[ranges[me].clone()]), bits(&summed(ranks, count)[ranges[me].clone()]));
    let gathered = read(&mut arena, spans[2]);
    for (member, range) in ranges.iter().enumerate() {
        assert_eq!(gathered[range.clone()], values(ranks[member], count)[range.clone()]);
    }
    world.barrier().unwrap();
}

fn fill(arena: &mut SharedArena, span: RawSlice, x: &[f32]) {
    // SAFETY: no operation is under way.
    unsafe { arena.slice_mut::<f32>(span) }.copy_from_slice(x);
}

fn read(arena: &mut SharedArena, span: RawSlice) -> Vec<f32> {
    // SAFETY: no operation is under way.
    unsafe { arena.slice_mut::<f32>(span) }.to_vec()
}

fn check(kind: Kind, n: usize, counts: &[usize]) {
    run(kind, n, |world| {
        assert_eq!((world.size(), world.all().ranks().len()), (n, n));
        for &count in counts {
            check_private(world.all(), count);
            check_shared(&world, world.all(), count);
        }
        // Groups in another order, side by side, under one id.
        let me = world.rank();
        let half: Vec<usize> = (0..n).rev().filter(|r| r % 2 == me % 2).collect();
        let group = world.group(&half, 3).unwrap();
        let front: Vec<usize> = (0..n.div_ceil(2)).collect();
        let other = front.contains(&me).then(|| world.group(&front, 4).unwrap());
        for &count in counts {
            check_private(&group, count);
            if let Some(other) = &other {
                check_private(other, count);
            }
        }
        world.barrier().unwrap();
    });
}

/// Nothing, less than a line, staged at once, staged in two chunks.
const COUNTS: [usize; 4] = [0, 1, 1000, 70_001];

#[test]
fn mpi() {
    common::mpi::under_mpiexec("mpi", &[2, 3, 4], |n| check(Kind::Mpi, n, &COUNTS));
}

#[test]
fn mpi_between_hosts() {
    common::mpi::under_mpiexec("mpi_between_hosts", &[4, 5], |n| {
        check(Kind::MpiHosts(2), n, &COUNTS);
        // More than all messages of a pipe on their way.
        check(Kind::Mpi, n, &[1_300_000]);
    });
}

#[test]
fn threads() {
    for n in [1, 2, 3, 4, 8] {
        check(Kind::Threads, n, &COUNTS);
    }
}

#[test]
fn shared_memory() {
    for n in [1, 2, 3, 4, 6] {
        check(Kind::Shm, n, &COUNTS);
    }
}

#[test]
fn tcp() {
    check(Kind::Tcp, 2, &[600_000]);
    for n in [2, 3, 4] {
        check(Kind::Tcp, n, &COUNTS);
    }
}

#[test]
fn hosts() {
    check(Kind::Hosts(2), 4, &COUNTS);
    check(Kind::Hosts(2), 5, &COUNTS);
    check(Kind::Hosts(3), 6, &COUNTS);
    check(Kind::Hosts(2), 6, &COUNTS[..3]);
    check(Kind::Hosts(2), 4, &[600_000]);
}

fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![Just(Kind::Threads), Just(Kind::Shm), Just(Kind::Tcp), (1usize..4).prop_map(Kind::Hosts)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn any_world(kind in kinds(), n in 1usize..8, counts in proptest::collection::vec(0usize..30_000, 1..3)) {
        check(kind, n, &counts);
    }
}
