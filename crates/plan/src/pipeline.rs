//! How long a pipeline takes, in closed form.

use program::{Pass, orders, spans};
use spec::PipelineSchedule;

/// One micro-batch on one stage, all chunks, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stage {
    /// Forward.
    pub forward_s: f64,
    /// Backward, weight gradients included.
    pub backward_s: f64,
}

impl Stage {
    /// Both passes.
    pub fn both_s(&self) -> f64 {
        self.forward_s + self.backward_s
    }
}

/// What the time of a pipeline depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pipeline {
    /// Order of work.
    pub schedule: PipelineSchedule,
    /// Stages `p`.
    pub stages: f64,
    /// Chunks a stage `v`.
    pub chunks: f64,
    /// Micro-batches `m`.
    pub micro_batches: f64,
    /// The first stage, with the embedding.
    pub first: Stage,
    /// The slowest of the stages between.
    pub middle: Stage,
    /// What the stages between take on average: less than the slowest where layers do not divide by stages.
    pub mean: Stage,
    /// The last stage, with the head.
    pub last: Stage,
    /// Weight gradients of one micro-batch on a middle stage.
    pub weight_s: f64,
}

/// Time from the first micro-batch's start to the last one's end.
///
/// Under 1F1B stage `s` begins when the stages before it have passed the first micro-batch on, and these have to take
/// the last one back: the sum of their times. Of its own `m` micro-batches it first does `p - s` forward passes, then
/// waits for what the stages behind need for the first micro-batch there and back less its own `p - s - 1` forward
/// passes meanwhile; when the forward passes are done it waits likewise less as many backward passes. The slowest of
/// these paths is the pipeline's time. For even stages that is `m (F + B) + (p - 1) (F + B)` (Narayanan et al. 2021,
/// section 2.2); of chunks only one part in `v` fills the pipeline. Weight gradients fill `2 W` of each stage's share
/// under ZB-H1 (Qi et al. 2023, table 2).
///
/// ```
/// use plan::pipeline::{Pipeline, Stage, makespan_s};
/// let even = Stage { forward_s: 1.0, backward_s: 2.0 };
/// let p = Pipeline {
///     schedule: spec::PipelineSchedule::Interleaved,
///     stages: 8.0,
///     chunks: 4.0,
///     micro_batches: 16.0,
///     first: even,
///     middle: even,
///     mean: even,
///     last: even,
///     weight_s: 1.0,
/// };
/// assert_eq!(makespan_s(&p), 16.0 * 3.0 + 7.0 * 3.0 / 4.0);
/// ```
pub fn makespan_s(p: &Pipeline) -> f64 {
    if p.stages <= 1.0 {
        return p.micro_batches * p.middle.both_s();
    }
    if p.schedule == PipelineSchedule::Gpipe {
        return wave_s(p, |s| s.forward_s) + wave_s(p, |s| s.backward_s);
    }
    let saved = match p.schedule {
        PipelineSchedule::ZeroBubble => 2.0 * p.weight_s,
        _ => 0.0,
    };
    let path = |stage: &Stage, before: f64, behind: f64, count_behind: f64| {
        let hidden = |pass_s: f64| (behind - count_behind * pass_s).max(0.0);
        let waits = hidden(stage.forward_s) + hidden(stage.backward_s);
        let fill = (before + waits - saved * (p.stages - 1.0)).max(0.0) / p.chunks;
        p.micro_batches * stage.both_s() + fill
    };
    let (first, mean, last) = (p.first.both_s(), p.mean.both_s(), p.last.both_s());
    let between = (p.stages - 2.0).max(0.0);
    let mut longest = path(&p.first, 0.0, between * mean + last, p.stages - 1.0);
    longest = longest.max(path(&p.last, first + between * mean, 0.0, 0.0));
    if between > 0.0 {
        // The slowest leaves the rest to the others. Along alike stages the path's length is convex: an end has the longest.
        let other = if between > 1.0 { (between * mean - p.middle.both_s()) / (between - 1.0) } else { mean };
        for behind in [between - 1.0, 0.0] {
            let before = first + (between - 1.0 - behind) * other;
            longest = longest.max(path(&p.middle, before, behind * other + last, behind + 1.0));
        }
    }
    longest
}

