//! Latent attention trains: the same bits however batches and layers are spread, and within the tolerance of sums in
//! another order where heads or sequences are cut.

mod common;

use common::{Trained, first_difference, model, train};
use spec::{
    DType, Experts, Latent, Layout, ModelSpec, PipelineSchedule, Position, Recompute, Rope, RopeScaling,
    Router, Score, Yarn, Zero,
};

const SEQUENCES: usize = 8;
const LR: f64 = 1e-3;

fn run(m: &ModelSpec, layout: &Layout, precision: DType) -> Trained {
    train(m, layout, (SEQUENCES, precision, LR), &|exec| exec.initialise(m, 11).expect("weights"))
}

/// Queries out of the residual stream; and, with experts as in DeepSeek-V3, out of a latent of their own.
fn models() -> [ModelSpec; 2] {
    let latent = Latent { query_rank: None, kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    let router = Router { score: Score::Sigmoid, scale: 2.5, groups: 4, top_groups: 2, ..Router::PLAIN };
    let experts = Experts { count: 8, top_k: 3, ffn: 128, shared_ffn: 24, dense_layers: 1, every: 1, router };
    let base = model(4, false, false);
    let base = ModelSpec { kv_heads: base.heads, latent: Some(latent), ..base };
    let deep = Latent { query_rank: Some(20), ..latent };
    let scaling = RopeScaling::Yarn(Yarn {
        factor: 8.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_positions: 64,
        attention_factor: Some(1.1),
        truncate: true,
        mscale_all_dim: 1.0,
    });
    let position = Position::Rope(Rope { theta: 1e4, scaling, max_positions: base.max_positions() });
    [base.clone(), ModelSpec { latent: Some(deep), experts: Some(experts), position, ..base }]
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    for precision in [DType::F32, DType::Bf16] {
        for m in models() {
            let expected = run(&m, &Layout::default(), precision);
            let one = Layout::default();
            for layout in [
                Layout { dp: 2, zero: Zero::Parameters, ..one.clone() },
                Layout { dp: 4, micro_batch: 2, ..one.clone() },
                Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one.clone() },
                Layout { recompute: Recompute::Full, micro_batch: 4, ..one.clone() },
                Layout { recompute: Recompute::Selective, ..one },
            ] {
                let got = run(&m, &layout, precision);
                assert_eq!((got.outputs, got.eval), (expected.outputs.clone(), expected.eval), "{layout:?}");
                if let Some(difference) = first_difference(&expected.weights, &got.weights) {
                    panic!("{difference} under {layout:?} in {precision}");
                }
            }
        }
    }
}

#[test]
fn cut_heads_and_sequences_agree() {
    for m in models() {
        let expected = run(&m, &Layout::default(), DType::F32);
        let tp = Layout { tp: 2, ..Layout::default() };
        for layout in [
            tp.clone(),
            Layout { sequence_parallel: true, dp: 2, zero: Zero::Optimizer, ..tp.clone() },
            Layout { sequence_parallel: true, cp: 2, ..tp },
            Layout { cp: 2, zero: Zero::Gradients, ..Layout::default() },
        ] {
            let got = run(&m, &layout, DType::F32);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
                assert!(off.0 < 1e-5 && off.1 < 1e-3, "step {}: {a:?} against {b:?} under {layout:?}", k + 1);
            }
        }
    }
}
