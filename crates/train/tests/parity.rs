//! The same numbers as PyTorch: loss, every gradient tensor, logits and ten AdamW steps, on models that
//! `transformers` made (see `tests/golden/README.md`).

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use ckpt::hf::HfWeights;
use common::golden;
use program::{Recipe, Request};
use serde_json::Value;
use spec::{DType, Experts, Layout, ModelSpec, Optimizer, Position, Router};
use train::{Executor, Mesh, StepInputs, StepOutputs};

const SEQUENCE: usize = 24;

struct Golden {
    model: ModelSpec,
    batches: Vec<(Vec<u32>, Vec<u32>)>,
    train: Value,
    name: &'static str,
}

impl Golden {
    fn load(name: &'static str) -> (Golden, HfWeights) {
        let (model, weights) = ckpt::hf::import(&golden(name)).expect("an imported model");
        let json = |file: &str| -> Value {
            let text = std::fs::read_to_string(golden(name).join(file)).expect("a golden file");
            serde_json::from_str(&text).expect("JSON")
        };
        let flat = |v: &Value| -> Vec<u32> {
            let rows = v.as_array().expect("rows").iter().flat_map(|r| r.as_array().expect("a row"));
            // -100 marks an ignored target.
            rows.map(|t| u32::try_from(t.as_i64().expect("an id")).unwrap_or(u32::MAX)).collect()
        };
        let batches = json("batch.json");
        let batches = batches.as_array().expect("batches").iter();
        let batches = batches.map(|b| (flat(&b["tokens"]), flat(&b["targets"]))).collect();
        (Golden { model, batches, train: json("train.json"), name }, weights)
    }

    fn executor(&self, weights: &HfWeights, micro_batch: usize, optimizer: Optimizer) -> Executor {
        let layout = Layout { micro_batch, ..Layout::default() };
        let request = Request {
            model: &self.model,
            layout: &layout,
            sequence: SEQUENCE,
            sequences: 4,
            precision: DType::F32,
            rank: 0,
            mode: program::Mode::Train,
            loss: Default::default(),
            recipe: Recipe { optimizer, ..Recipe::default() },
        };
        let mut exec = Executor::new(&request, 2, Mesh::alone(), false).expect("a program");
        exec.set_tables(&self.model).expect("tables");
        exec.set_params(&mut |p, out| weights.read_box(&p.name, p.row0, p.rows, p.col0, p.cols, out))
            .expect("weights");
        exec
    }

    /// A step on a batch; learning rate 0 leaves the weights alone.
    fn step(&self, exec: &mut Executor, batch: usize, step: u64, lr: f64) -> StepOutputs {
        let (tokens, targets) = &self.batches[batch];
        exec.tokens().copy_from_slice(tokens);
        exec.targets().copy_from_slice(targets);
        let valid_tokens = targets.iter().filter(|&&t| t != u32::MAX).count() as u64;
        let inputs = StepInputs { lr, ..common::inputs(step, valid_tokens) };
        exec.step(&inputs).expect("a step")
    }

    /// Tensors of a file that goes by Hugging Face names, by our names.
    fn tensors(&self, file: &str) -> HfWeights {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::copy(golden(self.name).join(file), dir.path().join("model.safetensors")).expect("copy");
        // Biases of experts have no gradient, and these steps leave them as they are: the files lack them.
        let router = |r: Router| Router { expert_bias: false, ..r };
        let experts = self.model.experts.map(|e| Experts { router: router(e.router), ..e });
        let model = ModelSpec { experts, ..self.model.clone() };
        HfWeights::open(dir.path(), &model).expect("tensors under the model's names")
    }

    fn numbers(&self, key: &str) -> Vec<f64> {
        let list = self.train.pointer(key).and_then(Value::as_array).expect("a list");
        list.iter().map(|v| v.as_f64().expect("a number")).collect()
    }
}

