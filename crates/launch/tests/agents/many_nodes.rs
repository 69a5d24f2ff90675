//! Several agents on loopback addresses: meeting, failing, vanishing.

use crate::common::{Ended, Folder, Running, until, until_gone};
use std::net::TcpListener;

/// Short enough for a test, long enough for a busy machine.
const CONF: &str =
    "join_timeout=30,last_call_timeout=0.3,keep_alive_interval=0.3,keep_alive_max_attempt=4,close_timeout=5";

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The flags of the nodes of one job.
pub(crate) struct Job {
    endpoint: String,
    nnodes: &'static str,
    more: Vec<String>,
}

impl Job {
    pub(crate) fn new(nnodes: &'static str, more: &[&str]) -> Job {
        Job {
            endpoint: format!("127.0.0.1:{}", free_port()),
            nnodes,
            more: more.iter().map(|m| (*m).to_owned()).collect(),
        }
    }

    /// Starts node `index`; its address orders it among the others. Node 0 hosts the store.
    fn node(&self, index: usize, nproc: usize, script: &str) -> Running {
        self.program(index, nproc, &["sh", "-c", script])
    }

    /// The same with another program.
    pub(crate) fn program(&self, index: usize, nproc: usize, program: &[&str]) -> Running {
        let (addr, nproc) = (format!("127.0.0.{}", index + 1), nproc.to_string());
        let conf = format!("{CONF},is_host={}", u8::from(index == 0));
        let fixed = [
            "--nnodes",
            self.nnodes,
            "--nproc-per-node",
            &nproc,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            &self.endpoint,
            "--rdzv-id",
            "job",
            "--rdzv-conf",
            &conf,
            "--local-addr",
            &addr,
            "--shutdown-timeout",
            "5",
        ];
        let more: Vec<&str> = self.more.iter().map(String::as_str).collect();
        Running::start(&[&fixed, &more[..], program].concat())
    }
}

fn all_end(nodes: Vec<Running>) -> Vec<Ended> {
    nodes.into_iter().map(Running::end).collect()
}

#[test]
fn two_nodes_get_ranks_and_one_master() {
    let folder = Folder::new();
    let script = format!(
        "echo $RANK $WORLD_SIZE $GROUP_RANK $GROUP_WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $TORCHELASTIC_RUN_ID > {0}/r$RANK; \
         echo $MASTER_PORT > {0}/port$RANK",
        folder.text()
    );
    let job = Job::new("2", &[]);
    for ended in all_end(vec![job.node(0, 2, &script), job.node(1, 1, &script)]) {
        ended.check(0, &[]);
    }
    assert_eq!(folder.wait("r0"), "0 3 0 2 0 127.0.0.1 job");
    assert_eq!(folder.wait("r1"), "1 3 0 2 1 127.0.0.1 job");
    assert_eq!(folder.wait("r2"), "2 3 1 2 0 127.0.0.1 job");
    assert_eq!(folder.wait("port0"), folder.wait("port2"));
}

#[test]
fn static_nodes_take_the_ranks_they_are_given() {
    let folder = Folder::new();
    let script = format!("echo $GROUP_RANK > {}/node$NODE_NAME", folder.text());
    let port = free_port().to_string();
    let node = |rank: &str| {
        let with_name = format!("NODE_NAME={rank}; {script}");
        let fixed = ["--nnodes=2", "--node_rank", rank, "--master_addr=127.0.0.1", "--master_port", &port];
        Running::start(&[&fixed[..], &["sh", "-c", &with_name]].concat())
    };
    for ended in all_end(vec![node("1"), node("0")]) {
        ended.check(0, &[]);
    }
    assert_eq!((folder.wait("node0"), folder.wait("node1")), ("0".into(), "1".into()));
}

#[test]
fn a_failure_for_good_ends_the_other_node_with_its_name() {
    let folder = Folder::new();
    let script = format!(
        "echo $$ > {0}/pid$RANK; if [ $RANK = 1 ]; then while ! [ -s {0}/pid0 ]; do sleep 0.01; done; exit 6; fi; exec sleep 1000",
        folder.text()
    );
    let job = Job::new("2", &[]);
    let ended = all_end(vec![job.node(0, 1, &script), job.node(1, 1, &script)]);
    ended[0].check(1, &["the job ended on another node: rank 1", "exited with code 6"]);
    ended[1].check(1, &["Root Cause", "exitcode  : 6"]);
    until_gone(&[folder.pid("pid0")]);
}

