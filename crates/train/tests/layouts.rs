//! The invariance matrix: weights after some steps are bit-identical for every data-parallel degree, ZeRO stage,
//! pipeline degree and schedule and accumulation split; tensor parallelism agrees within a stated tolerance.

mod common;

use common::{SEQUENCE, STEPS, Trained, executor, fill, first_difference, model, steps, train, weights};
use program::{Mode, Request};
use proptest::prelude::*;
use spec::{DType, Layout, ModelSpec, PipelineSchedule, Recompute, Zero};

const SEQUENCES: usize = 8;

fn run(m: &ModelSpec, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train(m, layout, (SEQUENCES, precision, lr), &|exec| exec.initialise(m, 11).expect("weights"))
}

fn reference(m: &ModelSpec, precision: DType) -> Trained {
    let mut one = executor(m, &Layout::default(), SEQUENCES, precision, 1);
    let outputs = steps(&mut one, m.vocab, 1, STEPS + 1);
    fill(&mut one, m.vocab, STEPS + 1);
    Trained { outputs, eval: one.evaluate().expect("evaluated"), experts: None, weights: weights(&one) }
}

/// A rate that moves every bit of the weights.
const LR: f64 = 1e-2;

fn check(m: &ModelSpec, layout: &Layout, precision: DType, expected: &Trained) {
    let got = run(m, layout, precision, LR);
    assert_eq!(got.outputs, expected.outputs, "losses and norms under {layout:?}");
    assert_eq!(got.eval.to_bits(), expected.eval.to_bits(), "evaluation under {layout:?}");
    if let Some(difference) = first_difference(&expected.weights, &got.weights) {
        panic!("{difference} under {layout:?} in {precision}");
    }
}

fn zeros() -> [Zero; 4] {
    [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters]
}

fn schedules() -> [(PipelineSchedule, usize); 4] {
    [
        (PipelineSchedule::Gpipe, 1),
        (PipelineSchedule::OneFOneB, 1),
        (PipelineSchedule::ZeroBubble, 1),
        (PipelineSchedule::Interleaved, 2),
    ]
}

fn models() -> [ModelSpec; 3] {
    [model(4, false, false), model(4, true, false), model(4, true, true)]
}

#[test]
fn data_parallel_and_zero() {
    for precision in [DType::F32, DType::Bf16] {
        for m in models() {
            let expected = reference(&m, precision);
            for zero in zeros() {
                for (dp, micro_batch) in [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1)] {
                    check(&m, &Layout { dp, zero, micro_batch, ..Layout::default() }, precision, &expected);
                }
            }
        }
    }
}

/// ZeRO over a part of dp, with replicas of these groups (HSDP).
#[test]
fn sharded_over_a_part_of_the_replicas() {
    for precision in [DType::F32, DType::Bf16] {
        for m in models() {
            let expected = reference(&m, precision);
            for zero in &zeros()[1..] {
                for (dp, shard, micro_batch) in [(4, 2, 1), (4, 2, 2), (8, 2, 1), (8, 4, 1)] {
                    let layout =
                        Layout { dp, shard: Some(shard), zero: *zero, micro_batch, ..Layout::default() };
                    check(&m, &layout, precision, &expected);
                }
            }
        }
    }
}

