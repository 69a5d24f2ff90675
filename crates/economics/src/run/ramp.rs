//! From tokens to steps and seconds, with smaller batches at the beginning.

use plan::answer::Choice;
use plan::estimate::{Estimator, Problem};
use spec::{Error, Result};

use super::Ask;
use crate::input::{self, Bounds};

/// Steps and their seconds.
pub(super) struct Trained {
    pub(super) steps: f64,
    pub(super) seconds: f64,
}

/// Batches that differ from what was asked by more than this share say so.
const SAID_FROM: f64 = 0.001;

pub(super) fn trained(
    problem: &Problem,
    choice: &Choice,
    ask: &Ask,
    assumptions: &mut Vec<String>,
) -> Result<Trained> {
    let sequence = problem.sequence as f64;
    let mut done = Trained { steps: 0.0, seconds: 0.0 };
    let mut seen = 0.0;
    let mut batch = 0.0;
    for ramp in &ask.ramp {
        input::number("ramp: tokens of a batch", ramp.batch_tokens, Bounds::Positive)?;
        input::number("ramp: tokens until", ramp.until_tokens, Bounds::Positive)?;
        if ramp.until_tokens <= seen || ramp.batch_tokens <= batch {
            let what = format!(
                "ramp {:.4e}:{:.4e} does not follow {batch:.4e}:{seen:.4e}",
                ramp.batch_tokens, ramp.until_tokens
            );
            return Err(Error::user(what).hint("batches and tokens rise: --ramp 4M:252M,8M:2.87T"));
        }
        let tokens = ramp.until_tokens.min(ask.tokens) - seen;
        if tokens <= 0.0 {
            break;
        }
        let sequences = whole(problem, choice, ramp.batch_tokens)?;
        let taken = sequences as f64 * sequence;
        if (taken / ramp.batch_tokens - 1.0).abs() > SAID_FROM {
            assumptions.push(format!(
                "ramp: batches of {:.3}M tokens are taken as {sequences} sequences, {:.3}M tokens: the nearest that {} replicas divide",
                ramp.batch_tokens / 1e6,
                taken / 1e6,
                choice.layout.dp
            ));
        }
        let steps = tokens / taken;
        done.steps += steps;
        done.seconds += steps * smaller_step_s(problem, choice, sequences)?;
        (seen, batch) = (ramp.until_tokens.min(ask.tokens), ramp.batch_tokens);
    }
    let steps = (ask.tokens - seen) / (problem.sequences as f64 * sequence);
    done.steps += steps;
    done.seconds += steps * choice.step_s;
    Ok(done)
}

/// The batch nearest to so many tokens that every replica has as many sequences of.
fn whole(problem: &Problem, choice: &Choice, batch_tokens: f64) -> Result<usize> {
    let full = problem.sequences as f64 * problem.sequence as f64;
    if batch_tokens > full {
        return Err(Error::user(format!(
            "ramp: batches of {batch_tokens:.4e} tokens, the full batch has {full:.4e}"
        ))
        .hint("a ramp has smaller batches than --batch"));
    }
    let each = batch_tokens / (problem.sequence as f64 * choice.layout.dp as f64);
    Ok((each.round() as usize).max(1) * choice.layout.dp)
}

/// Seconds of a step of fewer sequences in the same layout, with the largest micro-batch that still divides them.
fn smaller_step_s(problem: &Problem, choice: &Choice, sequences: usize) -> Result<f64> {
    let mut placement = choice.placement().clone();
    let each = sequences / placement.layout.dp;
    let fits = |b: &usize| each.is_multiple_of(*b);
    placement.layout.micro_batch = (1..=placement.layout.micro_batch).rev().find(fits).unwrap_or(1);
    let problem = Problem { sequences, ..problem.clone() };
    let estimate = Estimator::new(&problem, placement.format)?
        .estimate(&placement)
        .map_err(|e| e.context(format!("ramp: a step of {sequences} sequences")))?;
    Ok(estimate.step_s)
}
