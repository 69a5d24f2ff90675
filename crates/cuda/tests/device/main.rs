//! The executor on a GPU: against the CPU, against itself under other splits and layouts, and over recorded stretches.
//!
//! Without a GPU the same tests run in the emulator: stand-ins of the driver and its libraries execute the kernels on
//! the CPU. Without a GPU and without g++ they say so and pass.

#[path = "../../../train/tests/common/mod.rs"]
mod common;
mod against_cpu;
mod bits;
mod cases;
mod checkpoints;
mod own_layers;
mod ranks;
mod refusals;
mod spread;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use cuda::Cuda;
use program::{Mode, Recipe, Request};
use spec::{DType, Layout, ModelSpec};
use train::{Cpu, Device, Executor, Mesh};

/// Set for the tests that run in the emulator.
const EMULATED: &str = "PHALANX_TESTS_EMULATED";

/// What the emulated driver shall fail at.
const FAULT: &str = "PHALANX_EMULATED_FAULT";

/// Steps of runs that are compared: one call by call, one that is recorded, and two as recorded.
const STEPS: u64 = 4;

/// A GPU, or nothing and a line that says why.
fn gpu() -> Option<Cuda> {
    match Cuda::new(0) {
        Ok(device) => Some(device),
        Err(e) if std::env::var_os(EMULATED).is_some() => panic!("no device in the emulator: {e}"),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

fn cpu() -> Box<dyn Device> {
    Box::new(Cpu::new(1))
}

/// An executor with weights of its own seed.
fn executor(
    device: Box<dyn Device>,
    model: &ModelSpec,
    layout: &Layout,
    precision: DType,
    record: bool,
) -> Executor {
    executor_of(Recipe::default(), device, model, layout, (precision, record))
}

/// The same by any recipe.
fn executor_of(
    recipe: Recipe,
    device: Box<dyn Device>,
    model: &ModelSpec,
    layout: &Layout,
    (precision, record): (DType, bool),
) -> Executor {
    let (sequence, sequences) = (common::SEQUENCE, 4);
    let request = Request {
        model,
        layout,
        sequence,
        sequences,
        precision,
        rank: 0,
        mode: Mode::Train,
        loss: Default::default(),
        recipe,
    };
    let mut exec = Executor::on(device, &request, Mesh::alone(), record).expect("a program");
    exec.initialise(model, 11).expect("weights");
    exec
}

/// Models with every kind of op: Llama's, Qwen's with norms of heads and a tied table, GPT-2's.
fn models() -> [ModelSpec; 3] {
    // Heads of 64 take Hopper's own attention.
    [(false, false, 64), (true, false, 16), (true, true, 16)]
        .map(|(tied, gpt2, head_dim)| ModelSpec { head_dim, ..common::model(2, tied, gpt2) })
}

/// One of these tests in a process of its own, and what the emulator shall be like for it.
struct Emulated {
    test: String,
    environment: Vec<(&'static str, OsString)>,
}

/// Runs all of the above where there is no GPU. In one process kernels run one after another, so each test has its own.
#[test]
fn in_the_emulator() {
    if std::env::var_os(EMULATED).is_some() || Cuda::new(0).is_ok() {
        return;
    }
    let Some(libraries) = stand_ins() else { return };
    let logs = tempfile::tempdir().expect("a folder");
    let queue = Mutex::new(emulated(logs.path()).into_iter());
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let Some(next) = queue.lock().expect("no panic").next() else { return };
            let said = run(&next, &libraries);
            failed.lock().expect("no panic").extend(said);
        }
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..cores).for_each(|_| drop(scope.spawn(work))));
    let failed = failed.into_inner().expect("no panic");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Every test with one card, those of ranks with several as well, an old NCCL, and a driver that fails.
fn emulated(logs: &Path) -> Vec<Emulated> {
    let listed = Command::new(this()).args(["--list", "--format", "terse"]).output().expect("started");
    let listed = String::from_utf8(listed.stdout).expect("names");
    let tests = || listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let of = |test: &str, environment| Emulated { test: test.to_owned(), environment };
    let mut all: Vec<Emulated> = tests().map(|test| of(test, Vec::new())).collect();
    let of_ranks = tests().filter(|test| test.starts_with("ranks::"));
    all.extend(of_ranks.enumerate().map(|(i, test)| of(test, ranks::environment(&logs.join(i.to_string())))));
    let old = vec![("PHALANX_EMULATED_NCCL_VERSION", "21304".into())];
    all.push(of("ranks::ranks_that_share_a_card_go_over_the_host", old));
    let refused = refusals::REFUSALS.map(|(fault, _)| vec![(FAULT, fault.into())]);
    all.extend(refused.map(|fault| of("refusals::what_is_wrong_is_said", fault)));
    assert!(all.iter().all(|e| tests().any(|test| test == e.test)), "tests that have other names now");
    all
}

/// Runs one; what it said if it fails.
fn run(Emulated { test, environment }: &Emulated, libraries: &Path) -> Option<String> {
    let mut command = Command::new(this());
    command
        .args(["--exact", test, "--test-threads", "1"])
        .env(EMULATED, "1")
        .envs(environment.iter().cloned());
    command.env("LD_LIBRARY_PATH", libraries).env("XDG_CACHE_HOME", libraries.join("cache"));
    let done = command.output().expect("started");
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let ran = done.status.success() && out.contains("test result: ok. 1 passed");
    (!ran).then(|| format!("{test} in the emulator, {environment:?}: {}\n{out}\n{err}", done.status))
}

fn this() -> PathBuf {
    std::env::current_exe().expect("this program")
}

/// Builds the stand-ins; nothing and a line that says why if there is no compiler.
fn stand_ins() -> Option<PathBuf> {
    if Command::new("g++").arg("--version").output().is_err() {
        println!("skipped: no GPU, and no g++ to build the emulator with");
        return None;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let built = Command::new("bash").arg(root.join("emulator/build.sh")).arg(&out).status().expect("bash");
    assert!(built.success(), "the emulator does not build");
    Some(out)
}
