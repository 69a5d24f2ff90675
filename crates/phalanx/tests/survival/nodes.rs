//! Nodes that come and go, as a person calls it: `launch --nnodes MIN:MAX`, and nothing else.

use std::net::TcpListener;

use crate::common::{Lab, Started, tiny};

/// Steps enough that the run is still under way when a node is lost.
const STEPS: &str = "--set train.steps=300 --set train.eval_every=0 --set checkpoint.every=0";
/// Short enough for a test, long enough for a busy machine.
const CONF: &str =
    "join_timeout=60,last_call_timeout=1,keep_alive_interval=0.3,keep_alive_max_attempt=20,close_timeout=5";

/// Starts node `index` of two at most, with one rank.
fn node(lab: &Lab, endpoint: &str, index: usize) -> Started {
    let (program, train) = (env!("CARGO_BIN_EXE_phalanx"), tiny("r", STEPS));
    lab.start(&format!(
        "launch --nnodes 1:2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id job \
         --rdzv-conf {CONF},is_host={} --local-addr 127.0.0.{} {program} {train}",
        u8::from(index == 0),
        index + 1
    ))
}

#[test]
fn a_lost_node_costs_no_restart_and_no_step() {
    let lab = Lab::new();
    lab.train("alone", STEPS);
    let port = TcpListener::bind("127.0.0.1:0").and_then(|port| port.local_addr()).expect("a port");
    let (mut stays, lost) = (node(&lab, &port.to_string(), 0), node(&lab, &port.to_string(), 1));
    // Whoever comes late is taken in after a step.
    while !lab.path("r/journal-00001.jsonl").exists() {
        stays.wait_for("step ");
    }
    stays.wait_for("step ");
    Started::signal(lost.child.id() as i32, rustix::process::Signal::KILL);
    drop(lost.end());
    stays.wait_for("goes on after step");
    let (status, err) = stays.end();
    assert!(status.success() && err.contains("rank 0 keeps its memory"), "{err}");
    assert_eq!(lab.json("ckpt diff alone r --json")["bit_equal"], true);
    let ledger = lab.json("ledger r --json");
    assert_eq!((&ledger["exact"], &ledger["steps"]), (&true.into(), &300.into()), "{ledger}");
    assert!(ledger["steps_redone"].as_u64() <= Some(1), "{ledger}");
}

/// Fewer ranks of one node, with no restart to pay for more.
#[test]
fn a_lost_rank_is_done_without_where_fewer_are_enough() {
    let lab = Lab::new();
    let mut run = lab.start(&tiny("r", &format!("{STEPS} --nproc 2 --min-nproc 1")));
    run.wait_for("step 3/");
    Started::signal(run.rank(1), rustix::process::Signal::KILL);
    run.wait_for("goes on after step");
    let (status, err) = run.end();
    assert!(status.success() && err.contains("no restart is left: its place stays empty"), "{err}");
    assert_eq!(lab.json("ledger r --json")["exact"], true);
    let records = journal::read(&journal::path(&lab.path("r"), 0)).expect("a journal");
    let known = records.iter().find_map(|r| match r {
        journal::Record::Recovered { detection_s, session, .. } => Some((*detection_s, *session)),
        _ => None,
    });
    let (detection_s, session) = known.expect("a record of the recovery");
    assert!(detection_s.is_some_and(|s| s >= 0.0), "when the loss was known: {detection_s:?}");
    let steps_after = records
        .iter()
        .filter(|r| matches!(r, journal::Record::Drawn { session: s, .. } if Some(*s) == session));
    assert!(steps_after.count() > 0, "the steps that follow have its session");
}
