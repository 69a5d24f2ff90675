//! The planner on this machine: `layout = "auto"`, `compare` and `plan --cluster this` from a calibration file.

#[allow(dead_code, reason = "each test binary uses some of it")]
mod common;

use common::{Lab, sets, tiny};
use serde_json::Value;

/// A calibration file as `bench machine` writes it, with plausible rates of a machine with two cores; every op of the
/// small models is in it.
fn calibration() -> String {
    let products = [
        "linear",
        "linear_grad_input",
        "linear_grad_weight",
        "grouped_linear",
        "grouped_linear_grad_input",
        "grouped_linear_grad_weight",
        "attention",
        "attention_grad",
    ];
    let streams = [
        "adamw",
        "embed",
        "embed_grad",
        "grad_norm",
        "loss_sum",
        "norm",
        "norm_grad_input",
        "norm_grad_weight",
        "rope",
        "add",
        "shard_grads",
        "swiglu",
        "swiglu_grad",
        "xent",
        "xent_combine",
        "xent_grad",
        "xent_stats",
        "route",
        "route_grad",
        "permute",
        "permute_grad",
        "unpermute",
        "unpermute_grad",
        "split_heads",
        "join_heads",
        "slice",
    ];
    let mut text = String::from(
        "version = 1\n\n[machine]\nhost = \"lab\"\ncpu = \"two plausible cores\"\nphalanx = \"0.1.0\"\n\
         measured = \"2026-01-01T00:00:00Z\"\ncores = 2\nmemory_bytes = 8589934592\nop_gap_s = 1e-7\nspread = 0.03\n\
         crowding = 1.05\n",
    );
    let links = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"];
    text += &format!("kernels = {}\nlinks = {}\n", 2 * (products.len() + streams.len()), links.len());
    let kinds = products.iter().map(|k| (k, 2e10)).chain(streams.iter().map(|k| (k, 8e9)));
    for (kind, rate) in kinds {
        for (beside, share) in [(1, 1.0), (2, 0.9)] {
            text += &format!(
                "\n[[kernel]]\nkind = \"{kind}\"\nstorage = \"f32\"\nthreads = 1\nbeside = {beside}\nsamples = [\n  \
                 [32, 32, 32, {:e}],\n  [128, 64, 64, {:e}],\n]\n",
                share * rate,
                share * rate * 2.0
            );
        }
    }
    for op in links {
        text += &format!(
            "\n[[link]]\ntransport = \"shm\"\nop = \"{op}\"\nranks = 2\nsamples = [\n  [1024, 2e-6],\n  [1048576, 1e-4],\n]\n"
        );
    }
    text
}

fn lab() -> Lab {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("runs")).expect("a folder");
    lab.write("runs/machine.toml", calibration());
    lab
}

/// Keys of a mixture, whose experts are whole chunks of the gradient norm on either of two ranks.
const EXPERTS: &str = "--set model.experts.count=4 --set model.experts.top_k=2 --set model.experts.ffn=64";

/// The `[layout]` section of a run's own file.
fn layout(lab: &Lab, run: &str) -> String {
    let text = std::fs::read_to_string(lab.path(run).join("run.toml")).expect("a run file");
    let section = text.split("[layout]\n").nth(1).expect("a layout");
    section.split("\n\n").next().unwrap_or_default().to_owned()
}

#[test]
fn an_automatic_layout_is_chosen_kept_and_trains_to_the_same_bits() {
    let lab = lab();
    let args = "--nproc 2 --set layout=auto --set data.cache_dir=cache --set train.eval_every=0";
    let ran = lab.run(&tiny("auto", &format!("{args} --stop-after 3")));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let says: Vec<&str> = ran.err.lines().filter(|l| l.starts_with("layout auto: ")).collect();
    assert!(says[0].contains("layouts priced from runs/machine.toml"), "{}", ran.err);
    assert!(says[1].contains(" takes ") && says[1].contains(" a rank"), "{}", ran.err);
    assert!(says[2].contains("next best is"), "{}", ran.err);
    let chosen = layout(&lab, "auto");
    assert!(!chosen.contains("auto") && chosen.contains("tp = 1"), "{chosen}");

    // Another calibration would choose anew; a run that was begun keeps what it has.
    lab.write("runs/machine.toml", calibration().replace("2e-6", "2e-1").replace("1e-4", "9e-1"));
    let ran = lab.run(&tiny("auto", args));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.err.contains("layout auto: kept from auto: "), "{}", ran.err);
    assert_eq!(layout(&lab, "auto"), chosen);
    lab.write("runs/machine.toml", calibration());

    // The same layout by hand, and the choice made once more.
    let by_hand: String =
        chosen.lines().map(|l| format!("--set layout.{} ", l.replace([' ', '"'], ""))).collect();
    let keys = "--set data.cache_dir=cache --set train.eval_every=0";
    lab.train("hand", &format!("--nproc 2 {keys} {by_hand}"));
    lab.train("again", args);
    assert_eq!(layout(&lab, "again"), chosen, "the same file gives the same choice");
    for other in ["hand", "again"] {
        let difference = ckpt::diff(&lab.newest("auto"), &lab.newest(other)).expect("two checkpoints");
        assert!(difference.bit_equal(), "{other}: {difference:?}");
    }
}

