//! A job's secret on its way to the workers, and what happens where there is none, or another one.

use crate::common::{Folder, Running, run};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt as _;

/// Starts node `index` of two at `port`, with flags of its own before the script.
fn node(port: u16, index: usize, flags: &[&str], script: &str) -> Running {
    let (port, index) = (port.to_string(), index.to_string());
    let fixed =
        ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", &port, "--node-rank", &index];
    Running::start(&[&fixed, flags, &["sh", "-c", script]].concat())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn each_job_of_one_node_has_a_secret_of_its_own_and_all_its_workers_know_it() {
    let secret = || {
        let folder = Folder::new();
        // The launcher's own command line, for all on this machine to read, and a worker's: neither shows it.
        let script = format!(
            "echo $PHALANX_SECRET > {0}/r$RANK; tr '\\0' ' ' < /proc/$PPID/cmdline > {0}/c$RANK; ps ax >> {0}/c$RANK; true",
            folder.text()
        );
        run(&["--nproc-per-node", "2", "sh", "-c", &script]).check(0, &[]);
        let secrets = [folder.wait("r0"), folder.wait("r1")];
        assert_eq!(secrets[0], secrets[1]);
        assert!(secrets[0].len() == 64, "{}", secrets[0]);
        assert!(!folder.read("c0").unwrap().contains(&secrets[0]));
        secrets[0].clone()
    };
    assert_ne!(secret(), secret());
}

#[test]
fn beyond_this_machine_nobody_meets_without_a_secret() {
    let meet = ["--nnodes", "2", "--master-addr", "192.0.2.1"];
    let said = run(&[&meet[..], &["true"]].concat());
    said.check(2, &["meet at 192.0.2.1:29500", "no secret was given", "--secret FILE", "PHALANX_INSECURE=1"]);
    let both = run(&[&meet[..], &["--insecure", "--secret", "x", "true"]].concat());
    both.check(2, &["--secret and --insecure contradict each other"]);
}

#[test]
fn nodes_that_see_one_file_have_one_secret() {
    let (folder, port) = (Folder::new(), free_port());
    let file = format!("{}/job.secret", folder.text());
    let script = format!("echo $PHALANX_SECRET > {}/r$RANK", folder.text());
    let nodes = [0, 1].map(|index| node(port, index, &["--secret", &file], &script));
    nodes.into_iter().for_each(|node| node.end().check(0, &[]));
    assert_eq!([folder.wait("r0"), folder.wait("r1")], [(); 2].map(|()| folder.wait("job.secret")));
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_node_with_another_secret_is_told_both_sides() {
    let (folder, port) = (Folder::new(), free_port());
    let files = ["a", "b"].map(|name| format!("{}/{name}", folder.text()));
    let first = node(port, 0, &["--secret", &files[0]], "true");
    let second = node(port, 1, &["--secret", &files[1]], "true").end();
    let from = format!("(--secret {})", files[1]);
    second.check(2, &["its secret is not ours: it has the secret ", ", this process (pid ", &from]);
    // To the first one it has never been there.
    first.signal(libc::SIGTERM);
    let first = first.end();
    assert!(!first.stderr.contains("secret"), "{first:#?}");
}

#[test]
fn workers_listen_where_they_are_told_to() {
    let folder = Folder::new();
    let script = format!("echo $PHALANX_BIND > {}/bind", folder.text());
    run(&["--bind", "127.0.0.0/8", "sh", "-c", &script]).check(0, &[]);
    assert_eq!(folder.wait("bind"), "127.0.0.1");
    run(&["--bind", "10.0.0.0/40", "true"]).check(2, &["--bind=10.0.0.0/40: expected an address"]);
    run(&["--bind", "nosuch0", "true"]).check(2, &["no interface nosuch0", "127.0.0.1 (lo)"]);
}
