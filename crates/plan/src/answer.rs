//! A planning question and its answer: the best layouts, how sure they are, and why.

mod placed;

use serde::Serialize;
use serde_json::{Value, json};
use spec::cluster::Knob;
use spec::{Cluster, Error, Layout, NumberFormat, Optimizer, Result};

use crate::calibration::{Calibration, Evidence, Grade};
use crate::compute::lacks;
use crate::estimate::{Breakdown, Estimate, Estimator, MemoryUse, Problem, Updates};
use crate::given;
use crate::placement::Placement;
use crate::search::{self, Found, Searched, Space};
use crate::shape::Shape;
use crate::software::Software;
use crate::storage::{self, StorageEstimate};
use crate::strategy::Strategy;

pub use placed::{program_memory, stage_memory};

/// What is to be planned.
#[derive(Clone, Debug)]
pub struct Question {
    /// The model.
    pub shape: Shape,
    /// The machine, with the accelerators that the job gets.
    pub cluster: Cluster,
    /// The training stack; the usual one for the accelerator if `None`.
    pub software: Option<Software>,
    /// Format of the matrix products.
    pub format: NumberFormat,
    /// Tokens of a sequence; see [`default_batch`].
    pub sequence: usize,
    /// Sequences of the global batch.
    pub sequences: usize,
    /// How gradients become updates.
    pub optimizer: Updates,
    /// Tokens to train on, for the time of the whole run.
    pub tokens: Option<f64>,
    /// How many of the best layouts to give.
    pub keep: usize,
    /// Only layouts that this program can train.
    pub trainable_only: bool,
    /// Only layouts of this strategy.
    pub strategy: Option<Strategy>,
}

impl Question {
    /// What is usual for a model on a cluster: the batch ([`default_batch`]), the accelerator's 16-bit format and training
    /// stack, the ten best layouts of any strategy.
    pub fn usual(shape: Shape, cluster: Cluster) -> Question {
        let (sequences, sequence) = default_batch(&shape);
        Question {
            sequence,
            sequences: sequences_for(sequences, cluster.accelerators),
            format: cluster.accelerator.sixteen_bit(),
            shape,
            cluster,
            software: None,
            optimizer: Updates::default(),
            tokens: None,
            keep: 10,
            trainable_only: false,
            strategy: None,
        }
    }
}

/// One layout of an answer.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// Axes, schedule and policies, flat.
    pub layout: LayoutOut,
    /// Time of a step in seconds.
    pub step_s: f64,
    /// Low end of the interval.
    pub step_low_s: f64,
    /// High end of the interval.
    pub step_high_s: f64,
    /// Model FLOPs utilisation.
    pub mfu: f64,
    /// Tokens per second of the whole job.
    pub tokens_per_s: f64,
    /// Days to train the tokens asked for, at this rate without interruptions.
    pub train_days: Option<f64>,
    /// Part of the step that waits for tokens from shared storage: 0 unless reading outlasts the rest.
    pub loading_s: f64,
    /// Bytes of the fullest accelerator.
    pub memory_bytes: f64,
    /// Whether they fit; always true of layouts that a search found.
    pub fits: bool,
    /// Where they go.
    pub memory: MemoryUse,
    /// Where the time goes.
    pub breakdown: Breakdown,
    /// The largest part of the time.
    pub bound: &'static str,
    /// What it loses to the best, by part: positive where it takes longer. Empty for the best.
    pub loses_s: Vec<(&'static str, f64)>,
    #[serde(skip)]
    placement: Placement,
}

impl Choice {
    /// Names and values of the parts of the step, which add up to it.
    pub fn parts(&self) -> Vec<(&'static str, f64)> {
        let mut parts = self.breakdown.parts().to_vec();
        parts.push(("data loading", self.loading_s));
        parts
    }

    /// The layout as it was estimated.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }
}

/// A layout as flat keys, named as in the run file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayoutOut {
    /// Data-parallel ranks.
    pub dp: usize,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Context-parallel ranks.
    pub cp: usize,
    /// How they attend; a ring if it is not there.
    #[serde(skip_serializing_if = "spec::ContextMode::is_ring")]
    pub context: spec::ContextMode,
    /// Expert-parallel ranks.
    pub ep: usize,
    /// ZeRO stage.
    pub zero: u8,
    /// Residual stream split along the sequence.
    pub sequence_parallel: bool,
    /// Pipeline schedule.
    pub schedule: spec::PipelineSchedule,
    /// Chunks a stage.
    pub chunks: usize,
    /// Sequences at once.
    pub micro_batch: usize,
    /// What is recomputed.
    pub recompute: spec::Recompute,
    /// Order in which axes fill the machine, innermost first.
    pub order: crate::placement::Order,
}

