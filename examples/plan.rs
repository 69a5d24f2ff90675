//! The best layout of a model on a cluster, how sure it is, and what the next ones lose.
//!
//!     cargo run --release --example plan -- llama3-8b dgx-h100 64

use phalanx::exit;
use phalanx::planner::{Calibration, Catalog, Question, model, plan};

fn run() -> phalanx::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, usual: &str| args.get(i).cloned().unwrap_or_else(|| usual.to_owned());
    let accelerators = arg(2, "64").parse().map_err(|_| {
        phalanx::Error::user(format!("{} accelerators", arg(2, "64"))).hint("give a number, or leave it out")
    })?;
    let cluster = Catalog::builtin()?.cluster(&arg(1, "dgx-superpod-h100-64su"), Some(accelerators))?;
    let question = Question::usual(model(&arg(0, "llama3-8b"))?, cluster);
    let answer = plan(Question { keep: 3, ..question }, &Calibration::builtin()?, &|_, _| {})?;
    for choice in &answer.best {
        println!(
            "{}: {:.2} s a step ({:.2} to {:.2}), {:.1} % MFU, {:.0} GB, bound by {}",
            choice.placement(),
            choice.step_s,
            choice.step_low_s,
            choice.step_high_s,
            100.0 * choice.mfu,
            choice.memory_bytes / 1e9,
            choice.bound
        );
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    exit(run())
}
