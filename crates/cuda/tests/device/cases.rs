//! Models and recipes with what the plain ones lack: the numbers of the CPU, and the same bits under other splits.

use program::{Mode, Recipe, Request};
use spec::{
    Activation, DType, Experts, Latent, Layout, ModelSpec, Optimizer, Router, RunSpec, Score, Window, Zero,
};
use train::{Device, Executor, Mesh};

use crate::against_cpu::compare;
use crate::bits::together;
use crate::common::{self, SEQUENCE, first_difference, steps, token, weights};
use crate::{STEPS, cpu, executor_of, gpu};

/// A small model whose heads have a width that bf16 takes.
pub(crate) fn model(layers: usize, tied: bool, gpt2: bool) -> ModelSpec {
    ModelSpec { head_dim: 16, ..common::model(layers, tied, gpt2) }
}

/// A model, and how it is trained.
struct Case {
    model: ModelSpec,
    recipe: Recipe,
}

impl Case {
    fn check(&self, precision: DType) {
        // In bf16 roundings choose another expert now and then.
        let within = match (precision, self.model.experts) {
            (DType::F32, _) => (2e-5, 2e-5),
            (_, None) => (1e-2, 2e-2),
            (_, Some(_)) => (2e-2, 1e-1),
        };
        compare(&self.recipe, &self.model, precision, within);
        let one = Layout::default();
        let run = |layout: &Layout| {
            let device = Box::new(gpu()?);
            let mut exec = executor_of(self.recipe, device, &self.model, layout, (precision, false));
            steps(&mut exec, self.model.vocab, 1, STEPS + 1);
            exec.swap_average().expect("swapped");
            Some(weights(&exec))
        };
        let Some(expected) = run(&one) else { return };
        let found =
            run(&Layout { micro_batch: 2, recompute: spec::Recompute::Full, ..one }).expect("the same GPU");
        assert_eq!(first_difference(&expected, &found), None, "{} in {precision}", self.model.name);
    }

    /// Holds ranks that share the GPU to one alone: in bits, or within a share of each step's loss.
    fn check_ranks(&self, layout: &Layout, within: Option<f64>) {
        let Case { model, recipe } = self;
        let Some(device) = gpu() else { return };
        // In bf16 a rank under ZeRO has no whole masters.
        let precision = DType::F32;
        let mut exec = executor_of(*recipe, Box::new(device), model, &Layout::default(), (precision, false));
        let alone = steps(&mut exec, model.vocab, 1, STEPS + 1);
        let (found, losses) = together(*recipe, model, layout, precision);
        let Some(within) = within else {
            assert_eq!(first_difference(&weights(&exec), &found), None, "{} under {layout:?}", model.name);
            return;
        };
        assert_eq!(losses.len(), alone.len());
        for (step, (a, b)) in losses.iter().zip(&alone).enumerate() {
            let off = (a / b.loss - 1.0).abs();
            assert!(off < within, "step {step} of {} under {layout:?}: {a} against {}", model.name, b.loss);
        }
    }
}

#[test]
fn losses_dropout_and_averages() {
    let squeezed = ModelSpec { logit_softcap: 9.0, ..model(2, true, false) };
    let recipe = Recipe { z_loss: 0.01, dropout: 0.2, ema: true, ..Recipe::default() };
    Case { model: squeezed.clone(), recipe }.check(DType::F32);
    Case { model: squeezed, recipe }.check(DType::Bf16);
    // Biases of GPT-2 are added where elements are left out, and before.
    Case { model: model(1, false, true), recipe }.check(DType::Bf16);
}

/// Probabilities that attention leaves out: those of the CPU, by micro-batches of any size, on every rank of heads or
/// stages, with windows, sinks, documents, grouped queries and latents.
#[test]
fn dropout_of_probabilities() {
    let recipe = Recipe { attention_dropout: 0.2, ..Recipe::default() };
    let plain = Case { model: model(2, true, false), recipe };
    plain.check(DType::F32);
    plain.check(DType::Bf16);
    plain.check_ranks(&Layout { dp: 2, zero: Zero::Gradients, ..Layout::default() }, None);
    plain.check_ranks(&Layout { pp: 2, micro_batch: 2, ..Layout::default() }, None);
    plain.check_ranks(&Layout { tp: 2, ..Layout::default() }, Some(1e-5));
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 2 });
    let sunk = ModelSpec { window, sinks: true, head_dim: 64, ..model(2, false, false) };
    Case { model: sunk, recipe: Recipe { documents: true, dropout: 0.1, ..recipe } }.check(DType::Bf16);
    let latent = Latent { query_rank: Some(24), kv_rank: 16, nope_dim: 64, rope_dim: 32, value_dim: 64 };
    let base = model(1, false, false);
    let latent = ModelSpec { kv_heads: base.heads, latent: Some(latent), ..base };
    Case { model: latent, recipe }.check(DType::Bf16);
}

