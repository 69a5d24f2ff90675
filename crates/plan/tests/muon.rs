//! Muon priced: the moments that it does not keep, to the program's own count, and the time of whole matrices.

use plan::answer::stage_memory;
use plan::calibration::PRIOR;
use plan::estimate::{Estimate, Estimator, Problem};
use plan::placement::Placement;
use plan::shape::Shape;
use plan::software::Software;
use spec::{Catalog, Layout, ModelSpec, NumberFormat, Optimizer, Zero};

fn problem(optimizer: Optimizer, sequences: usize) -> Problem {
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
