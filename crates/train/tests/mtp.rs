//! A module that predicts one token more: the same bits in every layout that keeps them, and nothing of it in the model's
//! own loss, in what is evaluated or generated.

mod common;

use comm::World;
use common::{Trained, executor, first_difference, model, train};
use program::{Mode, Place, Request};
use spec::{
    ContextMode, DType, Experts, Latent, Layout, ModelSpec, Mtp, PipelineSchedule, Recompute, Router,
    RunSpec, Score, Zero,
};
use train::{Executor, Mesh};

const SEQUENCES: usize = 8;

fn run(m: &ModelSpec, layout: &Layout, precision: DType, lr: f64) -> Trained {
    train(m, layout, (SEQUENCES, precision, lr), &|exec| exec.initialise(m, 11).expect("weights"))
}

/// Behind plain layers, and behind those of DeepSeek-V3.
fn models() -> [ModelSpec; 2] {
    let plain = ModelSpec { mtp: Some(Mtp { weight: 0.5 }), ..model(4, false, false) };
    let latent = Latent { query_rank: Some(20), kv_rank: 12, nope_dim: 8, rope_dim: 4, value_dim: 6 };
    let router =
        Router { score: Score::Sigmoid, scale: 2.5, expert_bias: true, bias_rate: 0.01, ..Router::PLAIN };
    let experts = Experts { count: 8, top_k: 3, ffn: 128, shared_ffn: 24, dense_layers: 1, every: 1, router };
    let deep =
        ModelSpec { kv_heads: plain.heads, latent: Some(latent), experts: Some(experts), ..plain.clone() };
    [plain, deep]
}

/// With biases of experts that stay: they move by whole counts, which a rounded score may change.
fn unmoved(m: ModelSpec) -> ModelSpec {
    let router = |r: Router| Router { bias_rate: 0.0, ..r };
    let experts = m.experts.map(|e| Experts { router: router(e.router), ..e });
    ModelSpec { experts, ..m }
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let one = Layout::default();
    for (m, precision) in models().into_iter().zip([DType::F32, DType::Bf16]) {
        let expected = run(&m, &one, precision, 1e-2);
        let ep = if m.experts.is_some() { 2 } else { 1 };
        for layout in [
            Layout { micro_batch: 4, ..one.clone() },
            Layout { dp: 2, ep, zero: Zero::Parameters, ..one.clone() },
            Layout { dp: 4, ep, micro_batch: 2, zero: Zero::Gradients, ..one.clone() },
            Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one.clone() },
            Layout { pp: 2, dp: 2, ep, micro_batch: 2, zero: Zero::Optimizer, ..one.clone() },
            Layout { pp: 2, schedule: PipelineSchedule::Interleaved, chunks: 2, ..one.clone() },
            Layout { recompute: Recompute::Full, ..one.clone() },
            Layout { recompute: Recompute::Selective, dp: 2, ..one.clone() },
        ] {
            let got = run(&m, &layout, precision, 1e-2);
            assert_eq!(got.outputs, expected.outputs, "under {layout:?}");
            assert_eq!(
                (got.eval, got.experts),
                (expected.eval, expected.experts.clone()),
                "under {layout:?}"
            );
            assert_eq!(first_difference(&expected.weights, &got.weights), None, "under {layout:?}");
        }
    }
}

#[test]
fn tensor_parallel_within_tolerance() {
    for m in models().map(unmoved) {
        let expected = run(&m, &Layout::default(), DType::F32, 1e-3);
        for sequence_parallel in [false, true] {
            for (dp, pp) in [(2, 1), (1, 2)] {
                let layout = Layout { tp: 2, dp, pp, sequence_parallel, ..Layout::default() };
                let got = run(&m, &layout, DType::F32, 1e-3);
                for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                    let off = ((a.loss / b.loss - 1.0).abs(), (a.grad_norm / b.grad_norm - 1.0).abs());
                    let ahead = a.mtp_loss.zip(b.mtp_loss).map_or(1.0, |(a, b)| (a / b - 1.0).abs());
                    assert!(
                        off.0 < 1e-5 && off.1 < 1e-3 && ahead < 1e-5,
                        "step {}: {a:?}, {b:?} under {layout:?}",
                        k + 1
                    );
                }
            }
        }
    }
}