#[test]
fn pipelines() {
    for precision in [DType::F32, DType::Bf16] {
        for m in models() {
            let expected = reference(&m, precision);
            for (schedule, chunks) in schedules() {
                for (pp, micro_batch) in [(2, 1), (2, 2), (4, 1)] {
                    if pp * chunks <= m.layers {
                        check(
                            &m,
                            &Layout { pp, schedule, chunks, micro_batch, ..Layout::default() },
                            precision,
                            &expected,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn pipelines_with_uneven_stages_and_recompute() {
    let m = model(4, true, false);
    let expected = reference(&m, DType::F32);
    for recompute in [Recompute::Selective, Recompute::Full] {
        let layout = Layout { pp: 2, stage_layers: vec![1, 3], recompute, ..Layout::default() };
        check(&m, &layout, DType::F32, &expected);
    }
}

/// The embedding and the head are chunks of their own.
#[test]
fn pipelines_whose_ends_hold_no_layer() {
    for m in models() {
        let expected = reference(&m, DType::F32);
        for zero in zeros() {
            let layout = Layout {
                dp: 2,
                pp: 2,
                chunks: 2,
                schedule: PipelineSchedule::Interleaved,
                stage_layers: vec![0, 2, 2, 0],
                zero,
                ..Layout::default()
            };
            check(&m, &layout, DType::F32, &expected);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Products of the axes.
    #[test]
    fn products(dp in 1u32..3, parts: bool, zero in 0usize..4, schedule in 0usize..4, mb in 0u32..2, recompute in 0usize..3, bf16: bool, which in 0usize..3) {
        let (schedule, chunks) = schedules()[schedule];
        let recompute = [Recompute::None, Recompute::Selective, Recompute::Full][recompute];
        let layout = Layout {
            dp: 1 << dp,
            pp: 2,
            zero: zeros()[zero],
            shard: (parts && zero > 0 && dp == 2).then_some(2),
            schedule,
            chunks,
            micro_batch: 1 << mb,
            recompute,
            ..Layout::default()
        };
        let m = &models()[which];
        prop_assume!(layout.validate(m, SEQUENCES, SEQUENCE).is_ok());
        let precision = if bf16 { DType::Bf16 } else { DType::F32 };
        check(m, &layout, precision, &reference(m, precision));
    }
}

/// Tensor parallelism changes the order of sums inside products: losses agree to 1e-5 in float32.
#[test]
fn tensor_parallel_within_tolerance() {
    // A rate at which training does not amplify the last bit of a sum a hundredfold in ten steps.
    let lr = 1e-3;
    for m in models() {
        let expected = run(&m, &Layout::default(), DType::F32, lr);
        for (tp, dp, pp, sequence_parallel) in
            [(2, 1, 1, false), (2, 1, 1, true), (2, 2, 1, false), (2, 1, 2, true), (2, 2, 2, true)]
        {
            for (zero, groups) in [(Zero::Off, 1), (Zero::Parameters, 1), (Zero::Parameters, 2)] {
                // Groups that shard over as many ranks as there are replicas else.
                let (dp, shard) = (dp * groups, (groups > 1 && dp > 1).then_some(dp));
                let layout = Layout { tp, dp, pp, sequence_parallel, zero, shard, ..Layout::default() };
                let got = run(&m, &layout, DType::F32, lr);
                assert!((got.eval / expected.eval - 1.0).abs() < 1e-5, "evaluation under {layout:?}");
                for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                    let off = (a.loss / b.loss - 1.0).abs();
                    assert!(
                        off < 1e-5,
                        "step {}: loss {} against {} under {layout:?}",
                        k + 1,
                        a.loss,
                        b.loss
                    );
                    let off = (a.grad_norm / b.grad_norm - 1.0).abs();
                    assert!(
                        off < 1e-3,
                        "step {}: norm {} against {} under {layout:?}",
                        k + 1,
                        a.grad_norm,
                        b.grad_norm
                    );
                }
            }
        }
    }
}

/// ZeRO 3 over four ranks holds little more than a quarter of parameters, gradients and moments.
#[test]
fn zero_3_shards_the_state() {
    let m = ModelSpec::preset("llama-tiny-ref").expect("a preset");
    let state = |dp: usize, zero: Zero| {
        let layout = Layout { dp, zero, ..Layout::default() };
        let request = Request {
            model: &m,
            layout: &layout,
            sequence: 64,
            sequences: 4,
            precision: DType::F32,
            rank: dp - 1,
            mode: Mode::Train,
            loss: Default::default(),
            documents: false,
        };
        let p =
            program::Program::build(&request, &|op, p| train::workspace_len(op, p, 1)).expect("a program");
        p.memory.params + p.memory.grads + p.memory.moments
    };
    let share = state(4, Zero::Parameters) as f64 / state(1, Zero::Off) as f64;
    assert!(share <= 0.30, "{share}");
}

/// FNV-1a of everything that a run leaves, weights in the order of their names.
fn fingerprint(t: &Trained) -> u64 {
    let outputs = t.outputs.iter().flat_map(|o| [o.loss.to_bits(), o.grad_norm.to_bits()]);
    let weights = t.weights.values().flatten().map(|w| u64::from(*w));
    let words = outputs.chain([t.eval.to_bits()]).chain(weights);
    spec::hash::fnv1a(words.flat_map(u64::to_le_bytes))
}

/// The matrix above compares layouts with each other; this holds them to what they were, from one version to the next.
/// Tensor parallelism has its own order of sums, and so its own bits.
#[test]
fn the_bits_are_those_of_earlier_versions() {
    let tp = Layout { tp: 2, ..Layout::default() };
    let sp = Layout { tp: 2, dp: 2, sequence_parallel: true, zero: Zero::Parameters, ..Layout::default() };
    let mut found = Vec::new();
    for precision in [DType::F32, DType::Bf16] {
        for m in models() {
            found.push(fingerprint(&reference(&m, precision)));
            found.extend([&tp, &sp].map(|layout| fingerprint(&run(&m, layout, precision, LR))));
        }
    }
    assert_eq!(found, EARLIER, "{found:#x?}");
}

/// By precision, model and layout (one rank, tensor-parallel, tensor- and sequence-parallel with ZeRO 3).
const EARLIER: [u64; 18] = [
    0xd024_db8a_ca88_4327,
    0x6dbd_e758_e698_628d,
    0x269a_0701_8442_9ffc,
    0x81bb_aac6_91cc_30de,
    0x4799_4a99_31df_7fa6,
    0x1602_186a_4701_c523,
    0x5e5b_35fc_1251_76ab,
    0x101b_cea6_c224_163f,
    0x2b50_405a_be81_09ba,
    0xc53c_4989_4dd2_8d5e,
    0xbbfd_eac2_4986_ccc8,
    0xba3c_dc34_edec_f8a5,
    0x3c22_8db7_8bed_b8bf,
    0x3223_9b73_5f36_fc33,
    0xda34_c300_3280_ac05,
    0x569e_2c30_2777_fba4,
    0x9821_d377_88ef_a102,
    0xb8cb_8ca7_434d_56ae,
];
