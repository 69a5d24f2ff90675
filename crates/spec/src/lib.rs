//! What is asked: units, models, layouts, clusters and run files, parsed from text into checked values.
//!
//! Nothing here knows about performance: `spec` says what a run is, never how long it takes.

pub mod catalog;
pub mod cluster;
mod dtype;
mod error;
mod layout;
mod model;

pub use catalog::{Catalog, EntryKind, Measure};
pub use cluster::{Accelerator, Cluster, NumberFormat};
pub use dtype::DType;
pub use error::{Context, Error, Kind, Result};
pub use layout::{Layout, PipelineSchedule, Recompute, Reduce, Zero};
pub use model::{Activation, ModelSpec, NormKind, Position, Rope, RopeScaling};
