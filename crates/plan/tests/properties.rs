//! What holds of every estimate: never under the roofline, never worse on a better machine, parts that add up; and the
//! known answer for Llama 3 405B.

use plan::calibration::Calibration;
use plan::compute::Chip;
use plan::estimate::{Estimator, Problem, virtual_layers};
use plan::placement::{Order, Placement};
use plan::search::{Space, search};
use plan::shape::Shape;
use plan::software::{self, Software};
use proptest::prelude::*;
use spec::cluster::Knob;
use spec::{Catalog, Layout, ModelSpec, NumberFormat, PipelineSchedule, Recompute, Reduce, Zero};

fn problem(model: &str, cluster: &str, n: usize, sequences: usize, sequence: usize) -> Problem {
    let shape = match Shape::find(model).unwrap() {
        Some(shape) => shape,
        None => Shape::from_model(ModelSpec::preset(model).unwrap()),
    };
    let cluster = Catalog::builtin().unwrap().cluster(cluster, Some(n)).unwrap();
    let software = Software::usual(&cluster.accelerator.family);
    let calibration = Calibration::builtin().unwrap();
    let constants =
        calibration.constants(&cluster.accelerator.family.name, &cluster.accelerator.name, "bf16", &software);
    Problem { shape, cluster, software, constants, sequence, sequences, optimizer: Default::default() }
}

const MODELS: [&str; 4] = ["gpt3-13b", "llama1-65b", "mixtral-8x7b", "deepseek-v2"];
const CLUSTERS: [&str; 4] = ["dgx-superpod-a100", "dgx-superpod-h100", "dgx-superpod-gb200", "tpu-v5p-pod"];

fn layouts() -> impl Strategy<Value = (Layout, Order)> {
    let axes = (0usize..4, 0usize..3, 0usize..3, 0usize..3, 0usize..3, any::<bool>());
    axes.prop_map(|(tp, pp, dp, micro_batch, choices, flag)| {
        let (tp, pp, dp) = (1 << tp, 1 << pp, 1 << (dp + 1));
        let chunks = if pp > 1 && choices == 2 { 2 } else { 1 };
        let layout = Layout {
            dp,
            tp,
            pp,
            sequence_parallel: tp > 1 && flag,
            zero: [Zero::Off, Zero::Optimizer, Zero::Parameters][choices],
            schedule: if chunks > 1 { PipelineSchedule::Interleaved } else { PipelineSchedule::OneFOneB },
            chunks,
            stage_layers: Vec::new(),
            micro_batch: 1 << micro_batch,
            recompute: [Recompute::None, Recompute::Selective, Recompute::Full][choices],
            reduce: Reduce::Ring,
            ..Layout::default()
        };
        (layout, if flag { Order::TpCpDpPp } else { Order::TpCpPpDp })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn estimates_obey_the_roofline_and_the_machine(
        (layout, order) in layouts(),
        model in 0..MODELS.len(),
        cluster in 0..CLUSTERS.len(),
    ) {
        let problem = problem(MODELS[model], CLUSTERS[cluster], layout.world(), 128, 2048);
        let placement = Placement { order, ..Placement::of(layout, NumberFormat::Bf16) };
        let estimate = Estimator::new(&problem, placement.format).unwrap().estimate(&placement).unwrap();
        let parts = estimate.breakdown.parts();
        prop_assert!(parts.iter().all(|p| p.1 >= 0.0 && p.1.is_finite()), "{parts:?}");
        prop_assert!((parts.iter().map(|p| p.1).sum::<f64>() / estimate.step_s - 1.0).abs() < 1e-9);
        let chip = Chip::of(&problem.cluster.accelerator, placement.format).unwrap();
        let flops = problem.shape.flops_per_token(2048.0, true) * 128.0 * 2048.0;
        prop_assert!(estimate.step_s > flops / chip.peak / placement.layout.world() as f64);
        prop_assert!(estimate.mfu > 0.0 && estimate.mfu < 1.0);
        for knob in Knob::ALL {
            let better = Problem { cluster: problem.cluster.clone().scaled(knob, 1.3), ..problem.clone() };
            let faster = Estimator::new(&better, placement.format).unwrap().estimate(&placement).unwrap();
            prop_assert!(faster.step_s <= estimate.step_s * (1.0 + 1e-9), "{knob:?}");
        }
    }

    /// Whatever the stack, its virtual stages hold each layer once; where layers count alike none holds more than an even
    /// share, rounded up.
    #[test]
    fn virtual_stages_hold_all_layers(
        stack in 0..software::ALL.len(),
        layers in 1usize..200,
        pp in 1usize..40,
        chunks in 1usize..13,
    ) {
        let mut problem = problem("gpt3-13b", "dgx-superpod-h100", pp, 128, 2048);
        problem.shape.model.layers = layers;
        problem.software = software::ALL[stack].clone();
        let layout = Layout { pp, chunks: if pp == 1 { 1 } else { chunks }, ..Layout::default() };
        let virtuals = pp * layout.chunks;
        let dealt = virtual_layers(&problem, &Placement::of(layout, NumberFormat::Bf16));
        prop_assert_eq!(dealt.len(), virtuals);
        prop_assert_eq!(dealt.iter().sum::<usize>(), layers);
        let most = dealt.iter().copied().max().unwrap();
        prop_assert!(problem.software.stages_by_cost || most == layers.div_ceil(virtuals), "{dealt:?}");
    }
}

/// Llama 3 405B on 16,384 H100 (arXiv 2407.21783, Table 4): TP 8, PP 16, DP 128, interleaved, 41 % of peak.
#[test]
fn the_published_layout_of_llama_405b_is_among_the_best() {
    let problem = problem("llama3-405b", "meta-24k-roce", 16_384, 2048, 8192);
    let space = Space {
        accelerators: 16_384,
        format: NumberFormat::Bf16,
        keep: 10,
        micro_batch_max: 8,
        trainable_only: false,
        strategy: None,
    };
    let found = search(&problem, &space, &|_, _| ()).unwrap();
    let published = |f: &&plan::search::Found| {
        (f.placement.layout.tp, f.placement.layout.pp, f.placement.layout.dp) == (8, 16, 128)
    };
    let f = found.best.iter().find(published).expect("tp 8, pp 16, dp 128 is among the best ten");
    assert!((0.35..=0.46).contains(&f.estimate.mfu), "{}", f.estimate.mfu);
    assert!(f.estimate.step_s < 1.1 * found.best[0].estimate.step_s);
}
