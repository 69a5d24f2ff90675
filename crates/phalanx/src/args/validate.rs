use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};
use published::columns::{Column, RUNS, SERVING};

/// The columns that are read, after the flags.
fn columns() -> String {
    let list = |columns: &[Column]| -> String {
        columns.iter().map(|(name, what)| format!("  {name:<24}{what}\n")).collect()
    };
    format!(
        "The first line of the table names its columns, in any order. Of published runs:\n{}\nOf serving figures:\n{}",
        list(&RUNS),
        list(&SERVING)
    )
}

/// How rows are predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum By {
    /// In closed form.
    Estimate,
    /// By playing their steps, beside it.
    Simulate,
}

#[derive(Debug, ClapArgs)]
#[command(after_long_help = columns())]
pub(crate) struct Validate {
    /// Table of published runs, or of serving figures (CSV); --help lists the columns
    pub(crate) file: PathBuf,
    /// Fit on the table itself, leaving each source out of its own fit
    #[arg(long, conflicts_with = "calibration")]
    pub(crate) held_out: bool,
    /// Fit on half of the rows of each source and estimate the other half
    #[arg(long, conflicts_with_all = ["calibration", "held_out"])]
    pub(crate) half: bool,
    /// Estimate in closed form, or play each row's step too and compare both
    #[arg(long, value_enum, default_value_t = By::Estimate, conflicts_with_all = ["half", "fit"])]
    pub(crate) by: By,
    /// Fitted constants to use instead of the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) calibration: Option<PathBuf>,
    /// Fit the constants on the table and write them
    #[arg(long, value_name = "FILE.toml", conflicts_with_all = ["held_out", "half", "calibration", "json"])]
    pub(crate) fit: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
