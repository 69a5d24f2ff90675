use std::path::PathBuf;

use clap::{ArgMatches, Args as ClapArgs, Command, FromArgMatches, Subcommand};

use super::Plan;

/// A plan, or two side by side: flags, or a subcommand instead of them.
#[derive(Debug)]
pub(crate) enum PlanOr {
    Plan(Box<Plan>),
    Two(PlanCommand),
}

impl ClapArgs for PlanOr {
    fn augment_args(command: Command) -> Command {
        PlanCommand::augment_subcommands(Plan::augment_args(command))
            .args_conflicts_with_subcommands(true)
            .subcommand_negates_reqs(true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for PlanOr {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        match matches.subcommand_name() {
            Some(_) => PlanCommand::from_arg_matches(matches).map(PlanOr::Two),
            None => Plan::from_arg_matches(matches).map(|plan| PlanOr::Plan(Box::new(plan))),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
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
