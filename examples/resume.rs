//! A loop that may be killed at any time: started again it goes on from its newest checkpoint, under the same layout or
//! another, to the weights that it would have had.
//!
//!     cargo run --release --example resume -- /tmp/checkpoints
//!     phalanx launch --standalone --nproc-per-node 2 target/release/examples/resume /tmp/checkpoints pp=2

use std::path::PathBuf;

use phalanx::data::{DistributedSampler, TokenStream, Windows};
use phalanx::{Checkpoint, Error, Executor, Job, Meta, ModelSpec, StepInputs, exit, latest, layout};

const SEQUENCE: usize = 32;
const BATCH: usize = 4;
const STEPS: u64 = 60;
const EVERY: u64 = 10;

fn run() -> phalanx::Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = || Error::user("no folder for checkpoints").hint("resume DIR [LAYOUT]");
    let dir = PathBuf::from(args.next().ok_or_else(usage)?);
    let job = Job::join()?;
    let layout = job.spread(layout(&args.next().unwrap_or_default())?)?;
    let model = ModelSpec { vocab: 256, ..ModelSpec::preset("tiny")? };
    let dataset = Windows::bytes(include_str!("resume.rs"), SEQUENCE)?;
    let request = job.request(&model, &layout, SEQUENCE, BATCH);
    let mut exec = Executor::on(job.device(), &request, job.mesh(&layout)?, false)?;

    exec.initialise(&model, 42)?;
    let mut done = 0;
    if let Some(newest) = latest(&dir)? {
        let checkpoint = Checkpoint::open(&newest)?;
        exec.restore(&checkpoint)?;
        done = checkpoint.step();
    }
    // Nobody writes before all have read.
    exec.exchange(&[])?;

    let positions = exec.program.positions();
    let own = positions.len();
    let sampler = DistributedSampler::of_batches(dataset.len(), BATCH as u64, positions)?;
    let steps_per_epoch = sampler.samples() / own as u64;
    for step in done + 1..=STEPS {
        // What a step holds follows from its number alone, so no state of a loader is saved.
        let (epoch, first) = ((step - 1) / steps_per_epoch, (step - 1) % steps_per_epoch * own as u64);
        exec.load_samples(&dataset, &sampler.indices(epoch)[first as usize..][..own])?;
        let out = exec.step(&StepInputs::adamw(step, 1e-3, BATCH * SEQUENCE))?;
        if job.rank() == 0 {
            println!("step {step} loss {}", out.loss);
        }
        if step % EVERY == 0 {
            let meta =
                Meta { tokens: step * (BATCH * SEQUENCE) as u64, world: job.world(), ..Meta::default() };
            exec.save(&dir, step, meta)?;
        }
    }
    job.leave()
}

fn main() -> std::process::ExitCode {
    exit(run())
}
