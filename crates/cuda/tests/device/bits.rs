//! The same bits whenever the numerics contract promises them.

use std::collections::BTreeMap;

use comm::World;
use program::{Mode, Recipe, Request};
use spec::{DType, Layout, ModelSpec, PipelineSchedule, Recompute, Zero};
use train::{Executor, Mesh};

use crate::common::{SEQUENCE, first_difference, steps, weights};
use crate::{Cuda, STEPS, executor, gpu, models};

pub(crate) type Weights = BTreeMap<String, Vec<u32>>;

/// Weights after the steps of one rank.
fn alone(model: &ModelSpec, layout: &Layout, precision: DType, record: bool) -> Option<Weights> {
    let mut exec = executor(Box::new(gpu()?), model, layout, precision, record);
    steps(&mut exec, model.vocab, 1, STEPS + 1);
    Some(weights(&exec))
}

/// The same over the ranks of a layout, which share the GPU, by any recipe; and the losses of the steps.
pub(crate) fn together(
    recipe: Recipe,
    model: &ModelSpec,
    layout: &Layout,
    precision: DType,
) -> (Weights, Vec<f64>) {
    let worlds = World::threads(layout.world()).expect("ranks");
    let all: Vec<(Weights, Vec<f64>)> = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| {
                scope.spawn(move || {
                    let rank = world.rank();
                    let mesh = Mesh::new(world, layout).expect("groups");
                    let (sequence, sequences, mode) = (SEQUENCE, 4, Mode::Train);
                    let request = Request {
                        model,
                        layout,
                        sequence,
                        sequences,
                        precision,
                        rank,
                        mode,
                        loss: Default::default(),
                        recipe,
                    };
                    let device = Box::new(Cuda::new(rank).expect("the same GPU"));
                    let mut exec = Executor::on(device, &request, mesh, false).expect("a program");
                    exec.initialise(model, 11).expect("weights");
                    let losses = steps(&mut exec, model.vocab, 1, STEPS + 1).iter().map(|s| s.loss).collect();
                    (weights(&exec), losses)
                })
            })
            .collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    });
    let losses = all[0].1.clone();
    (all.into_iter().flat_map(|(weights, _)| weights).collect(), losses)
}

fn check(expected: &Weights, found: &Weights, what: &str) -> Option<String> {
    let mut expected = expected.clone();
    // Ranks under ZeRO 3 hold no whole parameters to compare.
    expected.retain(|name, _| found.contains_key(name));
    assert!(!expected.is_empty(), "{what}: nothing to compare");
    first_difference(&expected, found).map(|difference| format!("{what}: {difference}"))
}

/// All that differs, at once: which of many splits do tells more than the first.
fn accept(differences: impl IntoIterator<Item = Option<String>>) {
    let found: Vec<String> = differences.into_iter().flatten().collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn splits_recompute_and_recording() {
    let mut differences = Vec::new();
    for (model, precision) in models().iter().zip([DType::Bf16, DType::F32, DType::Bf16]) {
        let one = Layout::default();
        let Some(expected) = alone(model, &one, precision, false) else { return };
        let mut find = |layout: Layout, record, what: &str| {
            let found = alone(model, &layout, precision, record).expect("the same GPU");
            differences.push(check(&expected, &found, &format!("{} in {precision}, {what}", model.head_dim)));
        };
        find(one.clone(), false, "the same again");
        find(one.clone(), true, "call by call");
        for micro_batch in [2, 4] {
            let layout = Layout { micro_batch, ..one.clone() };
            find(layout, false, &format!("{micro_batch} sequences at once"));
        }
        for recompute in [Recompute::Selective, Recompute::Full] {
            let layout = Layout { micro_batch: 2, recompute, ..one.clone() };
            find(layout, false, &format!("{recompute:?} recompute"));
        }
    }
    accept(differences);
}

#[test]
fn layouts() {
    let model = &models()[0];
    let one = Layout::default();
    let Some(expected) = alone(model, &one, DType::Bf16, false) else { return };
    let of_zero = [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters];
    let of_zero = of_zero.map(|zero| Layout { dp: 2, zero, ..one.clone() });
    let pipeline = Layout { pp: 2, schedule: PipelineSchedule::OneFOneB, ..one.clone() };
    let both = Layout { pp: 2, dp: 2, ..one };
    accept(of_zero.into_iter().chain([pipeline, both]).filter_map(|layout| {
        let found = together(Recipe::default(), model, &layout, DType::Bf16).0;
        // Under ZeRO 3 no rank holds a whole parameter.
        (!found.is_empty()).then(|| check(&expected, &found, &format!("{layout:?}")))
    }));
}
