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
        ("[[flap]]\nrank = 1\nfactor = 0.5\nfor_s = 1", "no every_s"),
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
    refused("simulate --trace none.parquet", "none.parquet");
    lab.write("cut.parquet", b"PAR1 and no more");
    refused("simulate --trace cut.parquet", "cut.parquet: ");
    refused(&format!("{SMALL} --as-if luck=2"), "--as-if luck=2");
    refused(&format!("{SMALL} --ranks 64"), "--ranks 64: 64 is no rank");
    refused(&format!("{SMALL} --ranks 3"), "--ranks without --perfetto or --html");
    refused(&format!("{SMALL} --recovery elastic"), "--recovery, and nothing fails");
    refused(&format!("{SMALL} --seeds 3"), "--seeds, and nothing fails");
    refused("simulate --trace ops.csv --recovery elastic", "--recovery");
    refused(&format!("{SMALL} --spares 1"), "without --days");
    refused(&format!("{SMALL} --days 3 --min-nodes 9"), "--min-nodes 9");
    refused(&format!("{SMALL} --perfetto none/trace.json"), "--perfetto");
}

/// What is in a step that is not played has no cost that is known: it is said, never priced at nothing.
#[test]
fn what_is_outside_the_steps_played_is_said() {
    let lab = Lab::new();
    lab.write("late.toml", "[[slow]]\nrank = 3\nfactor = 2\n[[pause]]\nrank = 0\nfor_s = 3\nstep = 3\n[[fail]]\nnode = 1\nstep = 7\n");
    let play = |more: &str| lab.json(&format!("{SMALL} --scenario late.toml --json {more}"));
    let names = |json: &serde_json::Value, key: &str| -> Vec<String> {
        let all = json[key].as_array().expect("a list").iter();
        all.map(|of| of["of"].as_str().expect("a name").to_owned()).collect()
    };
    let check = |more: &str, costs: &[&str], not_played: &[&str]| {
        let json = play(more);
        assert_eq!(names(&json, "costs"), costs, "{more}: {json}");
        assert_eq!(names(&json, "not_played"), not_played, "{more}: {json}");
        let priced = json["costs"].as_array().expect("a list").iter();
        assert!(priced.clone().all(|cost| cost["seconds"].as_f64() > Some(0.0)), "{more}: {json}");
    };
    check("", &["slow 1"], &["pause 1", "fail 1"]);
    check("--steps 2", &["slow 1"], &["pause 1", "fail 1"]);
    check("--steps 3", &["slow 1", "pause 1"], &["fail 1"]);
    check("--steps 7", &["slow 1", "pause 1"], &[]);
    check("--days 3", &["slow 1"], &["pause 1"]);
    let text = lab.ok(&format!("{SMALL} --scenario late.toml"));
    assert!(
        text.contains("pause 1    not played: it is in step 3, after the 1 played; --steps 3 plays it"),
        "{text}"
    );
    assert_eq!(play("--days 3")["not_played"][0]["played_by"], "--steps 3 without --days");
}

/// Published runs are played beside the closed form, and a table that says nothing is refused.
#[test]
fn published_runs_are_played_too() {
    let lab = Lab::new();
    let header = "id,source,model name,layers,hidden,heads,vocab,seq_len,global_batch,micro_batch,accelerator,n_accel,tp,pp,dp,recompute,precision,step_time_s";
    let row = "a,here,GPT 22B,48,6144,64,51200,2048,4,4,NVIDIA A100-SXM4-80GB,8,8,1,1,full,fp16,1.42";
    lab.write("runs.csv", format!("{header}\n{row}\n"));
    let json = lab.json("validate runs.csv --by simulate --json");
    assert_eq!((&json["rows"][0]["contention"], &json["shares"][0]["rows"]), (&"nothing".into(), &1.into()));
    let differs = json["rows"][0]["differs"].as_f64().expect("a share");
    assert!(differs.abs() < 0.01, "{json}");
    assert!(lab.ok("validate runs.csv --by simulate").contains("1 rows estimated and played"));
    lab.write("none.csv", format!("{header}\n"));
    for args in [
        "validate none.csv --by simulate",
        "validate none.csv --fit out.toml",
        "validate runs.csv --by simulate --half",
    ] {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
        assert!(!lab.path("out.toml").exists(), "{args}");
    }
}

