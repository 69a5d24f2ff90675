//! Data-parallel training as a loop of one's own. Any launcher starts its ranks:
//!
//!     phalanx launch --standalone --nproc-per-node 4 target/release/examples/ddp
//!     torchrun --nproc-per-node 4 --no-python target/release/examples/ddp tp=2,pp=2
//!
//! The argument is the layout; data parallelism takes the ranks that it leaves over.

use phalanx::data::{DistributedSampler, TokenStream, Windows};
use phalanx::{Emitter, Executor, Job, ModelSpec, Role, StepInputs, ValueId, exit, layout};

const SEQUENCE: usize = 32;
const BATCH: usize = 8;

/// A transformer layer whose halves both read its input: x + attention(norm(x)) + mlp(norm(x)).
fn layer(e: &mut Emitter<'_>, i: usize, x: ValueId) -> ValueId {
    let name = |part: &str| format!("layers.{i}.{part}");
    let a = e.norm(Role::AttentionNorm, &name("attn_norm"), x);
    let m = e.norm(Role::MlpNorm, &name("mlp_norm"), x);
    let heads = e.grouped_queries(&name("attn"), a);
    let x = e.row_parallel(Role::AttentionOut, &name("attn.out"), heads, x);
    let ffn = e.model().ffn;
    e.mlp((Role::Up, Role::Down), &name("mlp"), ffn, m, x)
}

fn train() -> phalanx::Result<()> {
    let job = Job::join()?;
    let layout = job.spread(layout(&std::env::args().nth(1).unwrap_or_default())?)?;
    let model = ModelSpec { vocab: 256, layers: 4, ..ModelSpec::preset("tiny")? };
    let dataset = Windows::bytes(include_str!("ddp.rs"), SEQUENCE)?;

    let request = job.request(&model, &layout, SEQUENCE, BATCH);
    let mut exec = Executor::of_layers(job.device(), &request, &layer, job.mesh(&layout)?)?;
    exec.initialise(&model, 42)?;
    // Each rank draws the sequences of every batch that are its own, in an order that all ranks know.
    let positions = exec.program.positions();
    let (own, items) = (positions.len(), dataset.len());
    let sampler = DistributedSampler::of_batches(items, BATCH as u64, positions)?;

    let mut step = 0;
    for epoch in 0..4 {
        for samples in sampler.indices(epoch).chunks_exact(own) {
            step += 1;
            exec.load_samples(&dataset, samples)?;
            // Forward, backward, gradients summed over the ranks, clipping, AdamW.
            let out = exec.step(&StepInputs::adamw(step, 1e-3, BATCH * SEQUENCE))?;
            if job.rank() == 0 {
                println!("epoch {epoch} step {step} loss {} norm {}", out.loss, out.grad_norm);
            }
        }
    }
    job.leave()
}

fn main() -> std::process::ExitCode {
    exit(train())
}
