//! The planner as people meet it: answers, layouts given and emitted, the catalogue, and input that makes no sense.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::common::Lab;

/// A model and a machine that are searched in a fraction of a second.
const SMALL: &str = "plan --model gpt3-1.3b --cluster dgx-superpod-h100 --accelerators 16 --threads 1";

/// Refused with one error that holds `what`, and a hint unless the flag parser refused it.
pub(crate) fn refused(lab: &Lab, args: &str, code: i32, what: &str) -> String {
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(code), "{args}\n{}{}", ran.out, ran.err);
    assert_eq!(ran.err.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{args}\n{}", ran.err);
    let first = ran.err.lines().find(|l| l.starts_with("error: ")).unwrap_or_default();
    assert!(first.contains(what), "{args}\n{}", ran.err);
    assert!(ran.err.contains("\nhint: ") || ran.err.contains("try '--help'"), "{args}\n{}", ran.err);
    assert!(ran.out.is_empty() && !ran.err.contains("panicked"), "{args}\n{}{}", ran.out, ran.err);
    ran.err
}

#[test]
fn a_run_file_says_batch_format_and_optimizer_and_flags_go_over_it() {
    let lab = Lab::new();
    let machine = "--cluster dgx-superpod-h100 --accelerators 16 --threads 1";
    lab.write("model.toml", "model.preset = \"llama3.2-1b\"\ndata.prefix = \"unread\"\n");
    lab.write(
        "run.toml",
        "model.preset = \"llama3.2-1b\"\ndata.prefix = \"unread\"\nbatch.sequence = 1024\nbatch.sequences = 96\n\
         optim.kind = \"muon\"\ntrain.precision = \"f32\"\n",
    );
    let check = |args: &str, said: &str, same_as: &str| {
        let ran = lab.run(&format!("plan {machine} --model {args} --json"));
        assert_eq!(ran.code, Some(0), "{args}: {}", ran.err);
        assert!(
            if said.is_empty() { !ran.err.contains("says") } else { ran.err.contains(said) },
            "{}",
            ran.err
        );
        let best = |text: &str| -> Value {
            let json: Value = serde_json::from_str(text).expect("JSON");
            json["best"].clone()
        };
        let by_flags = lab.ok(&format!("plan {machine} --model llama3.2-1b {same_as} --json"));
        assert_eq!(best(&ran.out), best(&by_flags), "{args}");
    };
    let flags = "--sequence 1024 --sequences 96 --optimizer muon --format fp32";
    check("run.toml", "run.toml says: 96 sequences of 1024 tokens, --format fp32, --optimizer muon", flags);
    check(
        "run.toml --format bf16 --sequences 64",
        "run.toml says: --optimizer muon",
        "--sequence 1024 --sequences 64 --optimizer muon --format bf16",
    );
    check("model.toml", "", "");
    // An average has bytes and time; what has no price is named.
    let recipe = "train.ema = 0.999\ntrain.dropout = 0.1\noptim.qk_clip = 100\n";
    lab.write("recipe.toml", format!("model.preset = \"llama3.2-1b\"\ndata.prefix = \"unread\"\n{recipe}"));
    check("recipe.toml", "recipe.toml says: --ema\n", "--ema");
    check("recipe.toml", "not in this price: train.dropout, optim.qk_clip;", "--ema");
}

