//! A run in the text formats that Prometheus reads: version 0.0.4 and OpenMetrics 1.0.
//!
//! Counters and the histogram count what the journal holds from its first record, restarts included, so that they start
//! at zero with the run and not with whoever serves them.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::record::{Record, Step};

mod family;
mod lost;

pub use family::{FAMILIES, Family, Kind};
use lost::Lost;

/// A way to write a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Prometheus text exposition, version 0.0.4.
    Text,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl Format {
    /// The best format for a request's `Accept` header.
    pub fn accepted(accept: &str) -> Format {
        if accept.contains("application/openmetrics-text") { Format::OpenMetrics } else { Format::Text }
    }

    /// What the page's `Content-Type` header says.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Text => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Upper bounds of the histogram of steps, in seconds: a factor of about two apart, from toys to the largest runs.
pub const STEP_BOUNDS_S: [f64; 16] =
    [0.001, 0.003, 0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0];

/// What a run's journal comes to. Rank 0's journal holds what is of the run; any rank's holds its own waits and memory.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    info: String,
    values: BTreeMap<(&'static str, String), f64>,
    /// Steps in each range of [`STEP_BOUNDS_S`], and beyond the last.
    steps_in: [u64; STEP_BOUNDS_S.len() + 1],
    step_sum_s: f64,
    lost: Lost,
}

impl Metrics {
    /// Takes over what a record of rank 0 says.
    pub fn observe(&mut self, record: &Record) {
        self.lost.observe(record);
        if let Some(time_us) = record.time_us() {
            self.set("phalanx_last_record_timestamp_seconds", time_us as f64 / 1e6);
        }
        match record {
            Record::RunStarted { version, fingerprint, world, host, device, parameters, .. } => {
                self.info = format!(
                    "version=\"{}\",fingerprint=\"{}\",host=\"{}\",device=\"{}\"",
                    escape(version),
                    escape(fingerprint),
                    escape(host),
                    escape(device)
                );
                self.set("phalanx_ranks_wanted", *world as f64);
                self.set("phalanx_parameters", *parameters as f64);
                self.set("phalanx_running", 1.0);
                self.set("phalanx_failed", 0.0);
            }
            Record::Step(step) => self.step(step),
            Record::Eval { loss, .. } => self.set("phalanx_eval_loss", *loss),
            Record::Checkpoint { time_us, step, bytes, save_s, .. } => {
                self.set("phalanx_checkpoint_step", *step as f64);
                self.set("phalanx_checkpoint_timestamp_seconds", *time_us as f64 / 1e6);
                self.set("phalanx_checkpoint_bytes", *bytes as f64);
                self.add("phalanx_checkpoints_total", 1.0);
                self.add("phalanx_checkpoint_seconds_total", *save_s);
                self.add("phalanx_checkpoint_written_bytes_total", *bytes as f64);
            }
            Record::Resumed { step, .. } | Record::Recovered { step, .. } => {
                self.set("phalanx_step", *step as f64);
            }
            Record::Trouble { .. } | Record::Straggler { .. } | Record::Verified { .. } => {
                self.trouble(record)
            }
            Record::Warning { .. } => self.add("phalanx_warnings_total", 1.0),
            Record::Finished { .. } => self.set("phalanx_running", 0.0),
            Record::Failed { .. } => {
                self.set("phalanx_running", 0.0);
                self.set("phalanx_failed", 1.0);
            }
            _ => {}
        }
    }

    fn step(&mut self, step: &Step) {
        self.set("phalanx_step", step.step as f64);
        self.set("phalanx_loss", step.loss);
        self.set("phalanx_grad_norm", step.grad_norm);
        self.set("phalanx_learning_rate", step.lr);
        self.set("phalanx_tokens_per_second", step.tokens_per_s);
        self.set("phalanx_last_step_seconds", step.step_s);
        self.set("phalanx_last_step_timestamp_seconds", step.time_us as f64 / 1e6);
        for (family, value) in [("phalanx_mfu_ratio", step.mfu), ("phalanx_mtp_loss", step.mtp_loss)] {
            if let Some(value) = value {
                self.set(family, value);
            }
        }
        self.add("phalanx_steps_total", 1.0);
        self.add("phalanx_tokens_total", step.valid_tokens as f64);
        if !step.loss.is_finite() || !step.grad_norm.is_finite() {
            self.add("phalanx_nonfinite_steps_total", 1.0);
        }
        self.count_step(step.step_s);
    }

    fn trouble(&mut self, record: &Record) {
        match record {
            Record::Trouble { step, .. } => {
                self.set("phalanx_trouble_step", *step as f64);
                self.add("phalanx_troubles_total", 1.0);
            }
            Record::Straggler { share, .. } => {
                self.set("phalanx_straggler_ratio", *share);
                self.add("phalanx_stragglers_total", 1.0);
            }
            Record::Verified { step, .. } => self.set("phalanx_verified_step", *step as f64),
            _ => {}
        }
    }

    /// Takes over what a record of any rank's journal says of that rank alone.
    pub fn observe_rank(&mut self, rank: usize, record: &Record) {
        let Record::Step(Step { memory_bytes, exposed_comm_s, waits_s, .. }) = record else { return };
        let mut set = |name, labels: String, value: f64, adds: bool| {
            let at = self.values.entry((name, labels)).or_default();
            *at = if adds { *at + value } else { value };
        };
        set("phalanx_memory_bytes", format!("rank=\"{rank}\""), *memory_bytes as f64, false);
        if let Some(s) = exposed_comm_s {
            set("phalanx_exposed_wait_seconds_total", format!("rank=\"{rank}\""), *s, true);
        }
        for (axis, s) in waits_s {
            let labels = format!("rank=\"{rank}\",axis=\"{}\"", escape(axis));
            set("phalanx_collective_wait_seconds_total", labels, *s, true);
        }
    }

    /// Sets what whoever watches knows and no journal says: one of [`FAMILIES`].
    pub fn set(&mut self, name: &'static str, value: f64) {
        self.values.insert((name, String::new()), value);
    }

    /// Adds to a counter.
    pub fn add(&mut self, name: &'static str, value: f64) {
        *self.values.entry((name, String::new())).or_default() += value;
    }

    /// The latest value of a family that has no labels of its own.
    pub fn value(&self, name: &'static str) -> Option<f64> {
        self.values.get(&(name, String::new())).copied()
    }

    /// Seconds that counted, of all since the run began; none before its second record.
    pub fn goodput(&self) -> Option<f64> {
        self.lost.goodput()
    }

    /// Seconds lost so far, by cause.
    pub fn lost_s(&self) -> &BTreeMap<&'static str, f64> {
        &self.lost.seconds
    }

    /// Starts of the run after the first, by how the one before ended.
    pub fn restarts(&self) -> &BTreeMap<&'static str, u64> {
        &self.lost.restarts
    }

    fn count_step(&mut self, step_s: f64) {
        let at = STEP_BOUNDS_S.iter().position(|bound| step_s <= *bound).unwrap_or(STEP_BOUNDS_S.len());
        self.steps_in[at] += 1;
        if step_s.is_finite() {
            self.step_sum_s += step_s;
        }
    }

    /// Samples of a family: (suffix of the name, labels, value).
    fn samples(&self, family: &Family) -> Vec<(&'static str, String, f64)> {
        let by_cause = |seconds: &BTreeMap<&'static str, f64>| {
            seconds.iter().map(|(cause, s)| ("", format!("cause=\"{cause}\""), *s)).collect::<Vec<_>>()
        };
        match family.name {
            "phalanx_info" if !self.info.is_empty() => vec![("", self.info.clone(), 1.0)],
            "phalanx_goodput_ratio" => self.goodput().map(|g| ("", String::new(), g)).into_iter().collect(),
            "phalanx_lost_seconds_total" => by_cause(&self.lost.seconds),
            "phalanx_restarts_total" => {
                by_cause(&self.lost.restarts.iter().map(|(c, n)| (*c, *n as f64)).collect())
            }
            "phalanx_redone_steps_total" if self.step_count() > 0 => {
                vec![("", String::new(), self.lost.steps_redone as f64)]
            }
            "phalanx_step_seconds" if self.step_count() > 0 => self.histogram(),
            name => {
                let of_name = self.values.range((name, String::new())..).take_while(|((n, _), _)| *n == name);
                of_name.map(|((_, labels), value)| ("", labels.clone(), *value)).collect()
            }
        }
    }

    fn step_count(&self) -> u64 {
        self.steps_in.iter().sum()
    }

    fn histogram(&self) -> Vec<(&'static str, String, f64)> {
        let mut below = 0;
        let bounds = STEP_BOUNDS_S.iter().map(|b| number(*b)).chain(["+Inf".to_owned()]);
        let mut samples: Vec<_> = bounds
            .zip(self.steps_in)
            .map(|(bound, n)| {
                below += n;
                ("_bucket", format!("le=\"{bound}\""), below as f64)
            })
            .collect();
        samples.push(("_sum", String::new(), self.step_sum_s));
        samples.push(("_count", String::new(), below as f64));
        samples
    }
}

