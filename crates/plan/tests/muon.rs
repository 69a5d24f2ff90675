//! Muon priced: the moments that it does not keep, to the program's own count, and the time of whole matrices.

use plan::answer::stage_memory;
use plan::calibration::PRIOR;
use plan::estimate::{Estimate, Estimator, Problem, Updates};
use plan::placement::Placement;
use plan::shape::Shape;
use plan::software::Software;
use spec::{Catalog, Layout, ModelSpec, NumberFormat, Optimizer, Zero};

fn problem(rule: Optimizer, sequences: usize) -> Problem {
    updated(Updates { rule, average: false }, sequences)
}

fn updated(optimizer: Updates, sequences: usize) -> Problem {
    let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(8)).unwrap();
    Problem {
        shape: Shape::from_model(ModelSpec::preset("moe-tiny").unwrap()),
        cluster,
        software: Software::named("phalanx").unwrap(),
        constants: PRIOR,
        sequence: 256,
        sequences,
        optimizer,
    }
}

fn estimate(problem: &Problem, layout: &Layout) -> Estimate {
    let placement = Placement::of(layout.clone(), NumberFormat::Bf16);
    Estimator::new(problem, NumberFormat::Bf16).unwrap().estimate(&placement).unwrap()
}

#[test]
fn moments_are_as_many_fewer_as_the_program_places() {
    for (dp, tp, zero) in
        [(1, 1, Zero::Off), (2, 2, Zero::Off), (4, 1, Zero::Optimizer), (4, 2, Zero::Parameters)]
    {
        let layout = Layout { dp, tp, zero, ..Layout::default() };
        let [adamw, muon] = [Optimizer::AdamW, Optimizer::Muon].map(|o| problem(o, 16));
        let placed = |p: &Problem| {
            stage_memory(p, &Placement::of(layout.clone(), NumberFormat::Bf16), 0).unwrap().moments as f64
        };
        let spared = estimate(&adamw, &layout).memory.optimizer - estimate(&muon, &layout).memory.optimizer;
        let expected = placed(&adamw) - placed(&muon);
        assert!(
            expected > 0.0 && (spared / expected - 1.0).abs() < 0.01,
            "{spared} against {expected} under {layout:?}"
        );
    }
}

#[test]
fn an_average_takes_the_bytes_that_the_program_places_and_its_time() {
    for (dp, tp, zero, precision) in [
        (1, 1, Zero::Off, NumberFormat::Bf16),
        (2, 2, Zero::Off, NumberFormat::Bf16),
        (4, 1, Zero::Optimizer, NumberFormat::Bf16),
        (4, 2, Zero::Parameters, NumberFormat::Bf16),
        (4, 1, Zero::Gradients, NumberFormat::Fp32),
    ] {
        let layout = Layout { dp, tp, zero, ..Layout::default() };
        let placement = Placement::of(layout, precision);
        let [plain, kept] =
            [false, true].map(|average| updated(Updates { average, ..Updates::default() }, 16));
        let of = |p: &Problem| Estimator::new(p, precision).unwrap().estimate(&placement).unwrap();
        let placed = |p: &Problem| stage_memory(p, &placement, 0).unwrap();
        let (more, s) = {
            let (plain, kept) = (of(&plain), of(&kept));
            let s = kept.breakdown.optimizer_s - plain.breakdown.optimizer_s;
            (kept.memory.optimizer - plain.memory.optimizer, s)
        };
        let (without, with) = (placed(&plain), placed(&kept));
        assert_eq!((without.average, with.total - without.total), (0, with.average), "{placement:?}");
        assert!((more / with.average as f64 - 1.0).abs() < 0.01 && s > 0.0, "{more} {s} {with:?}");
    }
}

#[test]
fn whole_matrices_take_time_that_the_batch_does_not_change() {
    let more = |layout: &Layout, sequences| {
        let s = |o| estimate(&problem(o, sequences), layout).breakdown.optimizer_s;
        s(Optimizer::Muon) - s(Optimizer::AdamW)
    };
    let one = Layout::default();
    assert!(more(&one, 16) > 0.0);
    assert!((more(&one, 16) / more(&one, 256) - 1.0).abs() < 1e-9);
    // Replicas do everything each; ranks that shard take turns, and say more.
    let over = |dp, zero| Layout { dp, zero, ..Layout::default() };
    assert!((more(&over(8, Zero::Off), 16) / more(&one, 16) - 1.0).abs() < 1e-9);
    let turns = more(&over(8, Zero::Optimizer), 16);
    assert!(turns > more(&one, 16) / 8.0, "{turns}");
}
