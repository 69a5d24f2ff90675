//! What somebody tried who means no good, or does not know: refused with one error and a hint, lost nothing.

mod refusals;

use std::fs;
use std::io::Write as _;

use serde_json::json;

use crate::common::{Lab, tiny};

/// Repeats `lines` of rank 0's journal as `change` leaves them.
fn rewrite(lab: &Lab, run: &str, change: impl Fn(Vec<String>) -> Vec<String>) {
    let path = journal::path(&lab.path(run), 0);
    let lines = fs::read_to_string(&path).expect("a journal").lines().map(str::to_owned).collect();
    fs::write(&path, change(lines).iter().map(|l| format!("{l}\n")).collect::<String>()).expect("write it");
}

#[test]
fn a_finished_run_that_is_started_again_has_ended_for_every_watcher() {
    let lab = Lab::new();
    let check = |run: &str, args: &str| {
        lab.train(run, args);
        let top = lab.json(&format!("top {run} --json"));
        assert!(top.to_string().contains("\"finished\""), "{args}: {top}");
        let alive = lab.json(&format!("alive {run} --json"));
        assert_eq!((&alive["alive"], &alive["done"]), (&json!(true), &json!(true)), "{args}");
        let records = journal::read(&journal::path(&lab.path(run), 0)).expect("a journal");
        let last = records.iter().rfind(|r| !matches!(r, journal::Record::Sample { .. }));
        assert!(matches!(last, Some(journal::Record::Finished { .. })), "{args}: {last:?}");
    };
    for ranks in ["", "--nproc 2"] {
        let run = if ranks.is_empty() { "one" } else { "two" };
        check(run, &format!("{ranks} --stop-after 4"));
        check(run, &format!("{ranks} --stop-after 3"));
        check(run, ranks);
        check(run, ranks);
    }
}

#[test]
fn a_run_goes_on_from_what_was_imported_into_a_new_directory() {
    let lab = Lab::new();
    lab.train("r", "");
    lab.ok("ckpt export r/checkpoints/step-00000004 dcp --format dcp");
    let done = lab.json("ckpt import dcp new --json");
    assert!(done["path"].as_str().is_some_and(|p| p.ends_with("new/checkpoints/step-00000004")), "{done}");
    assert_eq!(lab.ok("generate new --tokens 1,2 -n 3 --threads 1").split(' ').count(), 3);
    let went_on = lab.run("train new/run.toml");
    assert!(went_on.err.contains("at step 4") && went_on.code == Some(0), "{}", went_on.err);
    assert_eq!(lab.json("ckpt diff r new --json")["bit_equal"], true, "the end of either run");
    for args in [
        "ckpt reshard r r/checkpoints/step-00000006 --ranks 2",
        "ckpt import dcp r/checkpoints/step-00000006/x",
    ] {
        let ran = lab.run(args);
        assert!(ran.code == Some(2) && ran.err.contains("is a checkpoint itself"), "{args}: {}", ran.err);
    }
}

#[test]
fn records_that_are_missing_accuse_nobody() {
    let lab = Lab::new();
    lab.train("r", "");
    let ledger = |steps: &str, damaged: bool| {
        let ran = lab.run("ledger r");
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        assert!(ran.out.contains(&format!("records are missing for {steps}:")), "{}", ran.out);
        assert!(
            ran.out.starts_with("6 steps of") && ran.out.contains("0 samples lost, 0 repeated"),
            "{}",
            ran.out
        );
        assert_eq!(ran.err.contains("damaged line"), damaged, "{}", ran.err);
    };
    let is_drawn = |line: &str, step: u64| {
        line.contains("\"kind\":\"drawn\"") && line.contains(&format!("\"step\":{step},"))
    };
    rewrite(&lab, "r", |lines| {
        lines.into_iter().map(|l| if is_drawn(&l, 2) { "{\"kind\":\"dr".to_owned() } else { l }).collect()
    });
    ledger("step 2", true);
    let shown = lab.run("journal export r --csv -o t.csv");
    assert_eq!(shown.err.matches("damaged lines are left out").count(), 1, "{}", shown.err);
    // The disk was full from here to the end: the checkpoint says how far the run came.
    rewrite(&lab, "r", |lines| {
        let end = lines.iter().position(|l| is_drawn(l, 5)).expect("step 5");
        lines.into_iter().take(end).filter(|l| !l.starts_with("{\"kind\":\"dr\"")).collect()
    });
    let ran = lab.run("ledger r");
    assert!(ran.out.contains("records are missing for steps 5 to 6:"), "{}", ran.out);
}

