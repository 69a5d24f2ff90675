//! One line, one hint, exit code 2.

use crate::check;
use crate::common::{Lab, tiny};

#[test]
fn numbers_of_threads_are_bounded_before_one_is_started() {
    let lab = Lab::new();
    check(&lab, &tiny("bad", "--set run.threads=65536"), 2, "run.threads = 65536");
    for args in [
        "generate bad --threads 20000",
        "bench step --threads 100000",
        "data build text.txt -o s --threads 9999",
        "replay none --step 1 --threads 1000000",
    ] {
        check(&lab, args, 2, "expected 0 to 1024");
    }
    check(&lab, "generate none --threads 8", 2, "read none/run.toml");
}

#[test]
fn nonsense_is_refused_before_anything_is_done() {
    let lab = Lab::new();
    let bad = |args: &str, what: &str| check(&lab, args, 2, what);
    bad(&tiny("bad", "--min-nproc 4 --nproc 2"), "--min-nproc 4, expected 1 to the 2 of --nproc");
    bad(&tiny("bad", "--stop-after 500"), "--stop-after 500 is beyond train.steps = 6");
    bad("bench step --steps 0", "--steps 0");
    bad("bench step --simd neon", "--simd neon, expected avx512, avx2 or scalar");
    bad("export bad out --max-shard-bytes 0", "--max-shard-bytes 0");
    bad("launch --node-rank 5 true", "--node-rank=5: expected a rank below --nnodes=1");
    bad("launch --local-ranks-filter 9 true", "--local-ranks-filter=9: expected local ranks below 1");
    bad("dash . --machine none.toml", "read none.toml");
    bad("doctor --cluster nope", "nope");
    let ranks = "--set layout.dp=65536 --set batch.sequences=65536";
    bad(&format!("program check {ranks}"), "a layout of 65536 ranks, of which at most 16384 are checked");
    let muon = "plan --model llama3-8b --cluster dgx-h100 --accelerators 8 --layout zero-1 --optimizer muon";
    bad(&format!("{muon} --emit megatron"), "megatron");
    let header = "id,model name,params_b,layers,hidden,ffn_hidden,heads,kv_heads,vocab,seq_len,global_batch,micro_batch,accelerator,n_accel,tp,pp,step_time_s";
    lab.write(
        "runs.csv",
        format!("{header}\na,m,8,32,4096,14336,32,8,128256,8192,256,1000000,h100,8,1,1,5\n"),
    );
    bad("validate runs.csv", "micro_batch = 1000000 is more than the 256 sequences");
    for (sweep, what) in
        [("optim.lr=1e-3,xx", "optim.lr = \"xx\""), ("nosuch.key=1,2", "unknown key nosuch.key")]
    {
        bad(&format!("launch slurm --sweep {sweep} -- train"), what);
        assert!(!lab.path("phalanx.sbatch").exists(), "{sweep}");
    }
}

#[test]
fn flags_that_would_not_count_are_refused() {
    let lab = Lab::new();
    let bad = |args: &str, what: &str| check(&lab, args, 2, what);
    bad(&tiny("bad", "--min-nproc 2"), "--nproc");
    bad(&tiny("bad", "--max-restarts 2"), "--nproc");
    bad(&tiny("bad", "--set data.text=other.txt"), "--text beside --set data.text=other.txt");
    bad(
        "program show --preset tiny --set model.preset=tiny-gpt2",
        "--preset beside --set model.preset=tiny-gpt2",
    );
    let verify = "--nproc 2 --verify-every 2 --set run.verify_every=3";
    bad(&tiny("bad", verify), "--verify-every beside --set run.verify_every=3");
    assert!(!lab.path("bad").exists());
    // A flag goes over a run file.
    lab.write("other.txt", "");
    lab.write("run.toml", "[data]\ntext = \"other.txt\"\n");
    let flags = tiny("r", "").replacen("train", "train run.toml", 1);
    lab.ok(&flags);
    let run = std::fs::read_to_string(lab.path("r/run.toml")).expect("a run file");
    assert!(run.contains("text = [\"text.txt\"]"), "{run}");
    bad(
        "plan --model tiny --cluster dgx-h100 --machine mine.toml",
        "--machine mine.toml counts only with --cluster this",
    );
    bad("plan --model llama3-8b --cluster dgx-h100 --recovery elastic", "--tokens does not say how long");
}

#[test]
fn what_cannot_begin_anew_leaves_the_run_where_it_is() {
    let lab = Lab::new();
    lab.ok(&tiny("r", ""));
    let documents = "--fresh --set model.position=learned --set data.attend=documents";
    check(&lab, &tiny("r", documents), 2, "learned positions");
    assert!(lab.path("r/checkpoints").exists());
}

