use std::path::PathBuf;

use clap::Args as ClapArgs;

const SIMULATE_EXAMPLES: &str = "\
Examples:
  A step of Llama 3 405B on 16,384 H100, message by message:
    phalanx simulate --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384 \\
      --layout tp=8,pp=16,micro_batch=1
  The same with a slow node and a bad link, and 54 days of it with failures:
    printf '[[slow]]\\nnode = 3\\nfactor = 1.2\\n[[link]]\\nrank = 99\\nfactor = 0.25\\n' > storm.toml
    phalanx simulate --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384 \\
      --layout tp=8,pp=16,micro_batch=1 --scenario storm.toml --days 54 --seeds 20
  What slowed a run whose ops were traced:
    phalanx simulate --trace ops.csv";

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
    /// What goes wrong: slow ranks, bad links, pauses, failures
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) scenario: Option<PathBuf>,
    /// Play a trace of a real run instead, and say what slowed it: comma-separated ops
    #[arg(long, value_name = "FILE.csv", conflicts_with_all = ["model", "cluster", "accelerators", "layout", "days", "scenario"])]
    pub(crate) trace: Option<PathBuf>,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
