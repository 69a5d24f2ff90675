//! What the ranks of each stage hold, from the step program itself.

use plan::answer::{Answer, Choice, stage_memory};
use program::Memory;
use spec::Result;

use super::{Figure, fill};
use crate::svg::{Anchor, Scale, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{bytes, count};

/// Stages that are built and drawn; of more, as many spread over all.
const STAGES_MAX: usize = 16;
const LABEL: f64 = 76.0;
const ROW: f64 = 20.0;

/// Bytes of one rank by what they are for.
fn parts(m: &Memory) -> [(&'static str, f64); 5] {
    [
        ("parameters", m.params + m.master),
        ("gradients", m.grads),
        ("optimizer", m.moments + m.average),
        ("activations", m.slots + m.scratch),
        ("other", m.other + m.workspace),
    ]
    .map(|(name, bytes)| (name, bytes as f64))
}

/// The memory map by stage: all ranks of a stage hold the same.
///
/// # Errors
/// Where the step program of the layout cannot be built, with why: some stacks lay out what it does not.
pub(crate) fn by_stage_memory(answer: &Answer, best: &Choice) -> Result<Figure> {
    let placement = best.placement();
    let (layout, problem) = (&placement.layout, &answer.problem);
    let rows = layout.pp.min(STAGES_MAX);
    let stages: Vec<usize> =
        (0..rows).map(|i| if rows < 2 { 0 } else { i * (layout.pp - 1) / (rows - 1) }).collect();
    let memory = |stage: &usize| stage_memory(problem, placement, *stage);
    let found: Vec<Memory> = stages.iter().map(memory).collect::<Result<_>>()?;
    let most = found.iter().map(|m| m.total as f64).fold(0.0, f64::max);
    let room = problem.cluster.accelerator.memory_bytes.value;
    let bottom = ROW * rows as f64;
    let mut svg = Svg::new(bottom + 34.0);
    let x = Scale::linear(0.0, room.max(most), LABEL, WIDTH - 8.0);
    let mut table =
        Table::new(&["stage", "parameters", "gradients", "optimizer", "activations", "other", "in all"]);
    for (i, (stage, m)) in stages.iter().zip(&found).enumerate() {
        let y = ROW * i as f64;
        svg.text(LABEL - 8.0, y + 14.0, Anchor::End, "label", &format!("stage {stage}"));
        let mut cells = vec![Cell::number(*stage as f64, count)];
        let mut at = 0.0;
        for (c, (name, held)) in parts(m).into_iter().enumerate() {
            let says = format!("stage {stage}, {name}: {}", bytes(held));
            svg.rect([x.at(at), y + 2.0, x.at(at + held) - x.at(at), ROW - 5.0], &fill(c), Some(i), &says);
            at += held;
            cells.push(Cell::number(held, bytes));
        }
        cells.push(Cell::number(m.total as f64, bytes));
        table.row(cells);
    }
    svg.line((x.at(room), 0.0), (x.at(room), bottom), "rule");
    let mut legend = LABEL;
    for (c, (name, _)) in parts(&found[0]).into_iter().enumerate() {
        svg.rect([legend, bottom + 14.0, 12.0, 12.0], &fill(c), None, "");
        svg.text(legend + 17.0, bottom + 24.0, Anchor::Start, "label", name);
        legend += 40.0 + 7.0 * name.len() as f64;
    }
    let fullest = stages.iter().zip(&found).max_by_key(|(_, m)| m.total).unwrap_or((&0, &found[0]));
    let says = format!(
        "Buffers of the step program on the {} ranks of each stage: stage {} holds the most, {}. What a framework adds, {} in \
         the estimate, comes on top; {}, which the estimate is of, holds {} in all.",
        count((layout.dp * layout.tp * layout.cp) as f64),
        fullest.0,
        bytes(fullest.1.total as f64),
        bytes(best.memory.framework),
        problem.software.name,
        bytes(best.memory.total())
    );
    let drawing = svg.finish("ranks", "Memory of the ranks of each stage", &says);
    Ok(Figure { id: "ranks", title: "What each rank holds, by stage".to_owned(), says, drawing, table })
}
