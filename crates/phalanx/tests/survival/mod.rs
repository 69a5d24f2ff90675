//! Checkpoints looked at, the ledger of samples, and a run under faults.

mod nodes;

use std::fs;

use serde_json::{Value, json};

use crate::common::Lab;

fn path(row: &Value) -> &str {
    row["path"].as_str().expect("a path")
}

#[test]
fn checkpoints_are_listed_checked_compared_and_removed() {
    let lab = Lab::new();
    lab.train("r", "--set checkpoint.keep=0");
    lab.train("s", "--set checkpoint.keep=0 --nproc 2 --stop-after 4");
    let found = lab.json("ckpt ls r --json");
    let steps = |found: &Value| -> Vec<u64> {
        let rows = found["checkpoints"].as_array().expect("rows");
        rows.iter().filter_map(|r| r["step"].as_u64()).collect()
    };
    assert_eq!(steps(&found), [2, 4, 6]);
    assert_eq!(found["checkpoints"][0]["world"], 1);
    assert_eq!(found["checkpoints"][0]["tokens"], 256);
    let shown = lab.json("ckpt show r --json");
    assert_eq!((&shown["step"], &shown["parameters"]), (&json!(6), &found["checkpoints"][2]["parameters"]));
    assert!(lab.ok("ckpt show r").contains("[300, 32]"));

    // The same step of another layout is the same; another step is not.
    let (a, b) = ("r/checkpoints/step-00000004", "s");
    assert_eq!(lab.json(&format!("ckpt diff {a} {b} --json"))["bit_equal"], true);
    let ran = lab.run("ckpt diff r s");
    assert_eq!(ran.code, Some(1), "{}", ran.err);
    assert!(ran.out.contains("tensors: different"), "{}", ran.out);

    assert_eq!(lab.json("ckpt verify r --json")["checkpoints"].as_array().map(Vec::len), Some(3));
    let file = lab.path("r/checkpoints/step-00000002/rank-00000.safetensors");
    let mut bytes = fs::read(&file).expect("a checkpoint");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&file, bytes).expect("damage it");
    let ran = lab.run("ckpt verify r");
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(
        ran.out.contains("step-00000002: damaged") && ran.out.contains("step-00000006: whole"),
        "{}",
        ran.out
    );
    assert!(ran.err.contains("chunk"), "{}", ran.err);

    let pruned = lab.json("ckpt prune r --keep 1 --every 4 --dry-run --json");
    assert_eq!(pruned, json!({"removed": [2], "kept": 2, "dry_run": true}));
    assert_eq!(steps(&lab.json("ckpt ls r --json")), [2, 4, 6]);
    lab.ok("ckpt prune r --keep 1 --every 4");
    let left = lab.json("ckpt ls r --json");
    assert_eq!(steps(&left), [4, 6]);
    assert!(path(&left["checkpoints"][0]).ends_with("step-00000004"));

    let check = |args: &str, what: &str| {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{args}: {}", ran.err);
    };
    check("ckpt prune r --keep 0", "--keep 0 would leave no checkpoint");
    check("ckpt ls none", "none: no such directory");
    check("ckpt diff r none", "none: no such directory");
}

#[test]
fn some_steps_are_kept_for_good() {
    let lab = Lab::new();
    lab.train("r", "--set train.steps=14 --set checkpoint.keep=1 --set checkpoint.keep_every=6");
    let steps = || -> Vec<u64> {
        let found = lab.json("ckpt ls r --json");
        found["checkpoints"].as_array().expect("rows").iter().filter_map(|r| r["step"].as_u64()).collect()
    };
    assert_eq!(steps(), [6, 12, 14]);
    assert_eq!(lab.ok("ckpt prune r --keep 1").trim(), "nothing to remove");
    lab.ok("ckpt prune r --keep 1 --every 12");
    assert_eq!(steps(), [12, 14]);
}

