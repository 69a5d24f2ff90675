//! Models that `transformers` saved (see `hf/make.py`), read and written back.

use std::fs;
use std::path::{Path, PathBuf};

use ckpt::hf;
use safetensors::SafeTensors;
use spec::DType;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hf").join(name)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn check(name: &str) {
    let dir = fixture(name);
    let (spec, weights) = hf::import(&dir).unwrap();
    let expected = fs::read(dir.join("expected.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(weights.names().count(), expected.len());
    let read = |name: &str| {
        let shape = weights.shape(name).unwrap();
        let mut out = vec![0.0; shape.iter().product()];
        weights.read(name, 0, if shape.len() == 1 { 1 } else { shape[0] }, &mut out).unwrap();
        out
    };
    for name in weights.names() {
        let tensor = expected.tensor(name).unwrap();
        assert_eq!(weights.shape(name).unwrap(), tensor.shape(), "{name}");
        assert_eq!(read(name), floats(tensor.data()), "{name}");
    }

    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join(name);
    hf::export(&spec, |name| Ok(read(name)), &out, DType::F32, u64::MAX, None).unwrap();
    let (ours, theirs) =
        (fs::read(out.join("model.safetensors")).unwrap(), fs::read(dir.join("model.safetensors")).unwrap());
    let (ours, theirs) =
        (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (name, tensor) in theirs.tensors() {
        assert_eq!(ours.tensor(&name).unwrap(), tensor, "{name}");
    }
}

#[test]
fn llama() {
    check("llama");
}

#[test]
fn qwen3() {
    check("qwen3");
}

#[test]
fn gpt2() {
    check("gpt2");
}