#[test]
fn an_answer_has_the_keys_that_scripts_read() {
    let lab = Lab::new();
    let json = lab.json(&format!("{SMALL} --tokens 30B --json --explain"));
    let search = &json["search"];
    assert!(search["layouts_priced"].as_u64().is_some_and(|n| n > 100), "{search}");
    assert!(search["layouts_per_s"].as_f64().is_some_and(|n| n > 0.0), "{search}");
    assert_eq!(search["threads"], 1);
    let best = &json["best"][0];
    for key in ["step_s", "mfu", "memory_bytes", "train_days", "tokens_per_s"] {
        assert!(best[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {best}");
    }
    assert_eq!(best["fits"], true);
    let layout = &best["layout"];
    let ranks =
        ["dp", "tp", "pp", "cp"].map(|k| layout[k].as_u64().expect("a count")).iter().product::<u64>();
    assert_eq!(ranks, 16);
    let storage = &json["storage"];
    for path in ["/checkpoint_bytes", "/write/value", "/load/value", "/stall/value", "/read/high"] {
        assert!(storage.pointer(path).and_then(Value::as_f64).is_some_and(|v| v > 0.0), "{path}: {storage}");
    }
    assert_eq!(json["explain"].as_array().map(Vec::len), Some(5));
    let text = lab.ok(&format!("{SMALL} --explain"));
    for part in
        ["where the time goes", "where the memory goes", "time against memory", "checkpoint", "assumed"]
    {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn a_layout_that_was_found_costs_the_same_when_it_is_given() {
    let lab = Lab::new();
    let text = lab.ok(SMALL);
    let found = text.lines().find_map(|l| l.trim().strip_prefix("tp=")).expect("a layout");
    let json = lab.json(&format!("{SMALL} --json"));
    let given = lab.json(&format!("{SMALL} --json --layout tp={found}"));
    assert_eq!(given["best"][0]["step_s"], json["best"][0]["step_s"]);
    assert_eq!(given["best"][0]["layout"], json["best"][0]["layout"]);
    assert_eq!(given["search"]["layouts_priced"], 1);
    // Another stack is another price; both are named.
    let other = lab.json(&format!("{SMALL} --json --software torchtitan --layout tp={found}"));
    assert_eq!(other["software"], "torchtitan");
    assert_ne!(other["best"][0]["step_s"], given["best"][0]["step_s"]);
}

#[test]
fn a_layout_that_does_not_fit_is_answered_and_is_wrong_input() {
    let lab = Lab::new();
    let ran = lab.run("plan --model llama3-70b --cluster dgx-h100 --layout tp=8");
    assert_eq!(ran.code, Some(2), "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("where the memory goes"), "{}", ran.out);
    assert!(
        ran.err.starts_with("error: layout tp=8,pp=1,dp=1") && ran.err.contains("does not fit"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("hint: "), "{}", ran.err);
    let ran = lab.run("plan --model llama3-70b --cluster dgx-h100 --layout tp=8 --json");
    let json: Value = serde_json::from_str(&ran.out).expect("the answer is printed");
    assert_eq!((ran.code, &json["best"][0]["fits"]), (Some(2), &Value::Bool(false)));
}

#[test]
fn strategies_and_machines_go_by_the_names_that_people_use() {
    let lab = Lab::new();
    let placed = |strategy: &str| {
        let ran = lab.run(&format!("{SMALL} --layout {strategy} --json"));
        let json: Value =
            serde_json::from_str(&ran.out).unwrap_or_else(|_| panic!("{strategy}: {}", ran.err));
        let layout = &json["best"][0]["layout"];
        ["dp", "tp", "pp", "zero"].map(|k| layout[k].as_u64().expect("a count"))
    };
    assert_eq!(placed("ddp"), [16, 1, 1, 0]);
    assert_eq!(placed("zero-3"), [16, 1, 1, 3]);
    assert!(placed("3D-Parallelism")[..3].iter().all(|n| *n > 1));
    assert!(lab.ok("catalog show zero-3").contains("--layout zero-3"));
    refused(&lab, &format!("{SMALL} --layout 4d"), 2, "neither a layout nor a strategy");

    let plan =
        |cluster: &str| lab.run(&format!("plan --model gpt3-1.3b --cluster {cluster} --accelerators 8"));
    let ran = plan("azure-openai");
    assert!(ran.err.contains("is taken for azure-eagle; it could also be azure-nd-a100"), "{}", ran.err);
    let ran = plan("v100");
    assert!(
        ran.out.contains(", fp16, ") && ran.err.contains("v100-sxm2 has no bf16"),
        "{}{}",
        ran.out,
        ran.err
    );
    assert!(plan("dgx-h100").err.is_empty());
    refused(
        &lab,
        "plan --model gpt2 --cluster azure-openai-2020 --format bf16",
        2,
        "has no bf16 matrix products",
    );
    refused(&lab, "plan --model gpt2 --cluster corelink", 2, "Corelink: no public figures");
}

#[test]
fn a_batch_is_asked_for_in_sequences_or_in_tokens() {
    let lab = Lab::new();
    let of = |args: &str| lab.json(&format!("{SMALL} --json --layout tp=1 {args}"))["sequences"].clone();
    assert_eq!(of("--sequences 64"), 64);
    assert_eq!(of("--sequence 1024 --batch 65536"), 64);
    assert_eq!(of(""), 256);
    let odd = lab.json("plan --model llama3-405b --cluster dgx-h100 --accelerators 100000 --json --keep 1");
    assert_eq!(odd["sequences"], 2000, "a batch that 100,000 accelerators split");
}

#[test]
fn every_stack_gets_arguments_and_a_rank_map() {
    let lab = Lab::new();
    for (stack, part) in [
        ("megatron", "--pipeline-model-parallel-size "),
        ("megatron-deepspeed", "--zero-stage "),
        ("torchtitan", "pipeline_parallel_degree = "),
        ("deepspeed", "\"train_micro_batch_size_per_gpu\": "),
        ("maxtext", "per_device_batch_size: "),
    ] {
        let ran = lab.run(&format!("{SMALL} --emit {stack} --rank-map {stack}.csv"));
        assert_eq!(ran.code, Some(0), "{stack}: {}", ran.err);
        assert!(ran.out.contains(part), "{stack}: {}", ran.out);
        assert!(ran.err.contains("layout: tp="), "{stack}: {}", ran.err);
        let map = fs::read_to_string(lab.path(&format!("{stack}.csv"))).expect("a rank map");
        assert_eq!(map.lines().count(), 17, "{stack}: {map}");
        assert_eq!(map.lines().next(), Some("rank,node,local_rank,tp,cp,dp,pp,ep"));
    }
    lab.ok(&format!("{SMALL} --rank-map ranks.json"));
    let map: Value = serde_json::from_slice(&fs::read(lab.path("ranks.json")).expect("a map")).expect("JSON");
    assert_eq!(
        (map.as_array().map(Vec::len), &map[9]["node"], &map[9]["local_rank"]),
        (Some(16), &1.into(), &1.into())
    );
}

#[test]
fn the_catalogue_lists_shows_and_checks() {
    let lab = Lab::new();
    let list = lab.ok("catalog list platforms");
    let line = list.lines().find(|l| l.contains("xai-colossus ")).expect("Colossus");
    assert!(line.contains(" 100000 "), "{line}");
    let models = lab.json("catalog list --kind model --json");
    for name in
        ["llama3-405b", "gpt3-175b", "deepseek-v3", "qwen3-32b", "gpt2", "palm-540b-like", "mixtral-8x22b"]
    {
        let known = models.as_array().is_some_and(|all| all.iter().any(|m| m["name"] == name));
        assert!(known, "{name}");
    }
    let shown = lab.ok("catalog show h100-sxm5");
    assert!(shown.contains("450 GB/s one way [ml 2026-08-22] NVLink 4; 900 GB/s both ways"), "{shown}");
    let json = lab.json("catalog show tpu-v5p-pod --json");
    assert!(json[0]["fields"]["note"].as_str().is_some_and(|n| n.contains("3D torus")), "{json}");
    assert_eq!((&json[0]["accelerators"], &json[0]["kind"]), (&6144.into(), &"platform".into()));
    assert!(lab.ok("catalog show mixtral-8x7b").contains("8 of 14336, 2 for each token"));
    assert!(lab.json("catalog check --json")["platforms"].as_u64().is_some_and(|n| n > 40));

    // A file of one's own changes a built-in entry, or adds one that can be planned for at once.
    lab.write(
        "mine.toml",
        "[node.dgx-h100]\nbase = \"dgx-h100\"\n\
         scale_out = { value = 800, unit = \"Gb/s\", direction = \"one-way\", source = \"my lab book\", date = \"2026\" }\n\
         [platform.garage]\nnode = \"dgx-h100\"\n\
         nodes = { value = 2, unit = \"nodes\", source = \"my lab book\", date = \"2026\" }\n",
    );
    let mine = lab.json("plan --model gpt3-1.3b --cluster garage --catalog mine.toml --json --keep 1");
    assert_eq!(mine["accelerators"], 16);
    assert!(lab.ok("catalog show garage --catalog mine.toml").contains("mine.toml:4"));
    assert!(lab.ok("catalog show dgx-h100 --catalog mine.toml").contains("800 Gb/s one way"));
}

#[test]
fn questions_that_make_no_sense_are_refused() {
    let lab = Lab::new();
    let bad = |args: &str, what: &str| refused(&lab, &format!("{SMALL} {args}"), 2, what);
    let machine = |n: &str, what: &str| {
        refused(
            &lab,
            &format!("plan --model gpt3-13b --cluster dgx-superpod-h100 --accelerators {n}"),
            2,
            what,
        )
    };
    machine("0", "0 accelerators asked of dgx-superpod-h100, expected 1 to");
    machine("100001", "100001 accelerators asked, dgx-superpod-h100 has 16384");
    machine("18446744073709551615", "18446744073709551615 accelerators asked");
    machine("18446744073709551616", "invalid value");
    machine("-1", "invalid value '-1'");
    let hint = machine("1", "no layout of gpt3-13b fits 1 x h100-sxm5: the smallest, tp=1");
    assert!(
        hint.contains("on every rank (optimiser") && hint.contains("accelerators would fit it (tp="),
        "{hint}"
    );

    for (flag, value, what) in [
        ("sequence", "0", "--sequence 0, expected at least 1"),
        ("sequence", "1000000000", "sequences of 1000000000 tokens"),
        ("sequence", "1e9", "invalid value"),
        ("sequences", "0", "--sequences 0, expected at least 1"),
        ("sequences", "18446744073709551615", "18446744073709551615 sequences a step"),
        ("batch", "0", "--batch 0, expected a number of tokens"),
        ("tokens", "-1", "--tokens -1, expected a number of tokens"),
        ("tokens", "nan", "--tokens nan"),
        ("tokens", "1e400", "--tokens 1e400"),
        ("tokens", "15.6Q", "--tokens 15.6Q"),
        ("keep", "0", "--keep 0, expected 1 to 10000"),
        ("format", "fp7", "unknown number format \"fp7\""),
        ("format", "int8", "has no int8 matrix products"),
        ("software", "torchtitn", "unknown training stack \"torchtitn\""),
        ("emit", "megatorn", "unknown stack \"megatorn\""),
        ("rank-map", "ranks.txt", "neither .csv nor .json"),
        ("rank-map", "none/ranks.csv", "write none/ranks.csv"),
        ("layout", "tp=3", "tp x pp x cp = 3 x 1 x 1 = 3 does not divide 16 accelerators"),
        ("layout", "tpp=2", "unknown key tpp"),
        ("layout", "schedule=dualpipe", "schedule=dualpipe"),
        ("catalog", "none.toml", "read none.toml"),
    ] {
        bad(&format!("--{flag} {value}"), what);
    }
    refused(&lab, &format!("{} --threads 100000", SMALL.replace(" --threads 1", "")), 2, "--threads 100000");
    bad("--layout tp=2 --keep 3", "cannot be used with");
}

#[test]
fn names_and_files_that_make_no_sense_are_refused() {
    let lab = Lab::new();
    let model =
        |name: &str, what: &str| refused(&lab, &format!("plan --model {name} --cluster dgx-h100"), 2, what);
    assert!(model("lama3-70b", "no model is called `lama3-70b`").contains("did you mean `llama3-70b`?"));
    assert!(model("gpt3-174b", "no model is called").contains("did you mean `gpt3-175b`?"));
    let cluster = refused(&lab, "plan --model gpt3-13b --cluster dgx-superpod-h10", 2, "unknown cluster");
    assert!(cluster.contains("did you mean `dgx-superpod-h100`?"), "{cluster}");

    lab.write("list.json", "[]");
    lab.write("short.json", "{\"hidden_size\": 4096, ");
    lab.write("random.json", [0u8, 159, 146, 150, 255]);
    lab.write("open.toml", "x = [");
    let huge = fs::File::create(lab.path("huge.json")).expect("a file");
    huge.set_len(10 << 30).expect("a file with a hole");
    model("list.json", "list.json: not a config.json");
    model("short.json", "short.json: not valid JSON");
    model("random.json", "read random.json: not text: byte 1");
    model("huge.json", "read huge.json: larger than 64 MiB");
    model("none.json", "read none.json");
    model("open.toml", "open.toml:1");
    for (args, what) in [
        ("catalog list foo", "unknown kind \"foo\""),
        ("catalog show lama3-70b", "nothing in the catalogue is called"),
        ("catalog check open.toml", "open.toml:1: not TOML"),
        ("catalog check random.json", "not text"),
        ("validate none.csv", "read none.csv"),
    ] {
        refused(&lab, args, 2, what);
    }
}

#[test]
fn catalogue_files_that_make_no_sense_are_refused_with_the_line() {
    let lab = Lab::new();
    let number = |value: &str| {
        format!(
            "[node.mine]\nbase = \"dgx-h100\"\nscale_out = {{ value = {value}, unit = \"Gb/s\", \
             direction = \"one-way\", source = \"a note\", date = \"2026\" }}\n"
        )
    };
    let cases = [
        (number("0"), "mine.toml:3: node.mine.scale_out = 0 Gb/s, expected a finite number above zero"),
        (number("-400"), "node.mine.scale_out = -400 Gb/s"),
        (number("nan"), "expected a finite number above zero"),
        (number("inf"), "expected a finite number above zero"),
        (number("400").replace("unit = \"Gb/s\", ", ""), "mine.toml:3: node.mine.scale_out has no unit"),
        (
            number("400").replace("source = \"a note\", ", ""),
            "mine.toml:3: node.mine.scale_out has no source",
        ),
        (number("400").replace(", date = \"2026\"", ""), "mine.toml:3: node.mine.scale_out has no date"),
        (number("400").replace("Gb/s", "GB"), "`GB` is no unit of it"),
        (number("\"fast\""), "mine.toml:3: node.mine.scale_out.value is of type string"),
        (number("400").replace("scale_out", "scale_uot"), "mine.toml:3: unknown key node.mine.scale_uot"),
        (
            number("400").replace("dgx-h100", "mine"),
            "mine.toml:1: node.mine has a cycle of bases: mine -> mine",
        ),
        (number("400").replace("dgx-h100", "dgx-h10"), "node.mine.base: unknown node \"dgx-h10\""),
        (number("400") + "fabric = \"none-such\"\n", "mine.toml:1: node.mine.fabric: unknown fabric"),
        (number("400") + &number("800"), "mine.toml:4: not TOML"),
        (number("400") + "aliases = [\"p5\"]\n", "\"p5\" already names"),
        ("[nodes.mine]\n".to_owned(), "mine.toml:1: unknown table [nodes]"),
        ("\u{feff}[node.mine]\n".to_owned(), "node.mine.accelerator is missing"),
        ("[node.mine]\r\nvendor = 3\r\n".to_owned(), "mine.toml:2: unknown key node.mine.vendor"),
        ("node = 3\n".to_owned(), "mine.toml:1: node is of type integer, expected a table"),
    ];
    for (text, what) in cases {
        lab.write("mine.toml", &text);
        refused(&lab, "catalog check mine.toml", 2, what);
    }
}

/// The header and three rows of published runs.
const RUNS: &str = "\
id,source,confidence,model name,params_b,layers,hidden,ffn_hidden,heads,kv_heads,vocab,experts,topk,seq_len,\
global_batch,micro_batch,accelerator,n_accel,tp,pp,dp,cp,ep,vpp,zero_fsdp,sequence_parallel,recompute,precision,\
step_time_s,tflops_per_gpu,mfu_pct,tokens_per_sec_per_gpu,gpu_hours_total,tokens_total,notes,flops_kind,\
derived_step_time_s
a,arXiv:2104.04473 Table 1,high,GPT 1.7B,1.7,24,2304,9216,24,24,51200,,,2048,512,16,NVIDIA A100-SXM4-80GB,32,1,1,32,1,,\
1,none,no,full,fp16,,137,,,,,\"one, with a comma\",hardware (incl. full recompute),
b,arXiv:2104.04473 Table 1,high,GPT 3.6B,3.6,30,3072,12288,32,32,51200,,,2048,512,16,NVIDIA A100-SXM4-80GB,64,2,1,32,1,,\
1,none,no,full,fp16,,138,,,,,,hardware (incl. full recompute),
";

#[test]
fn tables_of_runs_are_read_as_people_save_them() {
    let lab = Lab::new();
    lab.write("plain.csv", RUNS);
    lab.write("crlf.csv", RUNS.replace('\n', "\r\n"));
    lab.write("bom.csv", format!("\u{feff}{RUNS}"));
    let plain = lab.json("validate plain.csv --json");
    assert_eq!(plain["priced"], 2);
    for key in ["median_abs_error", "p90_abs_error"] {
        assert!(plain[key].as_f64().is_some_and(|e| e < 0.3), "{key}: {plain}");
    }
    assert_eq!(
        (plain["sources"].as_array().map(Vec::len), &plain["not_priced"]),
        (Some(1), &Value::Array(vec![]))
    );
    for key in ["id", "predicted", "published", "error"] {
        assert!(!plain["rows"][0][key].is_null(), "{key}: {plain}");
    }
    assert_eq!(lab.json("validate crlf.csv --json"), plain);
    assert_eq!(lab.json("validate bom.csv --json"), plain);

    let header = RUNS.lines().next().expect("a header");
    let cases = [
        (String::new(), "bad.csv:1: no header line"),
        (format!("{header}\n"), "bad.csv: a header without rows"),
        (RUNS.replace("accelerator,", "chip,"), "bad.csv:1: no column \"accelerator\""),
        (RUNS.replace(",512,16,", ",-512,16,"), "bad.csv:2: global_batch"),
        (RUNS.replace(",512,16,", ",nan,16,"), "bad.csv:2: global_batch"),
        (RUNS.replace(",512,16,", ",1e300,16,"), "bad.csv:2: global_batch"),
        (RUNS.replace(",137,", ",0,"), "bad.csv:2: tflops_per_gpu"),
        (RUNS.replace(", with", "\", with"), "bad.csv:2:"),
        (RUNS[..RUNS.len() - 40].to_owned(), "bad.csv:3:"),
    ];
    for (text, what) in cases {
        lab.write("bad.csv", &text);
        let ran = lab.run("validate bad.csv");
        assert!(
            ran.code == Some(2) && ran.err.contains(what),
            "{what}: {:?} {}{}",
            ran.code,
            ran.out,
            ran.err
        );
    }
}

#[test]
fn a_full_disk_fails_and_a_closed_pipe_does_not() {
    let lab = Lab::new();
    for args in ["catalog list", SMALL, "plan --help"] {
        let full = fs::File::options().write(true).open("/dev/full").expect("/dev/full");
        let ran = lab.command(args).stdout(full).stderr(Stdio::piped()).output().expect("start the program");
        let err = String::from_utf8_lossy(&ran.stderr);
        if !args.contains("--help") {
            assert_eq!(ran.status.code(), Some(1), "{args}: {err}");
            assert!(err.contains("error: write to stdout") && err.contains("hint: "), "{args}: {err}");
        }
        assert!(!err.contains("panicked"), "{args}: {err}");
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        drop(read);
        let ran =
            lab.command(args).stdout(Stdio::from(write)).stderr(Stdio::piped()).output().expect("start");
        let err = String::from_utf8_lossy(&ran.stderr);
        assert_eq!((ran.status.code(), err.as_ref()), (Some(0), ""), "{args}");
    }
}