#[test]
fn an_automatic_layout_from_a_run_file_spreads_over_any_ranks() {
    let lab = lab();
    let keys: Vec<String> =
        sets().split("--set ").filter(|k| !k.trim().is_empty()).map(str::to_owned).collect();
    let body: String = keys.iter().map(|k| format!("{}\n", k.trim().replacen('=', " = ", 1))).collect();
    lab.write("run.toml", format!("layout = \"auto\"\n{body}"));
    for ranks in [1, 2, 4] {
        let run = format!("auto-{ranks}");
        lab.ok(&format!("train run.toml --text text.txt --set run.dir={run} --nproc {ranks}"));
        let chosen = layout(&lab, &run);
        let axis = |name: &str| -> usize {
            let line = chosen.lines().find_map(|l| l.strip_prefix(&format!("{name} = ")));
            line.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no {name} in {chosen}"))
        };
        assert_eq!(axis("dp") * axis("tp") * axis("pp"), ranks, "{chosen}");
        let difference = ckpt::diff(&lab.newest("auto-1"), &lab.newest(&run)).expect("two checkpoints");
        assert!(difference.bit_equal(), "{ranks}: {difference:?}");
    }
}

#[test]
fn a_traced_run_is_joined_with_its_prediction_op_by_op() {
    let lab = lab();
    for (run, keys) in [
        ("alone", ""),
        ("dp", "--nproc 2"),
        ("zero1", "--nproc 2 --set layout.zero=1"),
        ("zero2", "--nproc 2 --set layout.zero=2"),
        ("zero3", "--nproc 2 --set layout.zero=3"),
        ("tp", "--nproc 2 --set layout.tp=2"),
        ("pp", "--nproc 2 --set layout.pp=2 --set layout.recompute=full"),
        ("both", "--nproc 4 --set layout.pp=2"),
        ("ring", "--nproc 2 --set layout.cp=2"),
        ("heads", "--nproc 2 --set layout.cp=2 --set layout.context=heads"),
        ("experts", &format!("--nproc 2 --set layout.ep=2 {EXPERTS}")),
    ] {
        lab.train(run, &format!("--trace --set data.cache_dir=cache --set train.eval_every=0 {keys}"));
        let report = lab.json(&format!("compare {run} --json"));
        assert_eq!(report["unmatched"], Value::Array(vec![]), "{run}");
        assert_eq!(report["memory_equal"], true, "{run}: {report}");
        assert_eq!(report["predicted_bytes"], report["measured_bytes"], "{run}");
        assert_eq!(report["steps"], 5, "all but the first");
        let ops = report["ops"].as_array().expect("ops");
        assert!(ops.len() > 30, "{run}: {} ops", ops.len());
        for op in ops {
            let seconds = |key: &str| op[key].as_f64().unwrap_or(-1.0);
            assert!(seconds("measured_s") >= 0.0 && seconds("predicted_s") >= 0.0, "{run}: {op}");
            let lost = seconds("measured_s") - seconds("predicted_s");
            assert!((op["lost_s"].as_f64().expect("a number") - lost).abs() < 1e-12, "{run}: {op}");
        }
        for key in ["predicted_step_s", "measured_step_s"] {
            assert!(report[key].as_f64().is_some_and(|s| s > 0.0), "{run}: {key}");
        }
        let talks = report["predicted_comm_s"].as_f64().expect("a number");
        assert_eq!(talks > 0.0, run != "alone", "{run}");
        assert!(lab.ok(&format!("compare {run}")).contains("equal on every rank"), "{run}");
    }
}

#[test]
fn this_machine_is_planned_for_like_a_cluster() {
    let lab = lab();
    let plan = lab.json("plan --cluster this --model tiny --format fp32 --accelerators 2 --json");
    let best = &plan["best"][0];
    assert_eq!((&plan["cluster"], &plan["accelerators"]), (&Value::from("this"), &Value::from(2)));
    assert!(plan["search"]["layouts_priced"].as_u64().is_some_and(|n| n > 10), "{plan}");
    assert!(
        best["step_s"].as_f64().is_some_and(|s| s > 0.0) && best["memory_bytes"].as_u64() > Some(0),
        "{plan}"
    );
    let axis = |name: &str| best["layout"][name].as_u64().expect("an axis");
    assert_eq!(axis("dp") * axis("tp") * axis("pp"), 2, "{best}");
    assert!(lab.ok("plan --cluster this --model tiny --format fp32").contains("layouts priced"));
}

