//! One step over the stages of the pipeline, played in the order that ranks run it.

use plan::answer::{Answer, Choice};
use plan::estimate::Estimator;
use plan::pipeline::Pipeline;
use program::{Pass, Work, WorkSpan, in_flight, orders, spans};
use spec::{Error, Result};

use super::Figure;
use crate::svg::{Anchor, Scale, Svg, WIDTH};
use crate::table::{Cell, Table};
use crate::text::{count, percent, seconds};

/// Pieces of work that a drawing holds: some megabytes.
const WORKS_MAX: usize = 24_000;
/// Stages that a drawing tells apart.
const STAGES_MAX: usize = 32;

/// A step as played.
pub(crate) struct Timeline {
    orders: Vec<Vec<Work>>,
    spans: Vec<Vec<WorkSpan>>,
    /// Micro-batches in flight at most, by stage.
    in_flight: Vec<f64>,
    /// End of the last pass.
    end_s: f64,
    step_s: f64,
    pipeline: Pipeline,
}

impl Timeline {
    /// Plays the best layout's step.
    ///
    /// # Errors
    /// If the layout is not allowed, which an answer rules out.
    pub(crate) fn of(answer: &Answer, best: &Choice) -> Result<Self> {
        let mut estimator = Estimator::new(&answer.problem, answer.question.format)?;
        let pipeline = estimator.pipeline(best.placement())?;
        let (stages, chunks) = (pipeline.stages as usize, pipeline.chunks as usize);
        let orders = orders(pipeline.schedule, stages, chunks, pipeline.micro_batches as usize);
        let split = orders.iter().flatten().any(|w| w.pass == Pass::Weight);
        let virtuals = estimator.virtuals(best.placement())?;
        let took = |v: usize, pass: Pass| {
            let weight = if split { pipeline.weight_s } else { 0.0 };
            match pass {
                Pass::Forward => virtuals[v].forward_s,
                Pass::Backward => (virtuals[v].backward_s - weight).max(0.0),
                Pass::Weight => weight,
            }
        };
        let spans = spans(&orders, chunks, took).map_err(Error::failure)?;
        let end_s = spans.iter().flatten().map(|s| s.end).fold(0.0, f64::max);
        let in_flight =
            orders.iter().map(|o| in_flight(o, chunks).iter().sum::<usize>() as f64 / pipeline.chunks);
        let in_flight = in_flight.collect();
        Ok(Timeline { in_flight, orders, spans, end_s, step_s: best.step_s, pipeline })
    }

    /// Seconds of a pass on a stage, all micro-batches.
    fn busy_s(&self, stage: usize, pass: Pass) -> f64 {
        let works = self.orders[stage].iter().zip(&self.spans[stage]);
        works.filter(|(w, _)| w.pass == pass).map(|(_, s)| s.end - s.start).sum()
    }

    /// Stages to draw, spread over all of them.
    fn shown(&self, most: usize) -> Vec<usize> {
        let all = self.orders.len();
        let rows = all.min(most).max(1);
        if rows == 1 {
            return vec![0];
        }
        (0..rows).map(|i| i * (all - 1) / (rows - 1)).collect()
    }
}

const NAMES: [(&str, Pass, &str); 3] = [
    ("forward", Pass::Forward, "c0"),
    ("backward", Pass::Backward, "c1"),
    ("weight gradients", Pass::Weight, "c2"),
];
const ROW_LABEL: f64 = 76.0;

/// Names of the colours.
fn legend(svg: &mut Svg, y: f64, names: &[(&str, &str)]) {
    let mut x = ROW_LABEL;
    for (name, class) in names {
        svg.rect([x, y - 10.0, 12.0, 12.0], class, None, "");
        svg.text(x + 17.0, y, Anchor::Start, "label", name);
        x += 40.0 + 7.0 * name.len() as f64;
    }
}