#[test]
fn a_gpu_that_is_not_there_is_told_of_before_data_is_prepared() {
    let lab = Lab::new();
    if lab.json("devices --json")["libraries"]["driver"]["error"].is_null() {
        eprintln!("skipped: there is a driver here");
        return;
    }
    for ranks in ["", "--nproc 2"] {
        check(
            &lab,
            &tiny("gpu", &format!("--set run.device=cuda {ranks}")),
            2,
            "run.device = \"cuda\": driver not",
        );
        assert!(!lab.path("cache").exists() && !lab.path("gpu/data.json").exists(), "{ranks}");
    }
}

#[test]
fn nccl_is_not_for_ranks_on_the_cpu() {
    let lab = Lab::new();
    for ranks in ["", "--nproc 2"] {
        let args = tiny("nccl", &format!("--set run.device=cpu --set run.messages=nccl {ranks}"));
        check(&lab, &args, 2, "run.messages = \"nccl\", but ranks compute on the CPU");
        assert!(!lab.path("cache").exists() && !lab.path("nccl/data.json").exists(), "{ranks}");
    }
}

#[test]
fn a_file_that_cannot_be_written_is_told_of_before_the_work_for_it() {
    let lab = Lab::new();
    lab.write("file", "");
    check(&lab, "bench machine -o file/machine.toml", 2, "file");
    let plan = "plan --model llama3-8b --cluster dgx-h100 --accelerators 8";
    check(&lab, &format!("{plan} --rank-map none/ranks.csv"), 2, "none/ranks.csv");
}

#[test]
fn every_refusal_has_the_same_shape() {
    let lab = Lab::new();
    let bad = |args: &str, what: &str| check(&lab, args, 2, what);
    bad("alive none", "read run directory none");
    bad("bench collectives --ranks 0", "--ranks 0");
    bad("bench collectives --transport zz", "--transport zz");
    bad("ckpt ls nonex", "nonex: no such directory");
    bad("top", "required arguments were not provided: <RUN_DIR>");
    bad("train --stpes 3", "unexpected argument '--stpes' found");
    bad("tarin", "unrecognized subcommand 'tarin'");
    bad("train --nproc x", "invalid value 'x' for '--nproc <N>'");
    bad("plan --model llama3-8b --cluster dgx-h100 --tokens -1T", "--tokens -1T");
    bad("launch slurm --nodes", "--nodes");
    for flag in
        ["nproc-per-node 0", "nnodes 0", "node-rank x", "master-port x", "max-restarts x", "redirects 9"]
    {
        bad(&format!("launch --{flag} true"), &format!("--{}", flag.replace(' ', "=")));
    }
    let ran = lab
        .command(&tiny("bad", ""))
        .envs([("RANK", "abc"), ("WORLD_SIZE", "2")])
        .output()
        .expect("start the program");
    let err = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.code() == Some(2) && err.contains("RANK=abc") && err.contains("\nhint: "), "{err}");
    assert!(lab.run("launch slurm --help").out.contains("Usage: phalanx launch slurm"));
}

#[test]
fn help_that_nobody_can_read_is_a_failure() {
    let lab = Lab::new();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let ran = lab.command("train --help").stdout(full).output().expect("start the program");
    assert_eq!(ran.status.code(), Some(1), "{}", String::from_utf8_lossy(&ran.stderr));
}

#[test]
fn a_launcher_whose_workers_all_refuse_their_input_refuses_too() {
    let lab = Lab::new();
    lab.write("two.sh", "exit 2");
    lab.write("one.sh", "exit 1");
    assert_eq!(lab.run("launch sh two.sh").code, Some(2));
    assert_eq!(lab.run("launch sh one.sh").code, Some(1));
}

#[test]
fn the_tiny_preset_trains_with_one_more_key() {
    let lab = Lab::new();
    let tiny = "train --set model.preset=tiny --set run.dir=bad --text text.txt --set train.steps=1";
    check(&lab, tiny, 2, "expected at most the vocabulary of 96 of tiny");
    assert!(lab.run(tiny).err.contains("hint: set model.vocab=257"));
    lab.ok(&format!("{} --set model.vocab=257", tiny.replace("bad", "good")));
}

#[test]
fn what_another_model_has_is_named_key_by_key() {
    let lab = Lab::new();
    lab.train("r", "");
    check(
        &lab,
        &tiny("new", "--init r --set model.layers=3"),
        2,
        "is not the model of this run: model.layers = 3, was 2",
    );
    let wide = lab.run(&tiny("wide", "--set model.window.tokens=100000"));
    assert!(
        wide.code == Some(0) && wide.err.contains("model.window.tokens = 100000 bounds nothing"),
        "{}",
        wide.err
    );
}
