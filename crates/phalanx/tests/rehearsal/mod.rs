//! `phalanx simulate` as people meet it.

use crate::common::Lab;

const SMALL: &str = "simulate --model llama3-8b --cluster dgx-superpod-h100 --accelerators 64 --layout tp=4,pp=2,micro_batch=1";

#[test]
fn a_rehearsal_has_the_keys_that_scripts_read() {
    let lab = Lab::new();
    let json = lab.json(&format!("{SMALL} --json"));
    assert_eq!(json["ranks"], 64);
    for key in ["step_s", "predicted_step_s", "wall_s", "events", "goodput"] {
        assert!(json[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {json}");
    }
    assert_eq!(json["interruptions"], 0.0);
    let found = lab.json("simulate --model gpt3-1.3b --cluster dgx-superpod-h100 --accelerators 16 --json");
    assert!(found["layout"].as_str().is_some_and(|l| l.starts_with("tp=")), "{found}");
}

#[test]
fn what_goes_wrong_takes_longer_and_the_same_seed_is_the_same_run() {
    let lab = Lab::new();
    lab.write("storm.toml", "[[slow]]\nnode = 3\nfactor = 1.5\n[[link]]\nrank = 9\nfactor = 0.1\n");
    let step = |args: &str| lab.json(&format!("{SMALL} {args} --json"))["step_s"].as_f64().expect("seconds");
    let (even, stormy) = (step(""), step("--scenario storm.toml"));
    assert!(stormy > 1.3 * even && stormy < 2.0 * even, "{even} {stormy}");
    lab.write("storm.toml", "[[fail]]\nnode = 3\nstep = 2\n[[pause]]\nrank = 0\nfor_s = 3\nstep = 3\n");
    let json = lab.json(&format!("{SMALL} --scenario storm.toml --steps 4 --json"));
    assert_eq!(json["interruptions"], 1.0);
    assert!(json["slowest_step_s"].as_f64() > json["step_s"].as_f64(), "{json}");
    let life = |args: &str| {
        let json = lab.json(&format!("{SMALL} --days 300 {args} --json"));
        (json["goodput"].as_f64().expect("a share"), json["lives"].clone())
    };
    let (goodput, lives) = life("--seed 5 --seeds 3");
    assert!((0.5..1.0).contains(&goodput), "{lives}");
    assert_eq!(life("--seed 5 --seeds 3").1, lives);
    assert_ne!(life("--seed 6 --seeds 3").1, lives);
    assert!(lab.ok(&format!("{SMALL} --days 54")).contains("interruptions"));
}

#[test]
fn nonsense_is_refused_with_a_hint() {
    let lab = Lab::new();
    let refused = |args: &str, what: &str| {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
        assert!(ran.err.contains(what), "{args}\n{}", ran.err);
        assert!(ran.err.contains("hint: ") && ran.out.is_empty(), "{args}\n{}", ran.err);
    };
    for (text, what) in [
        ("[[slow]]\nnode = 8\nfactor = 2", "node 8 does not exist"),
        ("[[slow]]\nnode = 1\nfactor = -1", "factor = -1, expected"),
        ("[[switch]]\ntier = 7\ngroup = 0\nfactor = 0.5", "tier 7 does not exist"),
        ("[[quake]]\nnode = 1", "quake"),
        ("slow = ", "storm.toml"),
    ] {
        lab.write("storm.toml", text);
        refused(&format!("{SMALL} --scenario storm.toml"), what);
    }
    refused(&format!("{SMALL} --scenario none.toml"), "none.toml");
    refused(&format!("{SMALL} --days -1"), "--days -1");
    refused(&format!("{SMALL} --days nan"), "--days");
    refused(&format!("{SMALL} --steps 0"), "--steps 0");
    refused(&format!("{SMALL} --seeds 0"), "--seeds 0");
    lab.write("ops.csv", "step,stage\n1,2\n");
    refused("simulate --trace ops.csv", "ops.csv: no column dp_rank");
    refused("simulate --trace ops.parquet", "comma-separated");
}

#[test]
fn a_cluster_without_failure_rates_is_said_and_lives_on() {
    let lab = Lab::new();
    let args = "simulate --model llama3-8b --cluster dgx-h100 --accelerators 8 --layout tp=8,micro_batch=1 --days 3 --json";
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.err.contains("no failure rates"), "{}", ran.err);
}