#[test]
fn a_checkpoint_in_other_files_is_the_same_and_a_run_goes_on_from_it() {
    let lab = Lab::new();
    lab.train("r", "--nproc 4 --set layout.dp=2 --set layout.pp=2 --set layout.zero=1");
    lab.train("s", "--stop-after 4");
    fs::remove_dir_all(lab.path("s/checkpoints/step-00000004")).expect("a checkpoint");
    let done = lab.json("ckpt reshard r/checkpoints/step-00000004 s --ranks 3 --json");
    assert_eq!((&done["files"], path(&done)), (&json!(3), "s/checkpoints/step-00000004"));
    assert_eq!(lab.json("ckpt diff r/checkpoints/step-00000004 s --json")["bit_equal"], true);
    assert_eq!(lab.json("ckpt show s --json")["world"], 3);
    lab.ok("ckpt verify s");
    lab.train("s", "--nproc 2");
    assert_eq!(lab.json("ckpt diff r s --json")["bit_equal"], true, "the end of either run");

    for (args, what) in [
        ("ckpt reshard r s --ranks 2", "step-00000006 is there already"),
        ("ckpt reshard r t --ranks 0", "reshard for 0 ranks"),
        ("ckpt reshard none t --ranks 1", "none: no such directory"),
    ] {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{args}: {}", ran.err);
    }
}

