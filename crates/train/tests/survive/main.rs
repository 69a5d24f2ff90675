//! Ranks that go on when others are killed: the same processes, the same bits.

mod agent;

use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use agent::Job;
use comm::{Bootstrap, Secret, StoreClient, TransportChoice, World};
use elastic::Orders;
use journal::{Record, Step};
use spec::{Result, RunSpec};
use train::{Agent, Asked, Audit, Beginning, Cpu, Device, Event, Mesh, Outcome, RunDir, Trainer, Way};

const STEPS: u64 = 12;
const TIMEOUT: Duration = Duration::from_secs(30);

/// A model and a batch so small that a step takes about a millisecond.
const MODEL: [&str; 18] = [
    "model.vocab=300",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.kv_heads=2",
    "model.head_dim=16",
    "model.ffn=48",
    "data.vocab_size=300",
    "data.text=text.txt",
    "batch.sequence=16",
    "batch.sequences=8",
    "train.eval_every=5",
    "train.eval_batches=1",
    "train.sample_tokens=0",
    "schedule.warmup_steps=1",
    "checkpoint.keep=0",
    "run.threads=1",
    "run.dir=run",
];

/// How the ranks of these tests find each other.
struct Here(RunSpec);

impl Way for Here {
    fn run(&self, orders: &Orders) -> Result<(RunSpec, String)> {
        let run = &self.0;
        let fitted = run.layout.fitted(&run.model, run.batch.sequences, run.batch.sequence, orders.world);
        let fitted = fitted.ok_or_else(|| spec::Error::user("no layout fits"))?;
        Ok((RunSpec { layout: fitted.layout, ..run.clone() }, fitted.why))
    }

    fn connect(&self, orders: &Orders, _: &RunSpec) -> Result<World> {
        let store = StoreClient::connect(&orders.store, TIMEOUT)?;
        let mut b = Bootstrap::new(orders.rank, orders.world, store, orders.session.clone());
        let tcp = std::env::var_os("SURVIVE_TCP").is_some();
        b.transport = if tcp { TransportChoice::Tcp } else { TransportChoice::Auto };
        b.timeout = TIMEOUT;
        World::connect(&b)
    }

    fn begin(&self, orders: &Orders, run: &RunSpec) -> Result<Beginning> {
        let asked = Asked { restarted: orders.round > 0, ..Asked::default() };
        let mut begin = Beginning::decide(run, asked)?;
        begin.prepare(run, &|_| {})?;
        Ok(begin)
    }

    fn lead(&mut self, _: &Orders, _: &RunSpec) -> Result<()> {
        Ok(())
    }

    fn device(&self, _: &Orders, _: &RunSpec, _: &Mesh) -> Result<Box<dyn Device>> {
        Ok(Box::new(Cpu::new(1)))
    }
}

fn run(keys: &[String]) -> RunSpec {
    RunSpec::load(None, keys, &train::read).expect("a run")
}

/// No test of its own: what a rank does, if this process is one.
#[test]
fn a_rank() {
    let Ok(orders) = std::env::var("SURVIVE_ORDERS") else { return };
    let keys: Vec<String> = std::env::var("SURVIVE_KEYS").expect("keys").lines().map(str::to_owned).collect();
    let fd = std::env::var("PHALANX_AGENT_FD").expect("a socket").parse().expect("a number");
    // SAFETY: the agent made it for this process, and nobody else has it.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    let agent = Agent::new(stream, Secret::none()).expect("an agent");
    let orders = Orders::read(&orders).expect("orders");
    let joined = Trainer::join(Box::new(Here(run(&keys))), agent, orders, false).expect("joined");
    let Some(mut trainer) = joined else { return };
    // Faults come between two steps that the test names, however fast or slow the machine is.
    let mut limit = number(&std::env::var("SURVIVE_LIMIT").expect("a limit"));
    let mut lines = std::io::stdin().lines();
    let mut each = |event| {
        if let Event::Record(Record::Step(Step { step, .. })) = event {
            while step >= limit {
                limit = lines.next().map_or(u64::MAX, |line| number(&line.expect("a line")));
            }
        }
    };
    let outcome = trainer.train(&AtomicBool::new(false), None, &mut each).expect("trained");
    assert_ne!(outcome, Outcome::Stopped);
}

