//! Mixtures of experts: weights after some steps are bit-identical for every degree of data, pipeline and expert
//! parallelism, ZeRO stage and accumulation split, whatever the router does.

mod common;

use common::{Trained, first_difference, model, train};
use program::{ParamPart, Request, Role};
use spec::{
    Activation, DType, Experts, Layout, ModelSpec, PipelineSchedule, Recompute, Router, RunSpec, Score, Zero,
};
use train::{Executor, Mesh};

const SEQUENCES: usize = 8;
const LR: f64 = 1e-2;
const PRECISIONS: [DType; 2] = [DType::F32, DType::Bf16];

/// An expert's matrices are whole chunks of the gradient norm: 128 x 32.
const EXPERTS: Experts =
    Experts { count: 4, top_k: 2, ffn: 128, shared_ffn: 0, dense_layers: 0, every: 1, router: Router::PLAIN };

/// Mixtral in small; and one with everything else that a router and its experts can have.
fn models() -> [ModelSpec; 2] {
    let router = Router {
        score: Score::Sigmoid,
        scale: 2.5,
        groups: 4,
        top_groups: 2,
        balance_loss: 0.3,
        z_loss: 0.05,
        expert_bias: true,
        bias_rate: 0.01,
        ..EXPERTS.router
    };
    let all = Experts { count: 8, top_k: 3, shared_ffn: 24, dense_layers: 1, router, ..EXPERTS };
    [
        ModelSpec { experts: Some(EXPERTS), ..model(4, false, false) },
        ModelSpec { experts: Some(all), activation: Activation::GeluTanh, ..model(4, true, false) },
    ]
}

fn run(m: &ModelSpec, layout: &Layout, precision: DType) -> Trained {
    train(m, layout, (SEQUENCES, precision, LR), &|exec| exec.initialise(m, 11).expect("weights"))
}

#[track_caller]
fn same(got: &Trained, expected: &Trained, layout: &Layout) {
    assert_eq!(got.outputs, expected.outputs, "losses and norms under {layout:?}");
    assert_eq!(got.eval.to_bits(), expected.eval.to_bits(), "evaluation under {layout:?}");
    assert_eq!(got.experts, expected.experts, "counts of experts under {layout:?}");
    if let Some(difference) = first_difference(&expected.weights, &got.weights) {
        panic!("{difference} under {layout:?}");
    }
}

fn layouts() -> Vec<Layout> {
    let mut all = Vec::new();
    for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
        let plain = Layout { zero, ..Layout::default() };
        for (dp, ep, micro_batch) in [(1, 1, 4), (4, 1, 1), (2, 2, 1), (4, 2, 2), (4, 4, 1)] {
            all.push(Layout { dp, ep, micro_batch, ..plain.clone() });
        }
        all.push(Layout { dp: 4, ep: 2, shard: (zero > Zero::Off).then_some(2), ..plain.clone() });
        let pipeline = Layout { pp: 2, dp: 2, ep: 2, recompute: Recompute::Selective, ..plain.clone() };
        for (schedule, chunks) in [(PipelineSchedule::ZeroBubble, 1), (PipelineSchedule::Interleaved, 2)] {
            all.push(Layout { schedule, chunks, ..pipeline.clone() });
        }
        all.push(Layout { dp: 2, ep: 2, recompute: Recompute::Full, ..plain });
    }
    all
}

#[test]
fn the_same_bits_over_replicas_stages_and_experts() {
    for (precision, m) in PRECISIONS.into_iter().zip(models()) {
        let expected = run(&m, &Layout::default(), precision);
        for layout in layouts() {
            same(&run(&m, &layout, precision), &expected, &layout);
        }
    }
}