/// Time of interleaved 1F1B whose virtual stages, in the order in which they run, differ: played.
///
/// A stage's forward passes over one chunk stand beside backward passes over another, and beside which differs from stage
/// to stage: where chunks differ, stages wait for each other at every turn, and no sum of theirs says how long. After two
/// groups of `p` micro-batches each group takes as long as the one before it, so that two plays stand for any number
/// (`micro_batches` is a multiple of the `stages`).
pub fn uneven_s(stages: usize, micro_batches: usize, virtuals: &[Stage]) -> f64 {
    let chunks = virtuals.len() / stages;
    let took = |v: usize, pass: Pass| match pass {
        Pass::Forward => virtuals[v].forward_s,
        _ => virtuals[v].backward_s,
    };
    let play_s = |micro_batches: usize| {
        let orders = orders(PipelineSchedule::Interleaved, stages, chunks, micro_batches);
        let spans = spans(&orders, chunks, took).unwrap_or_default();
        spans.iter().filter_map(|stage| stage.last()).map(|span| span.end).fold(0.0, f64::max)
    };
    let (less, more) = (2 * stages, 3 * stages);
    if micro_batches <= more {
        return play_s(micro_batches);
    }
    let (less_s, more_s) = (play_s(less), play_s(more));
    more_s + (more_s - less_s) * ((micro_batches - more) as f64 / stages as f64)
}

