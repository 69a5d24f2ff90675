//! How a run looks while it runs: a live line on a terminal, plain lines on a pipe.

use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use journal::Record;

use crate::output;

/// Draws the progress of a long operation over bytes.
pub(crate) struct Bytes {
    bar: ProgressBar,
}

impl Bytes {
    pub(crate) fn new() -> Bytes {
        let style = ProgressStyle::with_template("{msg:>12} {wide_bar} {bytes}/{total_bytes} {eta}");
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Bytes { bar }
    }

    pub(crate) fn update(&self, p: data::Progress) {
        self.bar.set_message(match p.stage {
            data::Stage::Collect => "read",
            data::Stage::Count => "count words",
            data::Stage::Merge => "learn merges",
            data::Stage::Encode => "tokenise",
        });
        self.bar.set_length(p.total_bytes);
        self.bar.set_position(p.done_bytes);
    }

    pub(crate) fn done(self) {
        self.bar.finish_and_clear();
    }
}

/// The face of a training run.
pub(crate) struct Live {
    bar: Option<ProgressBar>,
    json: bool,
    log_every: u64,
    steps: u64,
    eta: f64,
}

impl Live {
    pub(crate) fn new(steps: u64, done: u64, log_every: u64, json: bool) -> Live {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        let terminal = !json && !bar.is_hidden();
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}\n{bar:40} {pos}/{len} {prefix}") {
            bar.set_style(style);
        }
        bar.set_position(done);
        Live { bar: terminal.then_some(bar), json, log_every, steps, eta: 0.0 }
    }

    pub(crate) fn event(&mut self, event: train::Event) {
        match event {
            train::Event::Eta { seconds } => {
                self.eta = seconds;
                if let Some(bar) = &self.bar {
                    bar.set_prefix(format!(
                        "eta {}",
                        HumanDuration(Duration::from_secs_f64(seconds.max(0.0)))
                    ));
                }
            }
            train::Event::Record(record) if self.json => {
                output::print(&serde_json::to_string(&record).expect("a record is plain data"));
            }
            train::Event::Record(record) => self.record(&record),
        }
    }

    fn record(&self, record: &Record) {
        let Some(text) = line(record, self.steps, self.eta) else { return };
        match (&self.bar, record) {
            (Some(bar), Record::Step { step, .. }) => {
                bar.set_position(*step);
                bar.set_message(text);
            }
            (Some(bar), _) => bar.println(text),
            (None, Record::Step { step, .. })
                if !step.is_multiple_of(self.log_every) && *step != self.steps => {}
            (None, _) => output::print(&text),
        }
    }

    pub(crate) fn done(self) {
        if let Some(bar) = self.bar {
            let last = bar.message();
            bar.finish_and_clear();
            output::print(&last);
        }
    }
}

/// A record for people.
fn line(record: &Record, steps: u64, eta: f64) -> Option<String> {
    Some(match record {
        Record::Step {
            step,
            loss,
            grad_norm,
            lr,
            tokens_per_s,
            mfu,
            memory_bytes,
            exposed_comm_s,
            step_s,
            ..
        } => {
            let mfu = mfu.map(|m| format!("  mfu {:.1} %", 100.0 * m)).unwrap_or_default();
            // The share of the step in which this rank did nothing but wait for others.
            let comm =
                exposed_comm_s.map(|c| format!("  comm {:.1} %", 100.0 * c / step_s)).unwrap_or_default();
            format!(
                "step {step}/{steps}  loss {loss:.4}  norm {grad_norm:.3}  lr {lr:.2e}  {tokens_per_s:.0} tokens/s{mfu}{comm}  memory {}  eta {}",
                HumanBytes(*memory_bytes),
                clock(eta),
            )
        }
        Record::Eval { step, loss, tokens, .. } => {
            format!("eval {step}/{steps}  loss {loss:.4}  perplexity {:.2}  over {tokens} tokens", loss.exp())
        }
        Record::Checkpoint { path, bytes, save_s, .. } => {
            format!("saved {path}  {}  {save_s:.2} s", HumanBytes(*bytes))
        }
        Record::Finished { reason, step, .. } => format!("{reason}: step {step}"),
        Record::Warning { text, .. } => format!("warning: {text}"),
        _ => return None,
    })
}

fn clock(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    if s >= 3600 {
        format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
    } else {
        format!("{}:{:02}", s / 60, s % 60)
    }
}
