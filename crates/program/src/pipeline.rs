use serde::Serialize;
use spec::PipelineSchedule;

/// One piece of work of a pipeline stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Work {
    /// Which of the stage's chunks.
    pub chunk: usize,
    /// Which micro-batch.
    pub micro_batch: usize,
    /// Forward, backward for inputs (with weights unless the schedule splits them), backward for weights.
    pub pass: Pass,
}

/// Which pass over a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pass {
    /// Forward.
    Forward,
    /// Gradients of inputs, and of weights unless split.
    Backward,
    /// Gradients of weights, when split.
    Weight,
}

/// The order of work on every stage, by stage.
///
/// GPipe (Huang et al. 2019), 1F1B and interleaved 1F1B (Narayanan et al. 2021, section 2.2), and the zero-bubble
/// schedule with the memory of 1F1B (Qi et al. 2023, ZB-H1).
/// For each chunk, micro-batches run in index order in every pass: gradient sums rely on it.
pub fn orders(
    schedule: PipelineSchedule,
    stages: usize,
    chunks: usize,
    micro_batches: usize,
) -> Vec<Vec<Work>> {
    (0..stages).map(|s| order(schedule, s, stages, chunks, micro_batches)).collect()
}

/// The order of work on one stage.
pub(crate) fn order(
    schedule: PipelineSchedule,
    stage: usize,
    stages: usize,
    chunks: usize,
    micro_batches: usize,
) -> Vec<Work> {
    let behind = stages - 1 - stage;
    match schedule {
        PipelineSchedule::Gpipe => gpipe(micro_batches),
        PipelineSchedule::OneFOneB => one_f_one_b(behind, micro_batches, 1, stages),
        PipelineSchedule::Interleaved => {
            one_f_one_b(behind * 2 + (chunks - 1) * stages, micro_batches, chunks, stages)
        }
        PipelineSchedule::ZeroBubble => zero_bubble(stage, stages, micro_batches),
    }
}

fn gpipe(micro_batches: usize) -> Vec<Work> {
    let pass = |pass| (0..micro_batches).map(move |micro_batch| Work { chunk: 0, micro_batch, pass });
    pass(Pass::Forward).chain(pass(Pass::Backward)).collect()
}

/// `warm_up` forwards, then pairs, then the backwards that are left. With several chunks, `stages` micro-batches run
/// through a chunk before the next chunk takes over.
fn one_f_one_b(warm_up: usize, micro_batches: usize, chunks: usize, stages: usize) -> Vec<Work> {
    let total = micro_batches * chunks;
    let nth = |k: usize, pass: Pass| {
        let turn = (k / stages) % chunks;
        let chunk = if pass == Pass::Forward { turn } else { chunks - 1 - turn };
        Work { chunk, micro_batch: k / (stages * chunks) * stages + k % stages, pass }
    };
    let warm_up = warm_up.min(total);
    let mut order: Vec<Work> = (0..warm_up).map(|k| nth(k, Pass::Forward)).collect();
    for k in warm_up..total {
        order.push(nth(k, Pass::Forward));
        order.push(nth(k - warm_up, Pass::Backward));
    }
    order.extend((total - warm_up..total).map(|k| nth(k, Pass::Backward)));
    order
}

/// The warm-up of 1F1B; then stage `s` (from 0) lets `s` weight gradients pile up, so that inputs' gradients reach the
/// stages before it early, and works the pile off while it would otherwise wait. No stage ever holds more than
/// `stages` micro-batches.
fn zero_bubble(stage: usize, stages: usize, micro_batches: usize) -> Vec<Work> {
    let mut order = Vec::with_capacity(3 * micro_batches);
    let mut done = [0usize; 3];
    let mut run = |done: &mut [usize; 3], pass: Pass| {
        order.push(Work { chunk: 0, micro_batch: done[pass as usize], pass });
        done[pass as usize] += 1;
    };
    for _ in 0..micro_batches.min(stages - stage) {
        run(&mut done, Pass::Forward);
    }
    for _ in 0..micro_batches {
        run(&mut done, Pass::Backward);
        let [f, b, w] = done;
        if b - w > stage || f == micro_batches {
            run(&mut done, Pass::Weight);
        }
        if f < micro_batches {
            run(&mut done, Pass::Forward);
        }
    }
    while done[Pass::Weight as usize] < micro_batches {
        run(&mut done, Pass::Weight);
    }
    order
}

/// What one pass over a chunk takes, in any unit of time.
#[derive(Clone, Copy, Debug)]
pub struct PassTimes {
    /// Forward.
    pub forward: f64,
    /// Backward for inputs.
    pub input: f64,
    /// Backward for weights.
    pub weight: f64,
}

/// The outcome of playing a schedule.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Played {
    /// When the last stage is done.
    pub makespan: f64,
    /// Idle time of the stage that idles most, from start to makespan.
    pub bubble: f64,
    /// Most micro-batches in flight at once, by stage and chunk.
    pub in_flight: Vec<Vec<usize>>,
}

/// When a piece of work runs, in the unit of the times given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct WorkSpan {
    /// Begin.
    pub start: f64,
    /// End.
    pub end: f64,
}

/// Plays the orders with instant messages.
///
/// # Errors
/// Names the work that can never start, if the orders deadlock.
pub fn play(orders: &[Vec<Work>], chunks: usize, times: PassTimes) -> Result<Played, String> {
    let split = orders.iter().flatten().any(|w| w.pass == Pass::Weight);
    let took = |_: usize, pass: Pass| match pass {
        Pass::Forward => times.forward,
        Pass::Backward if split => times.input,
        Pass::Backward => times.input + times.weight,
        Pass::Weight => times.weight,
    };
    let spans = spans(orders, chunks, took)?;
    let makespan = spans.iter().flatten().map(|s| s.end).fold(0.0, f64::max);
    let busy = |(s, order): (usize, &Vec<Work>)| order.iter().map(|w| took(s, w.pass)).sum::<f64>();
    let bubble = orders.iter().enumerate().map(|o| makespan - busy(o)).fold(0.0, f64::max);
    let in_flight = orders.iter().map(|o| in_flight(o, chunks)).collect();
    Ok(Played { makespan, bubble, in_flight })
}