impl LayoutOut {
    /// Flattens a placement.
    pub fn of(placement: &Placement) -> Self {
        let l = &placement.layout;
        LayoutOut {
            dp: l.dp,
            tp: l.tp,
            pp: l.pp,
            cp: l.cp,
            context: l.context,
            ep: l.ep,
            zero: l.zero.into(),
            sequence_parallel: l.sequence_parallel,
            schedule: l.schedule,
            chunks: l.chunks,
            micro_batch: l.micro_batch,
            recompute: l.recompute,
            order: placement.order,
        }
    }
}

/// An answer with its reasons.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The question.
    pub question: Question,
    /// The problem as estimated.
    pub problem: Problem,
    /// Best first.
    pub best: Vec<Choice>,
    /// Time against memory: no layout is both faster and smaller.
    pub pareto: Vec<Choice>,
    /// How wide the interval of the best is, and on what evidence.
    pub grade: Grade,
    /// What was assumed.
    pub assumptions: Vec<String>,
    /// Data loading and checkpoints, if the cluster's storage is known.
    pub storage: Option<StorageEstimate>,
    /// Counts of the search.
    pub searched: Searched,
    /// The layout was given, not searched for.
    pub given: bool,
}

/// How the best layout's time follows a property of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// Which property.
    pub of: Knob,
    /// Change of the best layout's step time in percent for one percent more of it.
    pub elasticity: f64,
    /// Step time of the best layout found when there is a quarter more of it.
    pub step_s_with_quarter_more: f64,
}

/// A batch for a model where none is asked for: (sequences, tokens of a sequence).
///
/// Half a million tokens below 3 billion parameters, 2 below 30, 4 below 300, then 16 (GPT-3, Llama 2 and Llama 3.1
/// used 3.2, 4 and 16 million); sequences of 2048 for learned positions, else up to 8192.
pub fn default_batch(shape: &Shape) -> (usize, usize) {
    let sequence = match &shape.model.position {
        spec::Position::Learned { max_positions } => (*max_positions).min(2048),
        spec::Position::Rope(rope) => rope.max_positions.min(8192),
    };
    let params = shape.params();
    let tokens: usize = match params {
        p if p < 3e9 => 1 << 19,
        p if p < 30e9 => 1 << 21,
        p if p < 300e9 => 1 << 22,
        _ => 1 << 24,
    };
    ((tokens / sequence.max(1)).max(1), sequence.max(1))
}

/// A number of sequences near `usual` that `accelerators` split well: within an eighth, the one that shares the largest
/// divisor with them, and of those the nearest.
///
/// ```
/// use plan::answer::sequences_for;
/// assert_eq!(sequences_for(2048, 16_384), 2048);
/// assert_eq!(sequences_for(2048, 100_000), 2000);
/// assert_eq!(sequences_for(1024, 72), 1008);
/// ```
pub fn sequences_for(usual: usize, accelerators: usize) -> usize {
    let divisor = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let near = usual.saturating_sub(usual / 8).max(1)..=usual + usual / 8;
    near.max_by_key(|s| (divisor(*s, accelerators), std::cmp::Reverse(s.abs_diff(usual)))).unwrap_or(usual)
}