/// Experts may be spread without a bit changing; sequences are cut where nothing else is left.
#[test]
fn an_automatic_layout_spreads_experts_and_cuts_sequences() {
    let lab = lab();
    let keys = format!("{EXPERTS} --set layout=auto --set data.cache_dir=cache --set train.eval_every=0");
    lab.train("one", &keys);
    lab.train("two", &format!("--nproc 2 {keys}"));
    let difference = ckpt::diff(&lab.newest("one"), &lab.newest("two")).expect("two checkpoints");
    assert!(difference.bit_equal(), "{difference:?}");

    let plan = |args: &str| lab.json(&format!("plan --cluster this --model two/run.toml --json {args}"));
    let (even, chosen) =
        (plan("--accelerators 2 --keep 99"), plan("--accelerators 2 --experts-of two --keep 99"));
    let spread = |plan: &Value| -> Vec<(Value, f64)> {
        let best = plan["best"].as_array().expect("layouts").iter();
        best.filter(|c| c["layout"]["ep"] == 2)
            .map(|c| (c["layout"].clone(), c["step_s"].as_f64().expect("seconds")))
            .collect()
    };
    assert!(even["assumptions"].to_string().contains("every expert is chosen as often"), "{even}");
    assert!(chosen["assumptions"].to_string().contains("experts are chosen as in two"), "{chosen}");
    for (layout, even_s) in spread(&even) {
        let found = spread(&chosen).into_iter().find(|(l, _)| *l == layout);
        assert!(
            found.is_none_or(|(_, s)| s > even_s),
            "some rank has more to do than an even share: {layout}"
        );
    }

    let cut = "--nproc 2 --set layout=auto --set batch.sequences=1 --set model.layers=1 --set model.heads=3 \
               --set model.kv_heads=3 --set model.head_dim=8";
    let ran = lab.run(&tiny("cut", cut));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(layout(&lab, "cut").contains("cp = 2"), "{}", ran.err);
    assert!(ran.err.contains("only cuts of products or sequences fit"), "{}", ran.err);
}

#[test]
fn counts_of_experts_come_from_a_run_of_the_same_model() {
    let lab = lab();
    lab.train("plain", "");
    lab.train("mixture", EXPERTS);
    let check = |args: &str, first: &str, hint: &str| {
        let ran = lab.run(&format!("plan {args}"));
        assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
        assert!(ran.err.contains(&format!("error: {first}")), "{args}\n{}", ran.err);
        assert!(ran.err.contains(&format!("hint: {hint}")), "{args}\n{}", ran.err);
    };
    let this = "--cluster this --model mixture/run.toml --experts-of";
    lab.ok(&format!("plan {this} mixture"));
    // The module that predicts one token more has experts too.
    lab.train("ahead", &format!("{EXPERTS} --set model.mtp.depth=1"));
    lab.ok("plan --cluster this --model ahead/run.toml --experts-of ahead");
    check(
        &format!("{this} plain"),
        "no counts of experts are recorded in plain",
        "give the directory of a run",
    );
    check(&format!("{this} none"), "read run directory none", "give the directory of a run");
    let other = "--cluster this --model plain/run.toml --experts-of mixture";
    check(other, "mixture has other layers or experts than", "give a run of the same model");
    let cluster = "--cluster dgx-h100 --model tiny --experts-of mixture";
    check(cluster, "--experts-of with --cluster dgx-h100", "leave --experts-of out");
}

#[test]
fn what_a_calibration_lacks_of_a_model_is_measured() {
    let lab = lab();
    let latents = "--set model.latent.kv_rank=16 --set model.latent.nope_dim=8 --set model.latent.rope_dim=8 \
                   --set model.latent.value_dim=8 --set model.kv_heads=2";
    let args = format!("--nproc 2 --set layout=auto {latents} --set train.eval_every=0");
    let ran = lab.run(&tiny("latent", &args));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let lacks = ran.err.lines().find(|l| l.contains("knows nothing of ")).unwrap_or_default();
    assert!(lacks.starts_with("runs/machine.toml ") && lacks.contains("latent_norm"), "{}", ran.err);
    let text = std::fs::read_to_string(lab.path("runs/machine.toml")).expect("a calibration");
    assert!(text.contains("kind = \"latent_norm\""), "{text}");
    assert!(text.contains("host = \"lab\"") && text.contains("2.0000e10"), "what was there stays: {text}");
    // Known from now on.
    let ran = lab.run(&tiny("again", &args));
    assert!(ran.code == Some(0) && !ran.err.contains("knows nothing"), "{}", ran.err);
}

