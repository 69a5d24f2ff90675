//! Parts of today's recipes as people meet them: batches that grow, averages of weights.

use std::fs;

use ckpt::{Checkpoint, Kind};
use serde_json::Value;

use crate::common::{Lab, sets, tiny};

/// Layouts of the tiny model that train to the same bits.
const LAYOUTS: [&str; 6] = [
    "",
    "--set layout.micro_batch=2 --set layout.recompute=full",
    "--nproc 2 --set layout.zero=1",
    "--nproc 4 --set layout.zero=2",
    "--nproc 2 --set layout.zero=3",
    "--nproc 4 --set layout.dp=2 --set layout.pp=2",
];

/// Records of one kind in the journal of rank 0.
fn records(lab: &Lab, run: &str, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(lab.path(&format!("{run}/journal-00000.jsonl"))).expect("a journal");
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a record"));
    all.filter(|r| r["kind"] == kind).collect()
}

fn numbers(records: &[Value], key: &str) -> Vec<f64> {
    records.iter().map(|r| r[key].as_f64().unwrap_or(f64::NAN)).collect()
}

#[track_caller]
fn equal(lab: &Lab, a: &str, b: &str) {
    let diff = lab.json(&format!("ckpt diff {a} {b} --json"));
    assert_eq!(diff["bit_equal"], true, "{a} {b}: {diff}");
}

fn checkpoint(lab: &Lab, run: &str, step: u64) -> Checkpoint {
    Checkpoint::open(&lab.path(&format!("{run}/checkpoints/step-{step:08}"))).expect("a checkpoint")
}

fn read(from: &Checkpoint, name: &str, kind: Kind) -> Vec<f32> {
    let shape = from.tensor(name, kind).expect("such a tensor").shape.clone();
    let (rows, cols) = if shape.len() == 2 { (shape[0], shape[1]) } else { (1, shape[0]) };
    let mut out = vec![0.0; rows * cols];
    from.read_box(name, kind, 0, rows, 0, cols, &mut out).expect("a tensor");
    out
}

/// Five steps of 4 sequences, and 8 in those after them.
const GROWS: &str = "--set batch.sequences=8 --set batch.ramp=[4,4,20] --set train.steps=11 --set train.ema=0.9 \
    --set checkpoint.keep=0 --set train.eval_every=4 --set data.split=3,1,0";

#[test]
fn a_batch_that_grows_has_the_same_bits_in_every_layout_and_each_sample_once() {
    let lab = Lab::new();
    for precision in ["f32", "bf16"] {
        for (i, layout) in LAYOUTS.iter().enumerate() {
            let run = format!("{precision}{i}");
            lab.train(&run, &format!("{GROWS} --set train.precision={precision} {layout}"));
            equal(&lab, &format!("{precision}0"), &run);
            let (first, evals) =
                (records(&lab, &format!("{precision}0"), "eval"), records(&lab, &run, "eval"));
            assert_eq!(evals.len(), 3, "{layout}");
            for key in ["loss", "average_loss", "tokens"] {
                assert_eq!(numbers(&first, key), numbers(&evals, key), "{key}, {layout}");
            }
            let ledger = lab.json(&format!("ledger {run} --json"));
            assert_eq!(
                (&ledger["exact"], &ledger["samples"]),
                (&true.into(), &68.into()),
                "{layout}: {ledger}"
            );
        }
    }
    let steps = records(&lab, "f320", "step");
    let sizes = [[4.0; 5].as_slice(), &[8.0; 6]].concat();
    assert_eq!(numbers(&steps, "valid_tokens"), sizes.iter().map(|n| 32.0 * n).collect::<Vec<_>>());
    assert_eq!(numbers(&steps, "tokens").last(), Some(&(68.0 * 32.0)));
    // All of memory is there from the first step on, and as much as the program says.
    let shown = lab.json(&format!("program show {} {GROWS} {} --json", sets(), LAYOUTS[1]));
    let (total, steps) = (shown["memory"]["total"].as_f64(), records(&lab, "f321", "step"));
    assert!(numbers(&steps, "memory_bytes").iter().all(|bytes| Some(*bytes) == total), "{total:?}");
    // A step that is done again is as large as it was.
    for step in [3, 7] {
        assert_eq!(lab.json(&format!("replay f320 --step {step} --json"))["verdict"], "model_or_data");
    }
}

