//! A chosen layout as arguments of other training stacks.
//!
//! Flags and keys are those of Megatron-LM at d98e8a6 (2026-08), torchtitan 0.2.2 (the last release configured by
//! TOML), DeepSpeed at edaa722 (2026-08), Megatron-DeepSpeed at 4efb479 (2025-07) and MaxText at e591f30 (2026-08).

mod deepspeed;
mod maxtext;
mod megatron;
mod ranks;
mod traits;
mod torchtitan;

pub use ranks::{Place, rank_csv, ranks};

use plan::estimate::{Problem, Updates};
use plan::placement::Placement;
use spec::{Error, Optimizer, PipelineSchedule, Result, suggest};

/// Stacks that arguments can be written for, each with the training stack whose layouts suit it.
pub(crate) const STACKS: [(&str, &str); 5] = [
    ("megatron", "megatron-core-2026"),
    ("torchtitan", "torchtitan"),
    ("deepspeed", "deepspeed-zero3"),
    ("megatron-deepspeed", "megatron-deepspeed"),
    ("maxtext", "maxtext-2025"),
];

/// A layout written for another stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emitted {
    /// Arguments, or a configuration file.
    pub text: String,
    /// What else to set, and what the stack does differently.
    pub notes: Vec<String>,
}

/// The layout as arguments (or a configuration file) of `stack`.
///
/// # Errors
/// If the stack is unknown, or cannot express the layout: the message says which part, and what it has instead.
pub fn emit(stack: &str, problem: &Problem, placement: &Placement) -> Result<Emitted> {
    if problem.optimizer != Updates::default() && STACKS.iter().any(|s| s.0 == stack) {
        let (what, flag) = match problem.optimizer.rule {
            Optimizer::AdamW => ("an average of the weights".to_owned(), "--ema"),
            rule => (format!("the optimizer {}", rule.name()), "--optimizer"),
        };
        let what = format!("{what}, which it is not known to shard as it was priced");
        return Err(lacks(stack, what, format!("plan for the stack without {flag}")));
    }
    match stack {
        "megatron" => megatron::emit(problem, placement),
        "torchtitan" => torchtitan::emit(problem, placement),
        "deepspeed" => deepspeed::config(problem, placement),
        "megatron-deepspeed" => deepspeed::megatron(problem, placement),
        "maxtext" => maxtext::emit(problem, placement),
        other => Err(unknown(other)),
    }
}

/// The training stack (of [`plan::software::ALL`]) whose layouts suit `stack`.
///
/// # Errors
/// If the stack is unknown.
pub fn software(stack: &str) -> Result<&'static str> {
    STACKS.iter().find(|s| s.0 == stack).map(|s| s.1).ok_or_else(|| unknown(stack))
}

fn unknown(stack: &str) -> Error {
    Error::user(format!("unknown stack \"{stack}\" to emit for"))
        .hint(suggest::hint(stack, STACKS.iter().map(|s| s.0)))
}

/// The stack cannot express a part of the layout.
fn lacks(stack: &str, what: impl std::fmt::Display, instead: impl Into<String>) -> Error {
    Error::user(format!("{stack} has no {what}")).hint(instead)
}

/// `flag value` pairs, one a line, as a shell continues them.
fn arguments(args: &[String]) -> String {
    args.join(" \\\n") + "\n"
}

fn schedule_name(schedule: PipelineSchedule) -> &'static str {
    match schedule {
        PipelineSchedule::Gpipe => "GPipe",
        PipelineSchedule::OneFOneB => "1F1B",
        PipelineSchedule::Interleaved => "interleaved 1F1B",
        PipelineSchedule::ZeroBubble => "zero-bubble",
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod traits_tests;