/// Time of each stage by pass.
pub(crate) fn by_stage(t: &Timeline) -> Figure {
    let shown = t.shown(STAGES_MAX);
    let row = 18.0;
    let mut svg = Svg::new(row * shown.len() as f64 + 34.0);
    let x = Scale::linear(0.0, t.end_s, ROW_LABEL, WIDTH - 8.0);
    let mut table = Table::new(&["stage", "forward", "backward", "weights", "waits", "in flight"]);
    for (i, stage) in shown.iter().enumerate() {
        let y = row * i as f64;
        svg.text(ROW_LABEL - 8.0, y + 13.0, Anchor::End, "label", &format!("stage {stage}"));
        let mut at = 0.0;
        let mut cells = vec![Cell::number(*stage as f64, count)];
        for (name, pass, class) in NAMES {
            let s = t.busy_s(*stage, pass);
            let says = format!("stage {stage}, {name}: {}", seconds(s));
            if s > 0.0 {
                svg.rect([x.at(at), y + 2.0, x.at(at + s) - x.at(at), row - 4.0], class, Some(i), &says);
            }
            at += s;
            cells.push(Cell::number(s, seconds));
        }
        let waits = (t.end_s - at).max(0.0);
        let says = format!("stage {stage} waits {}", seconds(waits));
        svg.rect([x.at(at), y + 2.0, x.at(t.end_s) - x.at(at), row - 4.0], "free", Some(i), &says);
        cells
            .extend([Cell::number(waits, seconds), Cell::number(t.in_flight[*stage], |n| format!("{n:.1}"))]);
        table.row(cells);
    }
    legend(
        &mut svg,
        row * shown.len() as f64 + 24.0,
        &[("forward", "c0"), ("backward", "c1"), ("weight gradients", "c2"), ("waits", "free")],
    );
    let most =
        (0..t.orders.len()).map(|s| NAMES.iter().map(|n| t.busy_s(s, n.1)).sum::<f64>()).fold(0.0, f64::max);
    let says = match t.orders.len() {
        1 => "There is one stage: nothing waits for another.".to_owned(),
        n => format!(
            "The busiest of {n} stages works {} of the {} that the pipeline takes; the first holds {:.1} micro-batches at once.",
            percent(most / t.end_s),
            seconds(t.end_s),
            t.in_flight[0]
        ),
    };
    let drawing = svg.finish("stages", "Time of each stage by pass", &says);
    Figure { id: "stages", title: "Stage by stage".to_owned(), says, drawing, table }
}

/// One step over the stages.
pub(crate) fn timeline(t: &Timeline) -> Figure {
    let a_stage = t.orders.iter().map(Vec::len).max().unwrap_or(1).max(1);
    let shown = t.shown((WORKS_MAX / a_stage).clamp(1, STAGES_MAX));
    let row = 16.0;
    let bottom = row * shown.len() as f64;
    let mut svg = Svg::new(bottom + 58.0);
    let x = Scale::linear(0.0, t.step_s.max(t.end_s), ROW_LABEL, WIDTH - 8.0);
    let mut paths = [const { String::new() }; 3];
    for (i, stage) in shown.iter().enumerate() {
        let y = row * i as f64;
        svg.text(ROW_LABEL - 8.0, y + 12.0, Anchor::End, "label", &format!("stage {stage}"));
        svg.rect([ROW_LABEL, y + 1.0, x.at(t.end_s) - ROW_LABEL, row - 2.0], "free", Some(i), "");
        for (w, s) in t.orders[*stage].iter().zip(&t.spans[*stage]) {
            let (from, width) = (x.at(s.start), x.at(s.end) - x.at(s.start));
            // A hair between neighbours, where there is room for one.
            let width = if width > 1.5 { width - 0.4 } else { width };
            paths[w.pass as usize] +=
                &format!("M{from:.2} {:.0}h{width:.2}v{:.0}h-{width:.2}z", y + 2.0, row - 4.0);
        }
    }
    for ((_, _, class), d) in NAMES.iter().zip(&paths) {
        if !d.is_empty() {
            svg.path(d, class);
        }
    }
    let tail = t.step_s - t.end_s;
    if tail > 0.0 {
        let says = format!("between replicas, optimizer, stragglers: {}", seconds(tail));
        svg.rect([x.at(t.end_s), 0.0, x.at(t.step_s) - x.at(t.end_s), bottom], "c3", None, &says);
    }
    svg.ticks(&x, bottom, &seconds);
    legend(
        &mut svg,
        bottom + 46.0,
        &[
            ("forward", "c0"),
            ("backward", "c1"),
            ("weight gradients", "c2"),
            ("waits", "free"),
            ("between replicas, optimizer", "c3"),
        ],
    );
    let mut table = Table::new(&["of the step", "value"]);
    let mut row_of = |name: &str, cell: Cell| table.row(vec![Cell::words(name), cell]);
    row_of("micro-batches", Cell::number(t.pipeline.micro_batches, count));
    row_of("stages", Cell::number(t.pipeline.stages, count));
    row_of("chunks a stage", Cell::number(t.pipeline.chunks, count));
    row_of("end of the last pass", Cell::number(t.end_s, seconds));
    row_of("step", Cell::number(t.step_s, seconds));
    let says = format!(
        "{} micro-batches on {} stage{} of {} chunk{}; {}messages between stages are not drawn.",
        count(t.pipeline.micro_batches),
        count(t.pipeline.stages),
        if t.pipeline.stages > 1.0 { "s" } else { "" },
        count(t.pipeline.chunks),
        if t.pipeline.chunks > 1.0 { "s" } else { "" },
        if shown.len() < t.orders.len() {
            format!("{} stages are shown; ", shown.len())
        } else {
            String::new()
        },
    );
    let drawing = svg.finish("timeline", "One step over the stages", &says);
    Figure { id: "timeline", title: "One step, over the stages".to_owned(), says, drawing, table }
}