/// The largest distance of a tensor as a share of its norm, with the tensor's name.
fn distance(ours: &BTreeMap<String, Vec<f32>>, theirs: &HfWeights, model: &ModelSpec) -> (f64, String) {
    let no_rotation = matches!(model.position, Position::Learned { .. });
    let mut worst = (0.0, String::new());
    for (name, a) in ours.iter().filter(|(name, _)| !name.ends_with("expert_bias")) {
        let mut b = vec![0.0; a.len()];
        let rows = theirs.shape(name).map_or(1, |s| if s.len() == 2 { s[0] } else { 1 });
        theirs.read(name, 0, rows, &mut b).expect(name);
        let norm = b.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let off = a.iter().zip(&b).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum::<f64>().sqrt();
        // The gradient of a key bias is zero but for rounding (a constant added to every key changes no softmax), and
        // AdamW divides that rounding by its own size.
        let no_gradient = name.ends_with("attn.k.bias") && no_rotation;
        if !no_gradient && off / norm > worst.0 {
            worst = (off / norm, name.clone());
        }
    }
    worst
}

fn collect(each: impl Fn(&mut dyn FnMut(&program::ParamPart, &[f32]))) -> BTreeMap<String, Vec<f32>> {
    let mut all = BTreeMap::new();
    each(&mut |part, values| {
        all.insert(part.name.clone(), values.to_vec());
    });
    all
}

fn check(name: &'static str, weights_tolerance: f64) {
    let (g, weights) = Golden::load(name);
    for (file, batch) in [("grads.safetensors", 0), ("grads_masked.safetensors", 1)] {
        let mut exec = g.executor(&weights, 4, Optimizer::AdamW);
        let out = g.step(&mut exec, batch, 1, 0.0);
        let expected = g.numbers("/initial_losses/float64")[batch];
        assert!((out.loss / expected - 1.0).abs() < 2e-6, "{name}: loss {} against {expected}", out.loss);
        let grads = collect(|f| exec.each_grad(f).expect("on this machine"));
        let (off, tensor) = distance(&grads, &g.tensors(file), &g.model);
        assert!(off < 1e-5, "{name}: gradient of {tensor} is off by {off:e} of its norm");
    }
    let mut exec = g.executor(&weights, 2, Optimizer::AdamW);
    ten_steps(&g, &mut exec, 1e-2);
    let ours = collect(|f| exec.each_param(f).expect("on this machine"));
    let (off, tensor) = distance(&ours, &g.tensors("after10.safetensors"), &g.model);
    assert!(off < weights_tolerance, "{name}: {tensor} after ten steps is off by {off:e} of its norm");
}

/// Ten steps whose losses and gradient norms are those of the golden.
fn ten_steps(g: &Golden, exec: &mut Executor, lr: f64) {
    let name = g.name;
    let (losses, norms) = (g.numbers("/float64/losses"), g.numbers("/float64/grad_norms"));
    for k in 0..10 {
        let out = g.step(exec, k % 3, k as u64 + 1, lr);
        assert!(
            (out.loss / losses[k] - 1.0).abs() < 3e-5,
            "{name} step {k}: {} against {}",
            out.loss,
            losses[k]
        );
        assert!(
            (out.grad_norm / norms[k] - 1.0).abs() < 3e-4,
            "{name} step {k}: {} / {}",
            out.grad_norm,
            norms[k]
        );
    }
}

/// Ten steps of torch.optim.Muon, in float64, for the matrices inside layers, and of AdamW for the rest.
#[test]
fn muon_beside_adamw() {
    for (name, tolerance) in [("llama-gqa", 2e-4), ("deepseek-v3-like", 2e-4)] {
        let (mut g, weights) = Golden::load(name);
        let text = std::fs::read_to_string(golden(name).join("muon.json")).expect("a golden file");
        g.train = serde_json::from_str(&text).expect("JSON");
        let mut exec = g.executor(&weights, 2, Optimizer::Muon);
        ten_steps(&g, &mut exec, 3e-3);
        let ours = collect(|f| exec.each_param(f).expect("on this machine"));
        let (off, tensor) = distance(&ours, &g.tensors("muon10_from64.safetensors"), &g.model);
        assert!(off < tolerance, "{name}: {tensor} after ten steps is off by {off:e} of its norm");
    }
}

#[test]
fn llama_with_grouped_queries() {
    check("llama-gqa", 2e-4);
}

#[test]
fn llama_3_rotary_scaling() {
    check("llama3-rope", 5e-4);
}

#[test]
fn qwen_2_with_biases() {
    check("qwen2-like", 2e-3);
}

#[test]
fn qwen_3_with_head_norms() {
    check("qwen3-like", 2e-4);
}

