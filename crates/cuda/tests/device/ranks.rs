//! Ranks with a card each: the same bits through NCCL as over the host and as alone, and what ends it.
//!
//! Run again in the emulator with several cards and streams that wait for each other; on a machine with several GPUs as
//! they are.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use comm::{Bootstrap, StoreClient, StoreServer, World};
use program::{Mode, Program, Request};
use spec::run::MessageChoice;
use spec::{DType, Layout, ModelSpec, PipelineSchedule, Reduce, Zero};
use train::{Executor, Mesh};

use crate::common::{self, SEQUENCE, first_difference, steps, weights};
use crate::{Cuda, FAULT, STEPS, bits::Weights, executor, gpu};

mod exchanges;
mod waits;

/// Where the stand-in writes what ranks call.
pub(crate) const LOG: &str = "PHALANX_EMULATED_NCCL_LOG";

/// Set where the emulator has a card for each of several ranks.
pub(crate) const CARDS: &str = "PHALANX_EMULATED_GPUS";

/// Tests here use one log, and cards that are theirs.
static ALONE: Mutex<()> = Mutex::new(());

/// Whether there are cards for so many ranks; else a line that says so.
fn has_cards(ranks: usize) -> bool {
    let cards = cuda::census().cards.map_or(0, |cards| cards.len());
    if cards < ranks {
        println!("skipped: {cards} GPUs for {ranks} ranks");
    }
    cards >= ranks
}

fn model(layers: usize) -> ModelSpec {
    ModelSpec { head_dim: 16, ..common::model(layers, true, false) }
}

/// How ranks talk.
#[derive(Clone, Copy)]
struct Talk {
    messages: MessageChoice,
    staging_bytes: usize,
    /// How many cards they have together.
    cards: usize,
}

const NCCL: Talk = Talk { messages: MessageChoice::Nccl, staging_bytes: cuda::STAGING_BYTES, cards: 4 };
const HOST: Talk = Talk { messages: MessageChoice::Host, ..NCCL };

fn request<'a>(model: &'a ModelSpec, layout: &'a Layout, rank: usize, precision: DType) -> Request<'a> {
    Request {
        model,
        layout,
        sequence: SEQUENCE,
        sequences: 4,
        precision,
        rank,
        mode: Mode::Train,
        loss: Default::default(),
        recipe: Default::default(),
    }
}

/// Runs every rank of a layout in a thread.
fn each_rank<T: Send>(
    worlds: Vec<World>,
    model: &ModelSpec,
    layout: &Layout,
    (precision, talk): (DType, Talk),
    run: impl Fn(Executor) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| {
                let run = &run;
                scope.spawn(move || {
                    let rank = world.rank();
                    let mesh = Mesh::new(world, layout).expect("groups");
                    let device = Cuda::new(rank % talk.cards).expect("a card");
                    let device = device.with_messages(talk.messages, talk.staging_bytes);
                    let request = request(model, layout, rank, precision);
                    let mut exec = Executor::on(Box::new(device), &request, mesh, false).expect("a program");
                    exec.initialise(model, 11).expect("weights");
                    run(exec)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    })
}

/// Weights after the steps, of parameters that a rank holds whole, and the losses of the steps.
fn train(model: &ModelSpec, layout: &Layout, precision: DType, talk: Talk) -> (Weights, Vec<u64>) {
    let worlds = World::threads(layout.world()).expect("ranks");
    let all = each_rank(worlds, model, layout, (precision, talk), |mut exec| {
        let step = |k| waits::step(&mut exec, model.vocab, k).loss.to_bits();
        let mut losses: Vec<u64> = (1..=STEPS).map(step).collect();
        losses.push(exec.evaluate().expect("evaluated").to_bits());
        (weights(&exec), losses)
    });
    let losses = all[0].1.clone();
    (all.into_iter().flat_map(|(weights, _)| weights).collect(), losses)
}

/// Holds ranks that talk through NCCL to one rank alone, and to ranks that talk over the host.
fn check(layout: &Layout, layers: usize, precision: DType, talk: Talk) {
    check_of(&model(layers), layout, precision, talk);
}

fn check_of(model: &ModelSpec, layout: &Layout, precision: DType, talk: Talk) {
    if !has_cards(layout.world()) {
        return;
    }
    let _alone = ALONE.lock();
    let (found, losses) = train(model, layout, precision, talk);
    let over_host = train(model, layout, precision, HOST);
    assert_eq!(first_difference(&over_host.0, &found), None, "{layout:?} over the host");
    assert_eq!(over_host.1, losses, "{layout:?} over the host");
    if layout.tp > 1 {
        // No rank holds a whole parameter, and products are cut elsewhere.
        return;
    }
    let mut exec = executor(Box::new(gpu().expect("a card")), model, &Layout::default(), precision, false);
    let outputs = steps(&mut exec, model.vocab, 1, STEPS + 1);
    if layout.cp > 1 {
        // The contract of cut sequences is of losses.
        for (step, (one, cut)) in outputs.iter().zip(&losses).enumerate() {
            let (one, cut) = (one.loss, f64::from_bits(*cut));
            let within = if precision == DType::F32 { 2e-5 } else { 2e-2 };
            assert!((one / cut - 1.0).abs() < within, "step {step} of {layout:?}: {cut} against {one}");
        }
        return;
    }
    let mut alone = weights(&exec);
    alone.retain(|name, _| found.contains_key(name));
    // Under ZeRO 3 ranks hold few whole parameters.
    assert!(!alone.is_empty() || layout.zero == Zero::Parameters, "{layout:?}: nothing to compare");
    assert_eq!(first_difference(&alone, &found), None, "{layout:?} alone");
}

#[test]
fn data_parallel_ranks() {
    for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
        check(&Layout { dp: 2, zero, ..Layout::default() }, 2, DType::Bf16, NCCL);
    }
    check(&Layout { dp: 4, ..Layout::default() }, 2, DType::F32, NCCL);
}

