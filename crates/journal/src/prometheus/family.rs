//! What is exported.

/// How a family's values behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, but for a new run.
    Counter,
    /// Goes both ways.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// A name with its meaning.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// As it is exported; of a counter, with `_total`.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// In a sentence.
    pub help: &'static str,
}

const fn gauge(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: Kind::Gauge, help }
}

const fn counter(name: &'static str, help: &'static str) -> Family {
    Family { name, kind: Kind::Counter, help }
}

/// Every family, in the order of the page.
pub const FAMILIES: &[Family] = &[
    gauge("phalanx_info", "Version, fingerprint and host of the run; always 1"),
    gauge("phalanx_running", "1 while the run goes on, 0 once it finished or failed"),
    gauge("phalanx_failed", "1 if the run's last start failed"),
    gauge("phalanx_ranks_wanted", "Ranks of the run"),
    gauge("phalanx_ranks_alive", "Ranks whose journal grew lately, see docs/watching.md"),
    gauge("phalanx_parameters", "Parameters of the model"),
    gauge("phalanx_step", "Optimiser steps done"),
    gauge("phalanx_loss", "Training loss per valid token, in nats"),
    gauge("phalanx_mtp_loss", "Training loss of the module that predicts one token more, likewise"),
    gauge("phalanx_grad_norm", "Norm of the gradient before clipping"),
    gauge("phalanx_learning_rate", "Learning rate"),
    gauge("phalanx_tokens_per_second", "Tokens per second of all ranks"),
    gauge("phalanx_mfu_ratio", "Model FLOPs utilisation, 0 to 1"),
    gauge("phalanx_goodput_ratio", "Seconds of steps that count, of all seconds since the run began"),
    gauge("phalanx_eval_loss", "Held-out loss per token, in nats"),
    gauge("phalanx_last_step_seconds", "Duration of the last step"),
    gauge("phalanx_last_step_timestamp_seconds", "When the last step ended, since the Unix epoch"),
    gauge("phalanx_last_record_timestamp_seconds", "When the last record was written, since the Unix epoch"),
    gauge("phalanx_checkpoint_step", "Step of the last committed checkpoint"),
    gauge(
        "phalanx_checkpoint_timestamp_seconds",
        "When the last checkpoint was committed, since the Unix epoch",
    ),
    gauge("phalanx_checkpoint_bytes", "Bytes of the last committed checkpoint"),
    gauge("phalanx_memory_bytes", "Bytes that the placed program allocated, by rank"),
    Family { name: "phalanx_step_seconds", kind: Kind::Histogram, help: "Duration of steps" },
    counter("phalanx_steps_total", "Optimiser steps, those done again included"),
    counter("phalanx_redone_steps_total", "Steps that were lost and have to be done again"),
    counter("phalanx_nonfinite_steps_total", "Steps whose loss or gradient norm was not finite"),
    counter("phalanx_tokens_total", "Tokens trained on, those of steps done again included"),
    counter(
        "phalanx_restarts_total",
        "Starts after the first, by how the one before ended: failed, killed, stopped, finished",
    ),
    counter(
        "phalanx_lost_seconds_total",
        "Seconds that did not count, by cause: redone, down, start, checkpoint, recovery",
    ),
    counter("phalanx_checkpoints_total", "Checkpoints committed"),
    counter("phalanx_checkpoint_seconds_total", "Seconds that checkpoints took, in the background or not"),
    counter("phalanx_checkpoint_written_bytes_total", "Bytes of all committed checkpoints"),
    counter(
        "phalanx_exposed_wait_seconds_total",
        "Seconds of communication that no computation hid, by rank",
    ),
    counter("phalanx_collective_wait_seconds_total", "The same by rank and axis of the mesh"),
    counter("phalanx_warnings_total", "Warnings in the journal"),
    counter("phalanx_troubles_total", "Bad steps and corrupt states about which something was decided"),
    counter(
        "phalanx_stragglers_total",
        "Windows of steps in which ranks waited for one of them or for a link",
    ),
    gauge("phalanx_straggler_ratio", "Share of a step that was lost by it in the last of them"),
    gauge("phalanx_trouble_step", "Step of the last of them"),
    gauge("phalanx_verified_step", "Last step after which what ranks hold alike was compared and was alike"),
    gauge("phalanx_journal_damaged_lines", "Whole lines of the journal that are no records"),
    gauge("phalanx_journal_unknown_lines", "Records of kinds that this version does not know"),
    gauge("phalanx_journal_read_ratio", "Share of the journal that was read, 0 to 1"),
    gauge("phalanx_dash_clients", "Connections of the server that wrote this page"),
    counter("phalanx_dash_refused_total", "Connections and requests that the server refused"),
];
