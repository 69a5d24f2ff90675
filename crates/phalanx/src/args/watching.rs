//! Arguments of what watches runs and machines.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand};

const DASH_EXAMPLES: &str = "\
Examples:
  Watch a run, from a laptop through an SSH tunnel:
    phalanx dash runs/default --port 8600        (and: ssh -L 8600:127.0.0.1:8600 HOST)
  Compare two runs:
    phalanx dash runs/a runs/b
  Serve Prometheus and colleagues on a cluster's network, with a token:
    phalanx dash runs/default --bind 10.0.0.7 --port 8600 --token-file ~/.phalanx-token";

#[derive(Debug, ClapArgs)]
#[command(after_help = DASH_EXAMPLES)]
pub(crate) struct Dash {
    /// Directories of runs
    #[arg(required = true, value_name = "RUN_DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// Address to serve at; one that other machines reach needs a token, which is made up unless it is given
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDR")]
    pub(crate) bind: IpAddr,
    /// Port; 0 takes a free one and says which
    #[arg(long, default_value_t = 0)]
    pub(crate) port: u16,
    /// File whose first line is the token that everybody must bring
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Calibration file of the machine that runs were trained on, for planned times of ops
    #[arg(long, default_value = crate::this_machine::FILE, value_name = "FILE")]
    pub(crate) machine: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Top {
    /// Directories of runs
    #[arg(required = true, value_name = "RUN_DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// On a pipe, go on with a line for every new step until all runs have ended
    #[arg(long, conflicts_with = "json")]
    pub(crate) follow: bool,
    /// Print what is known of the runs as JSON, once
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Journal {
    #[command(subcommand)]
    pub(crate) what: JournalCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JournalCommand {
    /// List the journals of a run: ranks, records by kind, steps, bytes
    Ls {
        /// Directory of a run
        run_dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what happened in a run, steps and their ops left out
    Show {
        /// Directory of a run
        run_dir: PathBuf,
        /// Whose journal
        #[arg(long, default_value_t = 0)]
        rank: usize,
        /// Print records as they lie in the file
        #[arg(long)]
        json: bool,
    },
    /// Write steps, or evaluations or checkpoints, as a table
    Export {
        /// Directory of a run
        run_dir: PathBuf,
        /// Comma-separated values
        #[arg(long, required_unless_present_any = ["parquet", "otlp"])]
        csv: bool,
        /// A Parquet file, with snappy
        #[arg(long, value_name = "FILE", conflicts_with_all = ["csv", "output"])]
        parquet: Option<PathBuf>,
        /// Send as metrics, and steps as spans, to an OpenTelemetry collector: http://HOST:4318
        #[arg(long, value_name = "URL", conflicts_with_all = ["csv", "output", "parquet"])]
        otlp: Option<String>,
        /// What becomes a row: step, eval or checkpoint
        #[arg(long, default_value = "step", value_parser = ["step", "eval", "checkpoint"])]
        kind: String,
        /// Whose journal
        #[arg(long, default_value_t = 0)]
        rank: usize,
        /// Steps that were lost and done again, too
        #[arg(long)]
        all: bool,
        /// File to write instead of stdout
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Print what Prometheus is told of runs, for a textfile collector
    Metrics {
        /// Directories of runs
        #[arg(required = true, value_name = "RUN_DIR")]
        dirs: Vec<PathBuf>,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Doctor {
    /// Directory whose disk is checked: where runs will lie
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Of an allocation (srun --ntasks-per-node=1 phalanx doctor): what the catalogue says that nodes talk over
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: Option<String>,
    /// More catalogue files
    #[arg(long, value_name = "FILE")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Of an allocation: how nodes talk, as for train
    #[arg(long, default_value = "auto", value_parser = ["auto", "shm", "tcp", "mpi"])]
    pub(crate) transport: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Completions {
    /// bash, zsh, fish, elvish or powershell
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Man {
    /// Directory to write phalanx.1, phalanx-train.1 and so on into
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
}
