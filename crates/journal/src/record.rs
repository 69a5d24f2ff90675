use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::float;

/// One line of the journal. Times are microseconds since the Unix epoch.
///
/// Readers skip fields that they do not know, so that newer writers may add some.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Record {
    /// A rank began, or began again after an interruption.
    RunStarted {
        /// When.
        time_us: u64,
        /// Version of Phalanx.
        version: String,
        /// Fingerprint of everything that defines the run's numbers.
        fingerprint: String,
        /// Ranks.
        world: usize,
        /// This rank.
        rank: usize,
        /// Host name.
        host: String,
        /// What the rank runs on: `cpu`.
        device: String,
        /// Threads that its kernels run on; not known of every run.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        threads: Option<usize>,
        /// Parameters of the model.
        parameters: u64,
        /// FLOP/s of a rank's device that `mfu` is a share of, until a step beats it: the best ever measured there.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        peak_flops_per_s: Option<f64>,
    },
    /// An optimiser step was done.
    Step(Step),
    /// Which samples a rank puts into a step: written before it gives anything of the step to others.
    Drawn {
        /// When the step began; absent in older journals, which have this record after the step.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        begun_us: Option<u64>,
        /// Tells the starts of a run apart, as all ranks of a start agree on it.
        session: u64,
        /// Steps done once this one is.
        step: u64,
        /// First index and number of samples that follow each other in the data's order; one run of them or several.
        samples: Vec<(u64, u64)>,
        /// Sum, modulo 2^64, of a hash of every sample: its index and its tokens.
        tokens_xxh3: u64,
    },
    /// The held-out split was evaluated.
    Eval {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// Mean loss per token, in nats.
        #[serde(with = "float")]
        loss: f64,
        /// The same of the average of the weights over steps, where one is kept.
        #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
        average_loss: Option<f64>,
        /// Tokens evaluated.
        tokens: u64,
    },
    /// Text was sampled from the model.
    Sample {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// Prompt and continuation.
        text: String,
    },
    /// A checkpoint was committed.
    Checkpoint {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// Its directory.
        path: String,
        /// Bytes of its files.
        bytes: u64,
        /// Seconds that it took.
        #[serde(with = "float")]
        save_s: f64,
        /// Seconds that training waited for it; all of them unless it was written in the background.
        #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
        stall_s: Option<f64>,
    },
    /// Training went on from a checkpoint. Steps above `step` that come before this record were lost.
    Resumed {
        /// When.
        time_us: u64,
        /// Steps done in the checkpoint; 0 when none had been saved and the run began once more.
        step: u64,
        /// Its directory; empty when there was none.
        path: String,
    },
    /// Ranks met again without being started anew, since one was lost or one came.
    Recovered {
        /// When.
        time_us: u64,
        /// Steps done in what they go on from; later steps are done again.
        step: u64,
        /// Why they met, as the launcher says.
        why: String,
        /// What weights and moments came from: memory, a checkpoint's directory, or the beginning.
        source: String,
        /// Ranks that train now.
        world: usize,
        /// Tells the steps that follow from those before, as [`Record::Drawn`] has it; absent in older journals.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        session: Option<u64>,
        /// Seconds from the last sign of life of the rank that had been quiet for longest until this rank knew that its world
        /// had failed; absent if nobody was lost, of a rank that came, and where ranks give no signs of life.
        #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
        detection_s: Option<f64>,
        /// Seconds since this rank noticed.
        #[serde(with = "float")]
        recovery_s: f64,
        /// What they went into, in order: `orders` until the launcher said where to go, `run` to read the run file, `meet`
        /// until all had come, `open` for the data, `build` for program and memory, `restore` for weights and moments,
        /// `copies` for those that other ranks keep.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        phases: Vec<(String, f64)>,
    },
    /// The run went on although something that decides its numbers had changed, because a flag said so.
    Accepted {
        /// When.
        time_us: u64,
        /// Steps done before.
        step: u64,
        /// What changed, and by which flag it was accepted.
        what: String,
    },
    /// What a rank did in a step, op by op.
    Spans {
        /// Which rank.
        rank: usize,
        /// In which step.
        step: u64,
        /// In order of their start.
        spans: Vec<Span>,
    },
    /// A step or a state that was not as it should be, and what was done about it.
    Trouble {
        /// When.
        time_us: u64,
        /// The start of the run that it was in, as [`Record::Drawn`] has it.
        session: u64,
        /// The bad step, or the one after which the state was looked at.
        step: u64,
        /// What was wrong.
        what: Trouble,
        /// What was done.
        action: Action,
        /// Why, in words.
        why: String,
        /// Mean loss of the step.
        #[serde(with = "float")]
        loss: f64,
        /// Its gradient norm.
        #[serde(with = "float")]
        grad_norm: f64,
        /// The first and the last step whose samples are left out; absent if none are.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        skipped: Option<(u64, u64)>,
        /// Steps done in the checkpoint that weights and moments come from; absent if they come from none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        back_to: Option<u64>,
    },
    /// Weights and moments after a step, by their hashes, and that what several ranks hold alike is alike.
    Verified {
        /// When.
        time_us: u64,
        /// The start of the run that it was in.
        session: u64,
        /// Steps done.
        step: u64,
        /// Ranks.
        world: usize,
        /// Of all weights and moments, in hexadecimal digits: the same in every layout.
        hash: String,
        /// By parameter, of what of it this rank saves, weights and moments: the sum over ranks is that of all of it.
        own: BTreeMap<String, String>,
        /// Copies of something that were compared with another.
        compared: u64,
        /// Seconds that it took.
        #[serde(with = "float")]
        verify_s: f64,
    },
    /// The ranks wait for one of them, or for a link between some.
    Straggler {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// Who is late, or between whom the link is.
        ranks: Vec<usize>,
        /// What keeps the others waiting.
        cause: Cause,
        /// The axis of the mesh on which they wait most.
        axis: String,
        /// The op in which they do.
        op: String,
        /// Seconds of a step that are lost by it.
        #[serde(with = "float")]
        lost_s: f64,
        /// The same as a share of the step.
        #[serde(with = "float")]
        share: f64,
        /// In a sentence, with what it was compared with.
        why: String,
    },
    /// Something that a person should know of and that did not stop the run.
    Warning {
        /// When.
        time_us: u64,
        /// What.
        text: String,
    },
    /// The run ended as planned.
    Finished {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// Why it ended: all steps done, asked to stop.
        reason: String,
    },
    /// The run failed.
    Failed {
        /// When.
        time_us: u64,
        /// Steps done.
        step: u64,
        /// What failed.
        error: String,
        /// What to do about it, if known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hint: Option<String>,
    },
}

