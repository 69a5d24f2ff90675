//! Helpers of the integration tests: tiny models, fixed batches, weights as maps.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses some of it")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use comm::World;
use program::{Emitter, Mode, Recipe, Request, Role, RowFn, ValueId};
use spec::{DType, Experts, Latent, Layout, ModelSpec, Optimizer, Router, Window};
use train::{Executor, Mesh, StepInputs, StepOutputs};

pub const SEQUENCE: usize = 16;

/// Steps of [`train`].
pub const STEPS: u64 = 10;

/// A step of AdamW and nothing else, as [`Recipe::default`] is.
pub const PLAIN: Recipe = Recipe {
    optimizer: Optimizer::AdamW,
    z_loss: 0.0,
    documents: false,
    dropout: 0.0,
    attention_dropout: 0.0,
    qk_clip: 0.0,
    ema: false,
    ramp: None,
};

/// Every kind of matrix: queries with fewer keys, gate and up, and experts with a shared one.
pub fn mixture() -> ModelSpec {
    let router = Router { z_loss: 0.05, ..Router::PLAIN };
    let experts = Experts { count: 4, top_k: 2, ffn: 128, shared_ffn: 32, dense_layers: 1, every: 1, router };
    ModelSpec { experts: Some(experts), ..model(4, false, false) }
}

/// A small model with every parameter kind of its family.
pub fn model(layers: usize, tied: bool, gpt2: bool) -> ModelSpec {
    let family = ModelSpec::preset(if gpt2 { "tiny-gpt2" } else { "tiny" }).expect("a preset");
    ModelSpec { layers, qk_norm: !gpt2 && tied, tied_embeddings: tied, init_std: 0.08, ..family }
}

/// A model in which a query sees what of a sequence lies on several ranks, and not all of that.
pub fn windowed() -> ModelSpec {
    let window = Some(Window { tokens: 5, full_layers: 0, full_every: 2 });
    ModelSpec { window, sinks: true, ..model(3, false, false) }
}

/// One with latent attention.
pub fn latent() -> ModelSpec {
    let latent = Latent { query_rank: Some(10), kv_rank: 12, nope_dim: 6, rope_dim: 4, value_dim: 8 };
    ModelSpec { latent: Some(latent), kv_heads: 4, ..model(3, false, false) }
}

pub fn executor(
    model: &ModelSpec,
    layout: &Layout,
    sequences: usize,
    precision: DType,
    threads: usize,
) -> Executor {
    executor_of(Recipe::default(), model, layout, (sequences, precision, threads))
}

pub fn executor_of(
    recipe: Recipe,
    model: &ModelSpec,
    layout: &Layout,
    (sequences, precision, threads): (usize, DType, usize),
) -> Executor {
    let request = Request {
        model,
        layout,
        sequence: SEQUENCE,
        sequences,
        precision,
        rank: 0,
        mode: Mode::Train,
        loss: Default::default(),
        recipe,
    };
    let mut exec = Executor::new(&request, threads, Mesh::alone(), false).expect("a valid layout");
    exec.initialise(model, 11).expect("weights");
    exec
}

/// Token `i` of sequence `s` of step `k`: any fixed noise will do.
pub fn token(k: u64, s: usize, i: usize, vocab: usize) -> u32 {
    let mut x = k.wrapping_mul(0x9e37_79b9) ^ (s as u64) << 20 ^ i as u64 ^ 0x5bd1_e995;
    for _ in 0..3 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        x ^= x >> 29;
    }
    (x % vocab as u64) as u32
}

/// Every third target of odd sequences is ignored, so that sequences differ in valid tokens.
pub fn target(k: u64, s: usize, i: usize, vocab: usize) -> u32 {
    if !s.is_multiple_of(2) && i.is_multiple_of(3) { u32::MAX } else { token(k, s, i + 1, vocab) }
}

/// Where the document of token `i` begins: some end at any token.
pub fn document(k: u64, s: usize, i: usize) -> u32 {
    (1..=i).rev().find(|i| token(k, s, *i, 4) == 0).unwrap_or(0) as u32
}