#[test]
fn a_trace_passes_over_a_damaged_line() {
    let lab = Lab::new();
    lab.train("r", "--trace");
    rewrite(&lab, "r", |mut lines| {
        lines.insert(2, "\u{0}\u{0}".to_owned());
        lines
    });
    let ran = lab.run("trace r -o t.json");
    assert!(ran.code == Some(0) && ran.err.contains("the first is line 3"), "{}", ran.err);
}

#[test]
fn pipes_are_no_journals_and_no_tokens() {
    let lab = Lab::new();
    fs::create_dir(lab.path("p")).expect("a folder");
    let pipe = |name: &str| {
        rustix::fs::mkfifoat(rustix::fs::CWD, lab.path(name), rustix::fs::Mode::RWXU).expect("a pipe");
    };
    pipe("p/journal-00000.jsonl");
    pipe("token");
    lab.train("r", "--stop-after 1");
    fs::copy(lab.path("r/run.toml"), lab.path("p/run.toml")).expect("a run file");
    for args in [
        "journal ls p",
        "journal show p",
        "journal export p --csv",
        "journal metrics p",
        "ledger p",
        "top p",
        "alive p",
        "trace p",
        "dash r --token-file token",
        &tiny("p", ""),
    ] {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
        assert!(ran.err.contains("regular file") || ran.err.contains("a pipe"), "{args}: {}", ran.err);
        assert!(ran.err.contains("\nhint: "), "{args}: {}", ran.err);
    }
}

#[test]
fn what_is_there_is_not_replaced_by_chance() {
    let lab = Lab::new();
    lab.ok("data build text.txt --output set --vocab-size 300");
    let before = fs::read(lab.path("set.bin")).expect("a dataset");
    lab.write("other.txt", "one two three ".repeat(300));
    let again = "data build other.txt --output set --vocab-size 290";
    let ran = lab.run(again);
    assert!(
        ran.code == Some(2) && ran.err.contains("set.bin is there") && ran.err.contains("--force"),
        "{}",
        ran.err
    );
    assert!(fs::read(lab.path("set.bin")).expect("a dataset") == before);
    lab.ok(&format!("{again} --force"));
    assert!(fs::read(lab.path("set.bin")).expect("a dataset") != before);

    let decide = "decide --platform dgx-superpod-h100 --profile 6x64@0.3 --write mine.toml";
    lab.ok(decide);
    let mut mine = fs::OpenOptions::new().append(true).open(lab.path("mine.toml")).expect("a file");
    mine.write_all(b"# edited\n").expect("an edit");
    let ran = lab.run(decide);
    assert!(ran.code == Some(2) && ran.err.contains("--force"), "{}", ran.err);
    assert!(fs::read_to_string(lab.path("mine.toml")).expect("a file").ends_with("# edited\n"));
    lab.ok(&format!("{decide} --force"));
}

#[test]
fn the_best_peak_of_a_machine_is_the_one_that_counts() {
    let lab = Lab::new();
    let mfu = |run: &str| {
        lab.train(run, "");
        let records = journal::read(&journal::path(&lab.path(run), 0)).expect("a journal");
        let peak = records.iter().find_map(|r| match r {
            journal::Record::RunStarted { peak_flops_per_s, .. } => *peak_flops_per_s,
            _ => None,
        });
        let most = records.iter().filter_map(|r| match r {
            journal::Record::Step(step) => step.mfu,
            _ => None,
        });
        (peak.expect("a peak"), most.fold(0.0, f64::max))
    };
    let (first, most) = mfu("a");
    assert!(first > 0.0 && most <= 1.0, "{first} {most}");
    let kept = lab.path("cache/peaks.json");
    let all: std::collections::BTreeMap<String, f64> =
        serde_json::from_slice(&fs::read(&kept).expect("peaks")).expect("JSON");
    let more: std::collections::BTreeMap<String, f64> = all.into_keys().map(|key| (key, 4e15)).collect();
    fs::write(&kept, serde_json::to_string(&more).expect("JSON")).expect("write them");
    let (second, most) = mfu("b");
    assert_eq!(second, 4e15, "what was measured now does not lower it");
    assert!(most < 0.01, "{most}");
}

#[test]
fn a_text_that_ends_with_the_context_says_so() {
    let lab = Lab::new();
    lab.train("r", "");
    let ran = lab.run("generate r --tokens 1,2 -n 99999999999999 --threads 1 --json");
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let found: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    assert_eq!((&found["ended"], &found["count"]), (&json!("full"), &json!(31)), "{found}");
    assert!(ran.err.contains("stopped after 31 of 99999999999999 tokens"), "{}", ran.err);
    assert!(
        lab.json("keys --json").as_array().is_some_and(|keys| keys.iter().any(|k| k["key"] == "run.threads"))
    );
}
