//! The other side: what ranks read, and how they find one store.

use crate::common::{Folder, run};
use launch::RankEnv;
use std::process::{Command, Stdio};
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(30);
pub(crate) const FOLDER: &str = "LAUNCH_TEST_FOLDER";

/// When started as a rank: meets the others in the store and writes what it knows.
#[test]
fn as_rank() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let env = RankEnv::read().unwrap().expect("a launcher's environment");
    let store = env.store(TIMEOUT).unwrap();
    let sum = store.client.add(&format!("{}/sum", env.session), 1 << env.rank).unwrap();
    let all = (1 << env.world) - 1;
    if sum == all {
        store.client.set("all", b"here").unwrap();
    }
    store.client.get("all", TIMEOUT).unwrap();
    let text = format!(
        "{:?} {}/{} local {}/{} node {} restart {}\n",
        env.launcher, env.rank, env.world, env.local_rank, env.local_world, env.node, env.restart
    );
    std::fs::write(std::path::Path::new(&folder).join(format!("rank{}", env.rank)), text).unwrap();
    store.leave(TIMEOUT).unwrap();
}

/// The command of a rank: this test binary, running only `as_rank`.
pub(crate) fn rank() -> [String; 4] {
    let binary = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    [binary, "--exact".into(), "ranks::as_rank".into(), "--nocapture".into()]
}

#[test]
fn ranks_of_phalanx_meet_in_the_agents_store() {
    let folder = Folder::new();
    let set = format!("{FOLDER}={}", folder.text());
    let rank = rank();
    let program: Vec<&str> = ["env", &set].into_iter().chain(rank.iter().map(String::as_str)).collect();
    run(&[&["--nproc-per-node", "2"], &program[..]].concat()).check(0, &[]);
    assert_eq!(folder.wait("rank1"), "Phalanx 1/2 local 1/2 node 0 restart 0");
}

#[test]
fn a_limit_on_open_files_is_named_at_once() {
    let rank = rank();
    let check = |files: usize| {
        let folder = Folder::new();
        let set = format!("{FOLDER}={}", folder.text());
        let program: Vec<&str> = ["env", &set].into_iter().chain(rank.iter().map(String::as_str)).collect();
        let ended =
            crate::common::run_with_files(files, &[&["--nproc-per-node", "4"], &program[..]].concat());
        let named =
            ended.stderr.contains("may open no more files") || ended.stderr.contains("Too many open files");
        assert!(ended.code == Some(0) || named, "{files}: {ended:#?}");
        assert!(!ended.stderr.contains(&format!("waited {}", TIMEOUT.as_secs())), "{files}: {ended:#?}");
        usize::from(named)
    };
    let named: usize = (12..36).step_by(3).map(check).sum();
    assert!(named > 1, "no limit was too low");
}

/// Starts one process per environment and waits for all.
fn start(envs: &[Vec<(&str, String)>], folder: &Folder) {
    let rank = rank();
    let spawn = |env: &Vec<(&str, String)>| {
        let mut command = Command::new(&rank[0]);
        command.args(&rank[1..]).env_clear().env(FOLDER, folder.path()).stdout(Stdio::null());
        command.envs(env.iter().map(|(name, value)| (name, value)));
        command.spawn().unwrap()
    };
    let children: Vec<_> = envs.iter().map(spawn).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn ranks_of_other_launchers_meet_at_rank_0() {
    let job = format!("test-{}", std::process::id());
    let open_mpi = |rank: usize| {
        let mut env = vec![("OMPI_COMM_WORLD_RANK", rank.to_string()), ("OMPI_COMM_WORLD_SIZE", "3".into())];
        env.extend([
            ("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "3".into()),
        ]);
        env.push(("PMIX_NAMESPACE", job.clone()));
        env
    };
    let folder = Folder::new();
    start(&[open_mpi(2), open_mpi(0), open_mpi(1)], &folder);
    assert_eq!(folder.wait("rank2"), "OpenMpi 2/3 local 2/3 node 0 restart 0");

    let slurm = |rank: usize| {
        let mut env = vec![("SLURM_PROCID", rank.to_string()), ("SLURM_LOCALID", rank.to_string())];
        env.extend([("SLURM_STEP_NUM_TASKS", "2".into()), ("SLURM_STEP_TASKS_PER_NODE", "2".into())]);
        env.extend([
            ("SLURM_STEP_ID", "0".into()),
            ("SLURM_JOB_ID", job.clone()),
            ("SLURM_NODEID", "0".into()),
        ]);
        env
    };
    let folder = Folder::new();
    start(&[slurm(1), slurm(0)], &folder);
    assert_eq!(folder.wait("rank0"), "Slurm 0/2 local 0/2 node 0 restart 0");
}

#[test]
fn ranks_that_cannot_meet_say_why() {
    let env = |vars: &[(&str, &str)]| {
        let vars: Vec<(String, String)> = vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        RankEnv::from_vars(&|n| vars.iter().find(|(k, _)| k == n).map(|(_, v)| v.clone())).unwrap().unwrap()
    };
    let error = env(&[("PMI_RANK", "1"), ("PMI_SIZE", "2")]).store(TIMEOUT).unwrap_err();
    assert!(error.to_string().contains("MASTER_ADDR is not set"), "{error}");
    assert!(error.hint_text().unwrap().contains("mpirun"));
    let alone = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")];
    let error = env(&alone).store(Duration::from_millis(200)).unwrap_err();
    assert!(error.to_string().contains("rank 1") && error.to_string().contains("127.0.0.1:1"), "{error}");
}
