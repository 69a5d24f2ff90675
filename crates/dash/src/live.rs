//! What a page that looks on is told next: server-sent events. Pure but for the clock that it is given.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::run::Run;
use crate::view;

/// Between two tellings of everything but new points.
const FACTS_EVERY: Duration = Duration::from_millis(250);

/// After so many points a page gets the curves anew, so that it need not thin them out itself.
const POINTS_MAX: u64 = 1024;

/// How far somebody who looks on has been told of each run.
#[derive(Debug)]
pub(crate) struct Cursor {
    buckets: usize,
    told: Vec<Told>,
    facts_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// None before the first telling.
    epoch: Option<u64>,
    points: u64,
    /// Points since the curves were told.
    appended: u64,
    facts: u64,
}

impl Cursor {
    pub(crate) fn new(buckets: usize) -> Cursor {
        Cursor { buckets, told: Vec::new(), facts_at: None }
    }

    /// What is new, as events; empty if nothing is.
    pub(crate) fn next(&mut self, runs: &[Run], now: Instant, now_us: u64) -> String {
        self.told.resize(runs.len(), Told::default());
        let mut events = String::new();
        let facts_due = self.facts_at.is_none_or(|at| now.duration_since(at) >= FACTS_EVERY);
        let mut facts = Vec::new();
        for (index, (run, told)) in runs.iter().zip(&mut self.told).enumerate() {
            let new = match told.epoch {
                Some(epoch) if epoch == run.epoch && told.appended <= POINTS_MAX => run.since(told.points),
                _ => None,
            };
            match new {
                None => {
                    let mut whole = view::whole(run, now_us, self.buckets);
                    whole["run"] = json!(index);
                    event(&mut events, "whole", &whole);
                    *told =
                        Told { epoch: Some(run.epoch), points: run.points, appended: 0, facts: run.facts };
                }
                Some(points) => {
                    let rows: Vec<Value> = points.map(view::row).collect();
                    told.appended += rows.len() as u64;
                    told.points = run.points;
                    if !rows.is_empty() {
                        event(&mut events, "points", &json!({ "run": index, "points": rows }));
                    }
                    if facts_due && told.facts != run.facts {
                        told.facts = run.facts;
                        facts.push(json!({
                            "run": index,
                            "facts": view::facts(run, now_us),
                            "evals": run.evaluations(self.buckets),
                        }));
                    }
                }
            }
        }
        if !facts.is_empty() {
            event(&mut events, "facts", &json!(facts));
        }
        if facts_due {
            self.facts_at = Some(now);
        }
        events
    }
}

fn event(events: &mut String, name: &str, data: &Value) {
    events.push_str(&format!("event: {name}\ndata: {data}\n\n"));
}

#[cfg(test)]
mod tests {

    use journal::Record;
    use journal::line::Line;
    use journal::tail::Found;

    use super::*;

    fn add(run: &mut Run, step: u64) {
        let record = Record::Step(journal::Step {
            time_us: step,
            step,
            loss: 1.5,
            grad_norm: 1.0,
            lr: 0.1,
            tokens: step,
            valid_tokens: 1,
            tokens_per_s: 1.0,
            step_s: 0.5,
            memory_bytes: 1,
            ..journal::Step::default()
        });
        run.observe(&Found { offset: 100 * step, len: 100, line: Line::Record(record) });
    }

    /// Names of the events in `text`.
    fn names(text: &str) -> Vec<&str> {
        text.lines().filter_map(|l| l.strip_prefix("event: ")).collect()
    }

    #[test]
    fn first_the_whole_then_what_is_new() {
        let mut runs = vec![Run::new("a".into(), "a".into()), Run::new("b".into(), "b".into())];
        let mut cursor = Cursor::new(100);
        let (t0, mut at_ms) = (Instant::now(), 0);
        let mut next = |runs: &[Run]| {
            at_ms += 10;
            cursor.next(runs, t0 + Duration::from_millis(at_ms), 0)
        };
        assert_eq!(names(&next(&runs)), ["whole", "whole"]);
        assert_eq!(next(&runs), "");
        add(&mut runs[1], 1);
        let told = next(&runs);
        assert_eq!(names(&told), ["points"], "facts wait a moment: {told}");
        assert!(told.contains("[1,1,0,1.5,1.0,0.1,1.0,null,1.0,0.5,null,null]"), "{told}");
        let facts = (0..30).map(|_| next(&runs)).find(|t| !t.is_empty()).expect("facts in the end");
        assert_eq!(names(&facts), ["facts"]);
        assert!(facts.lines().all(|l| l.is_empty() || l.starts_with("event: ") || l.starts_with("data: ")));
        // A run that goes back is told anew.
        add(&mut runs[1], 2);
        add(&mut runs[1], 1);
        assert_eq!(names(&next(&runs)), ["whole"]);
    }

    #[test]
    fn after_many_points_the_curves_are_told_anew() {
        let mut runs = vec![Run::new("a".into(), "a".into())];
        let mut cursor = Cursor::new(100);
        let t0 = Instant::now();
        cursor.next(&runs, t0, 0);
        let mut wholes = 0;
        for step in 1..=3000 {
            add(&mut runs[0], step);
            let told = cursor.next(&runs, t0, 0);
            wholes += names(&told).iter().filter(|n| **n == "whole").count();
            assert_eq!(names(&told).len(), 1, "{told}");
        }
        assert_eq!(wholes, 2);
    }
}
