//! The run and the money: what a training run takes with its failures, what it costs, and whether to build or to rent.
//!
//! `plan` says what a step takes. This joins that with failures ([`failures`], [`goodput`]), tokens ([`run`]), prices
//! ([`price`]), energy ([`energy`]) and ownership ([`own`]),
//! chooses a plan by any of them ([`objective`]), and decides between owning and renting ([`decide`]).
//!
//! Nothing here does I/O or reads a clock: the day on which a price is read is an argument.
//!
//! Every estimate is a [`Spread`]: the value to compute with, and the range that its sources span. Money is whole cents
//! ([`Usd`]); what is shown as a sum is the sum of the parts shown.

pub mod date;
pub mod decide;
pub mod energy;
pub mod failures;
pub mod goodput;
mod input;
pub mod money;
pub mod objective;
pub mod own;
pub mod price;
pub mod run;
pub mod spread;
pub mod storage;

pub use date::Date;
pub use money::{Bill, Cost, Usd};
pub use spread::Spread;

/// Hours of a year, of 365.25 days.
pub const HOURS_PER_YEAR: f64 = 8766.0;
/// Hours of a month: a twelfth of a year.
pub const HOURS_PER_MONTH: f64 = HOURS_PER_YEAR / 12.0;
/// Seconds of an hour.
pub const HOUR_S: f64 = 3600.0;
/// Seconds of a day.
pub const DAY_S: f64 = 86_400.0;