#[test]
fn a_restart_takes_all_nodes_along_and_costs_only_the_one_that_failed() {
    let folder = Folder::new();
    let script = format!(
        "echo $PHALANX_SESSION $TORCHELASTIC_RESTART_COUNT >> {0}/log$RANK; \
         if [ $PHALANX_SESSION = job/0 ]; then if [ $RANK = 1 ]; then while ! [ -s {0}/log0 ]; do sleep 0.01; done; exit 6; fi; \
         exec sleep 1000; fi",
        folder.text()
    );
    let job = Job::new("2", &["--max-restarts", "1"]);
    let ended = all_end(vec![job.node(0, 1, &script), job.node(1, 1, &script)]);
    ended[0].check(0, &["starting over: rank 1"]);
    ended[1].check(0, &["restart 1 of 1: rank 1"]);
    assert_eq!(folder.wait("log0"), "job/0 0\njob/1 0");
    assert_eq!(folder.wait("log1"), "job/0 0\njob/1 1");
}

#[test]
fn survivors_of_a_killed_agent_are_told() {
    let check = |nnodes: &'static str, signal: i32, code: i32, parts: &[&str]| {
        let folder = Folder::new();
        let script = format!(
            "echo $$ > {0}/pid$WORLD_SIZE-$RANK; if [ $WORLD_SIZE = 2 ]; then exec sleep 1000; fi",
            folder.text()
        );
        let job = Job::new(nnodes, &[]);
        let nodes = [job.node(0, 1, &script), job.node(1, 1, &script)];
        let pids = [folder.pid("pid2-0"), folder.pid("pid2-1")];
        nodes[1].signal(signal);
        let [survivor, lost] = nodes;
        survivor.end().check(code, parts);
        lost.signal(libc::SIGKILL);
        drop(lost.end());
        until_gone(&pids);
        if code == 0 {
            folder.wait("pid1-0");
        }
    };
    // Two are needed: the survivor ends and says who is lost.
    check("2", libc::SIGKILL, 1, &["is lost: its agent has died", "1 of at least 2 nodes are left"]);
    check("2", libc::SIGSTOP, 1, &["is lost: no sign of life"]);
    // One is enough: it goes on alone.
    check("1:2", libc::SIGKILL, 0, &["starting over: node"]);
}

#[test]
fn the_end_of_the_stores_host_ends_the_others() {
    let folder = Folder::new();
    let script = format!("echo $$ > {}/pid$RANK; exec sleep 1000", folder.text());
    let job = Job::new("2", &[]);
    let nodes = [job.node(0, 1, &script), job.node(1, 1, &script)];
    let pids = [folder.pid("pid0"), folder.pid("pid1")];
    let [host, other] = nodes;
    host.signal(libc::SIGKILL);
    drop(host.end());
    other.end().check(1, &["the job's store is lost"]);
    until_gone(&pids);
}

#[test]
fn a_stopped_launcher_gives_way_to_the_others() {
    let folder = Folder::new();
    let script =
        format!("echo $$ > {0}/pid$WORLD_SIZE-$RANK; [ $WORLD_SIZE = 1 ] || exec sleep 1000", folder.text());
    let job = Job::new("1:2", &[]);
    let nodes = [job.node(0, 1, &script), job.node(1, 1, &script)];
    until("both run", || folder.read("pid2-0").and(folder.read("pid2-1")));
    let [stays, goes] = nodes;
    goes.signal(libc::SIGTERM);
    goes.end().check(128 + libc::SIGTERM, &[]);
    stays.end().check(0, &["starting over: node", "stopped by SIGTERM"]);
    folder.wait("pid1-0");
}

#[test]
fn nodes_that_never_come_are_named_at_the_deadline() {
    let port = free_port().to_string();
    let fixed = ["--nnodes=3", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port", &port];
    let ended = crate::common::run(&[&fixed[..], &["--rdzv-conf", "join_timeout=0.5", "true"]].concat());
    ended.check(1, &["1 of 3 nodes came within", "missing: node ranks 1, 2"]);
    // The one that hosts the store never comes.
    let fixed = ["--nnodes=3", "--node-rank=1", "--master-addr=127.0.0.1", "--master-port", &port];
    let ended = crate::common::run(&[&fixed[..], &["--rdzv-conf", "join_timeout=0.5", "true"]].concat());
    ended.check(1, &["did not come within", &port]);
}

#[test]
fn a_port_with_another_program_behind_it_is_told_of() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port().to_string();
    let host = ["--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1", "--master-port", &port, "true"];
    crate::common::run(&host).check(2, &["this node is to run the job's store", &port, "hint: "]);
}
