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

use std::path::{Path, PathBuf};
use std::process::Command;

use cuda::Cuda;
use program::{Mode, Recipe, Request};
use spec::{DType, Layout, ModelSpec};
use train::{Cpu, Device, Executor, Mesh};

/// Set for the tests that run in the emulator.
const EMULATED: &str = "PHALANX_TESTS_EMULATED";

/// What the emulated driver shall fail at.
const FAULT: &str = "PHALANX_EMULATED_FAULT";

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

/// Runs all of the above where there is no GPU.
#[test]
fn in_the_emulator() {
    if std::env::var_os(EMULATED).is_some() || Cuda::new(0).is_ok() {
        return;
    }
    let Some(libraries) = stand_ins() else { return };
    let tests = std::env::current_exe().expect("this program");
    let run_with = |arguments: &[&str], fault: &str, more: &[(&str, PathBuf)]| {
        let mut command = Command::new(&tests);
        command.args(arguments).env(EMULATED, "1").env(FAULT, fault).envs(more.iter().cloned());
        command.env("LD_LIBRARY_PATH", &libraries).env("XDG_CACHE_HOME", libraries.join("cache"));
        assert!(command.status().expect("started").success(), "the tests fail in the emulator: {fault}");
    };
    let run = |arguments: &[&str], fault: &str| run_with(arguments, fault, &[]);
    run(&["--test-threads", "2"], "");
    let several = ranks::environment(&libraries);
    run_with(&["--test-threads", "1", "ranks::"], "", &several);
    let old = [("PHALANX_EMULATED_NCCL_VERSION", PathBuf::from("21304"))];
    run_with(&["--exact", "ranks::ranks_that_share_a_card_go_over_the_host"], "", &old);
    for (fault, _) in refusals::REFUSALS {
        run(&["--exact", "refusals::what_is_wrong_is_said"], fault);
    }
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