/// What cannot run is not rehearsed without a word.
#[test]
fn a_layout_that_does_not_fit_is_said() {
    let lab = Lab::new();
    let ran = lab.run(
        "simulate --model llama3-70b --cluster dgx-h100 --accelerators 8 --layout tp=1,micro_batch=1 --sequences 8",
    );
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.err.contains("does not fit") && ran.err.contains("played all the same"), "{}", ran.err);
    let spent = ran.out.lines().find(|l| l.starts_with("rank ")).unwrap_or_default();
    assert!(spent[11..].starts_with("compute "), "{}", ran.out);
}

#[test]
fn a_cluster_without_failure_rates_is_said_and_lives_on() {
    let lab = Lab::new();
    let args = "simulate --model llama3-8b --cluster dgx-h100 --accelerators 8 --layout tp=8,micro_batch=1 --days 3 --json";
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.err.contains("no failure rates"), "{}", ran.err);
}

/// What the step waited for, what if, what ranks did: one answer as JSON, text, page and trace.
#[test]
fn answers_agree_wherever_they_are_written() {
    let lab = Lab::new();
    lab.write("storm.toml", "[[slow]]\nrank = 13\nfactor = 2\n[[link]]\nrank = 40\nfactor = 0.05\n");
    let args = format!(
        "{SMALL} --scenario storm.toml --as-if even-ranks --as-if good-links --as-if fabric=2 --ranks 0,13 \
         --perfetto trace.json --html step.html --json"
    );
    let json = lab.json(&args);
    let step_s = json["step_s"].as_f64().expect("seconds");
    let parts = json["critical_path"]["by_what"].as_array().expect("a list");
    let sum: f64 = parts.iter().map(|p| p["seconds"].as_f64().expect("seconds")).sum();
    assert!((sum / step_s - 1.0).abs() < 1e-9, "{sum} of {step_s}");
    assert_eq!(json["critical_path"]["by_rank"][0]["rank"], 13, "{json}");
    let others: Vec<f64> = json["as_if"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|o| o["step_s"].as_f64().expect("seconds"))
        .collect();
    assert_eq!(others.len(), 3);
    // The slow rank alone makes the step: without it, it is much faster, and a faster fabric helps little.
    assert!(others[0] < 0.8 * step_s && others[1] <= step_s && others[2] <= step_s, "{others:?} of {step_s}");
    let trace: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(lab.path("trace.json")).expect("a trace"))
            .expect("JSON");
    let ranks: std::collections::BTreeSet<u64> =
        trace["traceEvents"].as_array().expect("events").iter().filter_map(|e| e["pid"].as_u64()).collect();
    assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [0, 13]);
    let page = std::fs::read_to_string(lab.path("step.html")).expect("a page");
    for figure in ["path", "path-ranks", "spent", "ranks", "costs", "as-if"] {
        assert!(page.contains(&format!("<figure id=\"{figure}\"")), "no figure {figure}");
    }
    assert!(
        page.contains("rank 13") && !page.contains("src=") && !page.contains("https://"),
        "self-contained"
    );
}

/// Ranks that keep their processes lose less than those that start over, the more so with spares.
#[test]
fn recovery_follows_the_state_machines_of_the_launcher() {
    let lab = Lab::new();
    let large = "simulate --model llama3-405b --cluster meta-24k-roce --accelerators 16384 --layout tp=8,pp=16,micro_batch=1 --days 54 --seeds 5 --json";
    let restart = lab.json(large);
    let elastic = lab.json(&format!("{large} --recovery elastic"));
    let goodput = |json: &serde_json::Value| json["goodput"].as_f64().expect("a share");
    assert!(goodput(&elastic) > goodput(&restart), "{elastic}");
    assert_eq!(restart["interruptions"], elastic["interruptions"]);
    // Silent nodes are known by the keep-alive time of the rendezvous.
    let losses = elastic["recovery"]["losses"].as_array().expect("losses");
    let silent = losses.iter().find(|l| l["loss"] == "node").expect("nodes fall silent");
    assert!((10.0..15.0).contains(&silent["detect_s"].as_f64().expect("seconds")), "{silent}");
    let with =
        |spares: u64| lab.json(&format!("{large} --recovery elastic --spares {spares} --min-nodes 1900"));
    let (none, many) = (with(0), with(100));
    assert!(goodput(&none) < goodput(&many), "{none} {many}");
    assert!(
        none["lives"]["fewer"]["mean"].as_f64() > Some(0.0)
            && many["lives"]["fewer"]["mean"].as_f64() < Some(1e-9)
    );
    let stiff = lab.json(&format!("{large} --spares 0"));
    assert!(stiff["lives"]["repairs"]["mean"].as_f64() > Some(0.1), "{stiff}");
}

