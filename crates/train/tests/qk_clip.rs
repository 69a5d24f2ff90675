//! Scores of attention bounded: by exact maxima over replicas and micro-batches, in the same bits in every layout that keeps
//! them, and by as much as is said.

mod common;

use comm::World;
use common::{
    PLAIN, Trained, executor_of, fill, first_difference, inputs, model, same_bits, train_from_seed, weights,
};
use program::{OpKind, Program, Recipe, Request};
use spec::{ContextMode, DType, Latent, Layout, ModelSpec, Optimizer, PipelineSchedule, Recompute, Zero};
use train::{Executor, Mesh, StepInputs};

const SEQUENCES: usize = 8;
const TAU: f32 = 0.5;
const CLIPS: Recipe = Recipe { qk_clip: TAU, ..PLAIN };

/// Weights that make scores large against the bound; with fewer keys than queries unless of GPT-2.
fn large(gpt2: bool) -> ModelSpec {
    ModelSpec { init_std: 0.3, ..model(4, false, gpt2) }
}

/// Latent attention, with queries out of a latent or of the residual stream.
fn latent(query_rank: Option<usize>) -> ModelSpec {
    let latent = Latent { query_rank, kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    let plain = large(false);
    ModelSpec { kv_heads: plain.heads, latent: Some(latent), init_std: 0.6, ..plain }
}

fn run(m: &ModelSpec, recipe: Recipe, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train_from_seed(recipe, m, layout, (SEQUENCES, precision, lr))
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let plain = Layout::default();
    let over = |dp, pp, zero| Layout { dp, pp, zero, ..plain.clone() };
    let layouts = [
        over(2, 1, Zero::Off),
        over(4, 1, Zero::Optimizer),
        over(4, 1, Zero::Gradients),
        Layout { micro_batch: 4, recompute: Recompute::Full, ..plain.clone() },
        Layout { micro_batch: 2, recompute: Recompute::Selective, ..over(2, 2, Zero::Parameters) },
        Layout { chunks: 2, schedule: PipelineSchedule::Interleaved, ..over(1, 2, Zero::Off) },
    ];
    for (m, recipe, precision) in [
        (large(false), CLIPS, DType::F32),
        (large(true), CLIPS, DType::Bf16),
        (large(false), Recipe { optimizer: Optimizer::Muon, ema: true, ..CLIPS }, DType::F32),
        (latent(None), CLIPS, DType::F32),
        (latent(Some(20)), Recipe { optimizer: Optimizer::Muon, ..CLIPS }, DType::Bf16),
    ] {
        let expected = run(&m, recipe, &plain, precision, 1e-2);
        let without = run(&m, Recipe { qk_clip: 0.0, ..recipe }, &plain, precision, 1e-2);
        assert_eq!(expected.outputs[0], without.outputs[0], "the first step is not touched before its end");
        assert_ne!(expected.outputs[2], without.outputs[2], "scores are above the bound");
        for layout in &layouts {
            let got = run(&m, recipe, layout, precision, 1e-2);
            same_bits(&expected, &got, &format!("under {layout:?} in {precision}"));
        }
        // A bound that nothing reaches changes nothing.
        let high = run(&m, Recipe { qk_clip: 1e5, ..recipe }, &plain, precision, 1e-2);
        assert_eq!(
            (high.outputs, first_difference(&high.weights, &without.weights)),
            (without.outputs, None)
        );
    }
}

/// Heads cut over tp and dealt over cp, keys that walk a ring, and their products.
#[test]
fn cut_heads_and_sequences_within_tolerance() {
    let plain = Layout::default();
    let heads = Layout { cp: 2, context: ContextMode::Heads, ..plain.clone() };
    let ring = Layout { cp: 2, ..plain.clone() };
    for m in [large(false), large(true), latent(None), latent(Some(20))] {
        let expected = run(&m, CLIPS, &plain, DType::F32, 1e-3);
        let without = run(&m, Recipe { qk_clip: 0.0, ..CLIPS }, &plain, DType::F32, 1e-3);
        let off = |a: f64, b: f64| (a / b - 1.0).abs();
        assert!(off(expected.outputs[1].loss, without.outputs[1].loss) > 1e-4, "scores are above the bound");
        for layout in [
            Layout { tp: 2, ..plain.clone() },
            Layout { tp: 2, dp: 2, zero: Zero::Parameters, sequence_parallel: true, ..plain.clone() },
            ring.clone(),
            Layout { cp: 4, zero: Zero::Optimizer, ..ring.clone() },
            Layout { dp: 2, pp: 2, recompute: Recompute::Full, ..ring.clone() },
            heads.clone(),
            Layout { cp: 4, micro_batch: 2, zero: Zero::Gradients, ..heads.clone() },
            Layout {
                tp: 2,
                dp: 2,
                sequence_parallel: true,
                recompute: Recompute::Selective,
                ..heads.clone()
            },
        ] {
            let got = run(&m, CLIPS, &layout, DType::F32, 1e-3);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = off(a.loss, b.loss);
                assert!(off < 1e-5, "step {}: {} against {} under {layout:?}", k + 1, a.loss, b.loss);
            }
        }
    }
}

