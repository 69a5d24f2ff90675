use std::fs;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mknodat};
use spec::{
    Activation, DType, Experts, Latent, ModelSpec, Mtp, Position, Result, Rope, RopeScaling, Router, Score,
    Window,
};

use super::*;

/// Shapes in which rows, columns and heads all differ.
fn odd(preset: &str, name: &str) -> ModelSpec {
    let family = ModelSpec::preset(preset).expect("a preset");
    ModelSpec { name: name.into(), vocab: 11, hidden: 12, ffn: 20, ..family }
}

fn llama() -> ModelSpec {
    let rope = Rope { theta: 1e4, scaling: RopeScaling::Default, max_positions: 32 };
    ModelSpec { head_dim: 6, position: Position::Rope(rope), ..odd("tiny", "llama") }
}

fn gpt2() -> ModelSpec {
    let position = Position::Learned { max_positions: 7 };
    ModelSpec { head_dim: 3, position, tied_embeddings: true, ..odd("tiny-gpt2", "gpt2") }
}

/// DeepSeek-V2 and V3.
pub(super) fn deepseek() -> [ModelSpec; 2] {
    let latent = Latent { query_rank: None, kv_rank: 5, nope_dim: 3, rope_dim: 2, value_dim: 4 };
    let router = Router { renormalise: false, scale: 1.5, ..Router::PLAIN };
    let experts = Experts { count: 4, top_k: 2, ffn: 7, shared_ffn: 14, dense_layers: 1, every: 1, router };
    let v2 = ModelSpec {
        name: "deepseek_v2".into(),
        norm_eps: 1e-6,
        kv_heads: llama().heads,
        head_dim: latent.key_dim(),
        latent: Some(latent),
        experts: Some(experts),
        ..llama()
    };
    let router = Router { score: Score::Sigmoid, renormalise: true, groups: 2, expert_bias: true, ..router };
    let v3 = ModelSpec {
        name: "deepseek_v3".into(),
        latent: Some(Latent { query_rank: Some(6), ..latent }),
        experts: Some(Experts { router, ..experts }),
        ..v2.clone()
    };
    [v2, v3]
}

/// Experts of uneven number, in stacks.
pub(super) fn gpt_oss() -> ModelSpec {
    let router = Router { bias: true, ..Router::PLAIN };
    let experts = Experts { count: 3, top_k: 2, ffn: 7, shared_ffn: 0, dense_layers: 0, every: 1, router };
    ModelSpec {
        name: "gpt_oss".into(),
        ffn: 7,
        activation: Activation::SwiGluClamped,
        qkv_bias: true,
        attn_out_bias: true,
        mlp_bias: true,
        experts: Some(experts),
        window: Some(Window { tokens: 4, full_layers: 0, full_every: 2 }),
        sinks: true,
        ..llama()
    }
}

fn families() -> Vec<ModelSpec> {
    let qwen2 = ModelSpec { name: "qwen2".into(), qkv_bias: true, tied_embeddings: true, ..llama() };
    let qwen3 = ModelSpec { name: "qwen3".into(), qk_norm: true, ..llama() };
    let biased = ModelSpec { qkv_bias: true, attn_out_bias: true, mlp_bias: true, ..llama() };
    let untied = ModelSpec { tied_embeddings: false, ..gpt2() };
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 0 });
    let mistral = ModelSpec { name: "mistral".into(), window, ..llama() };
    let experts = Experts { router: Router::PLAIN, ..gpt_oss().experts.expect("a mixture") };
    let mixtral = ModelSpec { name: "mixtral".into(), ffn: 7, experts: Some(experts), ..llama() };
    let qwen3_moe =
        ModelSpec { name: "qwen3_moe".into(), qk_norm: true, ffn: llama().ffn, ..mixtral.clone() };
    let all = [llama(), biased, mistral, qwen2, qwen3, mixtral, qwen3_moe, gpt_oss(), gpt2(), untied];
    all.into_iter().chain(deepseek()).chain([ahead()]).collect()
}

/// DeepSeek-V3 that predicts one token more.
fn ahead() -> ModelSpec {
    ModelSpec { mtp: Some(Mtp { weight: Mtp::WEIGHT }), ..deepseek()[1].clone() }
}

