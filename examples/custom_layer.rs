//! A layer with a function of its own: the gate of its feed-forward half is a squared ReLU (So et al. 2021,
//! arXiv 2109.08668), with the derivative written beside it. First the derivative is held to finite differences, then
//! the model trains.
//!
//!     cargo run --release --example custom_layer

use phalanx::data::Windows;
use phalanx::{Emitter, Error, Executor, Job, Layout, ModelSpec, Role, RowFn, StepInputs, ValueId, exit};

/// `relu(gate)^2 up`, where a row is gates, then what they let through.
const SQUARED_RELU: RowFn = RowFn {
    name: "squared_relu",
    forward: |x, y| {
        let (gate, up) = x.split_at(y.len());
        for i in 0..y.len() {
            y[i] = gate[i].max(0.0).powi(2) * up[i];
        }
    },
    backward: |dy, x, dx| {
        let (gate, up) = x.split_at(dy.len());
        let (dgate, dup) = dx.split_at_mut(dy.len());
        for i in 0..dy.len() {
            dgate[i] = dy[i] * 2.0 * gate[i].max(0.0) * up[i];
            dup[i] = dy[i] * gate[i].max(0.0).powi(2);
        }
    },
};

fn layer(e: &mut Emitter<'_>, i: usize, x: ValueId) -> ValueId {
    let name = |part: &str| format!("layers.{i}.{part}");
    let h = e.norm(Role::AttentionNorm, &name("attn_norm"), x);
    let heads = e.grouped_queries(&name("attn"), h);
    let x = e.row_parallel(Role::AttentionOut, &name("attn.out"), heads, x);
    let h = e.norm(Role::MlpNorm, &name("mlp_norm"), x);
    let h = e.enter_tp(&name("mlp.in"), h);
    let width = e.model().ffn / e.layout().tp;
    let a = e.linear(Role::Up, &name("mlp.up"), h, 2 * width);
    let h = e.rows(SQUARED_RELU, &name("mlp.squared_relu"), a, width);
    e.row_parallel(Role::Down, &name("mlp.down"), h, x)
}

/// The largest difference between the derivative and central differences of the sum of `y`, over a row of some numbers.
fn error_of(f: RowFn) -> f32 {
    const STEP: f32 = 1e-2;
    let x: Vec<f32> = (0..16).map(|i| (i as f32 * 0.7).sin() + 0.1).collect();
    let sum = |x: &[f32]| {
        let mut y = vec![0.0; x.len() / 2];
        (f.forward)(x, &mut y);
        y.iter().sum::<f32>()
    };
    let mut dx = vec![0.0; x.len()];
    (f.backward)(&vec![1.0; x.len() / 2], &x, &mut dx);
    let errors = (0..x.len()).map(|i| {
        let at = |by: f32| {
            x.iter().enumerate().map(|(j, v)| v + if i == j { by } else { 0.0 }).collect::<Vec<_>>()
        };
        ((sum(&at(STEP)) - sum(&at(-STEP))) / (2.0 * STEP) - dx[i]).abs()
    });
    errors.fold(0.0, f32::max)
}

fn run() -> phalanx::Result<()> {
    let error = error_of(SQUARED_RELU);
    println!("derivative within {error:.1e} of finite differences");
    if error > 1e-2 {
        return Err(Error::failure("the derivative is wrong"));
    }
    let (job, layout) = (Job::join()?, Layout::default());
    let model = ModelSpec { vocab: 256, ..ModelSpec::preset("tiny")? };
    let text = Windows::bytes(include_str!("custom_layer.rs"), 32)?;
    let request = job.request(&model, &layout, 32, 8);
    let mut exec = Executor::of_layers(job.device(), &request, &layer, job.mesh(&layout)?)?;
    exec.initialise(&model, 1)?;
    for step in 1..=40 {
        let first = (step - 1) % 10 * 8;
        exec.load_samples(&text, &(first..first + 8).collect::<Vec<_>>())?;
        let out = exec.step(&StepInputs::adamw(step, 3e-3, 8 * 32))?;
        if step % 10 == 0 {
            println!("step {step} loss {:.4}", out.loss);
        }
    }
    job.leave()
}

fn main() -> std::process::ExitCode {
    exit(run())
}