#[test]
fn a_run_stopped_anywhere_on_a_ramp_goes_on_as_if_it_had_not_been() {
    let lab = Lab::new();
    // 2, 4, 6 and then 8 sequences.
    let grows = format!("{GROWS} --set batch.ramp=[2,2,24] --set train.eval_every=3");
    lab.train("whole", &grows);
    let sizes = numbers(&records(&lab, "whole", "step"), "valid_tokens");
    assert_eq!(
        sizes.iter().map(|n| n / 32.0).collect::<Vec<_>>(),
        [2., 2., 2., 2., 4., 4., 6., 6., 8., 8., 8.]
    );
    for stop in [1, 4, 5, 6, 7, 9] {
        let run = format!("s{stop}");
        lab.train(&run, &format!("{grows} --nproc 2 --set layout.zero=1 --stop-after {stop}"));
        lab.train(&run, &grows);
        equal(&lab, "whole", &run);
        assert_eq!(lab.json(&format!("ledger {run} --json"))["exact"], true);
    }
    let other = lab.run(&tiny("s4", &format!("{grows} --set batch.ramp=[4,4,20]")));
    let finished = lab.run(&tiny("s4", &format!("{grows} --set train.steps=20 --set batch.ramp=[4,4,20]")));
    for ran in [other, finished] {
        assert_eq!(ran.code, Some(2), "{}", ran.err);
        assert!(ran.err.contains("batch.ramp = [4, 4, 20], was [2, 2, 24]"), "{}", ran.err);
    }
}

#[test]
fn ranks_that_leave_a_sample_out_of_a_ramp_are_found() {
    let lab = Lab::new();
    lab.train("r", GROWS);
    let journal = lab.path("r/journal-00000.jsonl");
    let text = fs::read_to_string(&journal).expect("a journal");
    // What step 6 drew, the first of the full batch.
    assert!(text.contains("\"samples\":[[20,8]]"), "{text}");
    fs::write(&journal, text.replace("\"samples\":[[20,8]]", "\"samples\":[[20,7]]")).expect("written");
    let ran = lab.run("ledger r");
    assert_eq!(ran.code, Some(1), "{}{}", ran.out, ran.err);
}

#[test]
fn programs_of_all_sizes_share_one_memory() {
    let lab = Lab::new();
    for layout in ["", "--set layout.pp=2", "--set layout.dp=2 --set layout.zero=3"] {
        let total = |set: &str| {
            let shown = lab.json(&format!("program show {} {set} {layout} --json", sets()));
            shown["memory"]["total"].as_u64().expect("bytes")
        };
        let ramp = total("--set batch.sequences=8 --set batch.ramp=[4,4,20]");
        let most = ["4", "8"].map(|n| total(&format!("--set batch.sequences={n}"))).into_iter().max();
        assert_eq!(Some(ramp), most, "{layout}");
        lab.ok(&format!(
            "program check {} --set batch.sequences=8 --set batch.ramp=[4,4,20] {layout}",
            sets()
        ));
    }
}

