//! Models whose matrices are stored in few bits, written by the reference crate for safetensors.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use spec::{DType, ModelSpec};

use super::tests::{check_refused, deepseek, gpt_oss, weights};
use super::{SINGLE, export, import};

/// Element type, shape and bytes by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Exports a model in float32 and changes what was written.
fn written(spec: &ModelSpec, change: impl FnOnce(&mut Tensors)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    export(spec, weights(spec), &out, DType::F32, u64::MAX, None).unwrap();
    let bytes = std::fs::read(out.join(SINGLE)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of = |(name, t): (String, TensorView<'_>)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()));
    let mut tensors: Tensors = file.tensors().into_iter().map(of).collect();
    change(&mut tensors);
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    std::fs::write(out.join(SINGLE), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

/// Bytes that differ from their neighbours, none of them above `most`.
fn bytes(n: usize, most: u8) -> Vec<u8> {
    (0..n).map(|i| ((i * 31 + i / 7) % (usize::from(most) + 1)) as u8).collect()
}

#[track_caller]
fn read(dir: &Path, name: &str, (rows, cols): (usize, usize)) -> Vec<f32> {
    let (_, weights) = import(&dir.join("out")).unwrap();
    let mut out = vec![f32::NAN; rows * cols];
    weights.read(name, 0, rows, &mut out).unwrap();
    // A box from the middle is the same numbers.
    let (r, c) = (rows / 3, cols / 3);
    let mut part = vec![f32::NAN; (rows - r) * (cols - c - 1)];
    weights.read_box(name, r, rows - r, c, cols - c - 1, &mut part).unwrap();
    for (i, x) in part.iter().enumerate() {
        let (i, j) = (i / (cols - c - 1), i % (cols - c - 1));
        assert_eq!(*x, out[(r + i) * cols + c + j], "{name} {i} {j}");
    }
    out
}

#[test]
fn experts_in_mxfp4() {
    let spec = ModelSpec { hidden: 64, ..gpt_oss() };
    let e = spec.experts.unwrap();
    let spec = ModelSpec { ffn: 32, experts: Some(spec::Experts { ffn: 32, ..e }), ..spec };
    let (count, hidden, ffn) = (e.count, 64, 32);
    let (blocks, scales) =
        (bytes(count * 2 * ffn * hidden / 2, 255), bytes(count * 2 * ffn * hidden / 32, 200));
    let name = "model.layers.1.mlp.experts.gate_up_proj";
    let dir = written(&spec, |tensors| {
        tensors.remove(name).unwrap();
        let shape = vec![count, 2 * ffn, hidden / 32, 16];
        tensors.insert(format!("{name}_blocks"), (Dtype::U8, shape.clone(), blocks.clone()));
        tensors.insert(format!("{name}_scales"), (Dtype::U8, shape[..3].to_vec(), scales.clone()));
    });
    // Of each expert gates and ups alternate, each a row of its own.
    let sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for expert in 0..count {
        for (turn, part) in ["gate", "up"].into_iter().enumerate() {
            let found =
                read(dir.path(), &format!("layers.1.mlp.experts.{expert}.{part}.weight"), (ffn, hidden));
            for (i, x) in found.iter().enumerate() {
                let (row, col) = (expert * 2 * ffn + i / hidden * 2 + turn, i % hidden);
                let byte = blocks[(row * hidden + col) / 2];
                let bits = if col % 2 == 0 { byte % 16 } else { byte / 16 };
                let sign = if bits < 8 { 1.0 } else { -1.0 };
                let scale = 2f32.powi(i32::from(scales[(row * hidden + col) / 32]) - 127);
                assert_eq!(*x, sign * sizes[usize::from(bits % 8)] * scale, "{expert} {part} {i}");
            }
        }
    }
    let dir = written(&spec, |tensors| {
        tensors.remove(name).unwrap();
        let shape = vec![count, 2 * ffn, hidden / 32, 16];
        tensors.insert(format!("{name}_blocks"), (Dtype::U8, shape, blocks));
    });
    check_refused(&dir.path().join("out"), &format!("tensor {} [", &name["model.".len()..]));
}

#[test]
fn matrices_in_e4m3() {
    let wide = ModelSpec { hidden: 160, ffn: 300, ..deepseek()[1].clone() };
    let name = "model.layers.0.mlp.down_proj.weight";
    let elements = bytes(160 * 300, 0x7e);
    let scales: Vec<f32> = (0..2 * 3).map(|i| 0.25 * (i + 1) as f32).collect();
    let raw = |scales: &[f32]| scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>();
    let dir = written(&wide, |tensors| {
        tensors.insert(name.to_owned(), (Dtype::F8_E4M3, vec![160, 300], elements.clone()));
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, vec![2, 3], raw(&scales)));
    });
    for (i, x) in read(dir.path(), "layers.0.mlp.down.weight", (160, 300)).iter().enumerate() {
        let (bits, scale) = (elements[i], scales[i / 300 / 128 * 3 + i % 300 / 128]);
        let (exponent, mantissa) = (i32::from(bits / 8), f32::from(bits % 8) / 8.0);
        let size =
            if exponent == 0 { mantissa * 2f32.powi(-6) } else { (1.0 + mantissa) * 2f32.powi(exponent - 7) };
        assert_eq!(*x, size * scale, "{i}");
    }
    let without = written(&wide, |tensors| {
        tensors.insert(name.to_owned(), (Dtype::F8_E4M3, vec![160, 300], elements.clone()));
    });
    check_refused(&without.path().join("out"), "down_proj.weight has no scales");
    let uneven = written(&wide, |tensors| {
        tensors.insert(name.to_owned(), (Dtype::F8_E4M3, vec![160, 300], elements));
        tensors.insert(format!("{name}_scale_inv"), (Dtype::F32, vec![3, 2], raw(&scales)));
    });
    check_refused(&uneven.path().join("out"), "expected F32 [2, 3]: a scale for each 128 rows and columns");
}
