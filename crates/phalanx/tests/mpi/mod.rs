//! Training under an `mpiexec`, and under a real Slurm's `srun --mpi=pmi2`, with messages over MPI.

mod found;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::clusters::cluster::{Cluster, kill, until};
use crate::common::{Lab, tiny};
use found::{LIBRARY, mpi};

const PROGRAM: &str = env!("CARGO_BIN_EXE_phalanx");

/// `mpiexec` with these words, in the lab's folder.
fn mpiexec(root: &Path, lab: &Lab, args: &str) -> Command {
    let mut command = Command::new(root.join("bin/mpiexec"));
    command.current_dir(lab.path("")).args(args.split_whitespace()).stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PHALANX_MPI"] {
        command.env_remove(name);
    }
    command
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn ok(mut command: Command) -> String {
    let output = command.output().expect("start it");
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        err(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned() + &err(&output)
}

fn same_bits(lab: &Lab, a: &str, b: &str) {
    let difference = ckpt::diff(&lab.newest(a), &lab.newest(b)).expect("checkpoints");
    assert!(difference.bit_equal(), "{a} and {b}: {difference:?}");
}

const SHORT: &str = "--set train.eval_every=0 --set train.sample_tokens=0 --set data.cache_dir=cache";

/// Layouts of four ranks, and the run whose bits each must end in.
const MATRIX: [(&str, &str); 8] = [
    ("layout.dp=4", "one"),
    ("layout.zero=1", "one"),
    ("layout.zero=2", "one"),
    ("layout.zero=3", "one"),
    ("layout.pp=2", "one"),
    ("layout.pp=2 --set layout.zero=2", "one"),
    ("layout.tp=2", "tp"),
    ("layout.tp=2 --set layout.pp=2", "tp"),
];

#[test]
fn every_layout_over_mpi_ends_in_the_bits_of_one_rank() {
    let Some(root) = mpi() else { return };
    let lab = Lab::new();
    lab.train("one", SHORT);
    // Products are cut otherwise under tensor parallelism: the same cut, without MPI.
    lab.train("tp", &format!("{SHORT} --nproc 2 --set layout.tp=2"));
    for (i, (layout, alike)) in MATRIX.into_iter().enumerate() {
        let run = format!("cell-{i}");
        let train = tiny(&run, &format!("{SHORT} --set {layout} --transport mpi"));
        ok(mpiexec(&root, &lab, &format!("-n 4 {PROGRAM} {train}")));
        same_bits(&lab, alike, &run);
    }
    lab.ok("ledger cell-1");
}

#[test]
fn ranks_on_one_machine_say_why_they_do_without_mpi() {
    let Some(root) = mpi() else { return };
    let lab = Lab::new();
    let said = ok(mpiexec(&root, &lab, &format!("-n 2 {PROGRAM} {}", tiny("run", SHORT))));
    let how =
        "all ranks are on one machine and talk through shared memory; --transport mpi makes them use MPI";
    assert_eq!(said.matches(how).count(), 1, "{said}");
    lab.train("one", SHORT);
    same_bits(&lab, "one", "run");
}

/// Processes that run the program in the lab's folder.
fn processes(lab: &Lab) -> Vec<(i32, Vec<u8>)> {
    let (program, here) = (fs::canonicalize(PROGRAM).expect("the program"), lab.path(""));
    let here = fs::canonicalize(here).expect("a folder");
    let pids = fs::read_dir("/proc").expect("/proc").flatten();
    let pids = pids.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let is =
            |link: &str, path: &Path| fs::read_link(format!("/proc/{pid}/{link}")).is_ok_and(|p| p == path);
        is("exe", &program) && is("cwd", &here)
    })
    .map(|pid| (pid, fs::read(format!("/proc/{pid}/environ")).unwrap_or_default()))
    .collect()
}

#[test]
fn a_rank_that_is_killed_ends_all_and_the_same_command_goes_on() {
    let Some(root) = mpi() else { return };
    let lab = Lab::new();
    let long = format!("{SHORT} --set train.steps=400 --set checkpoint.every=20 --set checkpoint.keep=2");
    let train = format!("-n 4 {PROGRAM} {}", tiny("run", &format!("{long} --transport mpi")));
    let child = mpiexec(&root, &lab, &train).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("start mpiexec");
    let saved = lab.path("run/checkpoints");
    until("a checkpoint", || {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before it had saved");
        ckpt::latest(&saved).ok().flatten()
    });
    let is_rank_2 = |env: &[u8]| env.split(|b| *b == 0).any(|v| v == b"PMI_RANK=2");
    let rank = processes(&lab).into_iter().find(|(_, env)| is_rank_2(env)).expect("rank 2");
    kill(rank.0);
    let ended = child.wait_with_output().expect("mpiexec");
    assert!(!ended.status.success());
    // The launcher has seen it; no other rank tells a story of its own.
    assert!(err(&ended).matches("error: ").count() <= 1, "{}", err(&ended));
    until("all ranks to end", || processes(&lab).is_empty().then_some(()));
    ok(mpiexec(&root, &lab, &train));
    lab.train("undisturbed", &long);
    same_bits(&lab, "undisturbed", "run");
    lab.ok("ledger run");
}

#[test]
fn ranks_that_fail_end_all_with_their_code() {
    let Some(root) = mpi() else { return };
    let lab = Lab::new();
    // Two run files: ranks that do not mean the same run.
    let rank = |args: &str| format!("-n 1 {PROGRAM} {} --transport mpi", tiny("run", args));
    let both = format!("{} : {}", rank(SHORT), rank(&format!("{SHORT} --set optim.lr=0.1")));
    let ended = mpiexec(&root, &lab, &both).output().expect("mpiexec");
    assert_eq!(ended.status.code(), Some(2), "{}", err(&ended));
    assert!(err(&ended).contains("different configurations or binaries"), "{}", err(&ended));
    until("all ranks to end", || processes(&lab).is_empty().then_some(()));
}