/// The loss of one token more has a weight, and its own sum.
#[test]
fn one_token_more() {
    let mtp = Some(spec::Mtp { weight: 0.3 });
    let model = ModelSpec { mtp, ..model(1, false, false) };
    Case { model: model.clone(), recipe: Recipe::default() }.check(DType::F32);
    Case { model, recipe: Recipe::default() }.check(DType::Bf16);
}

/// Windows in every second layer, sinks, and documents that attention keeps inside.
#[test]
fn windows_sinks_and_documents() {
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 2 });
    let far = ModelSpec { window, ..model(2, false, false) };
    let recipe = Recipe { documents: true, ..Recipe::default() };
    let sunk = ModelSpec { sinks: true, ..far.clone() };
    Case { model: far, recipe: Recipe::default() }.check(DType::Bf16);
    Case { model: sunk.clone(), recipe }.check(DType::F32);
    Case { model: ModelSpec { head_dim: 64, ..sunk }, recipe }.check(DType::Bf16);
}

/// Muon's matrices, tall ones and wide, and scores that are bounded.
#[test]
fn muon_and_bounded_scores() {
    let recipe = Recipe { optimizer: Optimizer::Muon, qk_clip: 0.5, ..Recipe::default() };
    let model = model(2, false, false);
    let case = Case { model, recipe };
    case.check(DType::F32);
    case.check(DType::Bf16);
    // Ranks take matrices by turns.
    case.check_ranks(&Layout { dp: 2, zero: Zero::Optimizer, ..Layout::default() }, None);
    // Of each matrix they hold parts, by rows or by columns: sums inside products go in another order.
    case.check_ranks(&Layout { tp: 2, ..Layout::default() }, Some(1e-5));
}

/// Experts by softmax and by sigmoid, in groups, with losses of their router's own, biases that move, and bounds.
#[test]
fn mixtures() {
    let recipe = Recipe::default();
    let groups = Router {
        score: Score::Sigmoid,
        scale: 1.5,
        groups: 2,
        top_groups: 1,
        balance_loss: 0.02,
        z_loss: 0.01,
        expert_bias: true,
        bias_rate: 0.01,
        ..Router::PLAIN
    };
    Case { model: mixture(groups, Activation::SwiGlu), recipe }.check(DType::F32);
    let router = Router { bias: true, ..Router::PLAIN };
    let model = |router| ModelSpec { mlp_bias: true, ..mixture(router, Activation::SwiGluClamped) };
    Case { model: model(Router { balance_loss: 0.02, ..router }), recipe }.check(DType::F32);
    let recipe = Recipe { optimizer: Optimizer::Muon, ..Recipe::default() };
    // Tensor-parallel ranks route parts of sequences, which a balance's loss is not of.
    let case = Case { model: model(router), recipe };
    case.check(DType::Bf16);
    case.check_ranks(&Layout { dp: 2, zero: Zero::Gradients, ..Layout::default() }, None);
    case.check_ranks(&Layout { tp: 2, ..Layout::default() }, Some(1e-5));
}