/// Answers a question. `progress` is told search jobs done and in all.
///
/// # Errors
/// If the model is refused, or no layout is allowed or fits.
pub fn plan(
    question: Question,
    calibration: &Calibration,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Answer> {
    plan_from(question, calibration, &[], progress)
}

/// The same, from layouts of which it is known that they are good: see [`search::search_from`].
///
/// # Errors
/// As [`plan`].
pub fn plan_from(
    question: Question,
    calibration: &Calibration,
    good: &[Placement],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Answer> {
    let problem = pose(&question, calibration)?;
    let searched = search::search_from(&problem, &space(&question), good, progress)?;
    Ok(answer(question, problem, calibration, searched))
}

/// Estimates one layout, written as [`given::parse`] reads it, instead of searching. It need not fit: see [`Choice::fits`].
///
/// # Errors
/// If the model is refused, or the layout is unreadable or impossible.
pub fn estimate_given(question: Question, layout: &str, calibration: &Calibration) -> Result<Answer> {
    let problem = pose(&question, calibration)?;
    let given = given::parse(layout, &problem, question.format)?;
    let estimate = Estimator::new(&problem, question.format)?
        .estimate(&given.placement)
        .map_err(|e| e.context(format!("layout {layout}")).hint("the model does not allow this layout"))?;
    let found = vec![Found { placement: given.placement, estimate }];
    let searched = Searched {
        pareto: found.clone(),
        best: found,
        layouts_estimated: 1,
        layouts_pruned: 0,
        refused: Default::default(),
    };
    let mut answer = answer(question, problem, calibration, searched);
    answer.given = true;
    if !given.filled.is_empty() {
        answer.assumptions.insert(0, format!("not in the layout given: {}", given.filled.join(", ")));
    }
    Ok(answer)
}

/// The answers to questions that differ in the size of their machine alone, each with its fastest layout and no front.
/// `None` where nothing fits. Far quicker than as many calls of [`plan`], more so with layouts that are `good` at other sizes.
///
/// # Errors
/// If the model is refused.
pub fn fastest_each(
    questions: Vec<Question>,
    calibration: &Calibration,
    good: &[Placement],
) -> Result<Vec<Option<Answer>>> {
    let Some(first) = questions.first() else { return Ok(Vec::new()) };
    let space = space(first);
    let problems: Vec<Problem> = questions.iter().map(|q| pose(q, calibration)).collect::<Result<_>>()?;
    let found = search::fastest(&problems, &space, good)?;
    let with = |((question, problem), found): ((Question, Problem), Option<Found>)| {
        let best = vec![found?];
        let searched = Searched {
            pareto: best.clone(),
            best,
            layouts_estimated: 0,
            layouts_pruned: 0,
            refused: Default::default(),
        };
        Some(answer(question, problem, calibration, searched))
    };
    Ok(questions.into_iter().zip(problems).zip(found).map(with).collect())
}

/// The problem behind a question.
fn pose(question: &Question, calibration: &Calibration) -> Result<Problem> {
    question.shape.model.validate()?;
    if question.sequence == 0 || question.sequences == 0 {
        return Err(Error::user("the batch has no tokens").hint("give at least one sequence of one token"));
    }
    if question.sequence > SEQUENCE_MAX {
        let what = format!("sequences of {} tokens, expected at most {SEQUENCE_MAX}", question.sequence);
        return Err(Error::user(what).hint("give a shorter --sequence"));
    }
    if question.sequences > SEQUENCES_MAX {
        let what = format!("{} sequences a step, expected at most {SEQUENCES_MAX}", question.sequences);
        return Err(Error::user(what).hint("sequences are counted, not tokens"));
    }
    let accelerator = &question.cluster.accelerator;
    if accelerator.peak(question.format).is_none() {
        return Err(lacks(accelerator, question.format));
    }
    let family = &accelerator.family.name;
    let software = question.software.clone().unwrap_or_else(|| Software::usual(&accelerator.family));
    let constants = calibration.constants(family, &accelerator.name, recipe(question.format), &software);
    Ok(Problem {
        shape: stretched(&question.shape, question.sequence),
        cluster: question.cluster.clone(),
        software,
        constants,
        sequence: question.sequence,
        sequences: question.sequences,
        optimizer: question.optimizer,
    })
}

/// The same model with positions for `sequence` tokens: longer contexts are planned for before they are trained.
fn stretched(shape: &Shape, sequence: usize) -> Shape {
    let mut shape = shape.clone();
    let (spec::Position::Learned { max_positions } | spec::Position::Rope(spec::Rope { max_positions, .. })) =
        &mut shape.model.position;
    *max_positions = sequence.max(*max_positions);
    shape
}

/// Longer than any context.
const SEQUENCE_MAX: usize = 1 << 24;
/// More sequences than any batch has; keeps products of counts far from overflow.
const SEQUENCES_MAX: usize = 1 << 30;

fn answer(question: Question, problem: Problem, calibration: &Calibration, searched: Searched) -> Answer {
    let storage = estimate_storage(&question, &problem);
    let first = searched.best.first().map(|f| f.estimate);
    let grade = |breakdown: &Breakdown| {
        let (family, n) = (&question.cluster.accelerator.family.name, question.cluster.accelerators);
        calibration.spread(family, problem.software.name, breakdown.pace(), n)
    };
    let all = |found: &[Found]| -> Vec<Choice> {
        let of =
            |f: &Found| choice(&question, grade(&f.estimate.breakdown), storage.as_ref(), f, first.as_ref());
        found.iter().map(of).collect()
    };
    let (best, pareto) = (all(&searched.best), all(&searched.pareto));
    let grade = grade(&first.map(|f| f.breakdown).unwrap_or_default());
    let assumptions = assumptions(&question, &problem, &grade, best.first());
    Answer { question, problem, best, pareto, grade, assumptions, storage, searched, given: false }
}

fn estimate_storage(question: &Question, problem: &Problem) -> Option<StorageEstimate> {
    let tokens = question.sequences as f64 * question.sequence as f64;
    let load_bytes = tokens * storage::bytes_per_token(question.shape.model.vocab);
    storage::estimate_state(
        &problem.cluster,
        question.shape.params() * problem.software.checkpoint_bytes_per_param,
        load_bytes,
    )
}

/// The largest micro-batch that is tried: products are large long before.
const MICRO_BATCH_MAX: usize = 32;

fn space(question: &Question) -> Space {
    Space {
        accelerators: question.cluster.accelerators,
        format: question.format,
        keep: question.keep.max(1),
        micro_batch_max: MICRO_BATCH_MAX,
        trainable_only: question.trainable_only,
        strategy: question.strategy,
    }
}

/// The numeric recipe whose constants a format takes.
pub fn recipe(format: NumberFormat) -> &'static str {
    match format {
        NumberFormat::Fp8 => "fp8",
        NumberFormat::Fp4 => "nvfp4",
        NumberFormat::Int8 => "int8",
        _ => "bf16",
    }
}

fn choice(
    question: &Question,
    grade: Grade,
    storage: Option<&StorageEstimate>,
    found: &Found,
    best: Option<&Estimate>,
) -> Choice {
    let estimate = &found.estimate;
    let loading_s = storage.map_or(0.0, |s| s.exposed_s(estimate.step_s));
    let step_s = estimate.step_s + loading_s;
    let tokens = question.sequences as f64 * question.sequence as f64;
    let tokens_per_s = tokens / step_s;
    let loses_s = match best {
        Some(best) if best.step_s < estimate.step_s => loses(estimate, best, storage),
        _ => Vec::new(),
    };
    Choice {
        layout: LayoutOut::of(&found.placement),
        step_s,
        step_low_s: step_s / grade.factor,
        step_high_s: step_s * grade.factor,
        mfu: estimate.mfu * estimate.step_s / step_s,
        tokens_per_s,
        train_days: question.tokens.map(|t| t / tokens_per_s / 86_400.0),
        loading_s,
        memory_bytes: estimate.memory.total(),
        fits: estimate.fits,
        memory: estimate.memory,
        breakdown: estimate.breakdown,
        bound: if loading_s > estimate.step_s { "data loading" } else { estimate.breakdown.bound() },
        loses_s,
        placement: found.placement.clone(),
    }
}

/// What a layout loses to the best by part, largest first. The parts add up to the difference of the two steps, which is
/// never negative; a part is where the slower layout does better.
fn loses(slower: &Estimate, best: &Estimate, storage: Option<&StorageEstimate>) -> Vec<(&'static str, f64)> {
    let loading = |e: &Estimate| storage.map_or(0.0, |s| s.exposed_s(e.step_s));
    let parts = slower.breakdown.parts().into_iter().zip(best.breakdown.parts());
    let waits = ("data loading", loading(slower) - loading(best));
    let mut loses: Vec<(&str, f64)> =
        parts.map(|(a, b)| (a.0, a.1 - b.1)).chain([waits]).filter(|l| l.1 != 0.0).collect();
    loses.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    loses
}

fn assumptions(question: &Question, problem: &Problem, grade: &Grade, best: Option<&Choice>) -> Vec<String> {
    let mut out = vec![
        format!("training stack: {}", problem.software.name),
        format!("batch: {} sequences of {} tokens", question.sequences, question.sequence),
    ];
    if question.optimizer.rule != Optimizer::AdamW {
        out.push(format!("optimizer: {}", question.optimizer.rule.name()));
    }
    if question.optimizer.average {
        out.push("an average of the weights over steps is kept, in 32 bit".to_owned());
    }
    let family = &question.cluster.accelerator.family.name;
    out.push(match grade.evidence {
        Evidence::Validated => format!(
            "{} published runs of {family} with this stack, up to {} accelerators, were predicted unseen; nine in ten lay in the interval",
            grade.rows, grade.accelerators
        ),
        Evidence::OtherPace => format!(
            "{} published runs of {family} with this stack were predicted unseen, but none near whose pace was set as this one's; the interval is wider",
            grade.rows
        ),
        Evidence::Family => format!("{} published runs of {family} with other stacks were predicted unseen", grade.rows),
        Evidence::Software => format!("{} published runs of this stack on other accelerators were predicted unseen", grade.rows),
        Evidence::Extrapolated => "outside of what was validated: no published run is near".to_owned(),
    });
    if grade.accelerators > 0 && question.cluster.accelerators > grade.accelerators {
        out.push(format!(
            "extrapolated in size: {} accelerators asked, {} validated; the interval is wider",
            question.cluster.accelerators, grade.accelerators
        ));
    }
    if question.shape.experts.is_some() {
        out.push("experts are balanced: every rank gets as many tokens".to_owned());
    }
    if best.is_some_and(|b| b.loading_s > 0.0) {
        out.push("storage is slower than the step: tokens are waited for".to_owned());
    }
    let positions = question.shape.model.max_positions();
    if question.sequence > positions {
        out.push(format!("{} positions are assumed, the model has {positions}", question.sequence));
    }
    if let Some(best) = best
        && let Layout { pp, chunks, .. } = best.placement.layout
        && !question.shape.model.layers.is_multiple_of(pp * chunks)
    {
        out.push(format!(
            "{} layers over {pp} stages of {chunks} chunks: not all hold as many",
            question.shape.model.layers
        ));
    }
    out.push("no failures and no time for checkpoints in the step; tokens are read ahead".to_owned());
    out.extend(question.cluster.assumptions.iter().cloned());
    out
}

impl Answer {
    /// The answer as the interface prints it. `seconds` and `threads` are what the search took, which the caller measures.
    pub fn to_json(&self, seconds: f64, threads: usize) -> Value {
        let q = &self.question;
        json!({
            "model": q.shape.model.name,
            "params": q.shape.params(),
            "cluster": q.cluster.name,
            "accelerator": q.cluster.accelerator.name,
            "accelerators": q.cluster.accelerators,
            "software": self.problem.software.name,
            "format": q.format.name(),
            "sequence": q.sequence,
            "sequences": q.sequences,
            "tokens": q.tokens,
            "optimizer": q.optimizer.rule.name(),
            "search": {
                "layouts_priced": self.searched.layouts_estimated,
                "layouts_pruned": self.searched.layouts_pruned,
                "layouts_per_s": self.searched.layouts_estimated as f64 / seconds.max(1e-9),
                "seconds": seconds,
                "threads": threads,
                "refused": self.searched.refused,
            },
            "evidence": self.grade,
            "best": self.best,
            "pareto": self.pareto,
            "storage": self.storage,
            "assumptions": self.assumptions,
        })
    }

    /// What would help: how the time follows the machine, for the best layout and with the layout chosen again.
    ///
    /// # Errors
    /// If the changed machine allows no layout, which more of anything excludes.
    pub fn explain(&self) -> Result<Vec<Sensitivity>> {
        const STEP: f64 = 1.01;
        const BETTER: f64 = 1.25;
        let Some(best) = self.best.first() else { return Ok(Vec::new()) };
        let space = space(&self.question);
        Knob::ALL
            .into_iter()
            .map(|of| {
                let changed = |by: f64| Problem {
                    cluster: self.problem.cluster.clone().scaled(of, by),
                    ..self.problem.clone()
                };
                let with = |by: f64| -> Result<f64> {
                    Ok(Estimator::new(&changed(by), self.question.format)?.estimate(&best.placement)?.step_s)
                };
                let more = if self.given {
                    with(BETTER)?
                } else {
                    let more = search::search(&changed(BETTER), &space, &|_, _| ())?;
                    more.best.first().map_or(best.step_s, |f| f.estimate.step_s)
                };
                // Faster machines wait for the same storage.
                let estimated = best.step_s - best.loading_s;
                Ok(Sensitivity {
                    of,
                    elasticity: (with(STEP)? / estimated).ln() / STEP.ln(),
                    step_s_with_quarter_more: more.max(if best.loading_s > 0.0 { best.step_s } else { 0.0 }),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