#[test]
fn a_missing_or_older_library_is_one_message() {
    let lab = Lab::new();
    let train = format!("{} --transport mpi", tiny("run", ""));
    let refused = |vars: &[(&str, &str)], args: &str, words: &[&str]| {
        let mut command = lab.command(args);
        for name in ["PHALANX_MPI", "LD_LIBRARY_PATH", "PMI_RANK", "PMI_SIZE"] {
            command.env_remove(name);
        }
        let output =
            command.env("PATH", "/nowhere").envs(vars.iter().copied()).output().expect("start the program");
        let err = err(&output);
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(err.matches("error: ").count() == 1 && err.contains("hint: "), "{err}");
        assert!(words.iter().all(|w| err.contains(w)), "{words:?}: {err}");
        assert!(!lab.path("run").exists(), "nothing was begun");
    };
    refused(
        &[("PHALANX_MPI", "/nowhere/libmpi.so")],
        &train,
        &["PHALANX_MPI=/nowhere/libmpi.so", "pip install mpich"],
    );
    lab.write("libmpi.so.40", "an older one");
    let folder = lab.path("").display().to_string();
    let names = [LIBRARY, "is not in", &folder, "libmpi.so.40 is there, but has an interface of its own"];
    if find(&lab).is_none() {
        refused(&[("LD_LIBRARY_PATH", &folder)], &train, &names);
    }
    lab.write(LIBRARY, "no library ".repeat(100));
    let path = lab.path(LIBRARY).display().to_string();
    refused(&[("PHALANX_MPI", &path)], &train, &[LIBRARY, "invalid ELF header"]);
    let bench = "bench collectives --transport mpi";
    refused(&[("PHALANX_MPI", "/nowhere/libmpi.so")], bench, &["PHALANX_MPI=/nowhere/libmpi.so"]);
    let Some(root) = mpi() else { return };
    let library = root.join("lib").join(LIBRARY).display().to_string();
    let found = [("PHALANX_MPI", &*library)];
    refused(&found, &train, &["was not started so that MPI can find other ranks", "mpiexec -n 4"]);
    refused(&found, &format!("{train} --nproc 4"), &["was not started so that MPI can find other ranks"]);
}

/// A library that the loader of this machine finds by itself.
fn find(lab: &Lab) -> Option<String> {
    let mut command = lab.command("doctor --json");
    command.env("PATH", "/nowhere").env_remove("LD_LIBRARY_PATH").env_remove("PHALANX_MPI");
    let output = command.output().expect("start the program");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let check = found["checks"].as_array()?.iter().find(|c| c["name"] == "MPI")?;
    check["found"].as_str().filter(|f| !f.contains("there is no MPI library")).map(str::to_owned)
}

#[test]
fn a_library_that_does_not_belong_to_the_launcher_is_named() {
    let Some(root) = mpi() else { return };
    let lab = Lab::new();
    let library = root.join("lib").join(LIBRARY);
    let named = |vars: &[(&str, &str)], code: i32, words: &[&str]| {
        let mut command = lab.command(&format!("{} --transport mpi", tiny("run", SHORT)));
        command.env("PHALANX_MPI", &library).envs(vars.iter().copied());
        let output = command.output().expect("start the program");
        let err = err(&output);
        assert_eq!(output.status.code(), Some(code), "{err}");
        assert!(err.matches("error: ").count() == 1 && err.contains("hint: "), "{err}");
        assert!(words.iter().all(|w| err.contains(w)), "{words:?}: {err}");
        assert!(err.contains(library.to_str().expect("a path")) && err.contains("MPICH"), "{err}");
    };
    // Under a launcher that it does not speak to a library sees itself alone,
    let alone = ["the launcher calls this process rank 1 of 2, but for ", "it is rank 0 of 1"];
    named(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")], 2, &alone);
    // or ends the process: with Open MPI's mpirun,
    let open_mpi = [("PMIX_RANK", "1"), ("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")];
    let ended = "ended this process; the launcher has left ";
    named(&open_mpi, 2, &["MPI_Init of ", ended, "PMIX_RANK, OMPI_COMM_WORLD_RANK for it"]);
    // and where a launcher that it knows does not answer.
    let gone = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("PMI_FD", "999")];
    named(&gone, 1, &["MPI_Init of ", ended, "PMI_RANK, PMI_FD for it"]);
}

#[test]
fn srun_starts_ranks_that_talk_over_mpi() {
    let (Some(root), Some(cluster)) = (mpi(), Cluster::start(2, 4)) else { return };
    if !cluster.say("srun", "--mpi=list").contains("pmi2")
        && !err(&cluster.run("srun", "--mpi=list")).contains("pmi2")
    {
        return eprintln!("skipped: this Slurm has no pmi2");
    }
    let lab = Lab::new();
    let srun = |train: &str| {
        let mut command =
            cluster.client("srun", &format!("--mpi=pmi2 -N 2 --ntasks-per-node=2 {PROGRAM} {train}"));
        command.current_dir(lab.path("")).env("PHALANX_MPI", root.join("lib").join(LIBRARY));
        ok(command)
    };
    srun(&tiny("run", &format!("{SHORT} --set layout.zero=2 --set layout.pp=2 --transport mpi")));
    lab.train("one", SHORT);
    same_bits(&lab, "one", "run");
    assert!(cluster.processes(|_| true).is_empty(), "steps that ended have no processes");
}
