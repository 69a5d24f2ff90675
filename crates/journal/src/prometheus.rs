//! The latest values of a run in the Prometheus text exposition format (version 0.0.4).

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::record::Record;

/// What is exported: name, type, help. In the order of the page.
const METRICS: [(&str, &str, &str); 14] = [
    ("phalanx_info", "gauge", "Version and run of this rank; always 1"),
    ("phalanx_world_ranks", "gauge", "Ranks of the run"),
    ("phalanx_parameters", "gauge", "Parameters of the model"),
    ("phalanx_step", "gauge", "Optimiser steps done"),
    ("phalanx_tokens", "gauge", "Tokens trained on"),
    ("phalanx_loss", "gauge", "Training loss per valid token, in nats"),
    ("phalanx_grad_norm", "gauge", "Norm of the gradient before clipping"),
    ("phalanx_learning_rate", "gauge", "Learning rate"),
    ("phalanx_tokens_per_second", "gauge", "Tokens per second of all ranks"),
    ("phalanx_mfu_ratio", "gauge", "Model FLOPs utilisation"),
    ("phalanx_step_seconds", "gauge", "Duration of the last step"),
    ("phalanx_memory_bytes", "gauge", "Bytes allocated by the placed program"),
    ("phalanx_eval_loss", "gauge", "Held-out loss per token, in nats"),
    ("phalanx_checkpoint_step", "gauge", "Step of the last committed checkpoint"),
];

/// The latest value of every metric of one rank.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    rank: usize,
    info: String,
    values: BTreeMap<&'static str, f64>,
}

impl Metrics {
    /// Nothing known yet.
    pub fn new(rank: usize) -> Self {
        Metrics { rank, ..Metrics::default() }
    }

    /// Takes over what a record says.
    pub fn observe(&mut self, record: &Record) {
        match record {
            Record::RunStarted { version, fingerprint, world, host, parameters, .. } => {
                self.info = format!(
                    ",version=\"{}\",fingerprint=\"{}\",host=\"{}\"",
                    escape(version),
                    escape(fingerprint),
                    escape(host)
                );
                self.set("phalanx_info", 1.0);
                self.set("phalanx_world_ranks", *world as f64);
                self.set("phalanx_parameters", *parameters as f64);
            }
            Record::Step {
                step,
                loss,
                grad_norm,
                lr,
                tokens,
                tokens_per_s,
                mfu,
                step_s,
                memory_bytes,
                ..
            } => {
                self.set("phalanx_step", *step as f64);
                self.set("phalanx_tokens", *tokens as f64);
                self.set("phalanx_loss", *loss);
                self.set("phalanx_grad_norm", *grad_norm);
                self.set("phalanx_learning_rate", *lr);
                self.set("phalanx_tokens_per_second", *tokens_per_s);
                self.set("phalanx_step_seconds", *step_s);
                self.set("phalanx_memory_bytes", *memory_bytes as f64);
                if let Some(mfu) = mfu {
                    self.set("phalanx_mfu_ratio", *mfu);
                }
            }
            Record::Eval { loss, .. } => self.set("phalanx_eval_loss", *loss),
            Record::Checkpoint { step, .. } => self.set("phalanx_checkpoint_step", *step as f64),
            Record::Resumed { step, .. } | Record::Recovered { step, .. } => {
                self.set("phalanx_step", *step as f64)
            }
            _ => {}
        }
    }

    /// The page.
    pub fn render(&self) -> String {
        let mut page = String::new();
        for (name, kind, help) in METRICS {
            let Some(value) = self.values.get(name) else { continue };
            let info = if name == "phalanx_info" { self.info.as_str() } else { "" };
            let rank = self.rank;
            let value = match *value {
                v if v.is_nan() => "NaN".to_owned(),
                v if v.is_infinite() => if v > 0.0 { "+Inf" } else { "-Inf" }.to_owned(),
                v => v.to_string(),
            };
            // Writing to a String cannot fail.
            let _ = write!(
                page,
                "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{{rank=\"{rank}\"{info}}} {value}\n"
            );
        }
        page
    }

    fn set(&mut self, name: &'static str, value: f64) {
        debug_assert!(METRICS.iter().any(|(n, ..)| *n == name), "{name} is in the table");
        self.values.insert(name, value);
    }
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::step;

    #[test]
    fn page() {
        let mut metrics = Metrics::new(2);
        assert_eq!(metrics.render(), "");
        metrics.observe(&Record::RunStarted {
            time_us: 0,
            version: "0.1.0".into(),
            fingerprint: "a\"b".into(),
            world: 4,
            rank: 2,
            host: "h\\1".into(),
            device: String::new(),
            threads: None,
            parameters: 13_800_000,
        });
        metrics.observe(&step(3, f64::NAN));
        metrics.observe(&Record::Eval { time_us: 0, step: 3, loss: f64::INFINITY, tokens: 1 });
        let page = metrics.render();
        for line in [
            "phalanx_info{rank=\"2\",version=\"0.1.0\",fingerprint=\"a\\\"b\",host=\"h\\\\1\"} 1",
            "phalanx_parameters{rank=\"2\"} 13800000",
            "phalanx_loss{rank=\"2\"} NaN",
            "phalanx_eval_loss{rank=\"2\"} +Inf",
            "# TYPE phalanx_step gauge",
            "phalanx_learning_rate{rank=\"2\"} 0.0003",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} in\n{page}");
        }
    }
}