/// On a ring and with heads dealt, beside other axes: the token behind a cut is known to those before it.
#[test]
fn cut_sequences_within_tolerance() {
    let one = Layout { cp: 2, ..Layout::default() };
    let heads = Layout { context: ContextMode::Heads, ..one.clone() };
    for m in models().map(unmoved) {
        let expected = run(&m, &Layout::default(), DType::F32, 1e-3);
        for layout in [
            one.clone(),
            Layout { cp: 4, micro_batch: 4, ..one.clone() },
            Layout { pp: 2, recompute: Recompute::Full, ..one.clone() },
            Layout { tp: 2, sequence_parallel: true, zero: Zero::Optimizer, ..one.clone() },
            Layout {
                dp: 2,
                ep: if m.experts.is_some() { 4 } else { 1 },
                zero: Zero::Parameters,
                ..one.clone()
            },
            heads.clone(),
            Layout { cp: 4, micro_batch: 2, zero: Zero::Gradients, ..heads.clone() },
            Layout { pp: 2, dp: 2, ..heads.clone() },
        ] {
            let got = run(&m, &layout, DType::F32, 1e-3);
            for (k, (a, b)) in got.outputs.iter().zip(&expected.outputs).enumerate() {
                let off = |a: f64, b: f64| (a / b - 1.0).abs();
                let ahead = a.mtp_loss.zip(b.mtp_loss).map_or(1.0, |(a, b)| off(a, b));
                assert!(
                    off(a.loss, b.loss) < 1e-5 && off(a.grad_norm, b.grad_norm) < 1e-3 && ahead < 1e-5,
                    "step {}: {a:?}, {b:?} under {layout:?}",
                    k + 1
                );
            }
        }
    }
}

/// From samples each rank takes what lies behind its cuts, so that losses are those of tokens filled in by hand; who fills
/// in tokens alone is told.
#[test]
fn what_lies_behind_a_cut_comes_with_the_samples() {
    let [m, _] = models();
    for context in [ContextMode::Ring, ContextMode::Heads] {
        let layout = Layout { cp: 2, context, ..Layout::default() };
        let loss = |layout: &Layout| {
            on_ranks(&m, layout, &|exec| {
                exec.load_samples(&Noise(m.vocab), &[0, 1]).expect("samples");
                let out = exec.step(&common::inputs(1, 2 * common::SEQUENCE as u64)).expect("a step");
                out.mtp_loss.expect("a loss of one token more")
            })
        };
        let (whole, cut) = (loss(&Layout::default()), loss(&layout));
        assert!((cut / whole - 1.0).abs() < 1e-6, "{cut} and {whole}");
        let told = on_ranks(&m, &layout, &|exec| {
            exec.tokens().fill(1);
            exec.targets().fill(2);
            exec.step(&common::inputs(1, 8)).expect_err("nothing is known of what lies behind").to_string()
        });
        assert!(told.contains("behind this rank's parts"), "{told}");
    }
}

/// What the first rank gives of two sequences a step.
fn on_ranks<T: Send>(m: &ModelSpec, layout: &Layout, run: &(dyn Fn(&mut Executor) -> T + Sync)) -> T {
    let worlds = World::threads(layout.world()).expect("ranks");
    let rank = |world: World| {
        let (rank, precision) = (world.rank(), DType::F32);
        let mesh = Mesh::new(world, layout).expect("groups");
        let (sequence, mode, loss) = (common::SEQUENCE, Mode::Train, Default::default());
        let recipe = Default::default();
        let request =
            Request { model: m, layout, sequence, sequences: 2, precision, rank, mode, loss, recipe };
        let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
        exec.initialise(m, 11).expect("weights");
        run(&mut exec)
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(|| rank(world))).collect();
        let mut all: Vec<T> = ranks.into_iter().map(|r| r.join().expect("a rank")).collect();
        all.swap_remove(0)
    })
}

