//! Bad steps, silent corruption, stragglers; and a step done again to tell whose fault it was.

use std::fs;

use serde_json::{Value, json};

use crate::common::{Lab, Ran, tiny};

/// Layouts of the tiny model that train to the same bits.
const LAYOUTS: [&str; 5] = [
    "",
    "--nproc 2 --set layout.zero=1",
    "--nproc 4 --set layout.zero=2",
    "--nproc 2 --set layout.zero=3",
    "--nproc 4 --set layout.dp=2 --set layout.pp=2",
];

const WEIGHT: &str = "layers.0.mlp.down.weight";

/// Records of one kind in the journal of rank 0.
fn records(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(lab.path(&format!("{run}/journal-00000.jsonl"))).expect("a journal");
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
    all.filter(|r| r["kind"] == kind).collect()
}

fn equal(lab: &Lab, a: &str, b: &str) -> bool {
    lab.json(&format!("ckpt diff {a} {b} --json"))["bit_equal"] == true
}

fn fails(lab: &Lab, args: &str) -> Ran {
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(1), "{args}\n{}", ran.err);
    assert!(ran.err.contains("hint: "), "{args}\n{}", ran.err);
    ran
}

/// The same trouble in every layout: the same is decided, recorded and left out, and the weights are the same.
#[track_caller]
fn check_everywhere(flags: &str, action: &str, skipped: (u64, u64)) {
    let lab = Lab::new();
    let flags = format!("--set train.steps=12 --set checkpoint.keep=0 {flags}");
    for (i, layout) in LAYOUTS.iter().enumerate() {
        let run = format!("r{i}");
        lab.train(&run, &format!("{flags} {layout}"));
        let found = records(&lab, &run, "trouble");
        assert_eq!(found.len(), 1, "{layout}: {found:?}");
        assert_eq!((&found[0]["action"], &found[0]["step"]), (&json!(action), &json!(7)), "{layout}");
        assert_eq!(found[0]["skipped"], json!([skipped.0, skipped.1]), "{layout}");
        assert!(equal(&lab, "r0", &run), "{layout}: other weights");
        let ledger = lab.json(&format!("ledger {run} --json"));
        let left_out = 4 * (skipped.1 - skipped.0 + 1);
        assert_eq!(ledger["exact"], true, "{layout}: {ledger}");
        assert_eq!(
            (&ledger["samples_skipped"], &ledger["steps"]),
            (&json!(left_out), &json!(12)),
            "{layout}"
        );
    }
    // Stopped after it and gone on with: what decides is in the checkpoint.
    lab.train("s", &format!("{flags} --nproc 2 --stop-after 9"));
    lab.train("s", &flags);
    assert!(equal(&lab, "r0", "s"), "stopped and gone on with");
    assert!(lab.ok("ledger s").contains("left out by decisions on record"));
    assert!(lab.ok("journal show r0").contains("trouble"));
    lab.train("t", "--set train.steps=12");
    assert!(!equal_or_not(&lab, "r0", "t"), "a step that is left out changes the weights");
}

fn equal_or_not(lab: &Lab, a: &str, b: &str) -> bool {
    lab.run(&format!("ckpt diff {a} {b}")).code == Some(0)
}

#[test]
fn a_step_that_is_not_finite_is_left_out_alike_in_every_layout() {
    check_everywhere("--drill nan@7 --set trouble.on_nan=skip", "skip", (7, 7));
}

#[test]
fn a_spike_sends_all_layouts_back_to_the_same_checkpoint() {
    let flags = "--drill spike@7 --set trouble.on_spike=rollback --set trouble.window=4 \
        --set trouble.spike_factor=100 --set trouble.back_steps=1 --set trouble.skip_steps=1";
    // Checkpoints of steps 2, 4 and 6 are there; that of step 4 is at least one step before the last good one.
    check_everywhere(flags, "rollback", (5, 8));
}