#[test]
fn ranks_that_shard_in_groups() {
    for zero in [Zero::Optimizer, Zero::Parameters] {
        check(&Layout { dp: 4, zero, shard: Some(2), ..Layout::default() }, 2, DType::F32, NCCL);
    }
}

#[test]
fn tensor_parallel_ranks() {
    check(&Layout { tp: 2, ..Layout::default() }, 2, DType::F32, NCCL);
    check(&Layout { tp: 2, dp: 2, sequence_parallel: true, ..Layout::default() }, 2, DType::Bf16, NCCL);
}

#[test]
fn pipelines() {
    use PipelineSchedule::{Gpipe, Interleaved, OneFOneB, ZeroBubble};
    for (schedule, chunks) in [(Gpipe, 1), (OneFOneB, 1), (ZeroBubble, 1), (Interleaved, 2)] {
        check(&Layout { pp: 2, schedule, chunks, ..Layout::default() }, 4, DType::F32, NCCL);
    }
    let both = Layout { pp: 2, dp: 2, zero: Zero::Optimizer, schedule: OneFOneB, ..Layout::default() };
    check(&both, 2, DType::Bf16, NCCL);
}

/// Of ranks two by two on a card, groups along one axis talk through NCCL, others over the host.
#[test]
fn groups_with_and_without_nccl() {
    let talk = Talk { messages: MessageChoice::Auto, cards: 2, ..NCCL };
    check(&Layout { pp: 2, dp: 2, ..Layout::default() }, 2, DType::F32, talk);
}

#[test]
fn sums_in_many_pieces() {
    let talk = Talk { staging_bytes: 3000, ..NCCL };
    check(&Layout { dp: 2, zero: Zero::Optimizer, ..Layout::default() }, 2, DType::Bf16, talk);
    check(&Layout { dp: 4, ..Layout::default() }, 2, DType::F32, talk);
}

/// One operation of the stand-in's log.
#[derive(Debug, PartialEq)]
struct Called {
    communicator: String,
    rank: usize,
    ranks: usize,
    recorded: bool,
    what: String,
    bytes: u64,
}