#[test]
fn mixtral() {
    check("mixtral-like", 2e-4);
}

#[test]
fn qwen_3_mixture_with_a_dense_layer() {
    check("qwen3-moe-like", 2e-4);
}

#[test]
fn deepseek_v2_with_latents() {
    check("deepseek-v2-like", 2e-4);
}

#[test]
fn deepseek_v3_with_latent_queries_and_groups() {
    check("deepseek-v3-like", 2e-4);
}

#[test]
fn kimi_with_expert_biases_and_scaled_scores() {
    check("kimi-like", 2e-4);
}

#[test]
fn one_token_more_behind_latents() {
    check("mtp-like", 2e-4);
}

#[test]
fn mistral_over_windows() {
    check("mistral-like", 2e-4);
}

#[test]
fn gpt_oss_with_sinks_windows_and_biases() {
    check("gpt-oss-like", 2e-4);
}

#[test]
fn gpt_2() {
    check("gpt2", 2e-4);
}

/// Logits of the generation path, one token after another against a cache, equal those of `transformers`.
#[test]
fn logits_agree_with_transformers() {
    for name in [
        "llama-gqa",
        "llama3-rope",
        "qwen2-like",
        "qwen3-like",
        "mixtral-like",
        "qwen3-moe-like",
        "deepseek-v2-like",
        "deepseek-v3-like",
        "kimi-like",
        "mistral-like",
        "gpt-oss-like",
        "gpt2",
    ] {
        let (g, weights) = Golden::load(name);
        let layout = Layout::default();
        let request = Request {
            model: &g.model,
            layout: &layout,
            sequence: SEQUENCE,
            sequences: 1,
            precision: DType::F32,
            rank: 0,
            mode: program::Mode::Generate { positions: SEQUENCE },
            loss: Default::default(),
            recipe: Default::default(),
        };
        let mut exec = Executor::new(&request, 1, Mesh::alone(), false).expect("a program");
        exec.set_tables(&g.model).expect("tables");
        exec.set_params(&mut |p, out| weights.read_box(&p.name, p.row0, p.rows, p.col0, p.cols, out))
            .expect("weights");
        let expected = logits(&golden(name));
        let vocab = g.model.vocab;
        let rows = exec.all_logits(&g.batches[0].0[..SEQUENCE]).expect("logits");
        for (i, row) in rows.iter().enumerate() {
            for (a, b) in row.iter().zip(&expected[i * vocab..]) {
                assert!((a - b).abs() < 2e-5 * (1.0 + b.abs()), "{name} position {i}: {a} against {b}");
            }
        }
    }
}

fn logits(dir: &Path) -> Vec<f32> {
    let bytes = std::fs::read(dir.join("logits.safetensors")).expect("logits");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let data = file.tensor("logits").expect("a tensor");
    data.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}

/// What was imported goes out as it came in: stacks of experts whose gates and ups alternate, sinks, windows.
#[test]
fn exports_are_what_was_imported() {
    for name in ["mistral-like", "gpt-oss-like", "deepseek-v3-like", "kimi-like", "mtp-like"] {
        let (g, weights) = Golden::load(name);
        let dir = tempfile::tempdir().expect("a folder");
        let out = dir.path().join("out");
        let whole = |name: &str| {
            let shape = weights.shape(name).expect("a parameter");
            let mut all = vec![0.0; shape.iter().product()];
            weights.read(name, 0, if shape.len() == 2 { shape[0] } else { 1 }, &mut all).map(|()| all)
        };
        ckpt::hf::export(&g.model, whole, &out, DType::F32, u64::MAX, None).expect("exported");
        let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).expect("weights");
        let (ours, theirs) = (read(&out), read(&golden(name)));
        let tensors = |bytes: &[u8]| {
            let file = safetensors::SafeTensors::deserialize(bytes).expect("safetensors");
            let of = |(name, t): (String, safetensors::tensor::TensorView<'_>)| {
                (name, (t.shape().to_vec(), t.data().to_vec()))
            };
            file.tensors().into_iter().map(of).collect::<BTreeMap<_, _>>()
        };
        assert!(tensors(&ours) == tensors(&theirs), "{name}");
        let (again, _) = ckpt::hf::import(&out).expect("imported again");
        assert_eq!(again, g.model, "{name}");
    }
}