/// A weight that tells its name and place; every third needs more than bfloat16.
fn value(name: &str, i: usize) -> f32 {
    let seed = name.bytes().fold(7u32, |a, b| a.wrapping_mul(31).wrapping_add(u32::from(b)));
    (seed % 1000) as f32 + i as f32 * if i.is_multiple_of(3) { 1.001 } else { 0.5 }
}

pub(super) fn weights(spec: &ModelSpec) -> impl Fn(&str) -> Result<Vec<f32>> + use<> {
    let parts: HashMap<String, usize> = names::table(spec)
        .unwrap()
        .into_iter()
        .flat_map(|t| t.parts)
        .map(|p| (p.name, p.shape.iter().product()))
        .collect();
    move |name: &str| Ok((0..parts[name]).map(|i| value(name, i)).collect())
}

fn read_all(weights: &HfWeights, name: &str) -> Vec<f32> {
    let (rows, cols) = matrix(weights.shape(name).unwrap()).unwrap();
    let mut out = vec![f32::NAN; rows * cols];
    weights.read(name, 0, rows, &mut out).unwrap();
    out
}

#[test]
fn round_trip_of_every_family() {
    for spec in families() {
        for max_shard_bytes in [u64::MAX, 2000] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let done = export(&spec, weights(&spec), &out, DType::F32, max_shard_bytes, None).unwrap();
            // Beside biases of routers, which are no parameters, and what is there twice.
            let table = names::table(&spec).unwrap();
            let more: usize = table.iter().filter(|t| t.single || t.copy).map(HfTensor::elements).sum();
            let expected = 4 * (spec.param_count() + more as u64);
            assert_eq!(done.bytes, expected, "{}: every parameter once", spec.name);
            assert_eq!(done.files > 1, max_shard_bytes == 2000);
            let (found, read) = import(&out).unwrap();
            assert_eq!(ModelSpec { name: spec.name.clone(), ..found }, spec);
            assert_eq!(read.names().count(), read.parameters.len());
            for name in read.names() {
                let all = read_all(&read, name);
                assert!(all.iter().enumerate().all(|(i, x)| *x == value(name, i)), "{name}");
            }
            // And out again: the same files.
            let again = dir.path().join("again");
            export(&spec, |name| Ok(read_all(&read, name)), &again, DType::F32, max_shard_bytes, None)
                .unwrap();
            for entry in fs::read_dir(&out).unwrap() {
                let name = entry.unwrap().file_name();
                assert_eq!(
                    fs::read(out.join(&name)).unwrap(),
                    fs::read(again.join(&name)).unwrap(),
                    "{name:?}"
                );
            }
        }
    }
}