/// Fills in this rank's sequences of step `k` and returns the valid targets of the global batch.
pub fn fill(exec: &mut Executor, vocab: usize, k: u64) -> u64 {
    let packed = !exec.starts().is_empty();
    let (t, all) = (exec.program.sequence, exec.program.sequences);
    let local = exec.program.local_sequence();
    for i in 0..exec.program.local_sequences {
        let s = exec.program.place(i);
        for (at, j) in exec.program.positions().into_iter().flatten().enumerate() {
            exec.tokens()[i * local + at] = token(k, s, j, vocab);
            exec.targets()[i * local + at] = target(k, s, j, vocab);
        }
        let ends = exec.program.positions().map(|run| run.end);
        // Runs that follow each other are one.
        let runs = exec.behind().len() / exec.program.local_sequences;
        for (at, end) in ends[ends.len() - runs..].iter().enumerate() {
            exec.behind()[i * runs + at] = match *end < t {
                true => [token(k, s, *end, vocab), target(k, s, *end, vocab)],
                false => [target(k, s, t - 1, vocab), u32::MAX],
            };
        }
        let seen: Vec<usize> = exec.program.seen().into_iter().flatten().filter(|_| packed).collect();
        for (at, j) in seen.iter().enumerate() {
            exec.starts()[i * seen.len() + at] = document(k, s, *j);
        }
    }
    let valid = |s: usize| (0..t).filter(|&j| target(k, s, j, vocab) != u32::MAX).count() as u64;
    (0..all).map(valid).sum()
}

pub fn inputs(step: u64, valid_tokens: u64) -> StepInputs {
    StepInputs { valid_tokens, eps: 1e-8, ..StepInputs::adamw(step, 1e-2, 0) }
}

/// Runs steps `from..to` (from 1) and returns each one's outputs.
pub fn steps(exec: &mut Executor, vocab: usize, from: u64, to: u64) -> Vec<StepOutputs> {
    (from..to)
        .map(|k| {
            let valid = fill(exec, vocab, k);
            exec.step(&inputs(k, valid)).expect("a step")
        })
        .collect()
}

/// All weights by name, as bits.
pub fn weights(exec: &Executor) -> BTreeMap<String, Vec<u32>> {
    let mut all = BTreeMap::new();
    exec.each_param(&mut |part, values| {
        all.insert(part.name.clone(), values.iter().map(|v| v.to_bits()).collect());
    })
    .expect("on this machine");
    all
}

/// What a run leaves: outputs of its steps, the loss of an evaluation, and weights.
pub struct Trained {
    pub outputs: Vec<StepOutputs>,
    pub eval: f64,
    /// Counts of experts in the last step.
    pub experts: Option<Vec<f64>>,
    pub weights: BTreeMap<String, Vec<u32>>,
}

/// Trains on as many threads as the layout has ranks; returns outputs, and weights read back from a checkpoint that
/// all ranks wrote.
pub fn train(
    m: &ModelSpec,
    layout: &Layout,
    how: (usize, DType, f64),
    initialise: &(dyn Fn(&mut Executor) + Sync),
) -> Trained {
    train_by(Recipe::default(), m, layout, how, initialise)
}

/// [`train_by`] from the same weights every time.
pub fn train_from_seed(recipe: Recipe, m: &ModelSpec, layout: &Layout, how: (usize, DType, f64)) -> Trained {
    train_by(recipe, m, layout, how, &|exec| exec.initialise(m, 11).expect("weights"))
}

/// Holds a run to the bits of the losses, norms and weights of another.
#[track_caller]
pub fn same_bits(expected: &Trained, got: &Trained, what: &str) {
    assert_eq!(got.outputs, expected.outputs, "losses and norms {what}");
    if let Some(difference) = first_difference(&expected.weights, &got.weights) {
        panic!("{difference} {what}");
    }
}