fn number(text: &str) -> u64 {
    text.trim().parse().expect("a number")
}

/// What happens to a job.
#[derive(Clone, Copy)]
enum Fault {
    /// Once rank `.0` says that step `.1` is done it is killed, and so many new ranks come at once.
    Kill(usize, u64, usize),
    /// Stopped, found out, and then killed.
    Stop(usize, u64, usize),
    /// So many ranks come after step `.0`; nobody is lost.
    Come(u64, usize),
}

impl Fault {
    fn step(self) -> u64 {
        match self {
            Fault::Kill(_, step, _) | Fault::Stop(_, step, _) | Fault::Come(step, _) => step,
        }
    }
}

fn text() -> String {
    let words = ["mesh", "rank", "stage", "chunk", "bucket", "slot", "layout", "journal"];
    let word = |i: usize| words[(i * i / 7 + i / 3) % words.len()];
    (0..4000).map(|i| word(i).to_owned() + [" ", ".\n"][usize::from(i % 11 == 0)]).collect()
}

/// Trains with `keys` on one rank undisturbed, and on `ranks` under faults: the bits are the same, no sample is lost, and
/// no more than `redone` steps are done twice. `training` ranks train in the end.
#[track_caller]
fn check(keys: &[&str], ranks: usize, faults: &[Fault], training: usize, redone: u64) {
    let dir = tempfile::tempdir().expect("a folder");
    std::fs::write(dir.path().join("text.txt"), text()).expect("text");
    let here = |extra: &[&str], name: &str| -> Vec<String> {
        let mut all: Vec<String> = MODEL.iter().chain(extra).map(|k| (*k).to_owned()).collect();
        all.push(format!("train.steps={STEPS}"));
        all.push(format!("run.dir={name}"));
        all
    };
    // What decides the numbers is the same for both.
    let numbers: Vec<&str> = keys
        .iter()
        .copied()
        .filter(|k| ["train.", "model.", "batch."].iter().any(|s| k.starts_with(s)))
        .collect();
    let alone_keys = here(&numbers, "alone");
    Job::start(dir.path(), &alone_keys, 1, u64::MAX).finish(1);
    let keys = here(keys, "run");
    let limits = faults.iter().map(|fault| fault.step() + 1).chain([u64::MAX]);
    let mut job = Job::start(dir.path(), &keys, ranks, faults[0].step() + 1);
    for (fault, limit) in faults.iter().zip(limits.skip(1)) {
        match *fault {
            Fault::Kill(rank, step, new) => {
                assert!(job.await_step(rank, step), "it was to live until step {step}");
                let left = job.kill(rank);
                job.gather(&left, new, &format!("rank {rank} was killed"));
            }
            Fault::Stop(rank, step, new) => {
                assert!(job.await_step(rank, step), "it was to live until step {step}");
                job.stop(rank);
                let left = job.kill(rank);
                job.gather(&left, new, &format!("rank {rank} hung"));
            }
            Fault::Come(step, new) => {
                assert!(job.await_step(0, step), "it was to live until step {step}");
                let here = job.ranks.clone();
                job.gather(&here, new, &format!("{new} ranks came"));
            }
        }
        job.allow(limit);
    }
    job.finish(training);
    let newest = |name: &str| RunDir::new(dir.path().join(name)).newest_checkpoint().expect("a checkpoint");
    let difference = ckpt::diff(&newest("alone"), &newest("run")).expect("compared");
    assert!(difference.bit_equal(), "{difference:?}");
    let ledger = audit(dir.path());
    assert!(ledger.ledger.is_exact(), "{:?}", ledger.ledger);
    assert_eq!(ledger.ledger.steps, STEPS);
    assert!(ledger.ledger.steps_redone <= redone, "{:?}", ledger.ledger);
}

fn audit(dir: &Path) -> Audit {
    Audit::of(&dir.join("run"), &|_, _| {}).expect("journals")
}