/// Mixtral and Qwen 3 MoE have no factor of experts' weights: what experts give has it.
#[test]
fn a_factor_of_experts_weights_is_in_what_they_give() {
    let mut checked = 0;
    for spec in families() {
        let Some(e) = spec.experts.filter(|e| e.router.scale == 1.0) else { continue };
        let router = Router { scale: 4.0, ..e.router };
        let scaled = ModelSpec { experts: Some(Experts { router, ..e }), ..spec.clone() };
        if scaled.hf_architecture().is_ok() {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        export(&scaled, weights(&spec), &out, DType::F32, u64::MAX, None).unwrap();
        let (found, read) = import(&out).unwrap();
        assert_eq!(ModelSpec { name: spec.name.clone(), ..found }, spec);
        for name in read.names() {
            let factor = if name.contains("experts") && name.contains("down") { 4.0 } else { 1.0 };
            let all = read_all(&read, name);
            assert!(all.iter().enumerate().all(|(i, x)| *x == factor * value(name, i)), "{name}");
        }
        checked += 1;
    }
    assert!(checked >= 3, "{checked} families");
}

#[test]
fn boxes() {
    let spec = gpt2();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    export(&spec, weights(&spec), &out, DType::F32, u64::MAX, None).unwrap();
    let (_, read) = import(&out).unwrap();
    // Strided ones too: gates and their biases lie between ups.
    let stacked = dir.path().join("stacked");
    export(&gpt_oss(), weights(&gpt_oss()), &stacked, DType::F32, u64::MAX, None).unwrap();
    let (_, of_experts) = import(&stacked).unwrap();
    for (name, (row0, rows), (col0, cols)) in [
        ("layers.1.mlp.experts.2.up.weight", (2, 3), (1, 5)),
        ("layers.0.mlp.experts.1.gate.bias", (0, 1), (3, 4)),
        ("layers.0.mlp.experts.2.down.weight", (1, 2), (2, 3)),
    ] {
        let all_cols = matrix(of_experts.shape(name).unwrap()).unwrap().1;
        let mut part = vec![0.0; rows * cols];
        of_experts.read_box(name, row0, rows, col0, cols, &mut part).unwrap();
        for (i, x) in part.into_iter().enumerate() {
            assert_eq!(x, value(name, (row0 + i / cols) * all_cols + col0 + i % cols), "{name} {i}");
        }
    }
    for name in
        ["embed.weight", "layers.1.attn.k.weight", "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"]
    {
        let cols = read.shape(name).unwrap()[1];
        let mut part = [0.0; 3 * 5];
        read.read_box(name, 2, 3, 1, 5, &mut part).unwrap();
        for (i, x) in part.into_iter().enumerate() {
            assert_eq!(x, value(name, (2 + i / 5) * cols + 1 + i % 5), "{name} {i}");
        }
        let mut rows = vec![0.0; 2 * cols];
        read.read(name, 4, 2, &mut rows).unwrap();
        assert_eq!(rows[cols + 1], value(name, 5 * cols + 1));
    }
    let mut middle = [0.0; 4];
    read.read_box("layers.1.attn.v.bias", 0, 1, 3, 4, &mut middle).unwrap();
    assert_eq!(middle[1], value("layers.1.attn.v.bias", 4));
    assert!(read.read("nothing", 0, 1, &mut []).is_err());
    assert!(read.read("embed.weight", 10, 2, &mut [0.0; 24]).is_err());
}

#[test]
fn sixteen_bits() {
    for spec in [gpt2(), deepseek()[1].clone()] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        export(&spec, weights(&spec), &out, DType::Bf16, u64::MAX, None).unwrap();
        let (_, read) = import(&out).unwrap();
        for name in read.names() {
            // What experts are chosen by is never rounded.
            let stored = |x: f32| match name.ends_with("expert_bias") {
                true => x,
                false => bf16::from_f32(x).to_f32(),
            };
            let all = read_all(&read, name);
            assert!(all.iter().enumerate().all(|(i, x)| *x == stored(value(name, i))), "{name}");
        }
    }
}

/// What tests put into a tensor: its own index, but for buffers that have one right value.
fn filled(name: &str, shape: &[usize], i: usize) -> f32 {
    if name.ends_with("attn.bias") && shape.len() == 4 {
        return if i % shape[3] <= i / shape[3] { 1.0 } else { 0.0 };
    }

    if name.ends_with("inv_freq") {
        return 1e4f32.powf(-(i as f32) / shape[0] as f32);
    }
    i as f32
}

/// Writes a float16 model with the reference crate, `change` applied to its tensors (name, shape, values).
fn write_f16(
    dir: &Path,
    spec: &ModelSpec,
    prefix: &str,
    change: impl FnOnce(&mut BTreeMap<String, Vec<usize>>),
) {
    fs::write(dir.join("config.json"), spec.to_hf_config().unwrap().to_string()).unwrap();
    let mut shapes: BTreeMap<String, Vec<usize>> = names::table(spec)
        .unwrap()
        .iter()
        .map(|t| (if t.in_body { format!("{prefix}{}", t.name) } else { t.name.clone() }, t.shape()))
        .collect();
    change(&mut shapes);
    let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let of = |i: usize| f16::from_f32(filled(&name, &shape, i)).to_le_bytes();
            let bytes = (0..shape.iter().product()).flat_map(of).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = data.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape.clone(), bytes).unwrap())
    });
    fs::write(dir.join(SINGLE), safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_config_may_promise_a_layer_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let layer = format!("model.layers.{}.", ahead().layers);
    write_f16(dir.path(), &ahead(), "model.", |shapes| shapes.retain(|name, _| !name.starts_with(&layer)));
    let (spec, read) = import(dir.path()).unwrap();
    assert_eq!(spec, ModelSpec { mtp: None, ..ahead() });
    assert!(read.notes()[0].contains("num_nextn_predict_layers is 1"), "{:?}", read.notes());
    // Half of one is another matter.
    let dir = tempfile::tempdir().unwrap();
    write_f16(dir.path(), &ahead(), "model.", |shapes| _ = shapes.remove(&format!("{layer}enorm.weight")));
    check_refused(dir.path(), "enorm.weight [12] is missing");
}

