//! Whether the best layout leaves memory for what an estimate does not know.

use plan::answer::{Answer, Choice};

use super::text::{bytes, seconds};

/// Below this share of free memory a layout is tight: a choice. Tests hold the median of predicted over reserved bytes of
/// published runs within a twentieth; single rows miss by more.
const TIGHT: f64 = 0.1;

/// What to say of a best layout that is tight: how much is free, and the fastest that leaves more.
pub(super) fn said(answer: &Answer) -> Option<String> {
    let room = answer.question.cluster.accelerator.memory_bytes.value;
    let best = answer.best.first().filter(|b| b.fits)?;
    let free = |c: &Choice| 1.0 - c.memory_bytes / room;
    if free(best) >= TIGHT {
        return None;
    }
    let head = format!(
        "the layout leaves {} of {} free ({:.1} %), less than estimates of memory may err",
        bytes(free(best) * room),
        bytes(room),
        100.0 * free(best)
    );
    if answer.given {
        return Some(head);
    }
    let roomy = answer.best.iter().chain(&answer.pareto).filter(|c| free(c) >= TIGHT);
    let next = roomy.min_by(|a, b| a.step_s.total_cmp(&b.step_s));
    Some(match next {
        Some(c) => format!(
            "{head}; {} leaves {:.0} % and takes {} a step, {:.1} % longer",
            c.placement(),
            100.0 * free(c),
            seconds(c.step_s),
            100.0 * (c.step_s / best.step_s - 1.0)
        ),
        None => format!("{head}; no layout found leaves a tenth: more accelerators do"),
    })
}
