//! What is asked: models, layouts, clusters and run files, parsed from text into checked values.
//!
//! Nothing here knows about performance: `spec` says what a run is, never how long it takes.

pub mod catalog;
pub mod cluster;
mod doc;
mod dtype;
mod error;
mod family;
pub mod hash;
mod hf;
mod layout;
mod layout_check;
mod layout_fit;
mod legality;
mod lr;
mod model;
mod model_check;
mod model_count;
mod model_toml;
mod number_format;
mod origin;
pub mod random;
pub mod run;
pub mod shares;
pub mod stats;
pub mod suggest;
pub mod sum_tree;
mod toml_guard;
pub mod units;
mod words;

pub use catalog::{Catalog, EntryKind, Measure};
pub use cluster::{Accelerator, Cluster};
pub use dtype::DType;
pub use error::{Context, Error, Kind, Result, printable};
pub use family::{Family, MatrixUnits};
pub use hf::{HfModel, Windows, parse_json, small_json};
pub use layout::{ContextMode, ExpertRows, Layout, PipelineSchedule, Recompute, Reduce, Zero};
pub use layout_fit::Fitted;
pub use legality::{Broken, Checked, Rule, Tolerance, divisors, lcm};
pub use lr::{LrSchedule, ScheduleKind};
pub use model::{
    Activation, Experts, LATENT_NORM_EPS, Latent, ModelSpec, Mtp, NormKind, Position, Rope, RopeScaling,
    Router, Score, Window, Yarn,
};
pub use number_format::NumberFormat;
pub use origin::Origin;
pub use run::{Optimizer, RunSpec};
pub use sum_tree::{SumTree, merge_at};
pub use toml_guard::{Unreadable, guard_toml};

#[cfg(test)]
mod fuzz_test;