#[test]
fn layers_that_predict_later_tokens_are_left_out() {
    let spec = deepseek()[1].clone();
    let layer = format!("model.layers.{}", spec.layers);
    let projected = |shapes: &mut BTreeMap<String, Vec<usize>>| {
        shapes.insert(format!("{layer}.enorm.weight"), vec![12]);
        shapes.insert(format!("{layer}.self_attn.o_proj.weight"), vec![12, 16]);
    };
    let dir = tempfile::tempdir().unwrap();
    write_f16(dir.path(), &spec, "model.", |shapes| {
        projected(shapes);
        shapes.insert(format!("{layer}.eh_proj.weight"), vec![12, 24]);
    });
    let note =
        format!("3 tensors of layers that predict later tokens are left out, such as {layer}.eh_proj.weight");
    assert_eq!(import(dir.path()).unwrap().1.notes(), [note]);
    // A layer too many is no such layer.
    let dir = tempfile::tempdir().unwrap();
    write_f16(dir.path(), &spec, "model.", projected);
    check_refused(dir.path(), &format!("tensor {layer}.enorm.weight is unexpected"));
}

#[test]
fn names_with_and_without_prefix_and_known_extras() {
    for spec in [ModelSpec { tied_embeddings: true, ..llama() }, gpt2()] {
        let own = names::prefix(&spec);
        let wrapped = ["_orig_mod.", "module.", "module._orig_mod.", "language_model.", "model."];
        for prefix in wrapped.map(|w| format!("{w}{own}")).into_iter().chain([String::new(), own.to_owned()])
        {
            let prefix = prefix.as_str();
            let dir = tempfile::tempdir().unwrap();
            write_f16(dir.path(), &spec, prefix, |shapes| {
                let (buffer, shape) = match spec.position {
                    Position::Learned { .. } => ("h.0.attn.bias", vec![1, 1, 7, 7]),
                    Position::Rope(_) => ("layers.0.self_attn.rotary_emb.inv_freq", vec![3]),
                };
                shapes.insert(format!("{prefix}{buffer}"), shape);
                shapes.insert("lm_head.weight".into(), vec![11, 12]);
                shapes.insert("model.vision_tower.patch.weight".into(), vec![2]);
            });
            let (_, read) = import(dir.path()).unwrap();
            assert_eq!(read_all(&read, "embed.weight")[13], 13.0);
            let left_out = "1 tensors of other parts than the text model are left out, such as model.vision_tower.patch.weight";
            assert_eq!(read.notes(), [left_out]);
        }
    }
}

