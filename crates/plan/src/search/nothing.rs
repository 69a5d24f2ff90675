//! What to say where no layout fits: which bytes are too many, and how many accelerators would do.

use spec::Error;

use super::{Found, Part, Space, explore};
use crate::estimate::Problem;

pub(super) fn nothing(problem: &Problem, space: &Space, all: &Part) -> Error {
    let name = &problem.shape.model.name;
    let kind = space.strategy.map(|s| format!("{s} ")).unwrap_or_default();
    let room = problem.cluster.accelerator.memory_bytes.value;
    match &all.smallest {
        Some(found) => {
            let what = format!(
                "no {kind}layout of {name} fits {} x {}: {}",
                space.accelerators,
                problem.cluster.accelerator.name,
                overfull(found, room)
            );
            let hint = match (what_would_fit(problem, space), space.strategy) {
                (hint, None) => hint,
                (hint, Some(_)) => format!("{hint}; without --layout all strategies are tried"),
            };
            Error::user(what).hint(hint)
        }
        None => {
            let reasons: Vec<String> = all.refused.iter().map(|(why, n)| format!("{why} ({n})")).collect();
            let reasons = if reasons.is_empty() { vec!["no axis divides both".to_owned()] } else { reasons };
            Error::user(format!(
                "no {kind}layout of {name} uses {} accelerators with {} sequences: {}",
                space.accelerators,
                problem.sequences,
                reasons.join(", ")
            ))
            .hint("--accelerators and --sequences with small factors have more layouts")
        }
    }
}

/// Which rank a layout overfills, and with what, largest first.
fn overfull(found: &Found, room: f64) -> String {
    let m = found.estimate.memory;
    let gb = |x: f64| x / 1e9;
    let mut parts = [
        ("parameters", m.params),
        ("gradients", m.grads),
        ("optimiser", m.optimizer),
        ("activations", m.activations),
        ("working set", m.working),
        ("framework", m.framework),
    ];
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let parts: Vec<String> = parts.iter().map(|(what, x)| format!("{what} {:.1}", gb(*x))).collect();
    // The first stage keeps the most micro-batches in flight.
    let rank = match found.placement.layout.pp {
        1 => "every rank".to_owned(),
        pp => format!("rank 0 (stage 0 of {pp})"),
    };
    format!(
        "the smallest, {}, takes {:.1} GB of {:.1} GB on {rank} ({})",
        found.placement,
        gb(m.total()),
        gb(room),
        parts.join(", ")
    )
}

/// No more accelerators than this, or sixteen times those asked, are tried before giving up.
const TRIED_MAX: usize = 1 << 18;

/// The smallest number of accelerators found on which some layout fits, by doubling and then halving the gap.
fn what_would_fit(problem: &Problem, space: &Space) -> String {
    let fits = |n: usize| -> Option<Found> {
        let mut problem = problem.clone();
        problem.cluster.accelerators = n;
        // A larger micro-batch never takes less.
        let space = Space { accelerators: n, keep: 1, micro_batch_max: 1, ..space.clone() };
        explore(&problem, &space, &[], &|_, _| ()).ok()?.best.into_iter().next()
    };
    let n = space.accelerators;
    let has = problem.cluster.accelerators_max;
    let end = TRIED_MAX.max(16 * n).min(has);
    // Doubling stops at the machine's size, which is tried too.
    let doubled = std::iter::successors(Some(2 * n), |many| Some(2 * many)).take_while(|many| *many < end);
    let tries = doubled.chain((end > n).then_some(end));
    let Some((mut most, mut found)) = tries.into_iter().find_map(|many| Some((many, fits(many)?))) else {
        let all = if end == has { format!("all {end}") } else { end.to_string() };
        return format!(
            "not even {all} accelerators would do: a shorter --sequence takes less, and so does a smaller model"
        );
    };
    let per_node = problem.cluster.per_node.max(1);
    let mut least = n.max(most / 2);
    while most - least > per_node {
        let middle = least + ((most - least) / 2).next_multiple_of(per_node).min(most - least - 1);
        match fits(middle) {
            Some(fitting) => (most, found) = (middle, fitting),
            None => least = middle,
        }
    }
    format!("{most} accelerators would fit it ({})", found.placement)
}