impl Record {
    /// The record as it is written now: before, a device's name held its threads, `cpu, 4 threads`.
    pub(crate) fn current(mut self) -> Record {
        if let Record::RunStarted { device, threads: threads @ None, .. } = &mut self
            && let Some((name, count)) = device.rsplit_once(", ")
            && let Some(count) = count.strip_suffix(" threads").and_then(|n| n.parse().ok())
        {
            *threads = Some(count);
            *device = name.to_owned();
        }
        self
    }

    /// What was wrong and what was done, in a sentence; `None` of another record than [`Record::Trouble`].
    pub fn trouble_text(&self) -> Option<String> {
        let Record::Trouble { what, action, why, skipped, back_to, .. } = self else { return None };
        let back = back_to.map(|step| format!(", weights of step {step}")).unwrap_or_default();
        let skipped = match skipped {
            Some((a, b)) if a == b => format!(", samples of step {a} are left out"),
            Some((a, b)) => format!(", samples of steps {a} to {b} are left out"),
            None => String::new(),
        };
        Some(format!("{what}, {action}{back}{skipped}: {why}"))
    }

    /// When it happened, in microseconds since the Unix epoch; spans have times of their own.
    pub fn time_us(&self) -> Option<u64> {
        match *self {
            Record::RunStarted { time_us, .. }
            | Record::Step(Step { time_us, .. })
            | Record::Eval { time_us, .. }
            | Record::Sample { time_us, .. }
            | Record::Checkpoint { time_us, .. }
            | Record::Resumed { time_us, .. }
            | Record::Recovered { time_us, .. }
            | Record::Accepted { time_us, .. }
            | Record::Trouble { time_us, .. }
            | Record::Verified { time_us, .. }
            | Record::Straggler { time_us, .. }
            | Record::Warning { time_us, .. }
            | Record::Finished { time_us, .. }
            | Record::Failed { time_us, .. } => Some(time_us),
            Record::Drawn { .. } | Record::Spans { .. } => None,
        }
    }
}

