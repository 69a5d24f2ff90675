//! What is written for clusters that start the ranks: a batch script for Slurm, manifests for Kubernetes.
//!
//! A request goes in, text and the reasons of what was decided come out; nothing here submits, reads or looks anything
//! up. [`slurm::script`] writes a script in which every rank is a task of `srun`; [`kubernetes::manifests`] writes pods of
//! which each is a node with an agent, under the kind of job that the cluster has.
//!
//! Both follow one contract with the trainer, its exit code:
//!
//! | code | means | then |
//! | --- | --- | --- |
//! | 0 | all steps are done | the job is done |
//! | 2 | the input is wrong | the job fails: no restart mends it |
//! | 130 | asked to stop, and saved | the job is queued again, unless somebody ended it |
//! | other | a rank, a link or a node failed | it starts again from the newest checkpoint, within a budget |

pub mod kubernetes;
pub mod name;
pub mod quantity;
pub mod shell;
pub mod slurm;
mod yaml;

use serde::Serialize;

pub use quantity::{Memory, Time};
pub use yaml::Yaml;

/// Exit code of `phalanx train` and of its agent for input that no restart mends.
pub(crate) const WRONG_INPUT: u8 = 2;

/// Something that was chosen for a request, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// What was chosen.
    pub what: String,
    /// Why.
    pub why: String,
}

/// A list of them as it grows.
#[derive(Debug, Default)]
pub(crate) struct Decisions(Vec<Decision>);

impl Decisions {
    pub(crate) fn note(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.0.push(Decision { what: what.into(), why: why.into() });
    }

    pub(crate) fn list(self) -> Vec<Decision> {
        self.0
    }
}