/// Weights that send every token to the first experts: all scores are equal, and biases fall from one to the next.
fn blind(exec: &mut Executor, m: &ModelSpec) {
    exec.set_tables(m).expect("tables");
    let number = |part: &ParamPart, i: usize| {
        let h =
            part.name.bytes().fold(i as u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
        (h >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    exec.set_params(&mut |part, out| {
        let first = part.row0 * part.global.1;
        out.iter_mut().enumerate().for_each(|(i, x)| {
            *x = match part.key.role {
                Role::Router => 0.0,
                Role::ExpertBias => (part.cols - i) as f32 / 8.0,
                _ => 0.1 * number(part, first + i),
            }
        });
        Ok(())
    })
    .expect("weights");
}

/// All tokens go to two experts, which one rank holds: it has room for all of them, and gives the bits of one rank alone.
#[test]
fn a_router_that_sends_all_to_one_rank() {
    let m = &models()[0];
    // A rate at which nothing moves: the router stays blind.
    let go = |layout: &Layout| train(m, layout, (SEQUENCES, DType::F32, 1e-30), &|exec| blind(exec, m));
    let expected = go(&Layout::default());
    let tokens = (SEQUENCES * common::SEQUENCE) as f64;
    let of_layer = [tokens, tokens, 0.0, 0.0];
    assert_eq!(expected.experts, Some([of_layer; 4].concat()));
    for (dp, ep, micro_batch) in [(2, 2, 1), (4, 4, 2), (4, 2, 1)] {
        let layout = Layout { dp, ep, micro_batch, ..Layout::default() };
        same(&go(&layout), &expected, &layout);
    }
}

/// Biases follow the counts of the whole batch by the stated rule, whoever counted, and choose other experts in the end.
#[test]
fn biases_move_towards_an_even_load() {
    // All numbers here are whole multiples of it.
    let rate = 1.0 / 32.0;
    let balanced = |bias_rate| {
        let router = Router { score: Score::Sigmoid, expert_bias: true, bias_rate, ..EXPERTS.router };
        ModelSpec { experts: Some(Experts { router, ..EXPERTS }), ..model(4, false, false) }
    };
    // All scores are equal, so that only biases tell experts apart.
    let go = |rate: f32, layout: &Layout| {
        let m = &balanced(rate);
        train(m, layout, (SEQUENCES, DType::F32, 1e-30), &|exec| blind(exec, m))
    };
    let one = Layout::default();
    let moved = go(rate, &one);
    let biases = |t: &Trained, layer: usize| -> Vec<f32> {
        t.weights[&format!("layers.{layer}.mlp.expert_bias")].iter().map(|b| f32::from_bits(*b)).collect()
    };
    // Step by step: the two best by bias get all copies, twice the mean, and the others none.
    let mut expected = [4.0, 3.0, 2.0, 1.0].map(|b: f32| b / 8.0);
    let first = expected;
    for _ in 0..common::STEPS {
        let mut order = [0, 1, 2, 3];
        order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
        order[..2].iter().for_each(|e| expected[*e] -= rate);
        order[2..].iter().for_each(|e| expected[*e] += rate);
    }
    for layer in 0..4 {
        assert_eq!(biases(&moved, layer), expected, "layer {layer}");
    }
    assert_ne!(expected, first);
    for layout in [
        Layout { tp: 2, ..one.clone() },
        Layout { cp: 2, dp: 2, zero: Zero::Gradients, ..one.clone() },
        Layout { pp: 2, dp: 2, ep: 2, zero: Zero::Parameters, ..one.clone() },
    ] {
        let got = go(rate, &layout);
        assert_eq!(got.experts, moved.experts, "{layout:?}");
        (0..4).for_each(|layer| assert_eq!(biases(&got, layer), expected, "layer {layer} under {layout:?}"));
    }
    assert_eq!(biases(&go(0.0, &one), 2), first);
}

/// Tensor parallelism routes a share of the tokens on each rank: losses agree to 1e-5 in float32, with experts whole or
/// spread over the tensor group.
#[test]
fn tensor_parallel_within_tolerance() {
    for m in models() {
        let router = |e: Experts| Router { balance_loss: 0.0, bias_rate: 0.0, ..e.router };
        let m = ModelSpec { experts: m.experts.map(|e| Experts { router: router(e), ..e }), ..m };
        let go = |layout: &Layout| {
            train(&m, layout, (SEQUENCES, DType::F32, 1e-3), &|exec| {
                exec.initialise(&m, 11).expect("weights")
            })
        };
        let expected = go(&Layout::default());
        for (tp, dp, ep, sequence_parallel, micro_batch) in [
            (2, 1, 1, false, 1),
            (2, 1, 1, true, 2),
            (2, 1, 2, true, 1),
            (2, 2, 4, true, 2),
            (2, 2, 2, false, 1),
        ] {
            for zero in [Zero::Off, Zero::Parameters] {
                let layout = Layout { tp, dp, ep, sequence_parallel, zero, micro_batch, ..Layout::default() };
                let got = go(&layout);
                for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                    let (loss, norm) =
                        ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
                    assert!(
                        loss < 1e-5 && norm < 1e-3,
                        "step {}: {a:?} against {b:?} under {layout:?}",
                        k + 1
                    );
                }
            }
        }
    }
}

#[track_caller]
fn refused(sets: &str, message: &str, hint: &str) {
    let base = "model.experts.count=4 model.experts.top_k=2 model.experts.ffn=128";
    let sets: Vec<String> = base.split(' ').chain(sets.split(' ')).map(str::to_owned).collect();
    let run = RunSpec::load(None, &sets, &RunSpec::no_files);
    let found = run.and_then(|run| train::check_run(&train::Cpu::new(1), &run)).expect_err(message);
    assert!(found.to_string().contains(message), "{found}");
    let hint_text = found.hint_text().unwrap_or_default();
    assert!(hint_text.contains(hint) && found.exit_code() == 2, "{hint_text}");
}

/// One message each, with the values that work.
#[test]
fn what_does_not_fit_is_refused() {
    refused("model.experts.top_k=5", "model.experts.top_k = 5, expected 1 to 4", "");
    refused("model.experts.groups=3", "model.experts.groups = 3 does not divide", "that work: 1, 2, 4");
    refused(
        "model.experts.groups=4 model.experts.top_groups=1",
        "top_k = 2 of the 1 experts in model.experts.top_groups = 1",
        "that work: 2 to 4",
    );
    refused("model.experts.scale=0", "model.experts.scale = 0, expected a number above 0", "");
    refused(
        "model.experts.bias_rate=0.1",
        "model.experts.bias_rate = 0.1 without biases",
        "set model.experts.expert_bias=true",
    );
    refused(
        "model.experts.expert_bias=true model.experts.bias_rate=-1",
        "model.experts.bias_rate = -1, expected a number from 0",
        "",
    );
    refused(
        "layout.dp=3 layout.ep=3 batch.tokens=768",
        "layout.ep = 3 does not divide the 4 experts",
        "that work: 1",
    );
    refused(
        "layout.dp=2 layout.ep=4",
        "layout.ep = 4 does not divide the 2 ranks of a stage",
        "that work: 1, 2",
    );
    refused(
        "layout.dp=2 layout.ep=2 layout.expert_rows=\"even\"",
        "no room for uneven choices",
        "layout.expert_rows=all",
    );
    refused(
        "layout.dp=4 layout.ep=4 model.experts.ffn=16",
        "a rank's experts have 6144 elements, no multiple of 4096",
        "that work: 1, 2; with layout.reduce=ring any does",
    );
    refused(
        "layout.dp=4 layout.ep=4 layout.zero=2 layout.shard=2",
        "layout.shard = 2 cuts the 4 ranks that hold all experts",
        "",
    );
    refused(
        "layout.tp=2 model.experts.balance_loss=0.1",
        "model.experts.balance_loss with layout.tp = 2",
        "set layout.tp=1",
    );
}

#[test]
fn an_executor_without_room_says_so() {
    // What the trainer refuses before it begins; an executor built all the same does not write out of bounds.
    let m = &models()[0];
    let layout = Layout { dp: 2, ep: 2, expert_rows: spec::ExpertRows::Even, ..Layout::default() };
    let worlds = comm::World::threads(2).expect("ranks");
    let errors: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| {
                let layout = &layout;
                scope.spawn(move || {
                    let rank = world.rank();
                    let mesh = Mesh::new(world, layout).expect("groups");
                    let request = Request {
                        model: m,
                        layout,
                        sequence: common::SEQUENCE,
                        sequences: 2,
                        precision: DType::F32,
                        rank,
                        mode: program::Mode::Train,
                        loss: Default::default(),
                        recipe: Default::default(),
                    };
                    let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
                    blind(&mut exec, m);
                    let valid = common::fill(&mut exec, m.vocab, 1);
                    let out = exec.step(&common::inputs(1, valid));
                    if out.is_err() {
                        exec.mesh().abort("no room");
                    }
                    out.err().map(|e| e.to_string())
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    });
    let said = errors.iter().flatten().any(|e| e.contains("rows for experts with room for"));
    assert!(said, "{errors:?}");
}