#[test]
fn a_run_file_says_how_it_stores_and_flags_go_over_it() {
    let lab = lab();
    let keys: String =
        sets().replace("--set ", "").split_whitespace().map(|k| k.replacen('=', " = ", 1) + "\n").collect();
    lab.write("run.toml", format!("{keys}optim.kind = \"muon\"\n"));
    let plan = |more: &str| {
        lab.json(&format!("plan --cluster this --model run.toml --accelerators 2 --json {more}"))
    };
    let check = |more: &str, format: &str, sequences: u64| {
        let plan = plan(more);
        assert_eq!(
            (&plan["format"], &plan["sequences"]),
            (&format.into(), &sequences.into()),
            "{more}: {plan}"
        );
    };
    check("", "f32", 4);
    check("--format bf16 --sequences 8", "bf16", 8);
    check("--batch 512 --optimizer adamw", "f32", 16);
}

#[test]
fn flags_that_this_machines_planner_does_not_ask_are_refused() {
    let lab = lab();
    for flag in ["--tokens 1T", "--layout tp=2", "--recovery elastic", "--price 2", "--software torchtitan"] {
        let name = flag.split(' ').next().unwrap_or_default();
        let ran = lab.run(&format!("plan --cluster this --model tiny {flag}"));
        assert_eq!(ran.code, Some(2), "{flag}: {}", ran.err);
        assert!(ran.err.contains(&format!("error: {name} with --cluster this")), "{flag}: {}", ran.err);
        assert!(ran.err.contains(&format!("hint: leave out {name}")), "{flag}: {}", ran.err);
    }
}

#[test]
fn a_calibration_that_cannot_be_used_is_refused() {
    let lab = lab();
    let good = calibration();
    let check = |args: &str, first: &str, hint: &str| {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
        let errors: Vec<&str> = ran.err.lines().filter(|l| l.starts_with("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(first),
            "{args}\nfound    {errors:?}\nexpected {first}"
        );
        assert!(ran.err.contains(&format!("hint: {hint}")), "{}", ran.err);
        assert!(!ran.err.contains("panicked") && !lab.path("bad").exists(), "{}", ran.err);
    };
    let auto = tiny("bad", "--nproc 2 --set layout=auto");
    for (from, to, first) in [
        ("version = 1", "version = 9", "runs/machine.toml:1: version, expected 1"),
        ("2e10", "nan", "runs/machine.toml:22: rate of a sample is NaN"),
        ("2e10", "0.0", "runs/machine.toml:22: rate of a sample is 0, expected a finite number above 0"),
        ("2e10", "-2e10", "runs/machine.toml:22: rate of a sample is -20000000000"),
        ("cores = 2", "cores = none", "runs/machine.toml:8: "),
    ] {
        lab.write("runs/machine.toml", good.replacen(from, to, 1));
        check(&auto, first, "measure this machine again: phalanx bench machine");
        check("plan --cluster this --model tiny", first, "measure this machine again: phalanx bench machine");
    }
    lab.write("runs/machine.toml", &good[..good.len() / 2]);
    check(&auto, "runs/machine.toml:", "measure this machine again: phalanx bench machine");
    lab.write("runs/machine.toml", &good);
    check(
        &tiny("bad", "--nproc 2 --set layout=auto --set layout.dp=2"),
        "contradicts layout.auto",
        "leave out layout.dp",
    );
    check(&tiny("bad", "--nproc 3 --set layout=auto"), "no layout of 3 ranks trains", "values of layout");
    check("program show --set layout=auto", "chosen when training starts", "set layout keys instead");
    check("bench step --set layout=auto", "chosen when training starts", "set layout keys instead");
    check(
        "plan --cluster this --model tiny --explain",
        "--explain with --cluster this",
        "leave out --explain",
    );
    check("plan --cluster this --model tiny --format fp8", "format fp8", "give --format bf16");

    lab.train("plain", "");
    check("compare plain", "no ops are recorded in plain", "train with --trace");
    check("compare none", "read none/run.toml", "give the directory of a run");
    lab.train("traced", "--trace");
    check(
        "compare traced --machine none.toml",
        "read none.toml",
        "measure this machine first: phalanx bench machine",
    );
    check(
        "plan --cluster this --model tiny --machine none.toml",
        "read none.toml",
        "measure this machine first",
    );
    check("bench predict --machine none.toml", "read none.toml", "measure this machine first");

    // Ranks that another launcher started do not measure each other's noise.
    std::fs::remove_file(lab.path("runs/machine.toml")).expect("the file was there");
    let ran = lab.run(&format!(
        "launch --standalone --nproc-per-node 2 --no-python {} {}",
        env!("CARGO_BIN_EXE_phalanx"),
        tiny("bad", "--set layout=auto")
    ));
    assert!(ran.code != Some(0) && ran.err.contains("phalanx bench machine"), "{:?} {}", ran.code, ran.err);
}
