//! Muon: the same bits in every layout that keeps those of AdamW, tolerance under tensor parallelism, and a state of
//! one momentum that any layout reads.

mod common;

use common::{
    PLAIN, Trained, executor_of, first_difference, mixture, model, same_bits, steps, train_from_seed, weights,
};
use kernels::{MatrixOp, newton_schulz};
use program::Recipe;
use spec::{DType, Layout, ModelSpec, Optimizer, PipelineSchedule, Recompute, Zero};

const SEQUENCES: usize = 8;
const MUON: Recipe = Recipe { optimizer: Optimizer::Muon, ..PLAIN };

fn run(m: &ModelSpec, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train_from_seed(MUON, m, layout, (SEQUENCES, precision, lr))
}

fn check(m: &ModelSpec, precision: DType, layouts: &[Layout]) {
    let expected = run(m, &Layout::default(), precision, 1e-2);
    for layout in layouts {
        let got = run(m, layout, precision, 1e-2);
        same_bits(&expected, &got, &format!("under {layout:?} in {precision}"));
    }
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let plain = Layout::default();
    let over = |dp, pp, zero| Layout { dp, pp, zero, ..plain.clone() };
    let layouts = [
        over(2, 1, Zero::Off),
        over(2, 1, Zero::Optimizer),
        over(2, 1, Zero::Gradients),
        over(4, 1, Zero::Parameters),
        Layout { shard: Some(2), ..over(4, 1, Zero::Optimizer) },
        Layout { micro_batch: 2, recompute: Recompute::Full, ..over(2, 2, Zero::Parameters) },
        Layout { chunks: 2, schedule: PipelineSchedule::Interleaved, ..over(1, 2, Zero::Off) },
    ];
    check(&model(4, true, false), DType::F32, &layouts);
    check(&model(4, false, true), DType::F32, &layouts[3..6]);
    check(&model(4, false, false), DType::Bf16, &layouts[1..5]);
}

#[test]
fn bits_of_a_mixture_do_not_depend_on_who_holds_its_experts() {
    let over = |dp, ep, zero| Layout { dp, ep, zero, ..Layout::default() };
    let layouts = [over(2, 2, Zero::Off), over(2, 1, Zero::Optimizer), over(4, 2, Zero::Parameters)];
    check(&mixture(), DType::F32, &layouts);
}

#[test]
fn whole_matrices_are_orthogonalised_under_tensor_parallelism() {
    for m in [model(4, true, false), mixture()] {
        let expected = run(&m, &Layout::default(), DType::F32, 1e-3);
        for (dp, zero) in [(1, Zero::Off), (2, Zero::Optimizer), (2, Zero::Parameters)] {
            let layout = Layout { tp: 2, dp, zero, ..Layout::default() };
            let got = run(&m, &layout, DType::F32, 1e-3);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = (a.loss / b.loss - 1.0).abs();
                assert!(off < 1e-5, "step {}: {} against {} under {layout:?}", k + 1, a.loss, b.loss);
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_and_survive_a_checkpoint() {
    for precision in [DType::F32, DType::Bf16] {
        let m = model(2, true, false);
        let one = |threads| executor_of(MUON, &m, &Layout::default(), (SEQUENCES, precision, threads));
        let mut straight = one(1);
        steps(&mut straight, m.vocab, 1, 6);
        let mut first = one(3);
        steps(&mut first, m.vocab, 1, 4);
        let dir = tempfile::tempdir().expect("a folder");
        let state = first.state().expect("on this machine");
        // One momentum beside each matrix inside a layer, two moments beside the rest.
        let kinds = |name: &str| state.pieces().filter(|p| p.name == name).count();
        assert_eq!((kinds("layers.0.attn.q.weight"), kinds("embed.weight")), (2, 3));
        let path = ckpt::Saver::save(dir.path(), 3, state.pieces(), ckpt::Meta::default()).expect("saved");
        let checkpoint = ckpt::Checkpoint::open(&path).expect("a checkpoint");
        let mut second = one(2);
        second.restore(&checkpoint).expect("restored");
        steps(&mut second, m.vocab, 4, 6);
        assert_eq!(first_difference(&weights(&straight), &weights(&second)), None);
        let mut other = executor_of(Recipe::default(), &m, &Layout::default(), (SEQUENCES, precision, 1));
        let e = other.restore(&checkpoint).expect_err("the second moment is not there");
        assert!(e.to_string().contains("exp_avg_sq"), "{e}");
    }
}

/// The products that are taken, symmetric ones at half.
#[test]
fn as_many_flops_are_taken_as_the_program_says() {
    for (rows, cols) in [(8, 20), (20, 8), (9, 9)] {
        let (m, n) = (rows.min(cols) as u64, rows.max(cols) as u64);
        let mut flops = 0;
        let counted = newton_schulz((rows, cols), 1.0, &mut |step| {
            flops += match step.op {
                MatrixOp::Gram => m * m * n,
                MatrixOp::Symmetric => m * m * m,
                MatrixOp::Product => 2 * m * m * n,
                _ => 0,
            };
            Ok::<(), std::convert::Infallible>(())
        });
        assert!(counted.is_ok());
        assert_eq!(flops, program::newton_schulz_flops(rows, cols), "{rows} x {cols}");
    }
}

#[test]
fn a_matrix_that_nothing_moved_stays_but_for_its_decay() {
    let m = model(2, false, false);
    let mut exec = executor_of(MUON, &m, &Layout::default(), (SEQUENCES, DType::F32, 1));
    let before = weights(&exec);
    exec.targets().fill(u32::MAX);
    exec.tokens().fill(1);
    exec.step(&common::inputs(1, 0)).expect("a step without targets");
    let after = weights(&exec);
    let name = "layers.0.mlp.down.weight";
    for (b, a) in before[name].iter().zip(&after[name]) {
        let kept = f32::from_bits(*b) * (1.0 - 1e-2 * 0.1) as f32;
        assert_eq!(f32::from_bits(*a), kept);
    }
}
