//! How a run looks while it runs: a live line on a terminal, plain lines on a pipe.

use std::io;
use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use journal::{Record, Step};
use spec::{Error, Result, RunSpec};

use crate::busy::Progress;
use crate::output;

/// Draws the progress of a long operation over bytes; without a terminal it is told now and then.
pub(crate) struct Bytes(Progress);

impl Bytes {
    pub(crate) fn new() -> Bytes {
        Bytes(Progress::begin("preparing data", "{msg:>12} {wide_bar} {bytes}/{total_bytes} {eta}"))
    }

    pub(crate) fn update(&self, p: data::Progress) {
        let stage = match p.stage {
            data::Stage::Collect => "read",
            data::Stage::Count => "count words",
            data::Stage::Merge => "learn merges",
            data::Stage::Encode => "tokenise",
        };
        self.0.now(stage, p.done_bytes, p.total_bytes, || {
            let of =
                if p.total_bytes > 0 { format!(" of {}", HumanBytes(p.total_bytes)) } else { String::new() };
            format!("preparing data: {stage}, {}{of}", HumanBytes(p.done_bytes))
        });
    }
}

/// A run that is over sooner needs no word about how long it takes.
const WORTH_A_WORD_S: f64 = 20.0;

/// The face of a training run.
pub(crate) struct Live {
    bar: Option<ProgressBar>,
    json: bool,
    log_every: u64,
    steps: u64,
    eta: f64,
    /// Whether it was said how long the run will take.
    promised: bool,
    /// Where every record is, whatever becomes of stdout.
    journal: String,
    /// Why stdout takes no more; training goes on without it.
    lost: Option<io::Error>,
}

impl Live {
    pub(crate) fn new(run: &RunSpec, done: u64, json: bool) -> Live {
        let steps = run.train.steps as u64;
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
        let terminal = !json && !bar.is_hidden();
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}\n{bar:40} {pos}/{len} {prefix}") {
            bar.set_style(style);
        }
        bar.set_position(done);
        Live {
            bar: terminal.then_some(bar),
            json,
            log_every: run.train.log_every as u64,
            steps,
            eta: 0.0,
            promised: false,
            journal: journal::path(&run.run.dir, 0).display().to_string(),
            lost: None,
        }
    }

    fn print(&mut self, text: &str) {
        if self.lost.is_some() {
            return;
        }
        if let Err(e) = output::try_print(text) {
            output::say(&format!(
                "stdout takes no more ({e}): training goes on without it; every record is in {}",
                self.journal
            ));
            self.lost = Some(e);
        }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::say(text)),
            None => output::say(text),
        }
    }

    pub(crate) fn event(&mut self, event: train::Event) {
        if let train::Event::Record(Record::Warning { text, .. }) = &event {
            // For whoever watches, also where stdout is read by a program.
            self.say(&format!("warning: {text}"));
        }
        match event {
            train::Event::Placed { .. } => {}
            train::Event::Eta { seconds, settled } => {
                self.eta = seconds;
                if settled && !std::mem::replace(&mut self.promised, true) && seconds >= WORTH_A_WORD_S {
                    self.say(&format!("about {} to go", HumanDuration(Duration::from_secs_f64(seconds))));
                }
                if let Some(bar) = &self.bar {
                    bar.set_prefix(format!(
                        "eta {}",
                        HumanDuration(Duration::from_secs_f64(seconds.max(0.0)))
                    ));
                }
            }
            train::Event::Record(record) if self.json => {
                self.print(&serde_json::to_string(&record).expect("a record is plain data"));
            }
            train::Event::Record(record) => self.record(&record),
        }
    }

    fn record(&mut self, record: &Record) {
        let Some(text) = line(record, self.steps, self.eta) else { return };
        let text = spec::printable(&text).into_owned();
        match (&self.bar, record) {
            (Some(bar), Record::Step(Step { step, .. })) => {
                bar.set_position(*step);
                bar.set_message(text);
            }
            (Some(bar), _) => bar.println(text),
            (None, Record::Step(Step { step, .. }))
                if !step.is_multiple_of(self.log_every) && *step != self.steps => {}
            (None, _) => self.print(&text),
        }
    }

    /// Leaves the last line on the screen.
    ///
    /// # Errors
    /// If records that were asked for could not be written; a reader that has seen enough is no error.
    pub(crate) fn done(mut self) -> Result<()> {
        if let Some(bar) = self.bar.take() {
            let last = bar.message();
            bar.finish_and_clear();
            self.print(&last);
        }
        match self.lost {
            Some(e) if self.json && e.kind() != io::ErrorKind::BrokenPipe => {
                Err(Error::failure(format!("write records to stdout: {e}; the run itself is saved"))
                    .hint(format!("every record is in {}", self.journal)))
            }
            _ => Ok(()),
        }
    }
}

