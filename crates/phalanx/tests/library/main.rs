//! The examples of the library, run as their documentation says; and the list of what the library is.

#[path = "../clusters/cluster.rs"]
#[allow(dead_code, reason = "its other half is for the program's tests")]
mod cluster;
#[path = "../mpi/found.rs"]
mod found;
mod surface;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Variables by which a launcher around these tests would be taken for the examples' own.
const LAUNCHERS: [&str; 8] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
];

/// All of them.
const EXAMPLES: [&str; 4] = ["ddp", "custom_layer", "plan", "resume"];

/// An example. `cargo test` builds all of them beside the program, unless it is told which tests to build: then the ones
/// that are missing are built here.
fn example(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_BIN_EXE_phalanx")).with_file_name("examples");
        if EXAMPLES.iter().all(|example| folder.join(example).exists()) {
            return folder;
        }
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--offline", "--quiet", "--examples", "--manifest-path"]);
        cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("start cargo").success(), "the examples build");
        folder
    });
    folder.join(name)
}

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    for name in LAUNCHERS {
        command.env_remove(name);
    }
    command
}

fn output(mut command: Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
}

/// Lines that a program prints.
fn lines(command: Command) -> Vec<String> {
    let shown = format!("{command:?}");
    let out = output(command);
    assert!(out.status.success(), "{shown}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
}

/// An example as so many ranks.
fn launched(ranks: usize, name: &str, args: &[&str]) -> Command {
    let (ranks, example) = (ranks.to_string(), example(name));
    let mut all =
        vec!["launch", "--standalone", "--nproc-per-node", &ranks, example.to_str().expect("a path")];
    all.extend(args);
    command(Path::new(env!("CARGO_BIN_EXE_phalanx")), &all)
}

#[test]
fn the_loop_of_the_guide_has_the_same_bits_for_any_ranks_and_stages() {
    let one = lines(command(&example("ddp"), &[]));
    assert!(one.len() > 30 && one[0].starts_with("epoch 0 step 1 loss 5."), "{one:?}");
    assert!(loss(&one[one.len() - 1]) < loss(&one[0]) - 1.0, "it learns: {one:?}");
    for (ranks, layout) in [(2, ""), (4, "pp=2,zero=1"), (4, "pp=2,schedule=zero-bubble")] {
        assert_eq!(lines(launched(ranks, "ddp", &[layout])), one, "{ranks} ranks, {layout}");
    }
    for (a, b) in one.iter().zip(lines(launched(2, "ddp", &["tp=2"]))) {
        assert!((loss(a) - loss(&b)).abs() < 1e-4 * loss(a), "tp=2: {a} and {b}");
    }
}

fn loss(line: &str) -> f64 {
    let after = line.split("loss ").nth(1).and_then(|rest| rest.split(' ').next());
    after.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no loss in {line}"))
}

#[test]
fn torchrun_starts_it_too() {
    if Command::new("torchrun").arg("--version").output().is_err() {
        return eprintln!("skipped: torchrun is not installed");
    }
    let example = example("ddp");
    let args = ["--standalone", "--nproc-per-node", "2", "--no-python", example.to_str().expect("a path")];
    assert_eq!(lines(command(Path::new("torchrun"), &args)), lines(command(&example, &[])));
}

/// What mpiexec of MPICH, or srun with its PMI, leaves in the environment of ranks on one machine.
#[test]
fn ranks_of_mpi_find_each_other_without_a_launcher_of_ours() {
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let start = |rank: usize| {
        let mut one = command(&example("ddp"), &["pp=2"]);
        one.env("PMI_RANK", rank.to_string()).env("PMI_SIZE", "2").env("MPI_LOCALRANKID", rank.to_string());
        one.env("MPI_LOCALNRANKS", "2").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        one.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start a rank")
    };
    let ranks = [start(0), start(1)];
    let done = ranks.map(|rank| rank.wait_with_output().expect("a rank"));
    for out in &done {
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }
    let said: Vec<String> = String::from_utf8_lossy(&done[0].stdout).lines().map(str::to_owned).collect();
    assert_eq!(said, lines(command(&example("ddp"), &[])));
}

#[test]
fn a_real_mpiexec_starts_it_too() {
    let Some(root) = found::mpi() else { return };
    let example = example("ddp");
    let args = ["-n", "4", example.to_str().expect("a path"), "pp=2,zero=1"];
    let said = lines(command(&root.join("bin/mpiexec"), &args));
    assert_eq!(said, lines(command(&example, &[])), "{}", root.join("lib").join(found::LIBRARY).display());
}

#[test]
fn srun_starts_it_over_two_nodes_of_a_real_slurm() {
    let Some(cluster) = cluster::Cluster::start(2, 4) else { return };
    let example = example("ddp");
    let ranks = format!("-N 2 --ntasks-per-node=2 {} tp=1,pp=2", example.display());
    let mut srun = cluster.client("srun", &ranks);
    srun.current_dir(cluster.path("")).env("PHALANX_SECRET", "0123456789abcdef".repeat(4));
    assert_eq!(lines(srun), lines(command(&example, &[])));
}

#[test]
fn a_layout_that_does_not_fit_the_ranks_is_refused_with_a_hint() {
    for (args, what) in [("tp=3", "3 ranks for each replica, but 1"), ("tq=2", "unknown field `tq`")] {
        let out = output(command(&example("ddp"), &[args]));
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains(what) && said.contains("hint: "), "{said}");
    }
}

#[test]
fn a_custom_layer_trains_with_its_own_derivative() {
    let said = lines(command(&example("custom_layer"), &[]));
    assert!(said[0].starts_with("derivative within"), "{said:?}");
    assert!(loss(&said[4]) < loss(&said[1]) - 0.5, "it learns: {said:?}");
}

#[test]
fn the_planner_answers_a_call_as_the_command_does() {
    let said = lines(command(&example("plan"), &["llama3-8b", "dgx-h100", "8"]));
    assert_eq!(said.len(), 3, "{said:?}");
    let args = ["plan", "--model", "llama3-8b", "--cluster", "dgx-h100", "--accelerators", "8", "--json"];
    let answer = lines(command(Path::new(env!("CARGO_BIN_EXE_phalanx")), &args)).concat();
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("JSON");
    let step_s = answer["best"][0]["step_s"].as_f64().expect("seconds");
    assert!(said[0].contains(&format!(": {step_s:.2} s a step")), "{} and {step_s}", said[0]);
    let out = output(command(&example("plan"), &["llama3-9b"]));
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("hint: "));
}

#[test]
fn a_killed_loop_goes_on_to_the_losses_that_it_would_have_had() {
    let folder = tempfile::tempdir().expect("a folder");
    let dir = |name: &str| folder.path().join(name).display().to_string();
    let whole = lines(command(&example("resume"), &[&dir("whole")]));
    assert_eq!(whole.len(), 60, "{whole:?}");
    let mut child =
        command(&example("resume"), &[&dir("killed")]).stdout(Stdio::piped()).spawn().expect("started");
    let mut said = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let seen = said.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("step 25 ")));
    seen.expect("step 25").expect("a line");
    child.kill().expect("killed");
    child.wait().expect("gone");
    // As two stages now.
    let rest = lines(launched(2, "resume", &[&dir("killed"), "pp=2"]));
    let first = whole.len() - rest.len();
    assert!(first >= 20 && first.is_multiple_of(10), "it went on after step {first}");
    assert_eq!(rest, whole[first..]);
}
