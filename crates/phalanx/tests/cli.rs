//! The program as people meet it: trains, stops, resumes, spreads over ranks, refuses bad input.

mod accidents;
mod clusters;
mod common;
mod mpi;
mod economy;
mod owner;
mod planner;
mod recipes;
mod rehearsal;
mod serving;
mod stores;
mod strangers;
mod survival;
mod report;
mod trouble;
mod watching;

use std::fs;

use common::{Lab, Started, losses, sets, tiny};
use rustix::process::Signal;

#[test]
fn every_step_line_shows_its_loss() {
    let lab = Lab::new();
    let found = losses(&lab.train("run", ""));
    assert_eq!(found.len(), 6);
    assert!((found[0] - 300f64.ln()).abs() < 0.2, "a random model knows nothing: {found:?}");
    assert!(found[5] < found[0], "it learns: {found:?}");
    let again = lab.run(&tiny("run", ""));
    assert!(again.err.contains("all 6 steps were done before"), "{}", again.err);
}

#[test]
fn a_run_that_was_stopped_ends_as_if_it_had_not_been() {
    let lab = Lab::new();
    let args = "--set train.steps=80 --set checkpoint.keep=0 --set train.eval_every=0";
    lab.train("whole", args);
    let expected = lab.files(&lab.newest("whole"));

    lab.train("asked", &format!("{args} --stop-after 5"));
    lab.train("asked", args);
    assert_eq!(lab.files(&lab.newest("asked")), expected, "--stop-after");

    for (signal, code) in [(Signal::KILL, None), (Signal::INT, Some(130)), (Signal::TERM, Some(130))] {
        let run = format!("signal-{}", signal.as_raw());
        // Its stdout is read no further than step 5, so it cannot have reached the end.
        let mut started = lab.start(&tiny(&run, args));
        started.wait_for("step 5/");
        Started::signal(started.child.id() as i32, signal);
        let (status, err) = started.end();
        assert_eq!(status.code(), code, "{signal:?}: {err}");
        assert!(lab.newest(&run) < lab.path(&run).join("checkpoints/step-00000080"));
        lab.train(&run, args);
        assert_eq!(lab.files(&lab.newest(&run)), expected, "{signal:?}");
    }
}

#[test]
fn layouts_end_in_the_same_bits() {
    let lab = Lab::new();
    let args = "--set data.cache_dir=cache --set train.eval_every=0";
    let expected = losses(&lab.train("one", args));
    let check = |run: &str, layout: &str| {
        let found = losses(&lab.train(run, &format!("{args} {layout}")));
        let difference = ckpt::diff(&lab.newest("one"), &lab.newest(run)).expect("two checkpoints");
        assert!(difference.bit_equal(), "{layout}: {difference:?}");
        assert_eq!(found, expected, "{layout}");
    };
    check("dp", "--nproc 2");
    check("pp", "--nproc 2 --set layout.pp=2");
    check("zero", "--nproc 4 --set layout.zero=3");
    check("micro", "--set layout.micro_batch=4");

    // A run may go on under another layout.
    lab.train("moved", &format!("{args} --nproc 2 --stop-after 3"));
    lab.train("moved", &format!("{args} --nproc 4 --set layout.zero=2 --set layout.pp=2"));
    let difference = ckpt::diff(&lab.newest("one"), &lab.newest("moved")).expect("two checkpoints");
    assert!(difference.bit_equal(), "moved: {difference:?}");

    let found = losses(&lab.train("tp", &format!("{args} --nproc 2 --set layout.tp=2")));
    // Printed with four decimals.
    let apart = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(apart < 2e-4, "tp: {found:?} against {expected:?}");
}

