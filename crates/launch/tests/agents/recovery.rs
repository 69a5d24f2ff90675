//! Recovery without a restart: workers that speak with their agent keep their processes when others are lost.

use crate::common::{Folder, Running, is_alive, kill, until, until_gone};
use crate::many_nodes::Job;
use elastic::{Orders, Report};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{FromRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Where a worker writes what it knows.
const FOLDER: &str = "LAUNCH_TEST_RECOVERY";
const BEAT: Duration = Duration::from_millis(50);
const STORE_TIMEOUT: Duration = Duration::from_secs(10);

/// When started as a worker: writes `ROUND-RANK` (pid, world, restarts) into the folder whenever it is in a new world,
/// and ends well when `done` lies there.
#[test]
fn as_worker() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let var = |name: &str| std::env::var(name).unwrap();
    let fd: RawFd = var("PHALANX_AGENT_FD").parse().unwrap();
    // SAFETY: the agent made this descriptor for this process, and nothing else here uses it.
    let mut agent = unsafe { UnixStream::from_raw_fd(fd) };
    let lines = BufReader::new(agent.try_clone().unwrap()).lines();
    let (sender, orders) = channel();
    std::thread::spawn(move || {
        lines.map_while(Result::ok).for_each(|line| sender.send(Orders::read(&line).unwrap()).unwrap());
    });
    if folder.join("nonsense").exists() {
        agent.write_all(b"hello, agent\n").unwrap();
    } else {
        agent.write_all(Report::CanRecover.line().as_bytes()).unwrap();
    }
    let session = var("PHALANX_SESSION");
    let round = session.rsplit_once('/').unwrap().1.parse().unwrap();
    let restarts = var("TORCHELASTIC_RESTART_COUNT");
    let begin = |mut agent: &UnixStream, round: u64, rank: &str, world: &str, store: &str| {
        let text = format!("{} {world} {restarts}\n", std::process::id());
        let part = folder.join(format!("part-{}", std::process::id()));
        std::fs::write(&part, text).unwrap();
        agent.write_all(Report::Step { step: round }.line().as_bytes()).unwrap();
        // Wherever the store is now, what the worker was given for the first one opens it.
        launch::connect(store, STORE_TIMEOUT).unwrap();
        std::fs::rename(part, folder.join(format!("{round}-{rank}"))).unwrap();
    };
    begin(&agent, round, &var("RANK"), &var("WORLD_SIZE"), &var("PHALANX_STORE"));
    for ops in 0.. {
        match orders.recv_timeout(BEAT) {
            Ok(o) => {
                assert!(o.session.ends_with(&format!("/{}", o.round)) && !o.why.is_empty(), "{o:?}");
                begin(&agent, o.round, &o.rank.to_string(), &o.world.to_string(), &o.store);
            }
            Err(RecvTimeoutError::Timeout) => {
                agent.write_all(Report::Beat { ops, waits: false }.line().as_bytes()).unwrap();
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if folder.join("done").exists() || folder.join(format!("done-{}", std::process::id())).exists() {
            return;
        }
    }
}

/// The command of a worker that writes into `folder`.
fn worker(folder: &Folder) -> Vec<String> {
    let binary = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    let set = format!("{FOLDER}={}", folder.text());
    ["env", &set, &binary, "--exact", "recovery::as_worker", "--nocapture"].map(str::to_owned).to_vec()
}

fn start(folder: &Folder, flags: &[&str]) -> Running {
    let worker = worker(folder);
    Running::start(&[flags, &worker.iter().map(String::as_str).collect::<Vec<_>>()].concat())
}

/// A worker in a world: its process, the ranks, the restarts that it was told of when it was started.
#[derive(Clone, Copy, Debug, PartialEq)]
struct InWorld {
    pid: i32,
    world: usize,
    restarts: usize,
}

#[track_caller]
fn wait(folder: &Folder, round: u64, rank: usize) -> InWorld {
    let text = folder.wait(&format!("{round}-{rank}"));
    let numbers: Vec<usize> = text.split(' ').map(|n| n.parse().unwrap()).collect();
    InWorld { pid: i32::try_from(numbers[0]).unwrap(), world: numbers[1], restarts: numbers[2] }
}

#[track_caller]
fn wait_all(folder: &Folder, round: u64, ranks: usize) -> Vec<InWorld> {
    (0..ranks).map(|rank| wait(folder, round, rank)).collect()
}

fn finish(folder: &Folder) {
    std::fs::write(folder.path().join("done"), "").unwrap();
}

#[test]
fn survivors_keep_their_processes_and_the_lost_one_is_replaced() {
    let folder = Folder::new();
    let running = start(&folder, &["--nproc-per-node", "3", "--max-restarts", "3"]);
    let first = wait_all(&folder, 0, 3);
    kill(first[1].pid, libc::SIGKILL);
    let second = wait_all(&folder, 1, 3);
    assert_eq!((second[0], second[2]), (first[0], first[2]));
    assert_eq!((second[1].world, second[1].restarts), (3, 1));
    assert_ne!(second[1].pid, first[1].pid);
    // Two at once, the new one among them.
    kill(second[1].pid, libc::SIGKILL);
    kill(second[2].pid, libc::SIGKILL);
    let third = until("all meet again", || {
        let round = (2..=3).find(|r| (0..3).all(|k| folder.read(&format!("{r}-{k}")).is_some()))?;
        Some(wait_all(&folder, round, 3))
    });
    assert_eq!(third[0], first[0]);
    finish(&folder);
    let ended = running.end();
    ended.check(0, &["restart 1 of 3: rank 1", "SIGKILL", "ranks 0, 2 keep their memory", "restart 2 of 3"]);
}

#[test]
fn who_waits_for_orders_is_let_go_when_another_has_ended_well() {
    let folder = Folder::new();
    let running = start(&folder, &["--nproc-per-node", "3"]);
    let workers = wait_all(&folder, 0, 3);
    std::fs::write(folder.path().join(format!("done-{}", workers[1].pid)), "").unwrap();
    running.end().check(0, &[]);
}

#[test]
fn a_stopped_worker_is_killed_and_replaced() {
    let folder = Folder::new();
    let flags = ["--nproc-per-node", "2", "--max-restarts", "1", "--silence-timeout", "1.5"];
    let running = start(&folder, &flags);
    let first = wait_all(&folder, 0, 2);
    kill(first[0].pid, libc::SIGSTOP);
    let second = wait_all(&folder, 1, 2);
    assert_eq!(second[1], first[1]);
    assert!(!is_alive(first[0].pid));
    finish(&folder);
    running.end().check(0, &["killing rank 0", "no sign of life for 1.5 s", "rank 1 keeps its memory"]);
}

/// As by `scontrol suspend`: agent and workers are stopped for longer than a worker may be silent, then go on.
#[test]
fn a_job_that_was_stopped_whole_goes_on() {
    let (folder, other) = (Folder::new(), Folder::new());
    let flags = |silence| ["--nproc-per-node", "2", "--max-restarts", "1", "--silence-timeout", silence];
    let running = start(&folder, &flags("1"));
    let workers = wait_all(&folder, 0, 2);
    let clock = start(&other, &flags("4"));
    let stopped = wait_all(&other, 0, 2)[0].pid;
    let all = [running.pid(), workers[0].pid, workers[1].pid];
    all.iter().for_each(|pid| kill(*pid, libc::SIGSTOP));
    // As long as another agent takes to give a worker up.
    kill(stopped, libc::SIGSTOP);
    wait_all(&other, 1, 2);
    all.iter().for_each(|pid| kill(*pid, libc::SIGCONT));
    finish(&folder);
    let ended = running.end();
    ended.check(0, &[]);
    assert!(!ended.stderr.contains("no sign of life"), "{ended:?}");
    finish(&other);
    clock.end().check(0, &["no sign of life for 4.0 s"]);
}

#[test]
fn without_restarts_left_the_job_ends_or_shrinks() {
    let check = |flags: &[&str], code: i32, parts: &[&str]| {
        let folder = Folder::new();
        let fixed = ["--nproc-per-node", "3", "--max-restarts", "1"];
        let running = start(&folder, &[&fixed, flags].concat());
        let first = wait_all(&folder, 0, 3);
        kill(first[2].pid, libc::SIGKILL);
        let second = wait_all(&folder, 1, 3);
        kill(second[0].pid, libc::SIGKILL);
        if code == 0 {
            let third = wait_all(&folder, 2, 2);
            assert_eq!(
                third.iter().map(|w| (w.pid, w.world)).collect::<Vec<_>>(),
                [(second[1].pid, 2), (second[2].pid, 2)]
            );
            finish(&folder);
        }
        running.end().check(code, parts);
        until_gone(&second.iter().map(|w| w.pid).collect::<Vec<_>>());
    };
    check(&[], 1, &["rank      : 0 (local_rank: 0)", "(SIGKILL)"]);
    check(&["--min-nproc", "2"], 0, &["no restart is left: its place stays empty; ranks 1, 2 keep"]);
}

#[test]
fn a_worker_that_is_not_understood_gets_what_it_gets_under_torchrun() {
    let folder = Folder::new();
    std::fs::write(folder.path().join("nonsense"), "").unwrap();
    let running = start(&folder, &["--nproc-per-node", "2", "--max-restarts", "1"]);
    let first = wait_all(&folder, 0, 2);
    kill(first[1].pid, libc::SIGKILL);
    let second = wait_all(&folder, 1, 2);
    assert!(!is_alive(first[0].pid) && second[0].pid != first[0].pid);
    finish(&folder);
    running.end().check(0, &["rank 0 is not understood", "restart 1 of 1"]);
}

fn node(job: &Job, index: usize, nproc: usize, folder: &Folder) -> Running {
    let worker = worker(folder);
    job.program(index, nproc, &worker.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_death_on_one_node_costs_no_process_on_another() {
    let folder = Folder::new();
    let job = Job::new("2", &["--max-restarts", "1"]);
    let nodes = [node(&job, 0, 2, &folder), node(&job, 1, 2, &folder)];
    let first = wait_all(&folder, 0, 4);
    kill(first[3].pid, libc::SIGKILL);
    let second = wait_all(&folder, 1, 4);
    assert_eq!(second[..3], first[..3]);
    assert_ne!(second[3].pid, first[3].pid);
    finish(&folder);
    let [a, b] = nodes.map(Running::end);
    a.check(0, &["meeting again: rank 3", "ranks 0, 1 keep their memory"]);
    b.check(0, &["restart 1 of 1: rank 3", "rank 2 keeps its memory"]);
}

#[test]
fn survivors_of_a_killed_agent_go_on_with_fewer_and_take_it_in_again() {
    let folder = Folder::new();
    let job = Job::new("1:2", &[]);
    let [stays, dies] = [node(&job, 0, 1, &folder), node(&job, 1, 1, &folder)];
    let both = |round: u64| (0..2).all(|k| folder.read(&format!("{round}-{k}")).is_some()).then_some(round);
    let round = until("both meet", || (0..4).find_map(both));
    let first = wait_all(&folder, round, 2);
    dies.signal(libc::SIGKILL);
    let alone = wait(&folder, round + 1, 0);
    assert_eq!((alone.pid, alone.world), (first[0].pid, 1));
    until_gone(&[first[1].pid]);
    drop(dies.end());
    let back = node(&job, 1, 1, &folder);
    let again = wait_all(&folder, round + 2, 2);
    assert_eq!((again[0].pid, again[1].world), (first[0].pid, 2));
    finish(&folder);
    stays.end().check(0, &["is lost", "wants to join", "rank 0 keeps its memory"]);
    back.end().check(0, &[]);
}

#[test]
fn a_node_whose_restarts_are_spent_leaves_and_the_others_go_on() {
    let folder = Folder::new();
    let job = Job::new("1:2", &[]);
    let [stays, fails] = [node(&job, 0, 1, &folder), node(&job, 1, 2, &folder)];
    let all = |round: u64| (0..3).all(|k| folder.read(&format!("{round}-{k}")).is_some()).then_some(round);
    let round = until("all meet", || (0..4).find_map(all));
    let first = wait_all(&folder, round, 3);
    kill(first[2].pid, libc::SIGKILL);
    fails.end().check(1, &["rank      : 2", "(SIGKILL)"]);
    let alone = wait(&folder, round + 1, 0);
    assert_eq!((alone.pid, alone.world), (first[0].pid, 1));
    finish(&folder);
    stays.end().check(0, &["is lost: rank 2", "rank 0 keeps its memory"]);
    until_gone(&[first[1].pid]);
}

#[test]
fn the_store_moves_when_its_hosts_agent_is_killed() {
    let check = |nodes: usize, nnodes: &'static str, has_secret: bool| {
        let folder = Folder::new();
        let file = format!("{}/job.secret", folder.text());
        let secret = ["--secret", &file];
        let job = Job::new(nnodes, if has_secret { &secret } else { &[] });
        let mut agents: Vec<Running> = (0..nodes).map(|index| node(&job, index, 1, &folder)).collect();
        let all = |round: u64, ranks: usize| {
            (0..ranks).all(|k| folder.read(&format!("{round}-{k}")).is_some()).then_some(round)
        };
        let is_whole = |round: u64| wait(&folder, round, 0).world == nodes;
        let round = until("all meet", || (0..8).find_map(|r| all(r, nodes).filter(|r| is_whole(*r))));
        let first = wait_all(&folder, round, nodes);
        let host = agents.remove(0);
        host.signal(libc::SIGKILL);
        let next = until("the others meet", || (round + 1..round + 8).find_map(|r| all(r, nodes - 1)));
        let second = wait_all(&folder, next, nodes - 1);
        let expected: Vec<(i32, usize)> = first[1..].iter().map(|w| (w.pid, nodes - 1)).collect();
        assert_eq!(second.iter().map(|w| (w.pid, w.world)).collect::<Vec<_>>(), expected);
        until_gone(&[first[0].pid]);
        drop(host.end());
        finish(&folder);
        for (i, agent) in agents.into_iter().enumerate() {
            let place = if i == 0 { " on this node" } else { "" };
            let ended = agent.end();
            ended.check(
                0,
                &["the job's store is now at 127.0.0.2:", "which hosted the job's store: its agent has died"],
            );
            assert!(ended.stderr.contains(place), "{ended:#?}");
        }
    };
    check(2, "1:2", false);
    check(3, "2:3", true);
}
