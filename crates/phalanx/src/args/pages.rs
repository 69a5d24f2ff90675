use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand};

use super::Plan;

/// A plan, or two side by side.
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct PlanOr {
    #[command(subcommand)]
    pub(crate) what: Option<PlanCommand>,
    #[command(flatten)]
    pub(crate) plan: Option<Plan>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanCommand {
    /// Put two plans side by side: files of --json or --html, or the flags of a plan in quotes
    Compare {
        /// The first: FILE, or "--model NAME --cluster NAME ..."
        #[arg(allow_hyphen_values = true)]
        a: String,
        /// The second
        #[arg(allow_hyphen_values = true)]
        b: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Write a page with the comparison
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Guide {
    /// Write a page with the claims
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