/// What ranks called since the log was emptied; nothing on a GPU, which writes none.
fn called() -> Vec<Called> {
    let Some(path) = std::env::var_os(LOG) else { return Vec::new() };
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let _ = std::fs::remove_file(path);
    let one = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |i: usize| words[i].parse::<usize>().expect("a number");
        let (rank, ranks) = words[1].split_once('/').expect("a rank of some");
        let size = [1, 1, 4, 4, 8, 8, 2, 4, 8, 2][number(5)];
        Called {
            communicator: words[0].to_owned(),
            rank: rank.parse().expect("a rank"),
            ranks: ranks.parse().expect("ranks"),
            recorded: words[2] == "graph",
            what: words[3].to_owned(),
            bytes: (number(4) * size) as u64,
        }
    };
    text.lines().map(one).collect()
}

/// Bytes that a rank's program says it gives to others in a step.
fn stated(p: &Program) -> u64 {
    let items = p.schedule.iter().map(|item| item.block).chain([p.tail]);
    let comms = items.flat_map(|block| &p.blocks[block].ops).filter_map(|op| op.comm.as_ref());
    comms
        .map(|comm| {
            let ranks = comm.members.ranks(p.coords, &p.layout);
            comm.sent_bytes(ranks.iter().position(|r| *r == p.rank).expect("a member"), ranks.len())
        })
        .sum()
}

/// What was called before three steps and in each of them, and what `after` says of each rank; nothing where no log is
/// written.
fn logged<T: Send>(
    model: &ModelSpec,
    layout: &Layout,
    after: impl Fn(&Executor) -> T + Sync,
) -> Option<(Vec<Vec<Called>>, Vec<T>)> {
    let ranks = layout.world();
    if !has_cards(ranks) || std::env::var_os(LOG).is_none() {
        return None;
    }
    let _alone = ALONE.lock();
    let worlds = World::threads(ranks).expect("ranks");
    let barrier = std::sync::Barrier::new(ranks);
    let logs = Mutex::new(Vec::new());
    let said = each_rank(worlds, model, layout, (DType::F32, NCCL), |mut exec| {
        for k in 1..4 {
            // Between two steps nothing is under way anywhere.
            if barrier.wait().is_leader() {
                logs.lock().expect("no panic").push(called());
            }
            barrier.wait();
            steps(&mut exec, model.vocab, k, k + 1);
        }
        if barrier.wait().is_leader() {
            logs.lock().expect("no panic").push(called());
        }
        after(&exec)
    });
    Some((logs.into_inner().expect("no panic"), said))
}

/// Bytes that calls give to other ranks.
fn sent<'a>(calls: impl IntoIterator<Item = &'a Called>) -> u64 {
    let of = |c: &Called| match c.what.as_str() {
        "send" => c.bytes,
        "all-gather" => c.bytes * (c.ranks as u64 - 1),
        _ => 0,
    };
    calls.into_iter().map(of).sum()
}

/// What a program states is what goes through NCCL, first call by call and then in graphs, each sum by sends and receives
/// and a gathering, none by the library's own.
#[test]
fn calls_are_those_of_the_program() {
    let layout = Layout { dp: 2, pp: 2, zero: Zero::Optimizer, ..Layout::default() };
    let Some((logs, said)) = logged(&model(2), &layout, |exec| stated(&exec.program)) else { return };
    for (step, calls) in logs.iter().enumerate().skip(1) {
        assert_eq!(sent(calls), said.iter().sum::<u64>(), "step {step}");
        assert!(calls.iter().all(|c| ["send", "receive", "all-gather"].contains(&&*c.what)), "step {step}");
        // What step is recorded is run as a graph at once.
        // But for the sum between two graphs, after which the host looks at loss and norm: the only one of all ranks.
        let other = calls.iter().find(|c| c.recorded != (step > 1 && c.ranks < 4));
        assert_eq!(other, None, "step {step}");
    }
    // The same on every communicator in every step.
    let by_rank = |calls: &[Called]| {
        let mut all: BTreeMap<(String, usize), Vec<(String, u64)>> = BTreeMap::new();
        for c in calls {
            all.entry((c.communicator.clone(), c.rank)).or_default().push((c.what.clone(), c.bytes));
        }
        all
    };
    assert_eq!(by_rank(&logs[1]), by_rank(&logs[2]));
    assert_eq!(by_rank(&logs[1]), by_rank(&logs[3]));
    // World, two groups of replicas, a lane for activations and one for gradients between the stages of each replica, and
    // the ends of the pipeline of the replica that owns the tied table.
    let communicators: std::collections::BTreeSet<_> = logs[1].iter().map(|c| &c.communicator).collect();
    assert_eq!(communicators.len(), 1 + 2 + 2 * 2 + 1);
}