#[test]
fn a_killed_rank_is_replaced_under_every_sharding() {
    for zero in ["0", "1", "2", "3"] {
        let zero = format!("layout.zero={zero}");
        let keys = ["layout.dp=4", &zero, "checkpoint.every=0"];
        check(&keys, 4, &[Fault::Kill(1, 3, 1), Fault::Kill(0, 7, 1)], 4, 2);
    }
}

#[test]
fn stages_and_half_precision_survive_too() {
    let kills = [Fault::Kill(3, 2, 1), Fault::Stop(0, 6, 1)];
    check(&["layout.dp=2", "layout.pp=2", "checkpoint.every=0"], 4, &kills, 4, 2);
    check(
        &["layout.dp=2", "layout.zero=1", "train.precision=bf16", "checkpoint.every=0"],
        2,
        &[Fault::Kill(1, 4, 1)],
        2,
        1,
    );
}

/// A batch that grows under them, and an average of the weights that is evaluated in their place.
#[test]
fn a_growing_batch_and_averages_survive() {
    // 4 sequences in the first five steps, 8 from then on.
    let grows = ["batch.ramp=[4,4,20]", "train.ema=0.9", "checkpoint.every=0"];
    let over = |keys: &[&'static str]| [&grows, keys].concat();
    let kills = [Fault::Kill(1, 3, 1), Fault::Kill(0, 5, 1), Fault::Kill(1, 7, 1)];
    check(&over(&["layout.dp=2", "layout.zero=1"]), 2, &kills, 2, 3);
    check(&over(&["layout.dp=4", "layout.zero=3"]), 4, &[Fault::Kill(3, 4, 0), Fault::Come(8, 1)], 4, 2);
    check(&over(&["layout.dp=2", "layout.pp=2", "train.precision=bf16"]), 4, &[Fault::Stop(3, 6, 1)], 4, 1);
}

/// Experts that lie on several ranks: lost ones come from memory, and those of four ranks go to two and back.
#[test]
fn experts_over_ranks_survive() {
    let experts =
        ["model.experts.count=4", "model.experts.top_k=2", "model.experts.ffn=128", "checkpoint.every=0"];
    let over = |keys: &[&'static str]| [&experts, keys].concat();
    check(&over(&["layout.dp=4", "layout.ep=2"]), 4, &[Fault::Kill(1, 3, 1), Fault::Kill(2, 6, 1)], 4, 2);
    let faults = [Fault::Kill(3, 2, 0), Fault::Kill(0, 5, 0), Fault::Come(8, 2)];
    check(&over(&["layout.dp=4", "layout.ep=4", "layout.zero=1"]), 4, &faults, 4, 2);
    check(&over(&["layout.dp=2", "layout.pp=2", "layout.ep=2"]), 4, &[Fault::Kill(3, 3, 1)], 4, 1);
}

#[test]
fn fewer_ranks_go_on_and_more_are_taken_in() {
    // Three ranks train as two with a spare, which takes over when one of the two is lost; then two come back.
    let faults = [Fault::Kill(1, 2, 0), Fault::Kill(0, 5, 0), Fault::Come(8, 2)];
    check(&["layout.dp=4", "layout.zero=1", "checkpoint.every=0"], 4, &faults, 4, 2);
    // Down to one, whose neighbour keeps its share.
    check(&["layout.dp=2", "layout.zero=2", "checkpoint.every=0"], 2, &[Fault::Kill(0, 4, 0)], 1, 1);
}

#[test]
fn without_copies_the_last_checkpoint_or_the_beginning_serves() {
    let keys = [
        "layout.dp=2",
        "layout.zero=1",
        "checkpoint.memory_every=0",
        "checkpoint.every=4",
        "checkpoint.background=false",
    ];
    check(&keys, 2, &[Fault::Kill(1, 6, 1)], 2, 4);
    let keys = ["layout.dp=2", "layout.zero=1", "checkpoint.memory_every=0", "checkpoint.every=0"];
    check(&keys, 2, &[Fault::Kill(1, 6, 1)], 2, 8);
    // Copies that are older than a checkpoint are of no use.
    let keys = ["layout.dp=2", "layout.zero=1", "checkpoint.memory_every=5", "checkpoint.every=0"];
    check(&keys, 2, &[Fault::Kill(1, 5, 1)], 2, 4);
}
