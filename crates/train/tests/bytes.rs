//! Bytes that each rank sends while a step runs, as the transport counts them, are those that its program states.

mod common;

use std::collections::BTreeMap;

use comm::{Bootstrap, StoreClient, StoreServer, TransportChoice, World};
use common::{SEQUENCE, fill, inputs, mixture, model};
use program::{Axis, Coords, Members, Mode, Program, Replication, Request};
use proptest::prelude::*;
use spec::{ContextMode, DType, Layout, ModelSpec, PipelineSchedule, Recompute, Reduce, Zero};
use train::{Executor, Mesh};

const SEQUENCES: usize = 16;

/// Bytes by group.
type Sent = BTreeMap<String, u64>;

fn stated(p: &Program) -> Sent {
    let mut sent = Sent::new();
    let items = p.schedule.iter().map(|item| item.block).chain([p.tail]);
    for comm in items.flat_map(|block| &p.blocks[block].ops).filter_map(|op| op.comm.as_ref()) {
        let ranks = comm.members.ranks(p.coords, &p.layout);
        let me = ranks.iter().position(|r| *r == p.rank).expect("a member");
        let group = one_group(comm.members, p.coords, &p.layout);
        *sent.entry(format!("{group:?}")).or_default() += comm.sent_bytes(me, ranks.len());
    }
    sent
}

/// Experts' gradients meet in the group of the others' where both have the same members.
fn one_group(members: Members, coords: Coords, layout: &Layout) -> Members {
    let of_data = match members {
        Members::Replicas(Replication::Expert) => Members::Replicas(Replication::Data),
        Members::Shards(Replication::Expert) => Members::Shards(Replication::Data),
        Members::Owners(Replication::Expert) => Members::Owners(Replication::Data),
        other => other,
    };
    if of_data.ranks(coords, layout) == members.ranks(coords, layout) { of_data } else { members }
}

fn counted(exec: &Executor) -> Sent {
    exec.mesh().sent_bytes().into_iter().map(|(members, bytes)| (format!("{members:?}"), bytes)).collect()
}

fn check(m: &ModelSpec, layout: &Layout, precision: DType, join: impl Fn(usize) -> World + Sync) {
    let rank = |rank: usize| {
        let mesh = Mesh::new(join(rank), layout).expect("groups");
        let (sequence, sequences, mode) = (SEQUENCE, SEQUENCES, Mode::Train);
        let request = Request {
            model: m,
            layout,
            sequence,
            sequences,
            precision,
            rank,
            mode,
            loss: Default::default(),
            recipe: Default::default(),
        };
        let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
        exec.initialise(m, 1).expect("weights");
        let before = counted(&exec);
        let valid = fill(&mut exec, m.vocab, 1);
        exec.step(&inputs(1, valid)).expect("a step");
        let mut sent = counted(&exec);
        sent.iter_mut().for_each(|(group, bytes)| *bytes -= before[group]);
        let mut stated = stated(&exec.program);
        sent.keys().for_each(|group| _ = stated.entry(group.clone()).or_default());
        // How many rows go to whose experts is known once they are routed; that somebody talks, before.
        let routed = format!("{:?}", Members::Axis(Axis::Ep));
        assert_eq!(
            sent.remove(&routed).is_some_and(|bytes| bytes > 0),
            stated.remove(&routed).is_some_and(|bytes| bytes > 0),
            "rank {rank} of {layout:?}"
        );
        assert_eq!(sent, stated, "rank {rank} of {layout:?}");
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..layout.world())
            .map(|r| {
                scope.spawn({
                    let rank = &rank;
                    move || rank(r)
                })
            })
            .collect();
        ranks.into_iter().for_each(|r| r.join().expect("a rank"));
    });
}

/// Ranks as threads.
fn threads(m: &ModelSpec, layout: &Layout, precision: DType) {
    let worlds = World::threads(layout.world()).expect("ranks");
    let worlds: Vec<_> = worlds.into_iter().map(|w| std::sync::Mutex::new(Some(w))).collect();
    check(m, layout, precision, |rank| worlds[rank].lock().expect("no panic").take().expect("once"));
}

/// Ranks that find each other through a store, as processes do.
fn connected(m: &ModelSpec, layout: &Layout, transport: TransportChoice) {
    let server = StoreServer::start("127.0.0.1:0".parse().expect("an address")).expect("a store");
    let address = server.addr().to_string();
    check(m, layout, DType::F32, |rank| {
        let store = StoreClient::connect(&address, comm::DEFAULT_TIMEOUT).expect("the store");
        let bootstrap = Bootstrap { transport, ..Bootstrap::new(rank, layout.world(), store, "bytes") };
        World::connect(&bootstrap).expect("a world")
    });
}

fn layouts() -> impl Strategy<Value = Layout> {
    let axes = (0u32..4, 0u32..3, 0u32..3, any::<bool>(), 0usize..4, 0usize..4, 0u32..3, 0u32..3);
    (axes, 0usize..3, any::<bool>(), any::<bool>(), any::<bool>(), 0u32..3).prop_map(
        |((dp, tp, pp, sp, zero, schedule, mb, cp), recompute, ring, parts, heads, ep)| {
            let (schedule, chunks) = [
                (PipelineSchedule::Gpipe, 1),
                (PipelineSchedule::OneFOneB, 1),
                (PipelineSchedule::ZeroBubble, 1),
                (PipelineSchedule::Interleaved, 2),
            ][schedule];
            Layout {
                dp: 1 << dp,
                tp: 1 << tp,
                pp: 1 << pp,
                cp: 1 << cp,
                ep: 1 << ep,
                context: if heads { ContextMode::Heads } else { ContextMode::Ring },
                sequence_parallel: sp,
                shard: (parts && zero > 0 && dp > 1).then_some(2),
                zero: [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters][zero],
                schedule,
                chunks,
                micro_batch: 1 << mb,
                recompute: [Recompute::None, Recompute::Selective, Recompute::Full][recompute],
                reduce: if ring { Reduce::Ring } else { Reduce::Tree },
                ..Layout::default()
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { max_global_rejects: 20_000, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn are_what_the_program_states(layout in layouts(), bf16: bool, tied: bool, gpt2: bool, experts: bool) {
        let m = if experts { mixture() } else { model(4, tied, gpt2) };
        let layout = Layout { ep: if experts { layout.ep } else { 1 }, ..layout };
        prop_assume!((2..=8).contains(&layout.world()) && layout.validate(&m, SEQUENCES, SEQUENCE).is_ok());
        threads(&m, &layout, if bf16 { DType::Bf16 } else { DType::F32 });
    }
}

#[test]
fn do_not_depend_on_the_transport() {
    let m = model(4, true, false);
    for transport in [TransportChoice::Shm, TransportChoice::Tcp] {
        connected(&m, &Layout { dp: 2, tp: 2, sequence_parallel: true, ..Layout::default() }, transport);
        connected(&m, &Layout { dp: 2, pp: 2, zero: Zero::Parameters, ..Layout::default() }, transport);
        connected(&m, &Layout { cp: 4, ..Layout::default() }, transport);
        let context = ContextMode::Heads;
        connected(&m, &Layout { cp: 2, context, tp: 2, micro_batch: 2, ..Layout::default() }, transport);
    }
}
