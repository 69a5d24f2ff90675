//! Functions of rows, which the host computes wherever the rest does.

use program::{Layer, Mode, Recipe, Request};
use spec::{DType, Layout};
use train::{Device, Executor, Mesh};

use crate::cases::model;
use crate::common::{SEQUENCE, first_difference, steps, weights, with_rows};
use crate::{STEPS, cpu, gpu};

#[test]
fn functions_of_rows() {
    let model = model(1, false, false);
    let train = |device: Box<dyn Device>, layout: &Layout, precision| {
        let request = Request {
            model: &model,
            layout,
            sequence: SEQUENCE,
            sequences: 4,
            precision,
            rank: 0,
            mode: Mode::Train,
            loss: Default::default(),
            recipe: Recipe::default(),
        };
        let layer: Layer<'_> = &with_rows;
        let mut exec = Executor::of_layers(device, &request, layer, Mesh::alone()).expect("a program");
        exec.initialise(&model, 11).expect("weights");
        // Steps behind the first would be recorded ones.
        let losses: Vec<f64> = steps(&mut exec, model.vocab, 1, STEPS + 1).iter().map(|s| s.loss).collect();
        (losses, weights(&exec))
    };
    for (precision, within) in [(DType::F32, 2e-5), (DType::Bf16, 1e-2)] {
        let Some(device) = gpu() else { return };
        let (losses, ours) = train(Box::new(device), &Layout::default(), precision);
        for (step, (a, b)) in losses.iter().zip(train(cpu(), &Layout::default(), precision).0).enumerate() {
            assert!((a / b - 1.0).abs() < within, "step {step} in {precision}: {a} against {b}");
        }
        let split = Layout { micro_batch: 2, recompute: spec::Recompute::Full, ..Layout::default() };
        let (_, other) = train(Box::new(gpu().expect("the same GPU")), &split, precision);
        assert_eq!(first_difference(&ours, &other), None, "{precision}");
    }
}
