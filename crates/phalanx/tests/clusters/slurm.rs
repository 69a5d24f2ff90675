//! Training under a real Slurm, where there is one: ranks over nodes, time limits, lost nodes, ends.

use std::fs;
use std::path::PathBuf;

use super::cluster::{Cluster, kill, until};
use crate::common::{self, Lab, tiny};

const PROGRAM: &str = env!("CARGO_BIN_EXE_phalanx");

/// Long enough to be disturbed a few times.
const LONG: &str = "--set train.steps=1200 --set checkpoint.every=40 --set checkpoint.keep=2 --set train.eval_every=0 \
                    --set train.sample_tokens=0";

/// A cluster, and a folder in which jobs run.
struct Site {
    cluster: Cluster,
    lab: Lab,
}

impl Site {
    fn new(nodes: usize, cpus: usize) -> Option<Site> {
        let cluster = Cluster::start(nodes, cpus)?;
        Some(Site { cluster, lab: Lab::new() })
    }

    /// Submits through `phalanx launch slurm`; gives the job's number.
    fn submit(&self, flags: &str, train: &str) -> String {
        let args = format!("launch slurm {flags} -- {train}");
        let mut command = self.cluster.client(PROGRAM, &args);
        let output = command.current_dir(self.lab.path("")).output().expect("start the program");
        let err = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args}: {err}");
        assert!(err.contains("submitted "), "{err}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    fn log(&self, job: &str) -> String {
        fs::read_to_string(self.lab.path(&format!("phalanx-{job}.log"))).unwrap_or_default()
    }

    /// Waits until the run has done at least `step` steps, as its journal says.
    fn until_step(&self, run: &str, step: u64) {
        let journal = self.lab.path(run).join("journal-00000.jsonl");
        until(&format!("step {step} of {run}"), || (steps(&journal).last()? >= &step).then_some(()));
    }

    /// The run ended in the weights of the same run without Slurm.
    fn ends_alike(&self, run: &str, args: &str) {
        self.lab.train("undisturbed", args);
        let difference =
            ckpt::diff(&self.lab.newest("undisturbed"), &self.lab.newest(run)).expect("checkpoints");
        assert!(difference.bit_equal(), "{difference:?}");
        self.lab.ok(&format!("ledger {run}"));
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let jobs = self.cluster.say("scontrol", "--oneliner show job");
            eprintln!("jobs: {jobs}");
            for job in jobs.split_whitespace().filter_map(|w| w.strip_prefix("JobId=")) {
                let log = self.log(job);
                let tail: Vec<&str> = log.lines().rev().take(30).collect();
                eprintln!("log of {job}: {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
    }
}

/// Steps in the order in which a journal has them.
fn steps(journal: &PathBuf) -> Vec<u64> {
    let text = fs::read_to_string(journal).unwrap_or_default();
    let records = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).ok());
    records.filter(|r| r["kind"] == "step").filter_map(|r| r["step"].as_u64()).collect()
}

#[test]
fn ranks_over_two_nodes_end_in_the_bits_of_one() {
    let Some(site) = Site::new(2, 4) else { return };
    let srun = |args: &str| {
        let mut command = site.cluster.client("srun", args);
        command.current_dir(site.lab.path("")).output().expect("start srun")
    };
    let args = "--set train.eval_every=0 --set data.cache_dir=cache";
    let ran = srun(&format!(
        "-N 2 --ntasks-per-node=2 {PROGRAM} {}",
        tiny("run", &format!("{args} --transport tcp"))
    ));
    let err = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(0), "{err}");
    assert_eq!(common::losses(&String::from_utf8_lossy(&ran.stdout)).len(), 6);
    site.ends_alike("run", args);

    let refused = |flags: &str, more: &str, what: &str| {
        let ran = srun(&format!("{flags} --kill-on-bad-exit=1 {PROGRAM} {}", tiny("wrong", more)));
        let err = String::from_utf8_lossy(&ran.stderr);
        assert_eq!(ran.status.code(), Some(2), "{more}: {err}");
        assert!(err.contains(what) && err.contains("hint: "), "{err}");
    };
    refused("-N 2 -n 4", "--nproc 2", "--nproc 2 starts 2 ranks here, but SLURM_PROCID=");
    refused("-N 2 -n 4", "--set layout.dp=3", "layout.dp");
    assert!(site.cluster.processes(|_| true).is_empty(), "steps that ended have no processes");
}