/// What was wrong with a step or a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The loss or the gradient norm was not finite.
    Nan,
    /// One of them was far above those of the steps before.
    Spike,
    /// Weights or moments had changed by themselves.
    Corruption,
}

/// What keeps ranks waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A rank works longer than others.
    Compute,
    /// Messages take longer than they did, or than those of others.
    Link,
}

/// What was done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The run ended.
    Stop,
    /// The step's update was left out.
    Skip,
    /// Weights and moments are those of a checkpoint once more.
    Rollback,
    /// They come from ranks that agree.
    Restore,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Trouble::Nan => "not finite",
            Trouble::Spike => "spike",
            Trouble::Corruption => "corruption",
        })
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Action::Stop => "stopped",
            Action::Skip => "skipped",
            Action::Rollback => "rolled back",
            Action::Restore => "restored",
        })
    }
}

/// An optimiser step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// When it ended.
    pub time_us: u64,
    /// Steps done, this one included.
    pub step: u64,
    /// Mean loss per valid token, in nats.
    #[serde(with = "float")]
    pub loss: f64,
    /// Norm of the gradient before clipping.
    #[serde(with = "float")]
    pub grad_norm: f64,
    /// Learning rate.
    #[serde(with = "float")]
    pub lr: f64,
    /// Tokens trained on since the first step.
    pub tokens: u64,
    /// Tokens of this step that count in the loss.
    pub valid_tokens: u64,
    /// Tokens per second of all ranks.
    #[serde(with = "float")]
    pub tokens_per_s: f64,
    /// Model FLOPs utilisation, 0 to 1; absent when the machine's peak is not known.
    #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
    pub mfu: Option<f64>,
    /// Duration in seconds.
    #[serde(with = "float")]
    pub step_s: f64,
    /// Bytes that the placed program allocated on this rank.
    pub memory_bytes: u64,
    /// Seconds of communication that no computation hid; absent for a single rank.
    #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
    pub exposed_comm_s: Option<f64>,
    /// The same by the axis of the mesh that was waited on: `dp`, `tp`, `pp`, `cp`, `ep`; empty where it is not known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub waits_s: BTreeMap<String, f64>,
    /// How many tokens of the step went to each expert, layer by layer, none of a layer without; absent for a dense
    /// model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_counts: Option<Vec<Vec<u64>>>,
    /// Mean loss of the module that predicts one token more, in nats per valid token of the step, before its weight; absent
    /// for a model without.
    #[serde(with = "float::option", default, skip_serializing_if = "Option::is_none")]
    pub mtp_loss: Option<f64>,
}

/// One execution of one op.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Stable id of the op in the step program.
    pub op: u64,
    /// What people call it.
    pub name: String,
    /// What it occupied.
    #[serde(default)]
    pub lane: Lane,
    /// Micro-batch it worked on; absent for work once a step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<u32>,
    /// When it began.
    pub start_us: u64,
    /// When it ended.
    pub end_us: u64,
    /// Bytes that it moved between ranks; 0 for a kernel.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bytes: u64,
}

/// What a span occupies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// The rank's arithmetic.
    #[default]
    Compute,
    /// The rank's links.
    Comm,
}