/// The page of several runs, each under its name; `served` are families of the server itself.
pub fn render(runs: &[(String, Metrics)], served: &[(&'static str, f64)], format: Format) -> String {
    let mut page = String::new();
    for family in FAMILIES {
        let mut lines = String::new();
        for (run, metrics) in runs {
            for (suffix, labels, value) in metrics.samples(family) {
                let comma = if labels.is_empty() { "" } else { "," };
                // Writing to a string cannot fail.
                let _ = writeln!(
                    lines,
                    "{}{suffix}{{run=\"{}\"{comma}{labels}}} {}",
                    family.name,
                    escape(run),
                    number(value)
                );
            }
        }
        for (_, value) in served.iter().filter(|(name, _)| *name == family.name) {
            let _ = writeln!(lines, "{} {}", family.name, number(*value));
        }
        if !lines.is_empty() {
            let name = match format {
                Format::OpenMetrics => family.name.trim_end_matches("_total"),
                Format::Text => family.name,
            };
            let _ =
                write!(page, "# HELP {name} {}\n# TYPE {name} {}\n{lines}", family.help, family.kind.name());
        }
    }
    if format == Format::OpenMetrics {
        page.push_str("# EOF\n");
    }
    page
}

fn number(value: f64) -> String {
    match value {
        v if v.is_nan() => "NaN".to_owned(),
        v if v.is_infinite() => if v > 0.0 { "+Inf" } else { "-Inf" }.to_owned(),
        v => v.to_string(),
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests;