#[test]
fn a_job_saves_before_its_time_is_up_and_goes_on_at_another_size() {
    let Some(site) = Site::new(2, 2) else { return };
    let job = site.submit("--nodes 2 --ntasks-per-node 2", &tiny("run", LONG)[..]);
    site.until_step("run", 20);
    // What Slurm sends at --signal: to steps, not to the script.
    site.cluster.run("scancel", &format!("--signal=USR1 {job}"));
    until("the job to be queued again", || (site.cluster.job(&job, "Restarts") == "1").then_some(()));
    let log = site.log(&job);
    assert!(log.contains("stopped; the same command goes on from the checkpoint"), "{log}");
    // It starts again by itself, and a rank that dies is started again at once.
    let journal = site.lab.path("run/journal-00000.jsonl");
    let before = steps(&journal).len();
    until("steps after the restart", || (steps(&journal).len() > before + 20).then_some(()));
    let rank = site.cluster.processes(|env| env.iter().any(|v| v == "SLURM_PROCID=3"));
    let program = fs::canonicalize(PROGRAM).expect("the program");
    let is_rank = |pid: &&i32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program);
    kill(*rank.iter().find(is_rank).expect("rank 3"));
    site.cluster.until_state(&job, "COMPLETED");
    let log = site.log(&job);
    assert_eq!(log.matches("restart 1 of 3 goes on from the newest checkpoint").count(), 1, "{log}");
    assert_eq!(log.matches("resumed from ").count(), 2, "{log}");
    site.ends_alike("run", LONG);
}

#[test]
fn a_job_goes_on_when_a_node_is_taken_or_dies() {
    let Some(mut site) = Site::new(3, 1) else { return };
    let job = site.submit("--nodes 2 --setup true", &tiny("run", &LONG.replace("=1200", "=4000")));
    site.until_step("run", 50);
    site.cluster.run("scontrol", "update nodename=n1 state=down reason=test");
    until("the job to be queued again", || (site.cluster.job(&job, "Restarts") == "1").then_some(()));
    site.cluster.until_state(&job, "RUNNING");
    assert_eq!(site.cluster.job(&job, "NodeList"), "n[2-3]");
    site.cluster.run("scontrol", "update nodename=n1 state=resume");
    let journal = site.lab.path("run/journal-00000.jsonl");
    let before = steps(&journal).len();
    until("steps on other nodes", || (steps(&journal).len() > before + 50).then_some(()));
    site.cluster.kill_node(3);
    until("the job to be queued again", || (site.cluster.job(&job, "Restarts") == "2").then_some(()));
    site.cluster.until_state(&job, "COMPLETED");
    assert_eq!(site.cluster.job(&job, "NodeList"), "n[1-2]");
    site.ends_alike("run", &LONG.replace("=1200", "=4000"));
}

#[test]
fn scancel_leaves_a_checkpoint_and_no_process() {
    let Some(site) = Site::new(2, 2) else { return };
    let args = LONG.replace("=1200", "=100000");
    let job = site.submit("--nodes 2 --ntasks 4", &tiny("run", &args));
    site.until_step("run", 60);
    assert!(site.cluster.processes(|_| true).len() >= 4);
    site.cluster.run("scancel", &job);
    until("the processes to end", || site.cluster.processes(|_| true).is_empty().then_some(()));
    until("the job to end", || (site.cluster.job(&job, "JobState") == "CANCELLED").then_some(()));
    assert_eq!(site.cluster.job(&job, "Restarts"), "0");
    let log = site.log(&job);
    assert!(log.contains("stopped; the same command goes on from the checkpoint"), "{log}");
    let last = steps(&site.lab.path("run/journal-00000.jsonl")).last().copied().expect("steps");
    assert!(site.lab.newest("run").ends_with(format!("step-{last:08}")), "the last step is saved");
}