#[test]
fn a_run_ends_by_trouble_that_does_not_end() {
    let lab = Lab::new();
    let drills: String = (3..9).map(|step| format!("--drill nan@{step} ")).collect();
    for ranks in ["", "--nproc 2"] {
        let run = format!("r{}", ranks.len());
        let ran = fails(
            &lab,
            &tiny(
                &run,
                &format!(
                    "{drills} {ranks} --set train.steps=12 --set trouble.on_nan=skip --set trouble.most=2"
                ),
            ),
        );
        assert!(ran.err.contains("step 5: ") && ran.err.contains("trouble.most = 2"), "{}", ran.err);
        let actions: Vec<Value> =
            records(&lab, &run, "trouble").iter().map(|r| r["action"].clone()).collect();
        assert_eq!(actions, ["skip", "skip", "stop"]);
        // Step 5 was begun, and is no part of the weights.
        let begun: Vec<Value> = records(&lab, &run, "drawn").iter().map(|r| r["step"].clone()).collect();
        assert_eq!(begun, [1, 2, 3, 4, 5]);
        let ledger = lab.json(&format!("ledger {run} --json"));
        assert_eq!((&ledger["exact"], &ledger["steps"]), (&Value::from(true), &Value::from(4)), "{ledger}");
    }
    let ran = fails(&lab, &tiny("s", "--drill nan@1 --set trouble.on_nan=rollback"));
    assert!(ran.err.contains("no checkpoint up to step 0"), "{}", ran.err);
    for (set, what) in [
        ("--set trouble.on_nan=rollback --set checkpoint.every=0", "checkpoint.every = 0"),
        ("--set trouble.on_nan=rollback --set trouble.back_steps=9", "trouble.back_steps = 9"),
        ("--drill nan@0", "steps count from 1"),
        ("--drill dance@3", "unknown"),
        ("--drill nan@7", "--drill nan@7: step 7 never comes: the run ends with step 6"),
        ("--drill spike@4 --stop-after 3", "step 4 never comes: the run ends with step 3"),
        ("--drill slow@9-12:rank=0:ms=1", "step 9 never comes"),
        ("--drill slow@3-2:rank=0:ms=1", "the last comes before the first"),
        ("--nproc 2 --drill slow@3-4:rank=2:ms=1", "there is no rank 2: the run has 2"),
        ("--drill flip@3:rank=1:param=x", "there is no rank 1: the run has 1"),
        (
            "--drill flip@3:rank=0:param=layers.0.mlp.down.wieght",
            "rank 0 has no parameter layers.0.mlp.down.wieght",
        ),
        ("--drill flip@3:rank=0:param=layers.0.mlp.down.weight:bit=32", "there is no bit 32"),
    ] {
        let ran = lab.run(&tiny("t", set));
        assert_eq!(ran.code, Some(2), "{set}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{set}: {}", ran.err);
        assert!(!lab.path("t").exists(), "{set}");
    }
}

/// A flipped bit in one rank's memory: the run ends, and says whose and where.
#[track_caller]
fn check_flip(flags: &str, said: &[&str]) {
    let lab = Lab::new();
    let ran = fails(&lab, &tiny("r", &format!("--set train.steps=12 {flags}")));
    for said in said {
        assert!(ran.err.contains(said), "{flags}: {said}\n{}", ran.err);
    }
    let found = records(&lab, "r", "trouble");
    assert_eq!(
        found.last().map(|r| (&r["what"], &r["action"])),
        Some((&json!("corruption"), &json!("stop")))
    );
    assert!(records(&lab, "r", "verified").len() > 1 || flags.contains("verify-every 4"));
}

#[test]
fn a_flipped_bit_is_found_in_what_replicas_hold() {
    let of_two = format!("ranks 0, 1: {WEIGHT} differs, and no majority says whose is right");
    let of_four = format!("step 8: rank 2: {WEIGHT} is not what the other ranks hold");
    let flip = |rank: usize, step: u64| format!("--drill flip@{step}:rank={rank}:param={WEIGHT}");
    check_flip(&format!("--nproc 4 --verify-every 4 {}", flip(2, 6)), &[&of_four]);
    check_flip(&format!("--nproc 2 --verify-every 4 {}", flip(1, 6)), &["step 8: ", &of_two]);
    // Right after a comparison nothing had reason to change: one copy of two is known to be wrong.
    let at_rest = format!("rank 1: {WEIGHT} changed between two steps");
    check_flip(&format!("--nproc 2 --verify-every 4 {}", flip(1, 5)), &["step 4: ", &at_rest]);
}