/// All micro-batches through all stages in one direction.
fn wave_s(p: &Pipeline, pass: impl Fn(&Stage) -> f64) -> f64 {
    let (first, mean, last) = (pass(&p.first), pass(&p.mean), pass(&p.last));
    let between = (p.stages - 2.0).max(0.0);
    let slowest = if between > 0.0 { first.max(pass(&p.middle)).max(last) } else { first.max(last) };
    first + between * mean + last + (p.micro_batches - 1.0) * slowest
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::{PassTimes, play};

    /// The closed form against the schedule itself, played.
    #[test]
    fn even_pipelines_take_as_long_as_their_schedule_says() {
        let times = PassTimes { forward: 1.0, input: 1.0, weight: 1.0 };
        let check = |schedule, stages: usize, chunks: usize, micro_batches: usize| {
            let played = play(&orders(schedule, stages, chunks, micro_batches), chunks, times).unwrap();
            let stage = Stage { forward_s: chunks as f64, backward_s: 2.0 * chunks as f64 };
            let p = Pipeline {
                schedule,
                stages: stages as f64,
                chunks: chunks as f64,
                micro_batches: micro_batches as f64,
                first: stage,
                middle: stage,
                mean: stage,
                last: stage,
                weight_s: chunks as f64,
            };
            let closed = makespan_s(&p);
            assert!(
                (closed / played.makespan - 1.0).abs() < 1e-9,
                "{schedule:?} {stages} {chunks} {micro_batches}"
            );
        };
        for (p, m) in [(2, 4), (4, 8), (4, 16), (8, 16), (8, 64)] {
            check(PipelineSchedule::Gpipe, p, 1, m);
            check(PipelineSchedule::OneFOneB, p, 1, m);
            check(PipelineSchedule::ZeroBubble, p, 1, m);
            for v in [2, 4] {
                check(PipelineSchedule::Interleaved, p, v, m);
            }
        }
    }

    /// However many micro-batches, two plays stand for the whole.
    #[test]
    fn groups_of_micro_batches_take_as_long_as_the_third() {
        let check = |layers: usize, stages: usize, chunks: usize, head: f64, groups: usize| {
            let dealt = spec::Layout { pp: stages, chunks, ..Default::default() }.deal(layers);
            let last = dealt.len() - 1;
            let of = |(v, n): (usize, &usize)| {
                let t = *n as f64 + if v == last { head } else { 0.0 };
                Stage { forward_s: t, backward_s: 2.0 * t }
            };
            let virtuals: Vec<Stage> = dealt.iter().enumerate().map(of).collect();
            let orders = orders(PipelineSchedule::Interleaved, stages, chunks, groups * stages);
            let took = |v: usize, pass: Pass| match pass {
                Pass::Forward => virtuals[v].forward_s,
                _ => virtuals[v].backward_s,
            };
            let whole = spans(&orders, chunks, took).unwrap();
            let whole_s = whole.iter().flatten().map(|s| s.end).fold(0.0, f64::max);
            let ratio = uneven_s(stages, groups * stages, &virtuals) / whole_s;
            assert!((0.995..1.005).contains(&ratio), "{layers}/{stages}x{chunks} {groups}: {ratio}");
        };
        for groups in [1, 2, 3, 4, 9, 20] {
            check(126, 16, 6, 0.7, groups);
            check(126, 8, 11, 0.7, groups);
            check(61, 8, 4, 1.5, groups);
            check(40, 16, 2, 0.0, groups);
            check(7, 2, 3, 3.0, groups);
        }
    }

    /// Plays a schedule without chunks with times of its own for each stage.
    fn played(schedule: PipelineSchedule, stages: &[Stage], micro_batches: usize) -> f64 {
        let count = stages.len();
        let orders = orders(schedule, count, 1, micro_batches);
        let mut end = vec![[vec![None; micro_batches], vec![None; micro_batches]]; count];
        let mut next = vec![0; count];
        let mut clock = vec![0.0f64; count];
        while (0..count).any(|s| next[s] < orders[s].len()) {
            for s in 0..count {
                let Some(w) = orders[s].get(next[s]) else { continue };
                let m = w.micro_batch;
                let ready: Option<f64> = match w.pass {
                    Pass::Forward if s == 0 => Some(0.0),
                    Pass::Forward => end[s - 1][0][m],
                    _ if s + 1 == count => end[s][0][m],
                    _ => end[s + 1][1][m],
                };
                let Some(ready) = ready else { continue };
                let forward = w.pass == Pass::Forward;
                let took = if forward { stages[s].forward_s } else { stages[s].backward_s };
                clock[s] = clock[s].max(ready) + took;
                end[s][usize::from(!forward)][m] = Some(clock[s]);
                next[s] += 1;
            }
        }
        clock.into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn uneven_pipelines_take_as_long_as_their_schedule_says() {
        let stage = |t: f64| Stage { forward_s: t / 3.0, backward_s: 2.0 * t / 3.0 };
        for schedule in [PipelineSchedule::OneFOneB, PipelineSchedule::Gpipe] {
            for stages in [2, 3, 4, 7, 16] {
                for (first, middle, last) in
                    [(3.2, 3.0, 3.6), (3.0, 3.4, 2.0), (3.6, 3.0, 3.0), (2.0, 3.0, 2.5), (3.0, 3.0, 6.0)]
                {
                    for micro_batches in [stages, 2 * stages, 8 * stages] {
                        let p = Pipeline {
                            schedule,
                            stages: stages as f64,
                            chunks: 1.0,
                            micro_batches: micro_batches as f64,
                            first: stage(first),
                            middle: stage(middle),
                            mean: stage(middle),
                            last: stage(last),
                            weight_s: 0.0,
                        };
                        let mut all = vec![stage(middle); stages];
                        all[0] = stage(first);
                        all[stages - 1] = stage(last);
                        let ratio = makespan_s(&p) / played(schedule, &all, micro_batches);
                        assert!(
                            (0.985..1.015).contains(&ratio),
                            "{schedule:?} {stages} {first} {middle} {last} {micro_batches}: {ratio}"
                        );
                    }
                }
            }
        }
    }

    /// Layers that stages do not divide: some stages between take two layers, others three.
    #[test]
    fn stages_of_two_and_three_layers_take_as_long_as_their_schedule_says() {
        let stage = |layers: usize| {
            let t = layers as f64;
            Stage { forward_s: t / 3.0, backward_s: 2.0 * t / 3.0 }
        };
        for schedule in [PipelineSchedule::OneFOneB, PipelineSchedule::Gpipe] {
            for (layers, stages) in [(40, 16), (10, 4), (22, 8), (61, 16), (7, 3)] {
                let at = |s: usize| layers * s / stages;
                let all: Vec<Stage> = (0..stages).map(|s| stage(at(s + 1) - at(s))).collect();
                let between = &all[1..stages - 1];
                let slowest =
                    between.iter().copied().max_by(|a, b| a.both_s().total_cmp(&b.both_s())).unwrap();
                let mean = between.iter().map(Stage::both_s).sum::<f64>() / between.len() as f64;
                for micro_batches in [stages, 4 * stages] {
                    let p = Pipeline {
                        schedule,
                        stages: stages as f64,
                        chunks: 1.0,
                        micro_batches: micro_batches as f64,
                        first: all[0],
                        middle: slowest,
                        mean: Stage { forward_s: mean / 3.0, backward_s: 2.0 * mean / 3.0 },
                        last: all[stages - 1],
                        weight_s: 0.0,
                    };
                    let ratio = makespan_s(&p) / played(schedule, &all, micro_batches);
                    assert!(
                        (0.97..1.03).contains(&ratio),
                        "{schedule:?} {layers}/{stages} {micro_batches}: {ratio}"
                    );
                }
            }
        }
    }
}