/// Of the heads that other ranks have been dealt, or whose keys they have seen, every rank has the greatest scores: with heads
/// dealt, in the bits of one rank.
#[test]
fn every_rank_has_the_greatest_scores_of_all() {
    for m in [large(false), latent(Some(20))] {
        let maxima = |layout: &Layout| {
            let worlds = World::threads(layout.world()).expect("ranks");
            let rank = |world: World| {
                let (rank, precision) = (world.rank(), DType::F32);
                let mesh = Mesh::new(world, layout).expect("groups");
                let (sequence, sequences) = (common::SEQUENCE, SEQUENCES);
                let (mode, loss, recipe, model) = (Default::default(), Default::default(), CLIPS, &m);
                let request =
                    Request { model, layout, sequence, sequences, precision, rank, mode, loss, recipe };
                let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
                exec.initialise(&m, 11).expect("weights");
                let valid = fill(&mut exec, m.vocab, 1);
                exec.step(&inputs(1, valid)).expect("a step");
                exec.logit_maxima().expect("on this machine").expect("scores are looked at")
            };
            std::thread::scope(|scope| {
                let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| rank(world))).collect();
                ranks.into_iter().map(|r| r.join().expect("a rank")).collect::<Vec<_>>()
            })
        };
        let expected = maxima(&Layout::default()).swap_remove(0);
        assert_eq!(expected.len(), m.layers * m.heads);
        assert!(expected.iter().all(|most| *most > 0.0));
        let ring = Layout { cp: 2, dp: 2, ..Layout::default() };
        for layout in [Layout { context: ContextMode::Heads, ..ring.clone() }, Layout { tp: 2, ..ring }] {
            for got in maxima(&layout) {
                match layout.context {
                    ContextMode::Heads => assert_eq!(got, expected),
                    ContextMode::Ring => {
                        let near = |(a, b): (&f64, &f64)| (a / b - 1.0).abs() < 1e-4;
                        assert!(got.iter().zip(&expected).all(near), "{got:?} and {expected:?}");
                    }
                }
            }
        }
    }
}