#[test]
fn a_flipped_bit_is_found_in_what_one_rank_holds() {
    let flip = format!("--verify-every 1 --drill flip@6:rank=1:param={WEIGHT}");
    let at_rest = format!("rank 1: {WEIGHT}");
    for layout in [
        "--nproc 2 --set layout.zero=1",
        "--nproc 2 --set layout.zero=2",
        "--nproc 2 --set layout.zero=3",
        "--nproc 2 --set layout.tp=2",
        "--nproc 2 --set layout.zero=1 --set train.precision=bf16",
        "--nproc 2 --set train.precision=bf16",
    ] {
        check_flip(&format!("{layout} {flip}"), &[&at_rest, "changed between two steps"]);
    }
    // The second stage has the second layer.
    let other = WEIGHT.replace("layers.0", "layers.1");
    let flip = format!("--verify-every 1 --drill flip@6:rank=1:param={other}");
    check_flip(&format!("--nproc 2 --set layout.pp=2 {flip}"), &[&format!("rank 1: {other} changed")]);
}

#[test]
fn what_was_flipped_is_mended_and_the_bits_are_those_of_the_undisturbed_run() {
    let lab = Lab::new();
    let flags = "--set train.steps=12 --set checkpoint.keep=0";
    lab.train("r", flags);
    let mend = |run: &str, more: &str, action: &str| {
        lab.train(run, &format!("{flags} {more}"));
        let found = records(&lab, run, "trouble");
        assert_eq!(found.last().map(|r| &r["action"]), Some(&json!(action)), "{more}: {found:?}");
        assert!(equal(&lab, "r", run), "{more}");
        assert_eq!(lab.json(&format!("ledger {run} --json"))["exact"], true, "{more}");
    };
    let flip = |step: u64| format!("--drill flip@{step}:rank=1:param={WEIGHT}");
    // Before the update: a peer gives what the rank had, and the step is begun again.
    mend(
        "a",
        &format!("--nproc 2 --verify-every 1 --set trouble.on_corruption=restore {}", flip(6)),
        "restore",
    );
    // Steps were done with it: back to where all was right.
    mend(
        "b",
        &format!("--nproc 4 --verify-every 4 --set trouble.on_corruption=rollback {}", flip(6)),
        "rollback",
    );
    // Nobody else has it.
    let alone = "--nproc 2 --set layout.zero=3 --verify-every 2 --set trouble.on_corruption=restore";
    mend("c", &format!("{alone} {}", flip(7)), "rollback");
    // What is looked at is the same in every layout.
    let hashes = |run: &str| -> Vec<(Value, Value)> {
        records(&lab, run, "verified").iter().map(|r| (r["step"].clone(), r["hash"].clone())).collect()
    };
    let of_a = hashes("a");
    assert!(of_a.len() > 10 && hashes("c").iter().all(|h| of_a.contains(h)), "{of_a:?} {:?}", hashes("c"));
}