/// A run of our own, and profiles of PyTorch, replayed like a table of ops.
#[test]
fn journals_and_profiles_are_traces_too() {
    let lab = Lab::new();
    lab.train("run", "--nproc 4 --trace --set layout.pp=2 --set layout.dp=2");
    let json = lab.json("simulate --trace run --json");
    assert_eq!(json["workers"], 4);
    assert!(json["slowdown"].as_f64().is_some_and(|s| (0.9..100.0).contains(&s)), "{json}");
    assert_eq!(json["by_worker"].as_array().map(Vec::len), Some(2));
    assert_eq!(json["by_stage"].as_array().map(Vec::len), Some(2));
    // Rank 1 computes twice as long in front of what all wait for.
    std::fs::create_dir(lab.path("prof")).expect("a directory");
    for rank in 0..2 {
        lab.write(&format!("prof/rank{rank}.json"), profile(rank, 2));
    }
    let json = lab.json("simulate --trace prof --json --html blame.html");
    assert_eq!(json["by_worker"][0]["dp_rank"], 1, "{json}");
    // Of 100 and 200 us the mean is 150: the step takes 200 + 10 where it should take 150 + 10.
    let slowdown = json["slowdown"].as_f64().expect("a factor");
    assert!((slowdown - 210.0 / 160.0).abs() < 0.01, "{json}");
    assert!(
        std::fs::read_to_string(lab.path("blame.html")).expect("a page").contains("<figure id=\"workers\"")
    );
    lab.write("prof/rank1.json", profile(1, 1));
    let ran = lab.run("simulate --trace prof");
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("the trace has a hole"), "{}", ran.err);
    std::fs::remove_file(lab.path("prof/rank0.json")).expect("remove");
    assert!(lab.run("simulate --trace prof").err.contains("rank 1, expected rank 0"));
}

/// One rank's profile of two steps, with `collectives` in each.
fn profile(rank: u64, collectives: u64) -> String {
    let mut events = Vec::new();
    for step in 0..2u64 {
        let origin = 10_000 * step;
        events.push(format!(
            r#"{{"ph":"X","cat":"user_annotation","name":"ProfilerStep#{step}","ts":{origin},"dur":1000}}"#
        ));
        let compute = 100 * (rank + 1);
        events.push(format!(
            r#"{{"ph":"X","cat":"kernel","name":"gemm","ts":{origin},"dur":{compute},"tid":7}}"#
        ));
        for c in 0..collectives {
            let (ts, end) =
                if c == 0 { (origin + compute, origin + 210) } else { (origin + 300, origin + 301) };
            events.push(format!(
                r#"{{"ph":"X","cat":"kernel","name":"ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)","ts":{ts},"dur":{},"args":{{"Group size":2}}}}"#,
                end - ts
            ));
        }
    }
    format!(
        r#"{{"distributedInfo":{{"backend":"nccl","rank":{rank},"world_size":2}},"traceEvents":[{}]}}"#,
        events.join(",")
    )
}

/// RSC's mean times to failure, 7.9 hours on 1,024 GPUs and 47.7 days on 8, which its 21 to 27 failures in a thousand
/// node-days span (Kokolis et al. 2025).
#[test]
fn jobs_fail_as_often_as_published_ones() {
    let lab = Lab::new();
    let platform = "[platform.all-causes]\ntitle = \"All causes\"\nnode = \"dgx-a100\"\nfailure = \"rsc-jobs\"\n\
                    nodes = { value = 2000, unit = \"nodes\", source = \"choice\", date = \"2026-11\" }\n";
    lab.write("causes.toml", platform);
    let between_h = |accelerators: usize, days: f64| {
        let json = lab.json(&format!(
            "simulate --model gpt3-1.3b --cluster all-causes --catalog causes.toml --accelerators {accelerators} \
             --sequences 1024 --layout micro_batch=1 --days {days} --seeds 40 --json"
        ));
        24.0 * days / json["interruptions"].as_f64().expect("a count")
    };
    let large = between_h(1024, 100.0);
    assert!((large / 7.9 - 1.0).abs() < 0.03, "{large} h on 1,024");
    let small = between_h(8, 20_000.0) / 24.0;
    assert!((1000.0 / 27.0..=1000.0 / 20.9).contains(&small), "{small} days on 8");
}
