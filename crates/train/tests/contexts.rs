//! Context parallelism: sequences cut over ranks train as whole ones do, within the tolerance that sums in another order
//! take, whatever else is spread; for a given cut, bits do not depend on stages, schedules or what is recomputed.

mod common;

use common::{Trained, first_difference, model, train};
use spec::{DType, Experts, Layout, ModelSpec, NormKind, PipelineSchedule, Recompute, Router, RunSpec, Zero};

const SEQUENCES: usize = 8;
/// A rate at which training does not amplify the last bit of a sum a hundredfold in ten steps.
const LR: f64 = 1e-3;

fn run(m: &ModelSpec, layout: &Layout, precision: DType) -> Trained {
    train(m, layout, (SEQUENCES, precision, LR), &|exec| exec.initialise(m, 11).expect("weights"))
}

/// Losses within `loss`, gradient norms within `norm`, relatively.
#[track_caller]
fn close(got: &Trained, expected: &Trained, (loss, norm): (f64, f64), layout: &Layout) {
    assert!((got.eval / expected.eval - 1.0).abs() < loss, "evaluation under {layout:?}");
    for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
        let off = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
        assert!(off.0 < loss && off.1 < norm, "step {}: {a:?} against {b:?} under {layout:?}", k + 1);
    }
}

fn models() -> [ModelSpec; 3] {
    [model(4, false, false), model(4, true, false), model(4, true, true)]
}

/// Cuts of the sequence, with every other axis beside them.
fn layouts() -> Vec<Layout> {
    let one = Layout::default();
    let zero3 = Layout { zero: Zero::Parameters, ..one.clone() };
    let stages = Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one.clone() };
    vec![
        Layout { cp: 2, ..one.clone() },
        Layout { cp: 4, micro_batch: 2, ..one.clone() },
        Layout { cp: 8, ..one.clone() },
        Layout { cp: 2, dp: 2, zero: Zero::Optimizer, micro_batch: 4, ..one.clone() },
        Layout { cp: 2, dp: 4, zero: Zero::Gradients, shard: Some(2), ..one.clone() },
        Layout { cp: 2, tp: 2, recompute: Recompute::Selective, ..one },
        Layout { cp: 2, tp: 2, sequence_parallel: true, ..zero3.clone() },
        Layout { cp: 2, dp: 2, recompute: Recompute::Full, ..zero3 },
        Layout { cp: 2, ..stages.clone() },
        Layout { cp: 2, tp: 2, sequence_parallel: true, zero: Zero::Optimizer, ..stages },
    ]
}

#[test]
fn agree_with_whole_sequences() {
    for (i, m) in models().iter().enumerate() {
        let expected = run(m, &Layout::default(), DType::F32);
        // All cells of one model, and of the others each third.
        for layout in layouts().into_iter().skip(i).step_by(if i == 0 { 1 } else { 3 }) {
            close(&run(m, &layout, DType::F32), &expected, (1e-5, 1e-3), &layout);
        }
    }
}

#[test]
fn agree_in_bf16() {
    for (i, m) in models().iter().enumerate() {
        let expected = run(m, &Layout::default(), DType::Bf16);
        for layout in layouts().into_iter().skip(i).step_by(5) {
            close(&run(m, &layout, DType::Bf16), &expected, (2e-3, 2e-2), &layout);
        }
    }
}

#[test]
fn agree_with_experts() {
    let router = Router { z_loss: 0.05, ..Router::PLAIN };
    let experts = Experts { count: 4, top_k: 2, ffn: 128, shared_ffn: 24, dense_layers: 1, every: 1, router };
    let m = ModelSpec { experts: Some(experts), ..model(2, false, false) };
    assert_eq!(m.norm, NormKind::Rms);
    let expected = run(&m, &Layout::default(), DType::F32);
    for (dp, ep, tp, zero) in
        [(1, 1, 1, Zero::Off), (1, 2, 1, Zero::Off), (2, 4, 1, Zero::Parameters), (1, 2, 2, Zero::Optimizer)]
    {
        let layout = Layout { cp: 2, dp, ep, tp, zero, ..Layout::default() };
        let got = run(&m, &layout, DType::F32);
        close(&got, &expected, (1e-5, 1e-3), &layout);
        let total = |t: &Trained| t.experts.as_ref().expect("counts").iter().sum::<f64>();
        assert_eq!(total(&got), total(&expected), "every copy counts once under {layout:?}");
    }
}

/// What is the same op in the same order has the same bits: twice, over stages, schedules, micro-batches and recompute.
#[test]
fn bits_of_a_cut_do_not_depend_on_what_does_not_cut_it() {
    let m = model(4, true, false);
    for precision in [DType::F32, DType::Bf16] {
        let cut = Layout { cp: 2, ..Layout::default() };
        let expected = run(&m, &cut, precision);
        let pipeline = |schedule| Layout { pp: 2, schedule, ..cut.clone() };
        for layout in [
            cut.clone(),
            Layout { micro_batch: 4, ..cut.clone() },
            Layout { recompute: Recompute::Full, ..cut.clone() },
            Layout { zero: Zero::Optimizer, ..cut.clone() },
            pipeline(PipelineSchedule::Gpipe),
            pipeline(PipelineSchedule::OneFOneB),
            pipeline(PipelineSchedule::ZeroBubble),
        ] {
            let got = run(&m, &layout, precision);
            assert_eq!((got.outputs, got.eval), (expected.outputs.clone(), expected.eval), "{layout:?}");
            if let Some(difference) = first_difference(&expected.weights, &got.weights) {
                panic!("{difference} under {layout:?} in {precision}");
            }
        }
    }
}

#[track_caller]
fn refused(sets: &str, message: &str, hint: &str) {
    let sets: Vec<String> = sets.split(' ').map(str::to_owned).collect();
    let found = RunSpec::load(None, &sets, &RunSpec::no_files)
        .and_then(|run| {
            let b = &run.batch;
            run.layout.validate(&run.model, b.sequences, b.sequence)?;
            train::check_run(&train::Cpu::new(1), &run)
        })
        .expect_err(message);
    assert!(found.to_string().contains(message), "{found}");
    let hint_text = found.hint_text().unwrap_or_default();
    assert!(hint_text.contains(hint) && found.exit_code() == 2, "{hint_text}");
}

#[test]
fn what_does_not_fit_is_refused() {
    refused(
        "layout.cp=3 batch.sequence=256",
        "layout.cp = 3 cuts a sequence into 6 pieces, which do not divide its 256 tokens",
        "values of layout.cp that work: 1, 2, 4, 8, 16, 32, 64, 128",
    );
    refused(
        "layout.cp=2 model.experts.count=4 model.experts.top_k=2 model.experts.ffn=128 model.experts.balance_loss=0.1",
        "model.experts.balance_loss with layout.cp = 2",
        "set layout.cp=1",
    );
}
