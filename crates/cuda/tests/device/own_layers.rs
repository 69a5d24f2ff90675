//! Functions of rows, which the host computes wherever the rest does.

use program::{Emitter, Layer, Mode, Recipe, Request, Role, RowFn, ValueId};
use spec::{DType, Layout};
use train::{Device, Executor, Mesh};

use crate::cases::model;
use crate::common::{SEQUENCE, first_difference, steps, weights};
use crate::{cpu, gpu};

/// A gate that is open where it is above 0, which no kernel has.
const GATED: RowFn = RowFn {
    name: "reglu",
    forward: |x, y| {
        let (gate, up) = x.split_at(y.len());
        y.iter_mut().zip(gate.iter().zip(up)).for_each(|(y, (g, u))| *y = g.max(0.0) * u);
    },
    backward: |dy, x, dx| {
        let (gate, up) = x.split_at(dy.len());
        let (dgate, dup) = dx.split_at_mut(dy.len());
        for i in 0..dy.len() {
            dgate[i] = if gate[i] > 0.0 { dy[i] * up[i] } else { 0.0 };
            dup[i] = dy[i] * gate[i].max(0.0);
        }
    },
};

fn with_rows(e: &mut Emitter<'_>, i: usize, x: ValueId) -> ValueId {
    let name = |part: &str| format!("layers.{i}.{part}");
    let h = e.norm(Role::AttentionNorm, &name("attn_norm"), x);
    let o = e.grouped_queries(&name("attn"), h);
    let x = e.row_parallel(Role::AttentionOut, &name("attn.o"), o, x);
    let h = e.norm(Role::MlpNorm, &name("mlp_norm"), x);
    let ffn = e.model().ffn;
    let a = e.linear(Role::Up, &name("mlp.gate_up"), h, 2 * ffn);
    let h = e.rows(GATED, &name("mlp.gated"), a, ffn);
    e.row_parallel(Role::Down, &name("mlp.down"), h, x)
}

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
        // Steps behind the second would be recorded ones.
        let losses: Vec<f64> = steps(&mut exec, model.vocab, 1, 6).iter().map(|s| s.loss).collect();
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