/// A record for people.
fn line(record: &Record, steps: u64, eta: f64) -> Option<String> {
    Some(match record {
        Record::Step(Step {
            step,
            loss,
            grad_norm,
            lr,
            tokens_per_s,
            mfu,
            memory_bytes,
            exposed_comm_s,
            step_s,
            expert_counts,
            mtp_loss,
            ..
        }) => {
            let ahead = mtp_loss.map(|loss| format!("  mtp {loss:.4}")).unwrap_or_default();
            let experts = expert_counts.as_deref().and_then(busiest).unwrap_or_default();
            let mfu = mfu.map(|m| format!("  mfu {:.1} %", 100.0 * m)).unwrap_or_default();
            // The share of the step in which this rank did nothing but wait for others.
            let comm =
                exposed_comm_s.map(|c| format!("  comm {:.1} %", 100.0 * c / step_s)).unwrap_or_default();
            format!(
                "step {step}/{steps}  loss {loss:.4}{ahead}  norm {grad_norm:.3}  lr {lr:.2e}  {tokens_per_s:.0} tokens/s{mfu}{comm}{experts}  memory {}  eta {}",
                HumanBytes(*memory_bytes),
                clock(eta),
            )
        }
        Record::Eval { step, loss, average_loss, tokens, .. } => {
            let average = average_loss.map_or_else(String::new, |loss| format!("  average's loss {loss:.4}"));
            format!(
                "eval {step}/{steps}  loss {loss:.4}  perplexity {:.2}{average}  over {tokens} tokens",
                loss.exp()
            )
        }
        Record::Checkpoint { path, bytes, save_s, .. } => {
            format!("saved {path}  {}  {save_s:.2} s", HumanBytes(*bytes))
        }
        Record::Recovered { step, why, source, recovery_s, .. } => {
            format!("{why}: goes on after step {step} from {source}, {recovery_s:.2} s later")
        }
        Record::Straggler { step, why, .. } => format!("slow step {step}: {why}"),
        Record::Trouble { step, .. } => format!("trouble step {step}: {}", record.trouble_text()?),
        Record::Finished { reason, step, .. } => format!("{reason}: step {step}"),
        Record::Sample { text, .. } => format!("sample\n{text}"),
        _ => return None,
    })
}

/// The expert that got the most tokens, as a multiple of an even share, and its layer.
fn busiest(counts: &[Vec<u64>]) -> Option<String> {
    let times = |of: &Vec<u64>| {
        let most = of.iter().max().copied().unwrap_or(0) as f64;
        most * of.len() as f64 / of.iter().sum::<u64>().max(1) as f64
    };
    let layers = counts.iter().enumerate().filter(|(_, of)| !of.is_empty());
    let (layer, most) = layers.map(|(i, of)| (i, times(of))).max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(format!("  busiest expert {most:.2}x in layer {layer}"))
}

fn clock(seconds: f64) -> String {
    let s = seconds.max(0.0) as u64;
    if s >= 3600 {
        format!("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
    } else {
        format!("{}:{:02}", s / 60, s % 60)
    }
}