/// When each piece of work runs, by stage and in its order, where a pass over a virtual stage takes `took` and messages are
/// instant.
///
/// # Errors
/// As [`play`].
pub fn spans(
    orders: &[Vec<Work>],
    chunks: usize,
    took: impl Fn(usize, Pass) -> f64,
) -> Result<Vec<Vec<WorkSpan>>, String> {
    let stages = orders.len();
    let micro_batches = orders.iter().flatten().map(|w| w.micro_batch + 1).max().unwrap_or(0);
    let mut end = vec![vec![[None::<f64>; 3]; micro_batches]; stages * chunks];
    let mut spans: Vec<Vec<WorkSpan>> = orders.iter().map(|o| Vec::with_capacity(o.len())).collect();
    let mut clock = vec![0.0f64; stages];
    loop {
        let mut moved = false;
        for s in 0..stages {
            while let Some(w) = orders[s].get(spans[s].len()) {
                let v = w.chunk * stages + s;
                let of = |v: usize, pass: Pass| end[v][w.micro_batch][pass as usize];
                let ready = match w.pass {
                    Pass::Forward if v == 0 => Some(0.0),
                    Pass::Forward => of(v - 1, Pass::Forward),
                    Pass::Backward if v + 1 == stages * chunks => of(v, Pass::Forward),
                    Pass::Backward => of(v, Pass::Forward).and(of(v + 1, Pass::Backward)),
                    Pass::Weight => of(v, Pass::Backward),
                };
                let Some(ready) = ready else { break };
                let start = clock[s].max(ready);
                clock[s] = start + took(v, w.pass);
                end[v][w.micro_batch][w.pass as usize] = Some(clock[s]);
                spans[s].push(WorkSpan { start, end: clock[s] });
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    match (0..stages).find(|&s| spans[s].len() < orders[s].len()) {
        Some(s) => Err(format!("stage {s} waits for ever at {:?}", orders[s][spans[s].len()])),
        None => Ok(spans),
    }
}

/// Most micro-batches of each chunk whose activations a stage holds at once.
pub fn in_flight(order: &[Work], chunks: usize) -> Vec<usize> {
    let split = order.iter().any(|w| w.pass == Pass::Weight);
    let ends = if split { Pass::Weight } else { Pass::Backward };
    let mut now = vec![0usize; chunks];
    let mut most = vec![0usize; chunks];
    for w in order {
        if w.pass == Pass::Forward {
            now[w.chunk] += 1;
            most[w.chunk] = most[w.chunk].max(now[w.chunk]);
        } else if w.pass == ends {
            now[w.chunk] -= 1;
        }
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: PassTimes = PassTimes { forward: 1.0, input: 1.0, weight: 1.0 };

    fn check(schedule: PipelineSchedule, stages: usize, chunks: usize, micro_batches: usize, bubble: f64) {
        let orders = orders(schedule, stages, chunks, micro_batches);
        for o in &orders {
            assert!(o.len() % (micro_batches * chunks) == 0, "every micro-batch runs every pass");
        }
        let played = play(&orders, chunks, TIMES).expect("no deadlock");
        assert_eq!(
            played.bubble, bubble,
            "{schedule:?} {stages} stages {chunks} chunks {micro_batches} micro-batches"
        );
    }

    /// The bubble is `(p - 1)(F + B + W)` for GPipe and 1F1B, that over `v` chunks when interleaved (in units of a
    /// chunk's time), and `(p - 1)(F + B - W)` for ZB-H1 (Qi et al. 2023, table 2).
    #[test]
    fn bubbles_are_those_of_the_textbook() {
        for (p, m) in [(2, 4), (4, 8), (4, 16), (8, 16)] {
            let q = (p - 1) as f64;
            check(PipelineSchedule::Gpipe, p, 1, m, q * 3.0);
            check(PipelineSchedule::OneFOneB, p, 1, m, q * 3.0);
            check(PipelineSchedule::Interleaved, p, 2, m, q * 3.0);
            check(PipelineSchedule::ZeroBubble, p, 1, m, q);
        }
    }

    #[test]
    fn one_f_one_b_holds_at_most_the_remaining_stages() {
        let orders = orders(PipelineSchedule::OneFOneB, 4, 1, 16);
        let played = play(&orders, 1, TIMES).expect("no deadlock");
        assert_eq!(played.in_flight, [[4], [3], [2], [1]]);
    }

    #[test]
    fn few_micro_batches_still_run() {
        for p in 1..6 {
            for m in 1..6 {
                for s in [PipelineSchedule::Gpipe, PipelineSchedule::OneFOneB, PipelineSchedule::ZeroBubble] {
                    play(&orders(s, p, 1, m), 1, TIMES).expect("no deadlock");
                }
                play(&orders(PipelineSchedule::Interleaved, p, 3, p * m), 3, TIMES).expect("no deadlock");
            }
        }
    }

    #[test]
    fn a_deadlock_names_the_work() {
        let w = |micro_batch, pass| Work { chunk: 0, micro_batch, pass };
        let orders = vec![
            vec![w(0, Pass::Backward), w(0, Pass::Forward)],
            vec![w(0, Pass::Forward), w(0, Pass::Backward)],
        ];
        assert!(play(&orders, 1, TIMES).unwrap_err().starts_with("stage 0 waits for ever at Work"));
    }
}