#[test]
fn a_killed_rank_ends_the_others_with_one_message() {
    let lab = Lab::new();
    let mut started = lab.start(&tiny("run", "--nproc 4 --set train.steps=200"));
    started.wait_for("saved ");
    let rank = started.rank(2);
    Started::signal(rank, Signal::KILL);
    let (status, err) = started.end();
    assert_eq!(status.code(), Some(1), "{err}");
    let errors: Vec<&str> = err.lines().filter(|l| l.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{err}");
    assert!(errors[0].contains("rank 2") && errors[0].contains(&rank.to_string()), "{err}");
    assert!(err.contains("\nhint: "), "{err}");
    lab.newest("run");
}

#[test]
fn a_flag_that_contradicts_the_environment_is_refused() {
    let lab = Lab::new();
    let check = |env: &[(&str, &str)], refused: Option<&str>| {
        let mut command = lab.command(&tiny("run", "--nproc 2 --stop-after 1"));
        let output = command.envs(env.iter().copied()).output().expect("start the program");
        let err = String::from_utf8_lossy(&output.stderr);
        match refused {
            None => assert_eq!(output.status.code(), Some(0), "{env:?}: {err}"),
            Some(told) => {
                assert_eq!(output.status.code(), Some(2), "{env:?}: {err}");
                assert!(err.contains("--nproc 2 starts 2 ranks here, but") && err.contains(told), "{err}");
                assert!(err.contains("hint: ") && err.contains("phalanx launch --nnodes"), "{err}");
            }
        }
    };
    check(&[("RANK", "3"), ("WORLD_SIZE", "8")], Some("RANK=3 and WORLD_SIZE=8"));
    check(&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "pod-0")], Some("RANK=0 and WORLD_SIZE=2"));
    let step = [("SLURM_STEP_ID", "0"), ("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")];
    check(
        &[&step[..], &[("SLURM_LOCALID", "1")]].concat(),
        Some("SLURM_PROCID=1 and SLURM_STEP_NUM_TASKS=2"),
    );
    // One pod of one, a batch script, and the shell of salloc.
    check(&[("RANK", "0"), ("WORLD_SIZE", "1")], None);
    check(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_STEP_ID", "4294967291")], None);
    check(&[("SLURM_JOB_ID", "7"), ("SLURM_NTASKS", "4")], None);
}

