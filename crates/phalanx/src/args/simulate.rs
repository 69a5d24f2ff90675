use std::path::PathBuf;

use clap::{Args as ClapArgs, ValueEnum};

const SIMULATE_EXAMPLES: &str = "\
Examples:
  A step of Llama 3 405B on 16,384 H100, message by message:
    phalanx simulate --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384 \\
      --layout tp=8,pp=16,micro_batch=1
  The same with a slow node and a bad link, and 54 days of it with failures:
    printf '[[slow]]\\nnode = 3\\nfactor = 1.2\\n[[link]]\\nrank = 99\\nfactor = 0.25\\n' > storm.toml
    phalanx simulate --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384 \\
      --layout tp=8,pp=16,micro_batch=1 --scenario storm.toml --days 54 --seeds 20
  Ranks that keep their processes, four spare nodes, and the step as a page:
    phalanx simulate --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384 \\
      --layout tp=8,pp=16,micro_batch=1 --days 54 --recovery elastic --spares 4 --html step.html
  What slowed a run whose ops were traced:
    phalanx simulate --trace ops.parquet";

/// What follows a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Recover {
    /// All processes are stopped and started over from the last checkpoint, in the time that is published of such runs.
    Restart,
    /// Those that live keep their processes and memory, as `phalanx launch` does it, at its timeouts.
    Elastic,
}

#[derive(Debug, ClapArgs)]
#[command(after_help = SIMULATE_EXAMPLES)]
pub(crate) struct Simulate {
    /// Model of the catalogue, Hugging Face config.json, or run file
    #[arg(long, value_name = "NAME|FILE", required_unless_present = "trace")]
    pub(crate) model: Option<String>,
    /// Platform or node of the catalogue, for example dgx-superpod-h100-64su
    #[arg(long, value_name = "NAME", required_unless_present = "trace")]
    pub(crate) cluster: Option<String>,
    /// Accelerators to use; all of the cluster if absent
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) accelerators: Option<usize>,
    /// Layout as `phalanx plan` takes it; the best that it finds if absent
    #[arg(long, value_name = "KEY=VALUE,...|STRATEGY")]
    pub(crate) layout: Option<String>,
    /// Tokens of a sequence; usual for the model if absent
    #[arg(long, value_name = "TOKENS")]
    pub(crate) sequence: Option<usize>,
    /// Sequences of the global batch; usual for the model's size if absent
    #[arg(long, value_name = "N")]
    pub(crate) sequences: Option<usize>,
    /// Number format of the matrix products, as `phalanx plan` takes it
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Training stack; the usual one for the accelerator if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) software: Option<String>,
    /// Steps to play
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "days")]
    pub(crate) steps: u64,
    /// Days to live through, with failures at the cluster's rates
    #[arg(long, value_name = "D", allow_negative_numbers = true)]
    pub(crate) days: Option<f64>,
    /// What is drawn at random follows from it
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Lives to live, with seeds from --seed on
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub(crate) seeds: u64,
    /// What follows a failure: start everything over from a checkpoint, which it is if absent, or keep who lives (`elastic`)
    #[arg(long, value_name = "HOW", value_enum)]
    pub(crate) recovery: Option<Recover>,
    /// Nodes that stand by; as many as are wanted if neither this nor --min-nodes is given
    #[arg(long, value_name = "N")]
    pub(crate) spares: Option<u64>,
    /// Fewest nodes that the job goes on with while others are repaired; all of them if absent
    #[arg(long, value_name = "N")]
    pub(crate) min_nodes: Option<u64>,
    /// Say too what a step would take if: even-ranks, good-links, fabric=2, domain=2
    #[arg(long, value_name = "WHAT")]
    pub(crate) as_if: Vec<String>,
    /// Write what --ranks did in the first step, for ui.perfetto.dev
    #[arg(long, value_name = "FILE.json")]
    pub(crate) perfetto: Option<PathBuf>,
    /// Ranks to show in --perfetto and --html; the one done last if absent
    #[arg(long, value_name = "0,5,17-19")]
    pub(crate) ranks: Option<String>,
    /// Write the answer as a page too
    #[arg(long, value_name = "FILE.html")]
    pub(crate) html: Option<PathBuf>,
    /// What goes wrong: slow ranks, bad links, pauses, failures
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) scenario: Option<PathBuf>,
    /// Play a trace of a real run instead, and say what slowed it: a table of ops, comma-separated or Parquet
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "cluster", "accelerators", "layout",
        "sequence", "sequences", "format", "software", "steps", "days", "seed", "seeds", "recovery", "spares", "min_nodes", "scenario", "as_if",
        "perfetto", "ranks", "catalog"])]
    pub(crate) trace: Option<PathBuf>,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