/// The key head by which element `i` of a parameter is scaled, and the power of the factor, if it is: of queries that meet the
/// part of keys that all heads share the first, of all others its root.
fn scaled(m: &ModelSpec, name: &str, i: usize) -> Option<(usize, f64)> {
    let group = m.heads / m.kv_heads;
    let Some(l) = m.latent else {
        let kind = ["attn.q.", "attn.k."].iter().position(|k| name.contains(k))?;
        let head = i / if name.ends_with("bias") { 1 } else { m.hidden } / m.head_dim;
        return Some((if kind == 0 { head / group } else { head }, 0.5));
    };
    let (queries, keys) =
        (name.contains("attn.q.") || name.contains("attn.q_up."), name.contains("attn.kv_up."));
    let (width, dims) = match queries {
        true => (l.query_rank.unwrap_or(m.hidden), l.key_dim()),
        false => (l.kv_rank, l.nope_dim + l.value_dim),
    };
    let (head, dim) = (i / width / dims, i / width % dims);
    match dim < l.nope_dim {
        _ if !queries && !keys => None,
        true => Some((head, 0.5)),
        false => queries.then_some((head, 1.0)),
    }
}

/// Without a learning rate a step does nothing but bound: queries and keys of heads above shrink by one factor, the rest stays,
/// and the same batch's greatest scores are the bound then.
#[test]
fn a_step_leaves_no_greater_score_than_the_bound() {
    for m in [large(false), large(true), latent(None), latent(Some(20))] {
        let m = ModelSpec { layers: 1, ..m };
        let mut exec = executor_of(CLIPS, &m, &Layout::default(), (SEQUENCES, DType::F32, 2));
        let step = |exec: &mut Executor, k| {
            let valid = fill(exec, m.vocab, 1);
            exec.step(&StepInputs { lr: 0.0, ..inputs(k, valid) }).expect("a step");
            exec.logit_maxima().expect("on this machine").expect("scores are looked at")
        };
        let before = weights(&exec);
        let first = step(&mut exec, 1);
        let after = weights(&exec);
        let second = step(&mut exec, 2);
        assert_eq!(first.len(), m.heads);
        let group = m.heads / m.kv_heads;
        let most =
            |of: &[f64], key: usize| of[key * group..(key + 1) * group].iter().copied().fold(0.0, f64::max);
        let tau = f64::from(TAU);
        for key in 0..m.kv_heads {
            let (was, is) = (most(&first, key), most(&second, key));
            assert!(was > tau, "{first:?}");
            assert!((is / tau - 1.0).abs() < 1e-4, "{is} after {was}");
        }
        let mut changed = 0;
        for (name, was) in &before {
            let is = &after[name];
            for (i, (was, is)) in was.iter().zip(is).enumerate() {
                let (was, is) = (f32::from_bits(*was), f32::from_bits(*is));
                let Some((key, power)) = scaled(&m, name, i) else {
                    assert_eq!(was, is, "{name}");
                    continue;
                };
                let expected = f64::from(was) * (tau / most(&first, key)).powf(power);
                assert!((f64::from(is) - expected).abs() <= 1e-6 * expected.abs(), "{name}: {is} {expected}");
                changed += usize::from(was != is);
            }
        }
        assert!(changed > 0);
    }
}

#[test]
fn what_cannot_be_bounded_is_refused() {
    let check = |m: &ModelSpec, layout: &Layout, what: &str| {
        let request = Request {
            model: m,
            layout,
            sequence: common::SEQUENCE,
            sequences: SEQUENCES,
            precision: DType::F32,
            rank: 0,
            mode: Default::default(),
            loss: Default::default(),
            recipe: CLIPS,
        };
        let built = Program::build(&request, &|_, _| 0);
        match built {
            Ok(p) => {
                assert_eq!(what, "");
                let ops = p.blocks.iter().flat_map(|b| &b.ops);
                assert!(ops.filter(|op| matches!(op.kind, OpKind::QkClip { .. })).count() > 0);
            }
            Err(e) => assert!(!what.is_empty() && e.to_string().contains(what) && e.exit_code() == 2, "{e}"),
        }
    };
    let one = Layout::default();
    check(&model(2, false, false), &one, "");
    check(&model(2, true, false), &one, "model.qk_norm");
    check(&model(2, false, false), &Layout { cp: 2, ..one.clone() }, "");
    check(&latent(None), &one, "");
    check(&ModelSpec { sinks: true, ..model(2, false, false) }, &one, "model.sinks");
}
