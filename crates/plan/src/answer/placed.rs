//! Bytes of a layout's ranks from the step program itself.

use spec::{Layout, Result};

use crate::estimate::{Problem, virtual_layers};
use crate::placement::Placement;

/// Bytes of the fullest rank from the placed program itself: every stage's program is built and the largest counts.
///
/// # Errors
/// If the model or the batch does not allow the layout.
pub fn program_memory(problem: &Problem, placement: &Placement) -> Result<usize> {
    let mut most = 0;
    for stage in 0..placement.layout.pp {
        most = most.max(stage_memory(problem, placement, stage)?.total);
    }
    Ok(most)
}

/// Where the bytes of a stage's ranks go, from the placed program itself.
///
/// # Errors
/// As [`program_memory`].
pub fn stage_memory(problem: &Problem, placement: &Placement, stage: usize) -> Result<program::Memory> {
    // Chunks as the stack deals them: its ends may hold no layer.
    let stage_layers = virtual_layers(problem, placement);
    let layout = &Layout { stage_layers, ..placement.layout.clone() };
    let request = program::Request {
        model: &problem.shape.model,
        layout,
        sequence: problem.sequence,
        sequences: problem.sequences,
        precision: placement.precision(),
        rank: stage * layout.stage_ranks(),
        mode: program::Mode::Train,
        loss: Default::default(),
        recipe: program::Recipe {
            optimizer: problem.optimizer.rule,
            ema: problem.optimizer.average,
            ..Default::default()
        },
    };
    program::Program::build(&request, &|_, _| 0).map(|p| p.memory)
}