/// [`train`] by any recipe.
pub fn train_by(
    recipe: Recipe,
    m: &ModelSpec,
    layout: &Layout,
    (sequences, precision, lr): (usize, DType, f64),
    initialise: &(dyn Fn(&mut Executor) + Sync),
) -> Trained {
    let dir = tempfile::tempdir().expect("a folder");
    let worlds = World::threads(layout.world()).expect("ranks");
    type Left = (Vec<StepOutputs>, f64, Option<Vec<f64>>);
    let outputs: Vec<Left> = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| {
                let dir = dir.path();
                scope.spawn(move || {
                    let rank = world.rank();
                    let mesh = Mesh::new(world, layout).expect("groups");
                    let request = Request {
                        model: m,
                        layout,
                        sequence: SEQUENCE,
                        sequences,
                        precision,
                        rank,
                        mode: Mode::Train,
                        loss: Default::default(),
                        recipe,
                    };
                    let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
                    assert_eq!(exec.allocated_bytes(), exec.program.memory.total);
                    initialise(&mut exec);
                    let out = (1..=STEPS)
                        .map(|k| {
                            let valid = fill(&mut exec, m.vocab, k);
                            exec.step(&StepInputs { lr, ..inputs(k, valid) })
                                .unwrap_or_else(|e| panic!("rank {rank} step {k}: {e}"))
                        })
                        .collect();
                    exec.save(dir, STEPS, ckpt::Meta::default()).expect("saved");
                    let experts = exec.expert_counts().expect("on this machine");
                    fill(&mut exec, m.vocab, STEPS + 1);
                    (out, exec.evaluate().expect("evaluated"), experts)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    });
    for other in &outputs[1..] {
        assert_eq!(outputs[0], *other, "all ranks report the same");
    }
    let mut one = executor_of(recipe, m, &Layout::default(), (sequences, precision, 1));
    let checkpoint =
        ckpt::Checkpoint::open(&ckpt::latest(dir.path()).expect("a folder").expect("a checkpoint"));
    one.restore(&checkpoint.expect("whole")).expect("restored");
    let (outputs, eval, experts) = outputs[0].clone();
    Trained { outputs, eval, experts, weights: weights(&one) }
}

/// The first parameter in which two sets of weights differ.
pub fn first_difference(a: &BTreeMap<String, Vec<u32>>, b: &BTreeMap<String, Vec<u32>>) -> Option<String> {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().find(|(name, bits)| b[*name] != **bits).map(|(name, bits)| {
        let at = bits.iter().zip(&b[name]).position(|(x, y)| x != y).unwrap_or(0);
        format!("{name}[{at}]: {} against {}", f32::from_bits(bits[at]), f32::from_bits(b[name][at]))
    })
}

/// The repository's `tests/golden`.
pub fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// silu(gate) up, as the model's own activation, in plain arithmetic.
pub const GATED: RowFn = RowFn {
    name: "gated",
    forward: |x, y| {
        let (gate, up) = x.split_at(y.len());
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + (-g).exp()) * u;
        }
    },
    backward: |dy, x, dx| {
        let (gate, up) = x.split_at(dy.len());
        let (dgate, dup) = dx.split_at_mut(dy.len());
        for i in 0..dy.len() {
            let s = 1.0 / (1.0 + (-gate[i]).exp());
            dup[i] = dy[i] * gate[i] * s;
            dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        }
    },
};

/// The model's layer with its activation in a function of rows.
pub fn with_rows(e: &mut Emitter<'_>, i: usize, x: ValueId) -> ValueId {
    let name = |part: &str| format!("layers.{i}.{part}");
    let h = e.norm(Role::AttentionNorm, &name("attn_norm"), x);
    let o = e.grouped_queries(&name("attn"), h);
    let x = e.row_parallel(Role::AttentionOut, &name("attn.o"), o, x);
    let h = e.norm(Role::MlpNorm, &name("mlp_norm"), x);
    let h = e.enter_tp(&name("mlp.in"), h);
    let ffn = e.model().ffn / e.layout().tp;
    let a = e.linear(Role::Up, &name("mlp.gate_up"), h, 2 * ffn);
    let h = e.rows(GATED, &name("mlp.gated"), a, ffn);
    e.row_parallel(Role::Down, &name("mlp.down"), h, x)
}
