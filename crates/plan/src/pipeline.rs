//! Waiting in a pipeline, in closed form.

use spec::PipelineSchedule;

/// What a pipeline's schedule depends on.
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
    /// Forward and backward of one micro-batch on the slowest stage, all chunks.
    pub slowest_s: f64,
    /// The weight gradients in it.
    pub weight_s: f64,
    /// Forward and backward of one micro-batch on all other stages together.
    pub others_s: f64,
}

/// Time that the slowest stage waits in one step.
///
/// The first micro-batch goes through every stage and back before the last stage's share of the rest can follow: with
/// `v` chunks only one of `v` parts of it. That is `(p - 1) (F + B) / v` for even stages (Narayanan et al. 2021,
/// section 2.2). Of uneven stages the others hide part of that while a slow one warms up: for a stage a fifth slower
/// than the rest the wait is at most 6 % of the step too long. Weight gradients fill `2 W` of each stage's share under ZB-H1 (Qi et al. 2023, table 2).
///
/// ```
/// use plan::pipeline::{Pipeline, wait_s};
/// let even = Pipeline {
///     schedule: spec::PipelineSchedule::Interleaved,
///     stages: 8.0,
///     chunks: 4.0,
///     micro_batches: 16.0,
///     slowest_s: 3.0,
///     weight_s: 1.0,
///     others_s: 7.0 * 3.0,
/// };
/// assert_eq!(wait_s(&even), 7.0 * 3.0 / 4.0);
/// ```
pub fn wait_s(p: &Pipeline) -> f64 {
    if p.stages <= 1.0 {
        return 0.0;
    }
    let saved = match p.schedule {
        PipelineSchedule::ZeroBubble => 2.0 * p.weight_s * (p.stages - 1.0),
        _ => 0.0,
    };
    let rounds = (p.micro_batches / p.stages).fract();
    // A round that is not full leaves stages idle between chunks.
    let ragged = if p.chunks > 1.0 && rounds > 0.0 {
        (1.0 - rounds) * p.slowest_s * (p.chunks - 1.0) / p.chunks
    } else {
        0.0
    };
    ((p.others_s - saved) / p.chunks).max(0.0) + ragged
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::{Pass, PassTimes, orders, play};

    /// The closed form against the schedule itself, played.
    #[test]
    fn even_pipelines_wait_as_their_schedule_says() {
        let times = PassTimes { forward: 1.0, input: 1.0, weight: 1.0 };
        let check = |schedule, stages: usize, chunks: usize, micro_batches: usize| {
            let played = play(&orders(schedule, stages, chunks, micro_batches), chunks, times).unwrap();
            let chunk = 3.0;
            let p = Pipeline {
                schedule,
                stages: stages as f64,
                chunks: chunks as f64,
                micro_batches: micro_batches as f64,
                slowest_s: chunk * chunks as f64,
                weight_s: chunks as f64,
                others_s: (stages - 1) as f64 * chunk * chunks as f64,
            };
            let busy = chunk * (chunks * micro_batches) as f64;
            let closed = busy + wait_s(&p);
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

    /// Plays 1F1B with a time of its own for each stage.
    fn makespan(stage_s: &[f64], micro_batches: usize) -> f64 {
        let stages = stage_s.len();
        let orders = orders(PipelineSchedule::OneFOneB, stages, 1, micro_batches);
        let mut end = vec![[vec![None; micro_batches], vec![None; micro_batches]]; stages];
        let mut next = vec![0; stages];
        let mut clock = vec![0.0f64; stages];
        while (0..stages).any(|s| next[s] < orders[s].len()) {
            for s in 0..stages {
                let Some(w) = orders[s].get(next[s]) else { continue };
                let m = w.micro_batch;
                let ready: Option<f64> = match w.pass {
                    Pass::Forward if s == 0 => Some(0.0),
                    Pass::Forward => end[s - 1][0][m],
                    _ if s + 1 == stages => end[s][0][m],
                    _ => end[s + 1][1][m],
                };
                let Some(ready) = ready else { continue };
                let share = if w.pass == Pass::Forward { 1.0 / 3.0 } else { 2.0 / 3.0 };
                clock[s] = clock[s].max(ready) + share * stage_s[s];
                end[s][usize::from(w.pass != Pass::Forward)][m] = Some(clock[s]);
                next[s] += 1;
            }
        }
        clock.into_iter().fold(0.0, f64::max)
    }

    #[test]
    fn uneven_pipelines_follow_their_slowest_stage() {
        for stage_s in
            [vec![3.0, 3.4, 3.0, 3.0], vec![3.0, 3.0, 3.0, 3.6], vec![3.3, 3.0, 3.0, 3.0, 3.0, 3.5]]
        {
            for micro_batches in [8, 24] {
                let slowest = stage_s.iter().copied().fold(0.0, f64::max);
                let p = Pipeline {
                    schedule: PipelineSchedule::OneFOneB,
                    stages: stage_s.len() as f64,
                    chunks: 1.0,
                    micro_batches: micro_batches as f64,
                    slowest_s: slowest,
                    weight_s: 0.0,
                    others_s: stage_s.iter().sum::<f64>() - slowest,
                };
                let closed = slowest * micro_batches as f64 + wait_s(&p);
                let played = makespan(&stage_s, micro_batches);
                // A slow stage in the middle hides part of what the first micro-batch waits for.
                let ratio = closed / played;
                assert!(
                    (0.999..1.06).contains(&ratio),
                    "{stage_s:?} {micro_batches}: {closed} against {played}"
                );
            }
        }
    }
}