#[test]
fn a_step_done_again_tells_a_broken_machine_from_a_broken_model() {
    let lab = Lab::new();
    let flags = "--set train.steps=12 --set checkpoint.keep=0";
    let check = |run: &str, step: u64, more: &str, verdict: &str, tries: usize| -> Value {
        let ran = lab.run(&format!("replay {run} --step {step} --json {more}"));
        let code = i32::from(verdict != "model_or_data");
        assert_eq!(ran.code, Some(code), "{run} {step}: {}{}", ran.out, ran.err);
        let found: Value = serde_json::from_str(&ran.out).expect("JSON");
        assert_eq!(found["verdict"], verdict, "{run} {step}: {found}");
        assert_eq!(found["tries"].as_array().map(Vec::len), Some(tries), "{found}");
        found
    };
    lab.train("r", &format!("{flags} --nproc 2 --set layout.zero=1 --verify-every 1"));
    // What was mended there says nothing of the step.
    let mended = format!("--set trouble.on_corruption=restore --drill flip@6:rank=1:param={WEIGHT}");
    lab.train("e", &format!("{flags} --nproc 2 --verify-every 1 {mended}"));
    let found = check("r", 5, "", "model_or_data", 2);
    assert_eq!(found["tries"][0]["hash"], found["recorded"]["hash"]);
    assert!(found["from"].as_str().is_some_and(|p| p.ends_with("step-00000004")), "{found}");
    check("e", 5, "", "model_or_data", 2);
    check("r", 1, "--layout dp=4,zero=3 --layout pp=2", "model_or_data", 2);
    assert!(lab.ok("replay r --step 12").contains("the same bits: model or data"));
    // A bit that was flipped, and nobody looked.
    lab.train("f", &format!("{flags} --nproc 2 --drill flip@6:rank=1:param={WEIGHT}:bit=22"));
    let found = check("f", 6, "", "machine", 2);
    assert!(found["tries"][0]["differs_in"][0].as_str().is_some_and(|d| d.contains(" was ")), "{found}");
    check("f", 5, "", "model_or_data", 2);
    // A norm that was no number here, and is one again.
    let nan = "--drill nan@7 --set trouble.on_nan=skip";
    lab.train("n", &format!("{flags} {nan}"));
    check("n", 7, "", "machine", 1);
    check("n", 9, "", "model_or_data", 1);
    // A model that breaks does so again.
    let wild = "--set optim.lr=1e6 --set optim.grad_clip=0 --set train.steps=50 --set checkpoint.every=1";
    fails(&lab, &tiny("w", wild));
    let step = records(&lab, "w", "trouble")[0]["step"].as_u64().expect("a step");
    let found = check("w", step, "", "model_or_data", 1);
    assert_eq!(found["recorded"]["action"], "stop");
    // After a rollback the way leads over the checkpoint that was gone back to.
    let back = "--drill nan@7 --set trouble.on_nan=rollback --set trouble.back_steps=1";
    lab.train("b", &format!("{flags} {back} --verify-every 3"));
    check("b", 9, "", "model_or_data", 1);
    check("b", 8, "", "model_or_data", 1);
    for (args, what) in [
        ("replay r --step 99", "says nothing of step 99"),
        ("replay r --step 0", "--step 0"),
        ("replay none --step 1", "none"),
        ("replay r --step 3 --layout dp=3", "layout.dp"),
        ("replay r --step 3 --layout dance", "--layout dance"),
        ("replay r --step 3 --layout tp=2", "has other bits than the run's layout"),
    ] {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{args}: {}", ran.err);
    }
    fs::rename(lab.path("cache"), lab.path("elsewhere")).expect("move the tokens");
    let ran = lab.run("replay r --step 3");
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(ran.err.contains("the tokens that r was trained on are gone"), "{}", ran.err);
}

#[test]
fn a_rank_that_keeps_the_others_waiting_is_named() {
    let lab = Lab::new();
    let slow = "--drill slow@1-99:rank=1:ms=300 --set run.straggler_window=5 --set train.steps=20";
    for layout in ["--nproc 2", "--nproc 4 --set layout.dp=2 --set layout.pp=2"] {
        let run = format!("r{}", layout.len());
        let out = lab.train(&run, &format!("{slow} {layout}"));
        let found = records(&lab, &run, "straggler");
        assert!(!found.is_empty(), "{layout}: {out}");
        for f in &found {
            assert_eq!((&f["ranks"], &f["cause"]), (&json!([1]), &json!("compute")), "{layout}: {f}");
            assert!(f["share"].as_f64().is_some_and(|s| s > 0.1), "{f}");
            assert!(f["op"].as_str().is_some_and(|op| !op.is_empty()), "{f}");
        }
        assert!(out.contains("rank 1 works"), "{out}");
        assert!(lab.ok(&format!("journal show {run}")).contains("rank 1 works"));
        assert!(lab.ok(&format!("top {run}")).contains("step 20"));
    }
}