/// Keys, values and queries out of latents: DeepSeek-V2's, V3's with experts, Kimi's with bounded scores.
#[test]
fn latents() {
    let small = Latent { query_rank: None, kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    let wide = Latent { query_rank: Some(24), kv_rank: 16, nope_dim: 64, rope_dim: 32, value_dim: 64 };
    let of = |base: ModelSpec, latent| {
        let (kv_heads, latent) = (base.heads, Some(latent));
        ModelSpec { kv_heads, latent, ..base }
    };
    let plain = Case { model: of(model(2, false, false), small), recipe: Recipe::default() };
    plain.check(DType::F32);
    plain.check_ranks(&Layout { dp: 2, zero: Zero::Parameters, ..Layout::default() }, None);
    plain.check_ranks(&Layout { tp: 2, sequence_parallel: true, ..Layout::default() }, Some(1e-5));
    let router = Router { score: Score::Sigmoid, scale: 2.5, ..Router::PLAIN };
    let deep = of(mixture(router, Activation::SwiGlu), wide);
    Case { model: deep.clone(), recipe: Recipe::default() }.check(DType::Bf16);
    let recipe = Recipe { optimizer: Optimizer::Muon, qk_clip: 0.5, documents: true, ..Recipe::default() };
    let case = Case { model: deep, recipe };
    case.check(DType::F32);
    // Muon's polynomials are steep: what sums over two ranks round differently grows a hundredfold in an update.
    case.check_ranks(&Layout { tp: 2, ..Layout::default() }, Some(1e-4));
}

/// A small model with experts in its layer, and one that all tokens go to.
pub(crate) fn mixture(router: Router, activation: Activation) -> ModelSpec {
    let experts = Experts { count: 4, top_k: 2, ffn: 40, shared_ffn: 24, dense_layers: 0, every: 1, router };
    ModelSpec { experts: Some(experts), activation, ..model(1, false, false) }
}

/// A batch that grows: programs of two sizes by turns in one arena, each recorded anew.
#[test]
fn batches_that_grow() {
    let keys = [
        "model.preset=tiny",
        "model.head_dim=16",
        "model.vocab=257",
        "data.vocab_size=257",
        "batch.sequences=4",
        "batch.ramp=[2,2,6]",
    ];
    let keys = keys.map(String::from).into_iter().chain([format!("batch.sequence={SEQUENCE}")]);
    let run = RunSpec::load(None, &keys.collect::<Vec<_>>(), &RunSpec::no_files).expect("a run");
    let train = |device: Box<dyn Device>, record| {
        let mut exec = Executor::on(device, &Request::of(&run, 0), Mesh::alone(), record).expect("a program");
        exec.initialise(&run.model, 11).expect("weights");
        let sizes = (1..).zip([2, 2, 2, 4, 4, 4, 2, 2, 2, 4]);
        let losses: Vec<f64> = sizes
            .flat_map(|(step, sequences)| {
                exec.resize(&run, sequences).expect("a size of the ramp");
                steps(&mut exec, run.model.vocab, step, step + 1)
            })
            .map(|s| s.loss)
            .collect();
        (weights(&exec), losses)
    };
    let Some(device) = gpu() else { return };
    let (recorded, losses) = train(Box::new(device), false);
    let (one_by_one, _) = train(Box::new(gpu().expect("the same GPU")), true);
    assert_eq!(first_difference(&recorded, &one_by_one), None, "call by call");
    for (step, (a, b)) in losses.iter().zip(train(cpu(), false).1).enumerate() {
        assert!((a / b - 1.0).abs() < 2e-5, "step {step}: {a} against {b}");
    }
}

/// What a token that is generated sees, and logits that are squeezed: those of the CPU.
#[test]
fn generation_within_windows() {
    let window = Some(Window { tokens: 3, full_layers: 0, full_every: 2 });
    let model = ModelSpec { window, sinks: true, logit_softcap: 9.0, ..model(2, false, false) };
    check_generation(&model);
    let latent = Latent { query_rank: Some(20), kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    check_generation(&ModelSpec { kv_heads: model.heads, latent: Some(latent), ..model });
}

fn check_generation(model: &ModelSpec) {
    let tokens: Vec<u32> = (0..SEQUENCE).map(|i| token(1, 0, i, model.vocab)).collect();
    let logits = |device: Box<dyn Device>| {
        let layout = Layout::default();
        let request = Request {
            model,
            layout: &layout,
            sequence: SEQUENCE,
            sequences: 1,
            precision: DType::F32,
            rank: 0,
            mode: Mode::Generate { positions: SEQUENCE },
            loss: Default::default(),
            recipe: Recipe::default(),
        };
        let mut exec = Executor::on(device, &request, Mesh::alone(), false).expect("a program");
        exec.initialise(model, 11).expect("weights");
        exec.all_logits(&tokens).expect("logits").concat()
    };
    let Some(gpu) = gpu() else { return };
    let (ours, theirs) = (logits(Box::new(gpu)), logits(cpu()));
    let far = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(ours.len() == theirs.len() && far < 1e-4, "logits are off by {far}");
}
