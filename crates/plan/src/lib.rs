//! Estimate a step program in closed form and search layouts.
//!
//! Nothing here does I/O: clusters, models and tables come in as values, answers go out as values with their reasons.

pub mod answer;
pub mod calibration;
pub mod compute;
pub mod given;
pub mod placement;
pub mod models;
pub mod network;
pub mod pipeline;
pub mod estimate;
pub mod search;
pub mod shape;
pub mod software;
pub mod storage;
pub mod strategy;
pub mod template;