impl std::fmt::Display for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Lane::Compute => "compute",
            Lane::Comm => "comm",
        })
    }
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn step(step: u64, loss: f64) -> Record {
        Record::Step(Step {
            time_us: 1_700_000_000_000_000 + step,
            step,
            loss,
            grad_norm: 1.0,
            lr: 3e-4,
            tokens: 2048 * step,
            valid_tokens: 2048,
            tokens_per_s: 1000.5,
            mfu: Some(0.5),
            step_s: 2.0,
            memory_bytes: 1 << 30,
            exposed_comm_s: None,
            waits_s: BTreeMap::new(),
            expert_counts: None,
            mtp_loss: None,
        })
    }

    fn float() -> impl Strategy<Value = f64> {
        prop_oneof![
            any::<f64>(),
            any::<f32>().prop_map(f64::from),
            Just(f64::NAN),
            Just(f64::INFINITY),
            Just(-0.0)
        ]
    }

    fn bits(x: f64) -> u64 {
        // The payload of a NaN is not kept.
        if x.is_nan() { f64::NAN.to_bits() } else { x.to_bits() }
    }

    proptest! {
        #[test]
        fn floats_keep_their_bits(loss in float(), mfu in proptest::option::of(float())) {
            let Record::Step(Step { time_us, step, tokens, .. }) = step(1, 0.0) else { unreachable!() };
            let record = Record::Step(Step {
                time_us, step, loss, grad_norm: -loss, lr: loss, tokens, valid_tokens: 0, tokens_per_s: 1.0, mfu,
                step_s: 0.0, memory_bytes: 0, exposed_comm_s: mfu, waits_s: BTreeMap::new(),
                expert_counts: Some(vec![vec![], vec![3, 0]]), mtp_loss: mfu,
            });
            let text = serde_json::to_string(&record).unwrap();
            let Record::Step(Step { loss: l, grad_norm: g, mfu: m, exposed_comm_s: e, mtp_loss: a, .. }) =
                serde_json::from_str(&text).unwrap() else { unreachable!() };
            prop_assert_eq!((bits(l), bits(g)), (bits(loss), bits(-loss)));
            prop_assert!([m, e, a].iter().all(|x| x.map(bits) == mfu.map(bits)));
        }

        #[test]
        fn text_is_one_line(text: String) {
            let record = Record::Sample { time_us: 0, step: 1, text };
            let line = serde_json::to_string(&record).unwrap();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), record);
        }
    }

    #[test]
    fn shape_of_the_lines() {
        let spans = Record::Spans {
            rank: 1,
            step: 2,
            spans: vec![Span {
                op: 7,
                name: "linear".into(),
                lane: Lane::Compute,
                micro_batch: None,
                start_us: 5,
                end_us: 9,
                bytes: 0,
            }],
        };
        assert_eq!(
            serde_json::to_string(&spans).unwrap(),
            r#"{"kind":"spans","rank":1,"step":2,"spans":[{"op":7,"name":"linear","lane":"compute","start_us":5,"end_us":9}]}"#
        );
        let eval =
            Record::Eval { time_us: 3, step: 1, loss: f64::NEG_INFINITY, average_loss: None, tokens: 4 };
        assert_eq!(
            serde_json::to_string(&eval).unwrap(),
            r#"{"kind":"eval","time_us":3,"step":1,"loss":"-inf","tokens":4}"#
        );
        let eval = Record::Eval { time_us: 3, step: 1, loss: 2.5, average_loss: Some(f64::NAN), tokens: 4 };
        assert_eq!(
            serde_json::to_string(&eval).unwrap(),
            r#"{"kind":"eval","time_us":3,"step":1,"loss":2.5,"average_loss":"NaN","tokens":4}"#
        );
        let newer = r#"{"kind":"warning","time_us":1,"text":"x","colour":"red"}"#;
        assert_eq!(
            serde_json::from_str::<Record>(newer).unwrap(),
            Record::Warning { time_us: 1, text: "x".into() }
        );
        assert!(
            serde_json::from_str::<Record>(r#"{"kind":"eval","time_us":3,"step":1,"loss":"big","tokens":4}"#)
                .is_err()
        );
    }
}