/// Where a run does not promise bits, the library adds up as it likes.
#[test]
fn rings_are_the_librarys_own() {
    let layout = Layout { dp: 2, reduce: Reduce::Ring, ..Layout::default() };
    if !has_cards(2) {
        return;
    }
    let _alone = ALONE.lock();
    let model = model(2);
    called();
    let ours = train(&model, &layout, DType::F32, NCCL).1;
    let calls = called();
    assert!(calls.iter().any(|c| c.what == "all-reduce") || std::env::var_os(LOG).is_none());
    let theirs = train(&model, &layout, DType::F32, HOST).1;
    for (a, b) in ours.iter().zip(&theirs) {
        let (a, b) = (f64::from_bits(*a), f64::from_bits(*b));
        assert!((a / b - 1.0).abs() < 1e-4, "{a} against {b}");
    }
}

/// A rank that stays away ends the others by the deadline, with what they waited for.
#[test]
fn a_rank_that_stays_away_is_named() {
    if !has_cards(2) {
        return;
    }
    let _alone = ALONE.lock();
    let (model, layout) = (model(2), Layout { dp: 2, ..Layout::default() });
    for recorded in [false, true] {
        let worlds = World::threads_with(2, Duration::from_secs(5)).expect("ranks");
        let (told, hears) = mpsc::channel::<()>();
        let hears = Mutex::new(hears);
        let told = Mutex::new(Some(told));
        let said = each_rank(worlds, &model, &layout, (DType::F32, NCCL), |mut exec| {
            let last = if recorded { 4 } else { 1 };
            steps(&mut exec, model.vocab, 1, last);
            if exec.program.rank == 1 {
                // Until the other has given up.
                let _ = hears.lock().expect("no panic").recv();
                return String::new();
            }
            let valid = common::fill(&mut exec, model.vocab, last);
            let error = exec.step(&common::inputs(last, valid)).expect_err("nobody answers");
            drop(told.lock().expect("no panic").take());
            error.to_string()
        });
        let words = ["rank 0: waited 5.0 s for rank 1 in ", " among ", " over NCCL"];
        assert!(words.iter().all(|w| said[0].contains(w)), "{}", said[0]);
    }
}

/// Set for a process that is one rank of two: which, and where they meet.
const RANK: &str = "PHALANX_TESTS_RANK";
const STORE: &str = "PHALANX_TESTS_STORE";
/// How its model is spread: see [`exchanges::spread`].
const SPREAD: &str = "PHALANX_TESTS_SPREAD";

/// What such a process does: rank 1 is killed while rank 0 is in a message of the third step, which tells what became of it.
#[test]
fn one_of_two() {
    let (Ok(rank), Ok(store)) = (std::env::var(RANK), std::env::var(STORE)) else { return };
    let rank = rank.parse().expect("a rank");
    let store = StoreClient::connect(&store, comm::DEFAULT_TIMEOUT).expect("the store");
    let world = World::connect(&Bootstrap::new(rank, 2, store, "lost")).expect("a world");
    let (model, layout) = exchanges::spread(&std::env::var(SPREAD).unwrap_or_default());
    let mesh = Mesh::new(world, &layout).expect("groups");
    let device = Cuda::new(rank).expect("a card").with_messages(NCCL.messages, NCCL.staging_bytes);
    let request = request(&model, &layout, rank, DType::F32);
    let mut exec = Executor::on(Box::new(device), &request, mesh, false).expect("a program");
    exec.initialise(&model, 11).expect("weights");
    steps(&mut exec, model.vocab, 1, 3);
    if rank == 1 {
        // The log has what both begin, as many messages in a step, and the other may be in its third one already. Where nobody
        // writes one it may not have begun yet.
        let further = |text: String| {
            let begun = |rank: &str| text.lines().filter(|line| line.contains(rank)).count();
            begun(" 0/2 ") > begun(" 1/2 ")
        };
        let log = std::env::var_os(LOG);
        while log.as_ref().is_some_and(|path| !further(std::fs::read_to_string(path).unwrap_or_default())) {
            std::thread::yield_now();
        }
        std::process::abort();
    }
    let valid = common::fill(&mut exec, model.vocab, 3);
    println!("said: {}", exec.step(&common::inputs(3, valid)).expect_err("the other is gone"));
}

