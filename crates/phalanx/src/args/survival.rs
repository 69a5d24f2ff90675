use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};

#[derive(Debug, ClapArgs)]
pub(crate) struct Ckpt {
    #[command(subcommand)]
    pub(crate) what: CkptCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CkptCommand {
    /// List the checkpoints of a run, oldest first
    Ls {
        /// Directory of a run, or of checkpoints
        #[arg(value_name = "RUN_DIR")]
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a checkpoint holds, tensor by tensor
    Show {
        /// Directory of a checkpoint, or of a run, whose newest is taken
        #[arg(value_name = "CHECKPOINT")]
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Read a checkpoint, or all of a run's, from end to end and compare every checksum
    Verify {
        /// Directory of a checkpoint, or of a run
        #[arg(value_name = "CHECKPOINT")]
        path: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare two checkpoints, whatever layouts wrote them; exit code 1 if a bit differs
    Diff {
        /// Directory of a checkpoint, or of a run, whose newest is taken
        a: PathBuf,
        /// The other
        b: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint again in files of equal share, one for each of N ranks
    Reshard {
        /// Directory of a checkpoint, or of a run, whose newest is taken
        #[arg(value_name = "CHECKPOINT")]
        from: PathBuf,
        /// Directory of a run, or of checkpoints; made if it is missing
        out_dir: PathBuf,
        /// How many files
        #[arg(long, value_name = "N")]
        ranks: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write a checkpoint as another trainer reads it
    Export {
        /// Directory of a checkpoint, or of a run, whose newest is taken
        #[arg(value_name = "CHECKPOINT")]
        from: PathBuf,
        /// New directory
        out: PathBuf,
        /// dcp: torch.distributed.checkpoint
        #[arg(long)]
        format: ExportFormat,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Write another trainer's checkpoint as one of ours; nothing in it is executed
    Import {
        /// Directory of torch.distributed.checkpoint or of Megatron (torch_dist), or a model_*.bin of llm.c
        #[arg(value_name = "DIR_OR_FILE")]
        from: PathBuf,
        /// Directory of a run, or of checkpoints; made if it is missing
        #[arg(value_name = "RUN_DIR")]
        out_dir: PathBuf,
        /// What it is; told by its content if absent
        #[arg(long)]
        format: Option<ImportFormat>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove old checkpoints of a run
    Prune {
        /// Directory of a run, or of checkpoints
        #[arg(value_name = "RUN_DIR")]
        path: PathBuf,
        /// How many of the newest to keep
        #[arg(long, value_name = "N")]
        keep: usize,
        /// Keep those of every N-th step too; the run's checkpoint.keep_every if absent
        #[arg(long, value_name = "STEPS")]
        every: Option<u64>,
        /// Say what would be removed, and remove nothing
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ExportFormat {
    /// PyTorch's torch.distributed.checkpoint
    Dcp,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum ImportFormat {
    /// PyTorch's torch.distributed.checkpoint
    Dcp,
    /// Megatron's torch_dist
    Megatron,
    /// Weights of llm.c
    Llmc,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Ledger {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Replay {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// The step to do again
    #[arg(long, value_name = "K")]
    pub(crate) step: u64,
    /// Layout to do it in, for example dp=2,zero=1; may be given several times; the run's own and one rank alone if
    /// absent
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub(crate) layout: Vec<String>,
    /// Threads of all ranks together; one for each core if 0
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) threads: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Chaos {
    /// How many faults
    #[arg(long, default_value_t = 14, value_name = "N")]
    pub(crate) faults: usize,
    /// Chooses the faults: the same seed, the same faults
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Most ranks of a layout, up to 8
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub(crate) ranks: usize,
    /// Directory for the runs, kept afterwards; a temporary one if absent, kept if something is wrong
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BenchCheckpoint {
    /// Directory or URL to write under; what is written is removed again
    #[arg(long, default_value = ".", value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Rounds in which saves and dd take turns
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) rounds: usize,
    /// Steps between two saves in the background
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub(crate) steps: usize,
    /// Threads of the training step; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Override a key of the run file, model.preset for example
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
