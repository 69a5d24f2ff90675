//! Flags of a run's money, and of the decision to build or to rent.

use std::path::PathBuf;

use clap::Args as ClapArgs;

/// What a run costs and how it is kept alive.
#[derive(Clone, Debug, Default, ClapArgs)]
#[command(next_help_heading = "The run, with --tokens")]
pub(crate) struct Economy {
    /// What to choose for: time (all accelerators), dollars or tokens-per-dollar (as many as are best)
    #[arg(long = "for", default_value = "time", value_parser = ["time", "dollars", "tokens-per-dollar"], value_name = "WHAT")]
    pub(crate) objective: String,
    /// Only sizes that are done within so many days
    #[arg(long, value_name = "DAYS", allow_negative_numbers = true)]
    pub(crate) within: Option<f64>,
    /// US dollars an hour for an accelerator (2.5) or a node (98.32/node), a price of the catalogue, or a file with one
    #[arg(long, value_name = "PRICE", allow_hyphen_values = true)]
    pub(crate) price: Option<String>,
    /// On-demand, reserved-1y, reserved-3y, spot or capacity-block
    #[arg(long, value_name = "TERM")]
    pub(crate) commitment: Option<String>,
    /// Region of the price where the accelerator has prices by region, else the grid for energy and carbon
    #[arg(long, value_name = "NAME")]
    pub(crate) region: Option<String>,
    /// Pay the run's share of owning the machines instead of rent
    #[arg(long, conflicts_with_all = ["price", "commitment"])]
    pub(crate) own: bool,
    /// Smaller batches at the beginning, each until so many tokens: 4M:252M,8M:2.87T. Rounded to what the replicas divide
    #[arg(long, value_name = "BATCH:UNTIL,...")]
    pub(crate) ramp: Option<String>,
    /// After losing a node: restart, in-memory (copies on peers) or elastic (the others go on)
    #[arg(long, value_parser = ["restart", "in-memory", "elastic"], value_name = "HOW")]
    pub(crate) recovery: Option<String>,
    /// How checkpoints are saved; the best if absent
    #[arg(long, value_parser = ["blocking", "async", "node-local"], value_name = "HOW")]
    pub(crate) checkpoint: Option<String>,
    /// Useful seconds between checkpoints; the best if absent
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub(crate) checkpoint_every: Option<f64>,
    /// Failure rates of this entry of the catalogue, with its own interval
    #[arg(long, value_name = "NAME")]
    pub(crate) failures: Option<String>,
    /// Day on which prices are read: YYYY-MM-DD; today if absent
    #[arg(long, value_name = "DATE")]
    pub(crate) today: Option<String>,
}

const DECIDE_EXAMPLES: &str = "\
Examples:
  Half a year of experiments on 64 accelerators, then 512 that work most of the time:
    phalanx decide --platform dgx-superpod-h100 --profile 6x64@0.3,42x512@0.8
  The same with the assumptions as a file, edited and decided again:
    phalanx decide --platform dgx-superpod-h100 --profile 6x64@0.3,42x512@0.8 --write mine.toml
    phalanx decide mine.toml
  A budget of compute, as `phalanx plan --tokens` says it, over two years on 256 accelerators:
    phalanx decide --platform coreweave-h100 --accelerators 256 --hours 2.5M --months 24";

#[derive(Debug, ClapArgs)]
#[command(after_help = DECIDE_EXAMPLES)]
pub(crate) struct Decide {
    /// Assumptions that --write wrote, edited or not; those of the catalogue if absent
    #[arg(value_name = "ASSUMPTIONS.toml", conflicts_with_all = ["platform", "profile", "accelerators", "utilisation", "months", "hours", "price", "commitment", "region"])]
    pub(crate) file: Option<PathBuf>,
    /// Machine to rent or to buy
    #[arg(long, value_name = "NAME", default_value = "dgx-superpod-h100")]
    pub(crate) platform: String,
    /// Demand over months: MONTHSxACCELERATORS@UTILISATION, one after the other
    #[arg(long, value_name = "PROFILE", conflicts_with_all = ["accelerators", "utilisation", "months", "hours"])]
    pub(crate) profile: Option<String>,
    /// Accelerators that jobs want at a time
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub(crate) accelerators: usize,
    /// Share of the time that they work
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, conflicts_with = "hours")]
    pub(crate) utilisation: Option<f64>,
    /// Accelerator-hours of compute over all months, instead of a utilisation
    #[arg(long, value_name = "HOURS", allow_hyphen_values = true)]
    pub(crate) hours: Option<String>,
    /// Months to look ahead
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub(crate) months: usize,
    /// Data may not leave: machines of others are excluded
    #[arg(long)]
    pub(crate) private: bool,
    /// US dollars an hour for an accelerator (2.5) or a node (98.32/node), a price of the catalogue, or a file with one
    #[arg(long, value_name = "PRICE", allow_hyphen_values = true)]
    pub(crate) price: Option<String>,
    /// What that price is: on-demand, reserved-1y, reserved-3y or spot
    #[arg(long, value_name = "TERM", requires = "price")]
    pub(crate) commitment: Option<String>,
    /// Grid of the catalogue for the price of energy
    #[arg(long, value_name = "NAME")]
    pub(crate) region: Option<String>,
    /// Day on which prices are read: YYYY-MM-DD; today if absent
    #[arg(long, value_name = "DATE")]
    pub(crate) today: Option<String>,
    /// Write the assumptions to edit
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) write: Option<PathBuf>,
    /// With --write, replace a file that is there
    #[arg(long, requires = "write")]
    pub(crate) force: bool,
    /// Write a page with figures, tables and sources, in one file that needs no network
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
