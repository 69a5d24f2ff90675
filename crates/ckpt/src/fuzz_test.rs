//! The parsers of files that a checkpoint or a model brings, against damaged ones.

#[path = "../../../tests/fuzz.rs"]
pub(crate) mod harness;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use harness::fuzz;
use spec::{HfModel, ModelSpec};
use xxhash_rust::xxh3::xxh3_64;

use crate::header::{self, Entry, Header};
use crate::manifest::{MANIFEST, Manifest, hex};
use crate::{Checkpoint, Kind, Meta, Piece, Region, Saver, hf};

#[global_allocator]
static ALLOCATOR: harness::Counting = harness::Counting;

/// A checkpoint of two ranks with pieces of both kinds.
fn checkpoint(dir: &Path) -> std::path::PathBuf {
    let data: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let mut records = Vec::new();
    for rank in 0..2 {
        let piece =
            |name, boxes| Piece { name, kind: Kind::Param, global_shape: &[4, 6], boxes, data: &data };
        let ranges = vec![Region::range(12 * rank, 5), Region::range(12 * rank + 5, 7)];
        let columns = vec![Region::rect(0, 4, 3 * rank, 3)];
        let pieces = [piece("layers.0.attn.q.weight", ranges), piece("embed.weight", columns)];
        records.push(Saver::begin(dir, 7).unwrap().write_rank(rank, pieces).unwrap());
    }
    let state = serde_json::json!({ "next_sample": 12, "data": "0a", "list": [1.5, -2, null] });
    Saver::commit(dir, 7, records, Meta { tokens: 9, fingerprint: "f".into(), world: 2, state }).unwrap()
}

/// Gives a manifest the checksum of what it says now.
fn sealed(mut text: Vec<u8>) -> Vec<u8> {
    const FIELD: &[u8] = b"\"checksum\":\"";
    let Some(at) = text.windows(FIELD.len()).position(|w| w == FIELD).map(|at| at + FIELD.len()) else {
        return text;
    };
    let Some(digits) = text.get_mut(at..at + hex::DIGITS) else { return text };
    digits.copy_from_slice(hex::ZERO.as_bytes());
    let sum = hex::digits(xxh3_64(&text));
    text[at..at + hex::DIGITS].copy_from_slice(sum.as_bytes());
    text
}

#[test]
fn fuzz_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read(checkpoint(dir.path()).join(MANIFEST)).unwrap();
    let words = [
        "\"range\":{\"start\":0,\"len\":1}",
        "\"box\":",
        "\"pieces\":[",
        "\"state\":",
        "\"shape\":[0,",
        "\"x\":",
    ];
    fuzz("manifest", &[text], &words, sealed, |input| {
        let Ok(text) = std::str::from_utf8(input) else { return false };
        Manifest::from_text(text, Path::new("m")).is_ok()
    });
}

#[test]
fn fuzz_checkpoint() {
    // The whole way: a damaged manifest beside sound files, opened and read.
    let dir = tempfile::tempdir().unwrap();
    let path = checkpoint(dir.path());
    let text = fs::read(path.join(MANIFEST)).unwrap();
    let file = fs::File::options().write(true).open(path.join(MANIFEST)).unwrap();
    fuzz("checkpoint", &[text], &["\"offset\":8", "\"bytes\":"], sealed, |input| {
        file.set_len(input.len() as u64).unwrap();
        file.write_all_at(input, 0).unwrap();
        let Ok(ckpt) = Checkpoint::open(&path) else { return false };
        let mut out = [0.0; 24];
        let _ = ckpt.read_box("embed.weight", Kind::Param, 0, 4, 0, 6, &mut out);
        ckpt.verify().is_ok()
    });
}

#[test]
fn fuzz_safetensors() {
    let entry = |name: &str, dtype, shape: &[usize], bytes| Entry {
        name: name.into(),
        dtype,
        shape: shape.into(),
        bytes,
    };
    let entries =
        [entry("model.norm.weight", "F32", &[2, 3], 24), entry("h.0.attn.bias", "BOOL", &[1, 1, 2, 2], 4)];
    let good = [header::encode(&entries), vec![0; 28]].concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let file = fs::File::create_new(&path).unwrap();
    let opened = fs::File::open(&path).unwrap();
    let words = ["\"__metadata__\":{", "\"shape\":[", "\"data_offsets\":[0,8]", "\"dtype\":\"F8_E4M3\""];
    fuzz(
        "safetensors",
        &[good],
        &words,
        |input| input,
        |input| {
            file.set_len(input.len() as u64).unwrap();
            file.write_all_at(input, 0).unwrap();
            Header::read(&opened, &path).is_ok()
        },
    );
}

#[test]
fn fuzz_index() {
    let good =
        br#"{"metadata": {"total_size": 9}, "weight_map": {"a.weight": "model-1.safetensors", "b": "c"}}"#;
    fuzz(
        "index",
        &[good.to_vec()],
        &["\"weight_map\":{", "\"a\":\"b\","],
        |input| input,
        |input| {
            let Ok(text) = std::str::from_utf8(input) else { return false };
            hf::parses_as_index(text)
        },
    );
}

const CONFIGS: [&str; 4] = [
    r#"{ "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 99, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": { "rope_type": "llama3",
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32 } }"#,
    r#"{ "model_type": "gpt2", "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": null, "n_ctx": 64 }"#,
    r#"{ "model_type": "llava", "text_config": { "model_type": "qwen2", "num_hidden_layers": 3, "layer_types": [] },
        "vision_config": { "hidden_size": 3 }, "tie_word_embeddings": true }"#,
    r#"{ "model_type": "qwen3", "head_dim": 16, "rope_parameters": { "rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5, "rope_theta": 1e6 } }"#,
];

const CONFIG_WORDS: [&str; 12] = [
    "\"text_config\":{",
    "\"model_type\":\"mixtral\",",
    "\"num_local_experts\":8,",
    "\"quantization_config\":{},",
    "\"hidden_size\":32,",
    "\"n_embd\":",
    "\"rope_scaling\":{\"type\":\"yarn\",",
    "\"sliding_window\":8,",
    "\"kv_lora_rank\":8,",
    "\"mlp_only_layers\":[0,1],",
    "\"moe_layer_freq\":2,",
    "\"first_k_dense_replace\":1,",
];

#[test]
fn fuzz_config() {
    let good = CONFIGS.map(|text| text.as_bytes().to_vec());
    fuzz(
        "config",
        &good,
        &CONFIG_WORDS,
        |input| input,
        |input| {
            let Ok(text) = std::str::from_utf8(input) else { return false };
            if let Ok(found) = HfModel::read(text) {
                assert!(found.model.param_count() > 0);
                let _ = found.model.to_hf_config();
            }
            match ModelSpec::from_hf_config(text) {
                Ok(model) => model
                    .to_hf_config()
                    .map(|c| ModelSpec::from_hf_config(&c.to_string()))
                    .is_ok_and(|m| m.is_ok()),
                Err(_) => false,
            }
        },
    );
}