#[test]
fn a_checkpoint_goes_to_pytorch_and_back_and_a_run_goes_on_from_it() {
    let lab = Lab::new();
    lab.train("r", "--nproc 2 --set layout.zero=1");
    lab.train("s", "--stop-after 4");
    fs::remove_dir_all(lab.path("s/checkpoints/step-00000004")).expect("a checkpoint");
    let done = lab.json("ckpt export r/checkpoints/step-00000004 dcp --format dcp --json");
    assert!(done["tensors"].as_u64().is_some_and(|n| n > 10), "{done}");
    let done = lab.json("ckpt import dcp s --json");
    assert_eq!((&done["format"], &done["whole"]), (&json!("dcp"), &json!(true)));
    assert_eq!(lab.json("ckpt diff r/checkpoints/step-00000004 s --json")["bit_equal"], true);
    lab.train("s", "");
    assert_eq!(lab.json("ckpt diff r s --json")["bit_equal"], true, "the end of either run");

    fs::write(lab.path("dcp/.metadata"), b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.")
        .expect("a hostile file");
    for (args, what) in [
        ("ckpt import dcp t", "opcode 0x63 at byte 2: the name system of os is not on the list"),
        ("ckpt import dcp t --format llmc", "is of format dcp, not llmc"),
        ("ckpt import none t", "none"),
        ("ckpt export r dcp --format dcp", "not empty"),
    ] {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{args}: {}", ran.err);
    }
}

/// Training goes on while a checkpoint is written, of the weights that there were when it began.
#[test]
fn a_checkpoint_in_the_background_is_the_one_that_a_run_would_wait_for() {
    let lab = Lab::new();
    let steps = "--set checkpoint.keep=0 --set train.steps=40";
    for (ranks, waits, beside) in [("", "a", "b"), ("--nproc 2 --set layout.zero=3", "c", "d")] {
        lab.train(waits, &format!("{steps} {ranks} --set checkpoint.background=false"));
        let out = lab.train(beside, &format!("{steps} {ranks}"));
        assert!(out.contains("saved ") && lab.newest(beside).ends_with("step-00000040"), "{out}");
        for step in (2..=40).step_by(2) {
            let of = |run: &str| format!("{run}/checkpoints/step-{step:08}");
            assert_eq!(
                lab.json(&format!("ckpt diff {} {} --json", of(waits), of(beside)))["bit_equal"],
                true
            );
        }
    }
}

#[test]
fn a_ledger_counts_what_was_lost_and_what_came_twice() {
    let lab = Lab::new();
    lab.train("r", "--stop-after 4");
    // Back to step 2, and on under other ranks.
    fs::remove_dir_all(lab.path("r/checkpoints/step-00000004")).expect("a checkpoint");
    lab.train("r", "--nproc 4 --set layout.dp=2 --set layout.pp=2");
    let ledger = lab.json("ledger r --json");
    let expected = json!({"steps": 6, "sessions": 2, "steps_redone": 2, "samples": 24, "samples_lost": 0,
        "samples_skipped": 0, "skipped": [], "samples_repeated": 0, "wrong": [], "steps_missing": 0, "missing": [],
        "doubled": [], "damage": [], "tokens": {"state": "equal"}, "exact": true});
    assert_eq!(ledger, expected);

    // A rank that drew something else, or whose record is gone.
    let journal = lab.path("r/journal-00003.jsonl");
    let text = fs::read_to_string(&journal).expect("a journal");
    let check = |text: String, said: &str| {
        fs::write(&journal, text).expect("change it");
        let ran = lab.run("ledger r");
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        assert!(ran.out.contains(said), "{said}: {}", ran.out);
    };
    let of_step_5 = |l: &&str| l.contains("\"drawn\"") && l.contains("\"step\":5,");
    let line = text.lines().find(of_step_5).expect("step 5");
    let other = line.replace("[[18,2]]", "[[17,2]]");
    assert_ne!(line, other, "the second of two data-parallel ranks");
    check(text.replace(line, &other), "step 5: 1 lost, 1 repeated");
    check(text.replace(&format!("{line}\n"), ""), "step 5: ");
    let at = line.find("tokens_xxh3\":").expect("a hash") + "tokens_xxh3\":".len();
    let other = format!("{}1{}", &line[..at], line[at..].trim_start_matches(|c: char| c.is_ascii_digit()));
    check(text.replace(line, &other), "the tokens of step 5 are not those of the data");
    // The same line twice is damage of the file; the step done once more is not.
    fs::write(&journal, text.replace(line, &format!("{line}\n{line}"))).expect("double it");
    let ran = lab.run("ledger r");
    assert_eq!(ran.code, Some(0), "{}{}", ran.out, ran.err);
    assert!(ran.err.contains("1 line is there twice, the first of step 5"), "{}", ran.err);
    let doubled = &lab.json("ledger r --json")["doubled"];
    assert_eq!(doubled, &json!([{"rank": 3, "lines": 1, "first_step": 5}]));
    let again = line.replacen("\"begun_us\":1", "\"begun_us\":2", 1);
    assert_ne!(again, line);
    check(text.replace(line, &format!("{line}\n{again}")), "step 5: 0 lost, 2 repeated");
    fs::write(&journal, text).expect("as it was");
    lab.ok("ledger r");
}

#[test]
fn a_run_keeps_its_promises_under_faults() {
    let lab = Lab::new();
    let report = lab.json("chaos --faults 15 --seed 2 --ranks 4 --dir chaos --json");
    let not_tried = report["not_tried"].as_object().expect("kinds");
    assert!(not_tried.keys().all(|kind| kind.contains("disk")), "{report}");
    let expected = json!({"faults": 15, "recoveries": 15, "bit_identical": true, "tokens_equal": true, "hangs": 0,
        "orphans": 0, "leftovers": 0, "samples_lost": 0, "samples_repeated": 0, "steps_unrecorded": 0, "seed": 2,
        "replay": "phalanx chaos --faults 15 --seed 2 --ranks 4"});
    for (key, value) in expected.as_object().expect("keys") {
        assert_eq!(&report[key], value, "{key}: {report}");
    }
    let seconds = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
    let (detection_s, recovery_s) = (seconds("median_detection_s"), seconds("median_recovery_s"));
    assert!(detection_s > 0.0 && recovery_s > 0.0, "{report}");
    let kinds = report["kinds"].as_object().map(serde_json::Map::len);
    assert_eq!(kinds, Some(15 - not_tried.len()), "each kind at least once: {report}");
    let ran = lab.run("chaos --faults 1 --dir chaos");
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(ran.err.contains("--dir chaos: not empty"), "{}", ran.err);
    for flags in ["--faults 0", "--ranks 9"] {
        assert_eq!(lab.run(&format!("chaos {flags}")).code, Some(2), "{flags}");
    }
}