/// Samples without an end, of so many tokens.
struct Noise(usize);

impl data::TokenStream for Noise {
    fn sample(&self, index: u64, out: &mut [u32]) -> spec::Result<()> {
        (0..).zip(out).for_each(|(i, token)| *token = common::token(3, index as usize, i, self.0));
        Ok(())
    }

    fn len(&self) -> u64 {
        u64::MAX
    }

    fn sequence(&self) -> usize {
        common::SEQUENCE
    }
}

/// What is evaluated is the model's own loss; what is learnt, and told apart, is both.
#[test]
fn its_loss_moves_weights_and_is_reported_beside_the_models() {
    let [m, _] = models();
    let with = run(&m, &Layout::default(), DType::F32, 1e-2);
    let without = run(&ModelSpec { mtp: None, ..m.clone() }, &Layout::default(), DType::F32, 1e-2);
    assert_eq!(with.outputs[0].loss, without.outputs[0].loss);
    assert_eq!(without.outputs[0].mtp_loss, None);
    let ahead = |t: &Trained| t.outputs[0].mtp_loss.expect("a loss of one token more");
    // Of weights that know nothing both are near that of an even guess.
    assert!(
        (ahead(&with) / (m.vocab as f64).ln() - 1.0).abs() < 0.05 && ahead(&with) != with.outputs[0].loss
    );
    let heavier = ModelSpec { mtp: Some(Mtp { weight: 1.0 }), ..m.clone() };
    assert_eq!(ahead(&run(&heavier, &Layout::default(), DType::F32, 1e-2)), ahead(&with));
    assert!(with.outputs[0].grad_norm > without.outputs[0].grad_norm);
    assert_ne!(with.weights["layers.0.mlp.up.weight"], without.weights["layers.0.mlp.up.weight"]);
    let moved = |name: &str| {
        let mut first = executor(&m, &Layout::default(), SEQUENCES, DType::F32, 1);
        first.initialise(&m, 11).expect("weights");
        common::weights(&first)[name] != with.weights[name]
    };
    assert!(moved("mtp.embed_proj.weight") && moved("mtp.norm.weight") && moved("mtp.attn.q.weight"));
}

/// Generation holds nothing of it.
#[test]
fn generation_does_without() {
    let [_, m] = models();
    let layout = Layout::default();
    let request = |mode| Request {
        model: &m,
        layout: &layout,
        sequence: common::SEQUENCE,
        sequences: 1,
        precision: DType::F32,
        rank: 0,
        mode,
        loss: Default::default(),
        recipe: Default::default(),
    };
    let of =
        |mode| Executor::new(&request(mode), 1, Mesh::alone(), false).expect("a program").program.clone();
    let behind = |mode| of(mode).groups.iter().filter(|g| g.key.place == Place::Mtp).count();
    assert!(behind(Mode::Train) > 10);
    assert_eq!(behind(Mode::Generate { positions: 8 }), 0);
}

#[track_caller]
fn refused(sets: &str, message: &str, hint: &str) {
    let sets: Vec<String> = "model.mtp.depth=1 "
        .split(' ')
        .chain(sets.split(' '))
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .collect();
    let run = RunSpec::load(None, &sets, &RunSpec::no_files);
    let found = run.and_then(|run| train::check_run(&train::Cpu::new(1), &run)).expect_err(message);
    assert!(found.to_string().contains(message), "{found}");
    assert!(found.hint_text().unwrap_or_default().contains(hint) && found.exit_code() == 2, "{found:?}");
}

#[test]
fn what_does_not_fit_is_refused() {
    refused("model.mtp.depth=2", "model.mtp.depth = 2", "");
    refused("model.mtp.weight=0", "model.mtp.weight = 0, expected a number above 0", "model.mtp.depth=0");
    refused("model.mtp.weight=nan", "model.mtp.weight", "");
    refused("model.mtp.depth=0 model.mtp.weight=0.1", "model.mtp.weight = 0.1", "set model.mtp.depth too");
    refused(
        "model.tied_embeddings=true",
        "model.mtp needs an output projection",
        "model.tied_embeddings=false",
    );
}
