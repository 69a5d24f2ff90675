//! Serving a trained model: what a request waits for its first token and between tokens, what an accelerator yields and
//! what a million tokens cost, in closed form.
//!
//! A forward pass is the step program's own ([`ops`]), timed on the machine under a serving stack ([`pass`]); what lies
//! in memory bounds how many requests run at once ([`memory`]); requests that come and go share passes ([`serve`]).
//! [`answer`] joins them into a curve over concurrency with its knee and its price.
//!
//! Nothing here does I/O: clusters, models and stacks come in as values, answers go out as values with their reasons.

pub mod answer;
pub mod format;
pub mod memory;
pub mod models;
pub mod ops;
pub mod pass;
pub mod serve;
pub mod stack;