#[test]
fn an_average_is_the_weighted_mean_of_all_steps_and_moves_no_weight() {
    let lab = Lab::new();
    let every = "--set checkpoint.every=1 --set checkpoint.keep=0 --set checkpoint.background=false \
        --set data.split=3,1,0";
    lab.train("plain", every);
    lab.train("kept", &format!("{every} --set train.ema=0.5"));
    let names = ["embed.weight", "layers.1.mlp.down.weight", "final_norm.weight"];
    let last = checkpoint(&lab, "kept", 6);
    for name in names {
        let weights = |step: u64| read(&checkpoint(&lab, "kept", step), name, Kind::Param);
        let bits = |all: Vec<f32>| all.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(weights(6)), bits(read(&checkpoint(&lab, "plain", 6), name, Kind::Param)), "{name}");
        let shares: Vec<f64> = (1..=6).map(|step| 0.5_f64.powi(6 - step)).collect();
        let sum: f64 = shares.iter().sum();
        let mut mean = vec![0.0; weights(6).len()];
        for (step, share) in (1..=6).zip(&shares) {
            mean.iter_mut().zip(weights(step)).for_each(|(m, w)| *m += share / sum * f64::from(w));
        }
        let average = read(&last, name, Kind::Ema);
        let off = average.iter().zip(&mean).map(|(a, m)| (f64::from(*a) - m).abs()).fold(0.0, f64::max);
        let moved = average.iter().zip(weights(6)).map(|(a, w)| (a - w).abs()).fold(0.0, f32::max);
        assert!(off < 1e-6 && moved > 1e-4, "{name}: {off} {moved}");
    }
    let evals = records(&lab, "kept", "eval");
    assert!(numbers(&evals, "average_loss").iter().all(|l| l.is_finite()), "{evals:?}");
    assert_ne!(numbers(&evals, "average_loss"), numbers(&evals, "loss"));
    assert_eq!(numbers(&evals, "loss"), numbers(&records(&lab, "plain", "eval"), "loss"));
    assert!(!records(&lab, "plain", "eval")[0].as_object().expect("a record").contains_key("average_loss"));
}

#[test]
fn an_average_is_sampled_and_exported_when_asked_for() {
    let lab = Lab::new();
    lab.train("kept", "--set train.ema=0.5 --set train.steps=9");
    lab.ok("export kept weights");
    lab.ok("export kept average --ema");
    lab.ok("import average again");
    lab.ok("import weights raw");
    let kept = checkpoint(&lab, "kept", 9);
    for name in ["embed.weight", "layers.0.attn.q.weight"] {
        assert_eq!(read(&checkpoint(&lab, "again", 0), name, Kind::Param), read(&kept, name, Kind::Ema));
        assert_eq!(read(&checkpoint(&lab, "raw", 0), name, Kind::Param), read(&kept, name, Kind::Param));
    }
    // The average generates what the model that was made of it does.
    let ids = |args: &str| lab.ok(&format!("generate {args} --tokens 5,9 -n 12 --temperature 1 --seed 3"));
    assert_eq!(ids("kept --ema"), ids("again"));
    assert_ne!(ids("kept --ema"), ids("kept"));
    // What was imported has an average from its first step on.
    lab.train("again", "--set train.ema=0.5 --set train.steps=2");
    lab.train("plain", "");
    for command in ["generate plain --ema", "export plain x --ema"] {
        let ran = lab.run(command);
        assert_eq!(ran.code, Some(2), "{command}: {}", ran.err);
        assert!(ran.err.contains("keeps no average") && ran.err.contains("hint: "), "{command}: {}", ran.err);
    }
    for ema in ["1", "-0.1", "nan", "x"] {
        let ran = lab.run(&tiny("none", &format!("--set train.ema={ema}")));
        assert_eq!(ran.code, Some(2), "{ema}: {}", ran.err);
        assert!(ran.err.contains("train.ema") && ran.err.contains("hint: "), "{ema}: {}", ran.err);
    }
    let ran = lab.run(&tiny("plain", "--set train.ema=0.9 --set train.steps=9"));
    assert!(ran.code == Some(2) && ran.err.contains("train.ema = 0.9, was 0"), "{}", ran.err);
}

#[test]
fn averages_survive_resharding_and_pytorch() {
    let lab = Lab::new();
    lab.train("kept", "--nproc 2 --set layout.zero=3 --set train.ema=0.9");
    let newest = lab.newest("kept").display().to_string();
    lab.ok(&format!("ckpt reshard {newest} cut --ranks 3"));
    equal(&lab, &newest, "cut");
    lab.ok(&format!("ckpt export {newest} dcp --format dcp"));
    lab.ok("ckpt import dcp back");
    equal(&lab, &newest, "back");
}
