use std::fs;
use std::io::Write as _;

use journal::tail::Tail;

use super::*;

fn step(n: u64, loss: f64) -> Record {
    Record::Step(Step {
        time_us: 1_000_000 * n,
        step: n,
        loss,
        grad_norm: 1.0,
        lr: 0.1,
        tokens: 10 * n,
        valid_tokens: 10,
        tokens_per_s: 5.0,
        mfu: None,
        step_s: 0.5,
        memory_bytes: 100,
        exposed_comm_s: None,
        waits_s: BTreeMap::new(),
        expert_counts: None,
        mtp_loss: None,
    })
}

fn resumed(step: u64) -> Record {
    Record::Resumed { time_us: 0, step, path: "c".into() }
}

/// A run directory with these records, and what is read of it.
fn read(records: &[Record]) -> (tempfile::TempDir, Run) {
    let dir = tempfile::tempdir().expect("a folder");
    let mut file = fs::File::create(journal::path(dir.path(), 0)).expect("a journal");
    for record in records {
        writeln!(file, "{}", serde_json::to_string(record).expect("plain data")).expect("write");
    }
    let mut run = Run::new("r".into(), dir.path().to_owned());
    let mut tail = Tail::whole(journal::path(dir.path(), 0));
    tail.look(u64::MAX, &mut |found| run.observe(&found)).expect("a readable file");
    (dir, run)
}

fn losses(columns: &Columns) -> Vec<(u64, f32)> {
    let means = columns.series[0].mean.iter().map(|m| m.expect("finite"));
    columns.step.iter().copied().zip(means).collect()
}

#[test]
fn a_run_that_went_back_shows_what_counts() {
    let records: Vec<Record> =
        (1..=6).map(|n| step(n, 1.0)).chain([resumed(3)]).chain((4..=8).map(|n| step(n, 2.0))).collect();
    let (_dir, run) = read(&records);
    let expected: Vec<(u64, f32)> = (1..=8).map(|n| (n, if n > 3 { 2.0 } else { 1.0 })).collect();
    assert_eq!(losses(&run.curves(100)), expected);
    assert_eq!(losses(&run.zoom(0, 100, 100).look()), expected, "read from the file again");
    assert_eq!(losses(&run.zoom(3, 4, 100).look()), [(3, 1.0), (4, 2.0)]);
    assert_eq!((run.points, run.since(0).expect("all of them").count()), (5, 5));
    assert_eq!(run.metrics.value("phalanx_steps_total"), Some(11.0));
}

#[test]
fn a_close_look_shows_every_step() {
    let records: Vec<Record> = (1..=20_000).map(|n| step(n, n as f64)).collect();
    let (_dir, run) = read(&records);
    assert!(run.curves(500).step.len() <= 500);
    let close = losses(&run.zoom(9_990, 10_009, 500).look());
    assert_eq!(close, (9_990..=10_009).map(|n| (n, n as f32)).collect::<Vec<_>>());
    let wide = run.zoom(0, 20_000, 100).look();
    assert!(wide.step.len() <= 100);
    assert_eq!(wide.series[0].max.last(), Some(&Some(20_000.0)));
}

#[test]
fn who_is_behind_gets_points_or_hears_that_they_are_gone() {
    let (_dir, run) = read(&(1..=3000).map(|n| step(n, 1.0)).collect::<Vec<_>>());
    assert_eq!(run.since(2998).map(|p| p.map(|p| p.at.step).collect::<Vec<_>>()), Some(vec![2999, 3000]));
    assert_eq!(run.since(3000).map(Iterator::count), Some(0));
    assert!(run.since(1000).is_none());
    assert!(run.since(3001).is_none(), "of an epoch that is over");
}

#[test]
fn what_is_new_or_damaged_is_counted_and_passed_over() {
    let (dir, _) = read(&[step(1, 1.0)]);
    let path = journal::path(dir.path(), 0);
    let good = fs::read_to_string(&path).expect("the journal");
    fs::write(
        &path,
        format!("{good}{{\"kind\":\"dance\"}}\nnot json\n\n{}", good.replace("\"step\":1", "\"step\":2")),
    )
    .expect("write");
    let mut run = Run::new("r".into(), dir.path().to_owned());
    Tail::whole(path).look(u64::MAX, &mut |found| run.observe(&found)).expect("a readable file");
    assert_eq!(run.latest.map(|l| l.at.step), Some(2));
    assert_eq!(run.unknown["dance"], 1);
    assert_eq!(run.damage.0, 2);
    assert!(run.damage.1.as_ref().is_some_and(|why| why.starts_with("at byte ")), "{:?}", run.damage);
}

#[test]
fn a_preview_is_replaced_by_the_whole() {
    let records: Vec<Record> = (1..=100).map(|n| step(n, 1.0)).collect();
    let (_dir, whole) = read(&records);
    let mut shown = Run::new("r".into(), whole.dir.clone());
    shown.steps_wanted = Some(7);
    shown.preview(&records[..50]);
    assert!(shown.is_preview());
    assert_eq!(shown.curves(500).step.len(), 50);
    let epoch = shown.epoch;
    shown.replace(whole);
    assert!(!shown.is_preview() && shown.epoch > epoch);
    assert_eq!((shown.curves(500).step.len(), shown.steps_wanted), (100, Some(7)));
}

#[test]
fn losses_that_are_not_finite_are_events() {
    let (_dir, run) = read(&[step(1, 1.0), step(2, f64::NAN)]);
    assert_eq!(run.notes.back().map(|n| (n.kind, n.step)), Some(("warning", 2)));
}