/// A rank that is killed is named at once, also where NCCL itself would wait for it for ever.
#[test]
fn a_rank_that_is_killed_is_named() {
    if !has_cards(2) {
        return;
    }
    let _alone = ALONE.lock();
    for (spread, fault, among) in exchanges::KILLED {
        called();
        let server = StoreServer::start("127.0.0.1:0".parse().expect("an address")).expect("a store");
        let begin = |rank: usize| {
            let mut command = Command::new(std::env::current_exe().expect("this program"));
            command.args(["--exact", "ranks::one_of_two", "--nocapture"]).env(FAULT, fault);
            command.env(SPREAD, spread).env(RANK, rank.to_string()).env(STORE, server.addr().to_string());
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started")
        };
        let [first, second] = [begin(0), begin(1)].map(|child| child.wait_with_output().expect("ended"));
        assert!(!second.status.success(), "killed");
        let text = String::from_utf8_lossy(&first.stdout);
        let said = text.split("said: ").nth(1).unwrap_or_default();
        let at = format!(" among {among} ranks (ranks 0, 1) over NCCL: ");
        let at = if std::env::var_os(LOG).is_some() { at } else { String::new() };
        let words = [&*at, "rank 1 (pid ", " was lost: its connection "];
        assert!(words.iter().all(|w| said.contains(w)), "{text}\n{}", String::from_utf8_lossy(&first.stderr));
        assert_eq!(comm::blamed(said), Some(1));
    }
}

/// Without a card for each rank NCCL is refused if it was asked for, and else not taken.
#[test]
fn ranks_that_share_a_card_go_over_the_host() {
    let Some(_) = gpu() else { return };
    if has_cards(2) {
        return;
    }
    let (model, layout) = (model(2), Layout { dp: 2, ..Layout::default() });
    for messages in [MessageChoice::Auto, MessageChoice::Nccl] {
        let said = std::thread::scope(|scope| {
            let worlds = World::threads(2).expect("ranks").into_iter();
            let ranks: Vec<_> = worlds
                .map(|world| {
                    let (model, layout) = (&model, &layout);
                    scope.spawn(move || {
                        let rank = world.rank();
                        let mesh = Mesh::new(world, layout).expect("groups");
                        let device = Cuda::new(rank).expect("a card");
                        let device = device.with_messages(messages, cuda::STAGING_BYTES);
                        let request = request(model, layout, rank, DType::F32);
                        let exec = Executor::on(Box::new(device), &request, mesh, false);
                        exec.map(|exec| exec.device().ways().unwrap_or_default()).map_err(|e| {
                            assert!(
                                e.hint_text().is_some_and(|hint| hint.contains("run.messages=auto")),
                                "{e}"
                            );
                            e.to_string()
                        })
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().expect("a rank")).collect::<Vec<_>>()
        });
        let why = if std::env::var("PHALANX_EMULATED_NCCL_VERSION").is_ok() {
            "rank 0: NCCL is 2.13.4, expected 2.14.0 or later"
        } else {
            "ranks 0 and 1 share a card, which NCCL refuses"
        };
        let expected = match messages {
            MessageChoice::Nccl => Err(format!("run.messages = \"nccl\": {why}")),
            _ => Ok(format!("messages go over the host's memory: {why}")),
        };
        assert_eq!(said, [expected.clone(), expected]);
    }
}

/// Several cards for a test of this module, whose calls of NCCL go to a log.
pub(crate) fn environment(log: &std::path::Path) -> Vec<(&'static str, OsString)> {
    let several = [(CARDS, "4"), ("PHALANX_EMULATED_STREAMS", "async"), ("PHALANX_EMULATED_ORDER", "7")];
    let several = several.map(|(key, value)| (key, value.into()));
    several.into_iter().chain([(LOG, log.into())]).collect()
}