#[test]
fn a_model_goes_to_hugging_face_and_back() {
    let lab = Lab::new();
    lab.train("run", "");
    lab.ok("export run out-1");
    lab.ok("import out-1 again --set data.vocab_size=300");
    lab.ok("export again out-2");
    let (a, b) = (lab.files(&lab.path("out-1")), lab.files(&lab.path("out-2")));
    let names: Vec<&str> = a.iter().map(|(name, _)| name.as_str()).collect();
    for name in ["config.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert!(a == b, "export, import and export again give other bytes in {names:?}");
}

#[test]
fn an_export_knows_what_its_run_and_the_model_before_it_knew() {
    let lab = Lab::new();
    let read = |path: &str| fs::read_to_string(lab.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    let json = |path: &str| serde_json::from_str::<serde_json::Value>(&read(path)).expect(path);
    // No name of a token says that documents end with it.
    lab.train("run", "--set data.eod=a");
    lab.ok("export run hf");
    for dir in ["run", "hf"] {
        assert_eq!(json(&format!("{dir}/tokenizer_config.json"))["eos_token"], "a", "{dir}");
    }
    let end = json("hf/tokenizer.json")["model"]["vocab"]["a"].clone();
    assert!(end.as_u64() > Some(0), "{end}");
    assert_eq!(json("hf/generation_config.json")["eos_token_id"], end);

    lab.write("hf/chat_template.jinja", "{{ messages }}");
    lab.ok("import hf imp --set data.vocab_size=300");
    lab.train("tuned", "--init imp");
    lab.ok("export tuned out");
    for name in ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(read(&format!("out/{name}")), read(&format!("hf/{name}")), "{name}");
    }
}

#[test]
fn text_is_drawn_by_seed() {
    let lab = Lab::new();
    lab.train("run", "");
    let draw = |args: &str| lab.ok(&format!("generate run --threads 1 -n 20 {args}"));
    assert_eq!(draw("--prompt mesh --seed 7"), draw("--prompt mesh --seed 7"));
    assert_ne!(draw("--tokens 1,2,3 --seed 7"), draw("--tokens 1,2,3 --seed 8"));
    assert_eq!(
        draw("--tokens 1,2,3 --temperature 0 --seed 7"),
        draw("--tokens 1,2,3 --temperature 0 --seed 8")
    );
    assert_eq!(draw("--tokens 1,2,3").split(' ').count(), 20);
    let logits = lab.json("logits run --tokens 1,2,3 --json");
    assert_eq!((logits.as_array().map(Vec::len), logits[0].as_array().map(Vec::len)), (Some(3), Some(300)));
}

/// Replicas fill the ranks that contexts leave over; every sample is drawn once for each copy of the model.
#[test]
fn contexts_over_ranks_train_and_their_ledger_is_exact() {
    let lab = Lab::new();
    lab.train("whole", "");
    lab.train("cut", "--nproc 4 --set layout.cp=2");
    assert_eq!(lab.json("ledger cut --json")["exact"], true);
    let last = |run: &str| {
        let steps = lab.ok(&format!("journal export {run} --csv"));
        let loss = steps.lines().last().and_then(|l| l.split(',').nth(2)).map(str::parse::<f64>);
        loss.expect("a step").expect("a loss")
    };
    let (whole, cut) = (last("whole"), last("cut"));
    assert!((whole / cut - 1.0).abs() < 1e-5, "{whole} by one rank, {cut} by four");
}

#[test]
fn programs_of_all_ranks_are_checked_together() {
    let lab = Lab::new();
    let keys =
        format!("{} --set layout.tp=2 --set layout.pp=2 --set layout.dp=2 --set layout.zero=3", sets());
    let out = lab.ok(&format!("program check {keys}"));
    assert!(out.starts_with("8 programs, ") && out.trim_end().ends_with("every rule holds"), "{out}");
    let found = lab.json(&format!("program check {keys} --json"));
    assert_eq!(found["checked"]["ranks"], 8);
    assert!(found["checked"]["messages"].as_u64() > Some(0), "{found}");
    assert_eq!(found["violations"], serde_json::json!([]));
}

#[test]
fn the_program_shows_the_memory_that_a_step_takes() {
    let lab = Lab::new();
    let keys = format!("{} --set layout.micro_batch=4", sets());
    let program = lab.json(&format!("program show {keys} --json"));
    let step = lab.json(&format!("bench step {keys} --threads 1 --simd scalar --steps 1 --json"));
    let total = &program["memory"]["total"];
    assert!(total.as_u64().is_some_and(|bytes| bytes > 0), "{total}");
    assert_eq!((&step["peak_bytes_placed"], &step["peak_bytes_allocated"]), (total, total));
    for key in ["tokens_per_s", "model_gflops", "gemm_peak_gflops"] {
        assert!(step[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {step}");
    }
}

#[test]
fn a_dataset_is_built_shown_and_trained_on() {
    let lab = Lab::new();
    let built = lab.json("data build text.txt --output set --vocab-size 300 --json");
    let shown = lab.json("data show set --json");
    assert!(built["tokens"].as_u64().is_some_and(|n| n > 1000), "{built}");
    assert_eq!((&built["tokens"], &built["documents"]), (&shown["tokens"], &shown["documents"]));
    assert!(lab.ok("data show set").contains("mesh"), "the first document is shown as text");
    let out = lab.ok(&format!("train {} --set run.dir=run --set data.prefix=set", sets()));
    assert_eq!(losses(&out).len(), 6);
}

#[test]
fn a_trace_has_both_lanes_of_every_rank() {
    let lab = Lab::new();
    lab.train("run", "--nproc 2 --trace");
    lab.ok("trace run --output trace.json");
    let trace: serde_json::Value =
        serde_json::from_slice(&fs::read(lab.path("trace.json")).expect("a trace")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    for rank in 0..2 {
        for lane in ["compute", "comm"] {
            let has = events.iter().any(|e| e["ph"] == "X" && e["pid"] == rank && e["cat"] == lane);
            assert!(has, "no {lane} of rank {rank}");
        }
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let lab = Lab::new();
    let mut started = lab.start(&tiny("run", ""));
    started.wait_for("step 1/");
    let status = started.close();
    assert!(status.success(), "{status}");
    assert!(lab.newest("run").ends_with("step-00000006"));
}

/// Runs `args`, which must fail with `code`, say `first` in its last error line and give a hint, and leave no run.
#[track_caller]
fn check(lab: &Lab, args: &str, code: i32, first: &str) {
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(code), "{args}\n{}{}", ran.out, ran.err);
    let errors: Vec<&str> = ran.err.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "one message: {args}\n{}", ran.err);
    assert!(errors[0].contains(first), "{args}\nfound    {}\nexpected {first}", errors[0]);
    let hints = ran.err.lines().filter(|l| l.starts_with("hint: ")).count();
    assert_eq!(hints, 1, "one hint: {args}\n{}", ran.err);
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
    assert!(!lab.path("bad").exists(), "{args} left a run behind");
}

#[test]
fn bad_input_is_refused_with_a_hint() {
    let lab = Lab::new();
    lab.write("empty.txt", "");
    lab.write("file", "not a directory");
    let bad = |keys: &str, first: &str| {
        let set: String = keys.split_whitespace().map(|k| format!("--set {k} ")).collect();
        check(&lab, &tiny("bad", &set), 2, first);
    };
    bad("train.stepz=3", "unknown key train.stepz");
    bad("train.steps=-3", "train.steps = -3");
    bad("train.steps=0", "train.steps = 0");
    bad("model.layers=0", "model.layers = 0");
    bad("batch.sequences=9000000000000000000", "batch.sequences = 9000000000000000000");
    bad("model.kv_heads=3", "model.kv_heads = 3 does not divide model.heads = 2");
    bad("optim.lr=nan", "optim.lr = nan");
    bad("data.prefix=set", "contradicts data.text");
    bad("data.vocab_size=400", "data.vocab_size = 400");
    bad("data.tokenizer=none.json", "read tokenizer: open none.json");
    bad("layout.micro_batch=3", "layout.micro_batch = 3 does not divide");
    bad("layout.dp=2", "but 1 rank was started");
    bad("batch.sequence=50000 model.max_positions=50000", "one sample of sequence 50000 takes 50001");

    // Refusals before any rank starts, and one message where every rank fails.
    check(&lab, &tiny("bad", "--nproc 0"), 2, "--nproc 0");
    check(
        &lab,
        &tiny("bad", "--nproc 3"),
        2,
        "3 ranks: layout.dp = 3 does not divide the global batch of 4 sequences",
    );
    check(&lab, &tiny("bad", "--nproc 3 --set layout.tp=2"), 2, "but 3 ranks were started");
    let long = "--nproc 2 --set batch.sequence=50000 --set model.max_positions=50000";
    check(&lab, &tiny("bad", long), 2, "one sample of sequence 50000 takes 50001");

    check(&lab, &tiny("bad", "--stop-after 0"), 2, "--stop-after 0");
    check(&lab, &tiny("bad", "--resume"), 2, "nothing to resume");
    check(&lab, &tiny("bad", "--init none"), 2, "read none/run.toml");
    check(&lab, &tiny("file", ""), 2, "run.dir = file: not a directory");
    check(&lab, &format!("train {} --set run.dir=bad --text none.txt", sets()), 2, "open none.txt");
    check(&lab, &format!("train {} --set run.dir=bad --text empty.txt", sets()), 2, "no text in the input");
    check(&lab, "train none.toml", 2, "read none.toml");
    check(&lab, "generate none", 2, "read none/run.toml");
    check(&lab, "export none out", 2, "read none/run.toml");
    check(&lab, "import none bad", 2, "read none/config.json");
    check(&lab, &tiny("bad", "--nproc 8192 --set batch.sequences=8192"), 2, "8192 workers on one node");
    check(&lab, "trace none", 2, "none");
    check(&lab, "data show none", 2, "none.idx");
    check(&lab, "data build none.txt --output set", 2, "open none.txt");
    rustix::fs::mkfifoat(rustix::fs::CWD, lab.path("pipe"), rustix::fs::Mode::RWXU).expect("a pipe");
    check(&lab, "validate pipe", 2, "read pipe: a pipe, expected a file");
    check(&lab, "train pipe", 2, "read pipe: a pipe, expected a file");
    check(&lab, "data build text.txt --output file/set --vocab-size 300", 2, "file");
    check(&lab, "data build text.txt --output set/", 2, "set/: a directory, expected a prefix");
    check(&lab, "data build text.txt --output /dev/null", 2, "a special file, expected a prefix");
    // Why the only input was left out.
    lab.write("cut.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03cut");
    lab.write("latin.txt", b"gr\xfcn");
    check(
        &lab,
        "data build cut.txt.gz --output set",
        2,
        "no text in the input; left out 1 inputs not readable; cut.txt.gz",
    );
    check(&lab, "data build latin.txt --output set", 2, "left out 1 inputs not UTF-8: latin.txt");
    lab.write("nulls.json", "[null, {\"text\": \"a\"}]");
    check(&lab, "data build nulls.json --output set", 2, "nulls.json:1: null, expected an object");
    // A vocabulary takes memory for what the text can fill of it, not for what was asked.
    lab.ok("data build text.txt --output set --vocab-size 99999999999");
}

/// A micro-batch and a degree of data parallelism that nobody set are chosen, whatever comments speak of.
#[test]
fn what_a_run_file_leaves_open_is_filled_and_comments_set_nothing() {
    let lab = Lab::new();
    let check = |name: &str, file: &str, args: &str, micro_batch: usize, dp: usize| {
        lab.write("run-file.toml", file);
        lab.ok(&format!("train run-file.toml {} --text text.txt --set run.dir={name} {args}", sets()));
        let run = fs::read_to_string(lab.path(name).join("run.toml")).expect("the resolved run file");
        for line in [format!("micro_batch = {micro_batch}"), format!("dp = {dp}")] {
            assert!(run.lines().any(|l| l == line), "{line} after {file:?} {args}, in\n{run}");
        }
    };
    check("comment", "# micro_batch = 1, dp = 1\n", "", 4, 1);
    check("file", "[layout]\nmicro_batch = 2\n", "", 2, 1);
    check("flag", "[layout]\nmicro_batch = 2\n", "--set layout.micro_batch=1", 1, 1);
    check("ranks", "[layout]\ndp = 1\n", "--nproc 2", 2, 2);
    check_refused(&lab, "--nproc 2 --set layout.dp=1", "but 2 ranks were started");
    // Ranks come first, then what a layout of so many is held to.
    let experts = "--set model.experts.count=4 --set model.experts.top_k=2 --set model.experts.ffn=64";
    check("experts", "", &format!("--nproc 2 --set layout.ep=2 {experts}"), 2, 2);
    check("shard", "[layout]\nzero = 1\n", "--nproc 2 --set layout.shard=2", 2, 2);
    check_refused(&lab, &format!("--set layout.ep=2 {experts}"), "layout.ep = 2 does not divide the 1 ranks");
    check_refused(
        &lab,
        &format!("--nproc 2 --set layout.ep=4 {experts}"),
        "layout.ep = 4 does not divide the 2 ranks",
    );
    check_refused(&lab, "--nproc 2 --set layout.tp=2 --set layout.ep=2", "layout.ep = 2, but llama-tiny-ref");
    lab.write("run-file.toml", "[layout]\nzero = 1\nmicro_batch = 4\n");
    check_refused(&lab, "--nproc 2", "run-file.toml:3: layout.micro_batch = 4 does not divide");
}

fn check_refused(lab: &Lab, args: &str, first: &str) {
    check(lab, &format!("train run-file.toml {} --text text.txt --set run.dir=no {args}", sets()), 2, first);
}

#[test]
fn what_does_not_train_yet_is_planned_and_refused_by_name() {
    let lab = Lab::new();
    let experts = "--set model.experts.count=4 --set model.experts.top_k=2 --set model.experts.ffn=16";
    check(&lab, &tiny("bad", "--set layout.ep=2"), 2, "layout.ep = 2, but llama-tiny-ref has no experts");

    let sizes = r#""vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768"#;
    fs::create_dir(lab.path("mixtral")).expect("a folder");
    fs::create_dir(lab.path("granite")).expect("a folder");
    let routed = r#""num_local_experts": 8, "num_experts_per_tok": 2"#;
    lab.write("mixtral/config.json", format!(r#"{{ "model_type": "mixtral", {sizes}, {routed} }}"#));
    lab.write("granite/config.json", format!(r#"{{ "model_type": "granitemoe", {sizes}, {routed} }}"#));
    check(&lab, "import granite bad", 2, "architecture granitemoe can be planned, it does not train yet");
    let plan = lab.ok("plan --model mixtral/config.json --cluster dgx-h100 --accelerators 64 --json");
    let found: serde_json::Value = serde_json::from_str(&plan).expect("JSON");
    assert_eq!(found["params"].as_f64(), Some(46_702_792_704.0));
    assert!(found["best"][0]["mfu"].as_f64().is_some_and(|mfu| mfu > 0.1), "{}", found["best"][0]);
    lab.write("mamba.json", r#"{ "model_type": "mamba" }"#);
    check(&lab, "plan --model mamba.json --cluster dgx-h100", 2, "mamba cannot be planned: ");

    let show = format!("program show {} {experts} --set layout.dp=2 --set layout.ep=2", sets());
    let program = lab.ok(&show);
    assert!(program.contains("all_to_all") && program.contains("experts over 2 ranks"), "{program}");
}

#[test]
fn a_tokenizer_too_large_for_the_model_is_refused_before_text_is_read() {
    let lab = Lab::new();
    lab.ok("data build text.txt --output set --vocab-size 290");
    let keys = "--set model.vocab=280 --set data.vocab_size=280 --set data.cache_dir=cache";
    let args = tiny("bad", &format!("{keys} --set data.tokenizer=set.tokenizer.json"));
    check(&lab, &args, 2, "set.tokenizer.json has 290 entries, but the model's vocabulary has 280");
    let err = lab.run(&args).err;
    assert!(err.contains("model.vocab") && err.contains("data.vocab_size"), "{err}");
    assert!(!lab.path("cache").exists(), "nothing was tokenised");
}

#[test]
fn damage_is_noticed_and_nothing_is_overwritten() {
    let lab = Lab::new();
    lab.train("run", "--stop-after 4");
    let checkpoint = lab.newest("run");
    let tensors = checkpoint.join("rank-00000.safetensors");
    let good = fs::read(&tensors).expect("a checkpoint");
    let fails = |args: &str, first: &str| {
        let before = lab.files(&checkpoint);
        check(&lab, args, 2, first);
        assert!(lab.files(&checkpoint) == before && lab.newest("run") == checkpoint, "{args}");
    };

    fails(&tiny("run", "--set train.seed=3"), "train.seed = 3, was 42");
    fails(&tiny("run", "--set model.layers=1"), "model.layers = 1, was 2");

    fs::write(&tensors, &good[..good.len() - 100]).expect("cut it short");
    fails(&tiny("run", ""), "is cut short");
    fails("export run out", "is cut short");
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    fs::write(&tensors, &flipped).expect("flip a bit");
    fails(&tiny("run", ""), "is damaged");
    fails(&tiny("run", "--nproc 2"), "is damaged");
    fails("generate run", "is damaged");
    assert!(!lab.path("out").exists());

    lab.ok("data build text.txt --output set --vocab-size 300");
    let bin = fs::read(lab.path("set.bin")).expect("a dataset");
    let train = format!("train {} --set run.dir=bad --set data.prefix=set", sets());
    lab.write("set.bin", &bin[..1000]);
    check(&lab, &train, 2, "set.bin: cut short: 1000 bytes");
    lab.write("set.bin", bin.iter().map(|_| 0x7f).collect::<Vec<u8>>());
    check(&lab, &train, 2, "has id 32639, but the model's vocabulary has 300 entries");
    lab.write("set.bin", "");
    check(&lab, &train, 2, "set.bin: empty file");
}

#[test]
fn a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint() {
    for ranks in ["", "--nproc 2"] {
        let lab = Lab::new();
        let wild = "--set optim.lr=1e6 --set optim.grad_clip=0 --set checkpoint.every=1 --set train.steps=50";
        let ran = lab.run(&tiny("run", &format!("{wild} {ranks}")));
        assert_eq!(ran.code, Some(1), "{}", ran.err);
        let errors: Vec<&str> = ran.err.lines().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{}", ran.err);
        assert!(
            errors[0].contains("step ") && errors[0].contains("the weights were not updated"),
            "{}",
            ran.err
        );
        assert!(ran.err.contains("hint: resume from the last checkpoint"), "{}", ran.err);
        ckpt::verify(&lab.newest("run")).expect("a sound checkpoint");
    }
}