#[test]
fn the_doctor_looks_at_every_node_and_at_what_lies_between() {
    let Some(site) = Site::new(2, 2) else { return };
    // The second node lets a process open few files.
    let script =
        format!("[ $SLURM_NODEID = 0 ] || ulimit -n 256\nexec {PROGRAM} doctor --transport tcp \"$@\"\n");
    site.lab.write("doctor.sh", script);
    let doctor = |args: &str| {
        let args = format!("-N 2 --ntasks-per-node=2 bash doctor.sh {args}");
        let ran = site.cluster.client("srun", &args).current_dir(site.lab.path("")).output();
        let ran = ran.expect("start srun");
        let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        (ran.status.code(), out.into_owned(), err.into_owned())
    };
    let (code, out, err) = doctor("--json --cluster dgx-h100");
    let json: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
    assert_eq!(code, Some(i32::from(json["verdict"] == "bad")), "{out}{err}");
    let nodes = json["nodes"].as_array().expect("nodes");
    let of = |node: usize, check: &str| {
        let checks = nodes[node]["checks"].as_array().expect("checks");
        checks
            .iter()
            .find(|c| c["name"] == check)
            .unwrap_or_else(|| panic!("no {check} in {checks:?}"))
            .clone()
    };
    assert_eq!((&nodes[0]["node"], &nodes[1]["node"], nodes.len()), (&"n1".into(), &"n2".into(), 2));
    assert_eq!((&nodes[0]["ranks"], &nodes[1]["ranks"]), (&2.into(), &2.into()));
    assert_eq!(
        (&of(0, "open files")["verdict"], &of(1, "open files")["verdict"]),
        (&"ok".into(), &"warn".into())
    );
    assert!(of(0, "disk speed")["found"].as_str().is_some_and(|f| f.contains("MB/s")));
    // Both nodes are this machine, whose clock is one.
    assert_eq!(of(1, "clock offset")["verdict"], "ok");
    let link = of(0, "to the next");
    let found = link["found"].as_str().expect("text");
    assert!(
        found.contains(" to n2 over tcp, ") && found.contains("that the catalogue gives dgx-h100"),
        "{found}"
    );
    assert!(nodes[0]["link"]["bytes_per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{out}");

    let (_, out, err) = doctor("");
    for line in ["2 nodes, 4 ranks: n1, n2", "256 (at most 256)  [n2]"] {
        assert!(out.contains(line), "no {line} in {out}{err}");
    }
    let (code, out, err) = doctor("--dir nowhere");
    assert_eq!(code, Some(1), "{out}{err}");
    assert!(out.contains("BAD  disk") && out.contains("[all 2]"), "{out}{err}");
    let (code, out, err) = doctor("--cluster nowhere");
    assert_eq!((code, out.is_empty()), (Some(2), true), "{out}{err}");
}

#[test]
fn a_sweep_is_an_array_of_runs() {
    let Some(site) = Site::new(2, 2) else { return };
    let job = site.submit("--sweep optim.lr=1e-3,3e-4 --sweep train.seed=1,2 --at-once 2", &tiny("run", ""));
    until("the array to end", || {
        site.cluster.say("squeue", &format!("-h -j {job}")).trim().is_empty().then_some(())
    });
    for (i, (lr, seed)) in [("0.001", 1), ("0.001", 2), ("0.0003", 1), ("0.0003", 2)].iter().enumerate() {
        let run = format!("run/{i}");
        assert!(site.lab.newest(&run).ends_with("step-00000006"), "{run}");
        let text = fs::read_to_string(site.lab.path(&run).join("run.toml")).expect("a run file");
        assert!(
            text.contains(&format!("lr = {lr}\n")) && text.contains(&format!("seed = {seed}\n")),
            "{text}"
        );
    }
    assert_eq!(site.cluster.nodes(), 2);
}

#[test]
fn what_slurm_refuses_is_said_in_its_words() {
    let Some(site) = Site::new(1, 1) else { return };
    let refused = |flags: &str, words: &str| {
        let args = format!("launch slurm {flags} -- {}", tiny("run", ""));
        let mut command = site.cluster.client(PROGRAM, &args);
        let output = command.current_dir(site.lab.path("")).output().expect("start the program");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(
            err.contains(words) && err.matches("error: ").count() == 1 && err.contains("hint: "),
            "{err}"
        );
    };
    refused("--partition nowhere", "invalid partition");
    refused("--constraint nowhere", "Invalid feature specification");
}