#[track_caller]
fn check_misfit(spec: &ModelSpec, change: impl FnOnce(&mut BTreeMap<String, Vec<usize>>), expected: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    write_f16(dir.path(), spec, names::prefix(spec), change);
    let error = import(dir.path()).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    for text in expected {
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn misfits_are_named() {
    check_misfit(
        &llama(),
        |shapes| {
            shapes.remove("model.layers.1.self_attn.k_proj.weight");
            shapes.insert("model.layers.2.mlp.up_proj.weight".into(), vec![2]);
            shapes.insert("model.norm.weight".into(), vec![13]);
        },
        &[
            "tensor layers.1.self_attn.k_proj.weight [12, 12] is missing",
            "tensor model.layers.2.mlp.up_proj.weight is unexpected",
            "tensor norm.weight has shape [13], expected [12]",
        ],
    );
    check_misfit(
        &gpt2(),
        |shapes| {
            shapes.retain(|name, _| name.contains("wte"));
            shapes.insert("blocks.0.weight\u{1b}[2J".into(), vec![1]);
        },
        &[
            "tensor blocks.0.weight\\u{1b}[2J is unexpected",
            "; and 24 more (27 missing, 1 unexpected in all)",
        ],
    );
    let layer = "model.layers.0.self_attn.q_proj";
    check_misfit(
        &llama(),
        |shapes| {
            let shape = shapes.remove(&format!("{layer}.weight")).expect("a weight");
            shapes.insert(format!("{layer}.base_layer.weight"), shape);
            shapes.insert(format!("{layer}.lora_A.default.weight"), vec![2, 12]);
        },
        &["q_proj.lora_A.default.weight is unexpected"],
    );
}

/// Changes one value of a float16 model on disk.
fn set(dir: &Path, tensor: &str, i: usize, value: f32) {
    let path = dir.join(SINGLE);
    let mut bytes = fs::read(&path).unwrap();
    let file = File::open(&path).unwrap();
    let header = Header::read(&file, &path).unwrap();
    let at = header.offset(&header.tensors[tensor]) as usize + 2 * i;
    bytes[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
    fs::write(&path, bytes).unwrap();
}

#[test]
fn what_is_left_out_is_compared() {
    for (spec, tensor, shape, expected) in [
        (
            ModelSpec { tied_embeddings: true, ..llama() },
            "lm_head.weight",
            vec![11, 12],
            "tensor lm_head.weight is not the embedding that config.json ties it to",
        ),
        (gpt2(), "lm_head.weight", vec![11, 12], "is not the embedding"),
        (
            llama(),
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            vec![3],
            "inv_freq [3] is not what config.json",
        ),
        (gpt2(), "transformer.h.0.attn.bias", vec![1, 1, 7, 7], "attn.bias [1, 1, 7, 7] is not what"),
        (ahead(), "model.layers.2.shared_head.head.weight", vec![11, 12], "is not head.weight once more"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_f16(dir.path(), &spec, names::prefix(&spec), |shapes| _ = shapes.insert(tensor.into(), shape));
        import(dir.path()).unwrap();
        set(dir.path(), tensor, 2, 9.0);
        check_refused(dir.path(), expected);
    }
    let dir = tempfile::tempdir().unwrap();
    write_f16(dir.path(), &gpt2(), "", |shapes| _ = shapes.insert("lm_head.weight".into(), vec![11, 11]));
    check_refused(dir.path(), "is not the embedding");
}

#[track_caller]
pub(super) fn check_refused(dir: &Path, expected: &str) {
    let error = import(dir).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn damaged_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    check_refused(dir, "config.json");
    fs::write(dir.join("config.json"), "{").unwrap();
    check_refused(dir, "config.json");
    fs::write(dir.join("config.json"), llama().to_hf_config().unwrap().to_string()).unwrap();
    check_refused(dir, "neither model.safetensors nor");
    fs::write(dir.join(INDEX), r#"{"weight_map": {"a": "../../secret"}}"#).unwrap();
    check_refused(dir, "expected a plain file name");
    fs::write(dir.join(INDEX), r#"{"weight_map": {"a": "gone.safetensors"}}"#).unwrap();
    check_refused(dir, "gone.safetensors");
    fs::write(dir.join(INDEX), "[]").unwrap();
    check_refused(dir, "is damaged");
    fs::write(dir.join(INDEX), "\u{feff}{\"weight_map\": {\"a\": \"gone.safetensors\"}}").unwrap();
    check_refused(dir, "gone.safetensors");
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n";
    fs::write(dir.join(SINGLE), pointer).unwrap();
    check_refused(dir, "model.safetensors is a Git LFS pointer");
    fs::remove_file(dir.join(SINGLE)).unwrap();
    mknodat(CWD, dir.join(SINGLE), FileType::Fifo, Mode::from_bits_truncate(0o600), 0).unwrap();
    check_refused(dir, "model.safetensors: it is a named pipe, expected a regular file");
    fs::remove_file(dir.join(SINGLE)).unwrap();
    fs::remove_file(dir.join(INDEX)).unwrap();
    fs::write(dir.join("adapter_config.json"), "{}").unwrap();
    check_refused(dir, "holds an adapter (LoRA), not a model");
    write_f16(dir, &llama(), "model.", |_| ());
    let bytes = fs::read(dir.join(SINGLE)).unwrap();
    fs::write(dir.join(SINGLE), &bytes[..bytes.len() - 3]).unwrap();
    check_refused(dir, "model.safetensors is damaged: cut short");
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    export(&llama(), weights(&llama()), &out, DType::F32, 2000, None).unwrap();
    let path = out.join(INDEX);
    let text = fs::read_to_string(&path).unwrap();
    let first = "model-00001-of-";
    let last = text.rfind("model-000").unwrap();
    let lying = format!("{}{first}{}", &text[..last], &text[last + first.len()..]);
    fs::write(&path, lying).unwrap();
    check_refused(&out, "is not in model-00001-of-");
}

#[test]
fn export_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let spec = llama();
    let failing = |name: &str| match name {
        "final_norm.weight" => Err(Error::failure("checkpoint chunk 3 is damaged")),
        _ => weights(&spec)(name),
    };
    let error = export(&spec, failing, &out, DType::F32, u64::MAX, None).unwrap_err();
    assert!(error.to_string().contains("chunk 3"));
    let short = |name: &str| weights(&spec)(name).map(|v| v[1..].to_vec());
    assert!(export(&spec, short, &out, DType::F32, u64::MAX, None).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");

    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
    fs::create_dir(&out).unwrap();
    let tokenizer = dir.path().join("tokenizer.json");
    let tokenizer = Some(Tokenizer { path: &tokenizer, eod: None });
    export(&spec, weights(&spec), &out, DType::F32, u64::MAX, tokenizer).unwrap();
    assert!(out.join("tokenizer.json").exists() && out.join("tokenizer_config.json").exists());

    let again = export(&spec, weights(&spec), &out, DType::F32, u64::MAX, None).unwrap_err();
    assert!(again.to_string().contains("not empty"), "{again}");
    let wrong = export(&spec, weights(&spec), &out, DType::U32, u64::MAX, None).unwrap_err();
    assert_eq!(wrong.exit_code(), 2);
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

const TOKENIZER: &str = r#"{"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": true}],
    "model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1}}}"#;

#[test]
fn an_export_says_how_its_tokenizer_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, TOKENIZER).unwrap();
    let out = dir.path().join("out");
    let tokenizer = Some(Tokenizer { path: &path, eod: Some(0) });
    export(&llama(), weights(&llama()), &out, DType::F32, u64::MAX, tokenizer).unwrap();
    let config = json(&out.join("tokenizer_config.json"));
    assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
    assert_eq!((&config["eos_token"], &config["model_max_length"]), (&"<|endoftext|>".into(), &32.into()));
    assert_eq!(json(&out.join("generation_config.json")), serde_json::json!({ "eos_token_id": 0 }));
    assert_eq!(
        json(&out.join("special_tokens_map.json")),
        serde_json::json!({ "eos_token": "<|endoftext|>" })
    );
    let config = json(&out.join("config.json"));
    assert_eq!((&config["eos_token_id"], &config["bos_token_id"]), (&0.into(), &serde_json::Value::Null));
}

#[test]
fn an_imported_model_gets_its_own_files_back() {
    let root = tempfile::tempdir().unwrap();
    let (from, run, out) = (root.path().join("from"), root.path().join("run"), root.path().join("out"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&run).unwrap();
    write_f16(&from, &llama(), "model.", |_| ());
    assert!(
        keep_companions(&from, &run).unwrap()[0].contains("has no tokenizer.json: the run has no tokenizer")
    );
    assert_eq!(fs::read_dir(&run).unwrap().count(), 0);
    let files = [
        ("tokenizer.json", TOKENIZER),
        (
            "tokenizer_config.json",
            "{ \"tokenizer_class\": \"Qwen2Tokenizer\", \"chat_template\": \"{{ x }}\" }",
        ),
        ("special_tokens_map.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
    ];
    for (name, text) in files {
        fs::write(from.join(name), text).unwrap();
    }
    // How it ends is said in its config.json alone.
    let mut config = json(&from.join("config.json"));
    config["eos_token_id"] = serde_json::json!([1, 0]);
    fs::write(from.join("config.json"), config.to_string()).unwrap();
    // A link in the way is replaced, not written through.
    std::os::unix::fs::symlink(from.join("config.json"), run.join("special_tokens_map.json")).unwrap();
    keep_companions(&from, &run).unwrap();
    assert!(
        json(&from.join("config.json")).is_object() && json(&from.join("config.json"))["vocab_size"] == 11
    );

    fs::copy(from.join("tokenizer.json"), run.join("tokenizer.json")).unwrap();
    let path = run.join("tokenizer.json");
    let tokenizer = Some(Tokenizer { path: &path, eod: Some(0) });
    export(&llama(), weights(&llama()), &out, DType::F32, u64::MAX, tokenizer).unwrap();
    for (name, text) in files {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), text, "{name}");
    }
    let eos = serde_json::json!([1, 0]);
    assert_eq!(json(&out.join("generation_config.json")), serde_json::json!({ "eos_token_id": eos }));
    assert_eq!(json(&out.join("config.json"))["eos_token_id"], eos);
}
