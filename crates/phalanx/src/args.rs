mod clusters;
mod economy;
mod pages;
mod run;
mod serving;
mod simulate;
mod survival;
mod watching;
mod validate;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, Subcommand};

pub(crate) use clusters::{Alive, Kubernetes, KubernetesKind, Slurm};
pub(crate) use economy::{Decide, Economy};
pub(crate) use pages::{Guide, PlanCommand, PlanOr};
pub(crate) use run::RunArgs;
pub(crate) use serving::Inference;
pub(crate) use simulate::{Recover, Simulate};
pub(crate) use survival::{
    BenchCheckpoint, Chaos, Ckpt, CkptCommand, ExportFormat, ImportFormat, Ledger, Replay,
};
pub(crate) use validate::{By, Validate};
pub(crate) use watching::{Completions, Dash, Doctor, Journal, JournalCommand, Man, Top};

/// Plan, rehearse and run the training of large models
#[derive(Debug, Parser)]
#[command(name = "phalanx", version, long_version = crate::version::long(), max_term_width = 100)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Train a model; continues where an earlier run of the same directory stopped
    Train(Train),
    /// Continue text with the newest checkpoint of a run
    Generate(Generate),
    /// Print the logits after each of some tokens
    Logits(Logits),
    /// Make a run of a Hugging Face model directory
    Import(Import),
    /// Write the newest checkpoint of a run as a Hugging Face model directory
    Export(Export),
    /// Look into the step program
    Program(Program),
    /// Build and inspect token datasets
    Data(Data),
    /// Measure this machine
    Bench(Bench),
    /// Find the best layouts of a model on a cluster, or on this machine
    Plan(PlanOr),
    /// Recompute the figures of the guide to AI supercomputing platforms, and say which hold
    Guide(Guide),
    /// Rehearse a run on a virtual clock: contention, slow ranks, bad links, failures; or find what slowed a traced run
    Simulate(Simulate),
    /// What serving a model takes and costs: time to first token, between tokens, tokens per second
    Inference(Inference),
    /// Build or rent: what to do for a profile of demand over months, why, and what would change it
    Decide(Decide),
    /// Join predicted with measured times of a run, op by op
    Compare(Compare),
    /// Estimate published runs or serving figures and compare
    Validate(Validate),
    /// Accelerators, clusters, prices and failure rates, with their sources
    Catalog(Catalog),
    /// What this machine can compute on, and what is missing to use its GPUs
    Devices(Devices),
    /// Start any program's ranks, with torchrun's flags and environment; or ask Slurm or Kubernetes to
    Launch(Launch),
    /// Serve a page that shows runs live: curves, ranks, the last step, what happened; and metrics for Prometheus
    Dash(Dash),
    /// Show runs live on the terminal; once, as plain lines, on a pipe
    Top(Top),
    /// List, show and export what a run recorded
    Journal(Journal),
    /// Check this machine for what training on it needs, and say what to do
    Doctor(Doctor),
    /// Say whether a run writes to its journals, for probes; exit code 1 if it does not
    Alive(Alive),
    /// Write a Perfetto file of a run that was trained with --trace
    Trace(Trace),
    /// List, check, compare and remove checkpoints
    Ckpt(Ckpt),
    /// Prove from a run's journals that each sample was trained on exactly once
    Ledger(Ledger),
    /// Do a step of a run again, and tell a broken machine from a broken model by its bits
    Replay(Replay),
    /// Kill, stop and damage a small run at random, and hold its weights to the undisturbed one's
    Chaos(Chaos),
    /// List every key of a run file with its default
    Keys(Keys),
    /// Print what makes a shell complete commands and flags
    Completions(Completions),
    /// Write manual pages
    Man(Man),
}

#[derive(Clone, Debug, ClapArgs)]
pub(crate) struct Train {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Ranks to start on this machine; layout.dp follows unless it is set
    #[arg(long, value_name = "N")]
    pub(crate) nproc: Option<usize>,
    /// Lost ranks that are replaced while the others keep their processes and memory, before the run ends
    #[arg(long, value_name = "N", default_value_t = 0, requires = "nproc")]
    pub(crate) max_restarts: u32,
    /// Fewest ranks to go on with when one keeps failing; all of them unless it is set
    #[arg(long, value_name = "N", requires = "nproc")]
    pub(crate) min_nproc: Option<usize>,
    /// How ranks talk: auto (shared memory within a machine; between machines MPI where an mpiexec started the ranks and
    /// its library loads, else tcp), shm, tcp or mpi; never changes the numbers
    #[arg(long, default_value = "auto", value_parser = ["auto", "shm", "tcp", "mpi"])]
    pub(crate) transport: String,
    /// Demand that the directory holds a run to continue; one without a checkpoint begins at step 0
    #[arg(long, conflicts_with = "fresh")]
    pub(crate) resume: bool,
    /// Move an earlier run of the same directory aside and begin anew
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Begin with the weights of another run, or of an imported model
    #[arg(long, value_name = "RUN_DIR")]
    pub(crate) init: Option<PathBuf>,
    /// Go on although the run's data has changed; the journal records it
    #[arg(long)]
    pub(crate) accept_changed_data: bool,
    /// Go on although learning rates of past steps would have been others; the journal records it
    #[arg(long)]
    pub(crate) accept_changed_schedule: bool,
    /// Stop after this step with a checkpoint, as if interrupted
    #[arg(long, value_name = "STEP")]
    pub(crate) stop_after: Option<u64>,
    /// Record start and end of every op in the journal
    #[arg(long)]
    pub(crate) trace: bool,
    /// Compare what several ranks hold alike after every N steps; the same as --set run.verify_every=N
    #[arg(long, value_name = "N")]
    pub(crate) verify_every: Option<usize>,
    /// Let something go wrong on purpose: nan@STEP, spike@STEP, flip@STEP:rank=R:param=NAME, slow@FIRST-LAST:rank=R:ms=T
    #[arg(long, value_name = "WHAT@STEP")]
    pub(crate) drill: Vec<String>,
    /// Print records as JSON lines on stdout instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

const PLAN_EXAMPLES: &str = "\
Examples:
  The best layouts of Llama 3 405B on a large SuperPOD, and what would make it faster:
    phalanx plan --model llama3-405b --cluster dgx-superpod-h100-64su --tokens 15.6T --explain
  What a published layout costs:
    phalanx plan --model gpt3-175b --cluster dgx-superpod-a100 --accelerators 1024 \\
      --sequence 2048 --sequences 1536 --layout tp=8,pp=8,chunks=12,micro_batch=1,zero=1
  The cheapest number of accelerators that is done within two months, at a price of one's own:
    phalanx plan --model llama3-70b --cluster aws-p5-ultracluster --accelerators 4096 --tokens 2T \\
      --for dollars --within 60 --price 40/node
  Arguments and rank map for Megatron-LM:
    phalanx plan --model llama3-70b --cluster nd-h100-v5 --accelerators 512 \\
      --emit megatron --rank-map ranks.csv
  A page for those who pay and those who run it:
    phalanx plan --model llama3-405b --cluster dgx-superpod-h100-64su --tokens 15.6T --html plan.html
  Two machines side by side:
    phalanx plan compare plan.html \"--model llama3-405b --cluster tpu-v5p-pod --tokens 15.6T\"";

#[derive(Debug, Default, ClapArgs)]
#[command(after_help = PLAN_EXAMPLES)]
pub(crate) struct Plan {
    /// Model of the catalogue, Hugging Face config.json, or run file
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) model: String,
    /// Platform or node of the catalogue, for example dgx-superpod-h100-64su; `this` for the machine at hand
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: String,
    /// Calibration file of the machine at hand, with --cluster this; runs/machine.toml if absent
    #[arg(long, value_name = "FILE")]
    pub(crate) machine: Option<PathBuf>,
    /// A run whose counts of experts say how uneven they are chosen, with --cluster this; evenly if absent
    #[arg(long, value_name = "RUN_DIR")]
    pub(crate) experts_of: Option<PathBuf>,
    /// Accelerators to use, or ranks of this machine; all of the cluster, or one for each core, if absent
    #[arg(long, value_name = "N")]
    pub(crate) accelerators: Option<usize>,
    /// Tokens to train on, for example 15.6T
    #[arg(long, value_name = "TOKENS")]
    pub(crate) tokens: Option<String>,
    /// Tokens of a sequence; what the run file says, or usual for the model, if absent
    #[arg(long, value_name = "TOKENS")]
    pub(crate) sequence: Option<usize>,
    /// Sequences of the global batch; what the run file says, or usual for the model's size, if absent
    #[arg(long, value_name = "N")]
    pub(crate) sequences: Option<usize>,
    /// Global batch in tokens instead of sequences, for example 16M
    #[arg(long, value_name = "TOKENS", conflicts_with = "sequences")]
    pub(crate) batch: Option<String>,
    /// Number format of the matrix products: bf16, fp16, fp8, fp4, int8, tf32 or fp32; what the run file says, else bf16,
    /// or fp16 without it, if absent
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// How gradients become updates: adamw, or muon for matrices inside layers; what the run file says, else adamw, if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) optimizer: Option<String>,
    /// An average of the weights over steps is kept (train.ema)
    #[arg(long)]
    pub(crate) ema: bool,
    /// Training stack to plan for; the usual one for the accelerator if absent
    #[arg(long, value_name = "NAME")]
    pub(crate) software: Option<String>,
    /// Estimate this layout instead of searching, for example tp=8,pp=16,zero=1; or the best of a strategy: ddp, tensor,
    /// pipeline, 3d, zero-1 to zero-3, fsdp. Exit code 2 if it does not fit
    #[arg(long, value_name = "KEY=VALUE,...|STRATEGY", conflicts_with_all = ["keep", "trainable_only"])]
    pub(crate) layout: Option<String>,
    /// Layouts to print
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub(crate) keep: usize,
    /// Only layouts that `phalanx train` runs today
    #[arg(long)]
    pub(crate) trainable_only: bool,
    /// Threads of the search; 0 for all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub(crate) threads: usize,
    /// Say what would help: step time against bandwidth, FLOP/s and memory
    #[arg(long)]
    pub(crate) explain: bool,
    #[command(flatten)]
    pub(crate) economy: Economy,
    /// Write the best layout for megatron, megatron-deepspeed, deepspeed, torchtitan or maxtext
    #[arg(long, value_name = "STACK")]
    pub(crate) emit: Option<String>,
    /// Write a page with figures, tables, assumptions and sources, in one file that needs no network
    #[arg(long, value_name = "FILE", conflicts_with = "emit")]
    pub(crate) html: Option<PathBuf>,
    /// Write which node, axes and stage each rank of the best layout has
    #[arg(long, value_name = "FILE.csv|FILE.json")]
    pub(crate) rank_map: Option<PathBuf>,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Constants that `phalanx validate --fit` wrote, instead of the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) calibration: Option<PathBuf>,
    /// Print JSON
    #[arg(long, conflicts_with = "emit")]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Keys {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Devices {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Catalog {
    #[command(subcommand)]
    pub(crate) what: CatalogCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CatalogCommand {
    /// List entries: accelerators, fabrics, nodes, storage, prices, failure rates, platforms, models
    List {
        /// Only of this kind
        kind: Option<String>,
        /// The same as the argument
        #[arg(long = "kind", value_name = "KIND", conflicts_with = "kind")]
        only: Option<String>,
        /// More catalogue files, over the built-in ones
        #[arg(long, value_name = "FILE.toml")]
        catalog: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show an entry or a model with every number's unit, source and date
    Show {
        /// Name
        name: String,
        /// More catalogue files, over the built-in ones
        #[arg(long, value_name = "FILE.toml")]
        catalog: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check the built-in catalogue, with your files over it
    Check {
        /// Files to add
        files: Vec<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, ClapArgs)]
#[command(disable_help_flag = true)]
pub(crate) struct Launch {
    /// torchrun's flags, then the program and its arguments; or slurm or kubernetes with flags of their own
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<OsString>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Trace {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// File to write; open it at ui.perfetto.dev
    #[arg(short, long, default_value = "trace.json")]
    pub(crate) output: PathBuf,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Generate {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// Text to continue; the run's sample.prompt if absent
    #[arg(long)]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue, instead of text
    #[arg(long, value_name = "IDS", conflicts_with = "prompt")]
    pub(crate) tokens: Option<String>,
    /// Tokens to generate
    #[arg(short = 'n', long)]
    pub(crate) count: Option<usize>,
    /// 0 takes the likeliest token
    #[arg(long)]
    pub(crate) temperature: Option<f64>,
    /// Sample among this many likeliest tokens; 0 for all
    #[arg(long)]
    pub(crate) top_k: Option<usize>,
    /// Sample among the likeliest tokens that hold this share
    #[arg(long)]
    pub(crate) top_p: Option<f64>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Take the average of the weights over steps (train.ema)
    #[arg(long)]
    pub(crate) ema: bool,
    /// Threads; 0 for all cores
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Print prompt, text or token ids, and why it ended, as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Logits {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// Token ids, separated by spaces or commas
    #[arg(long, value_name = "IDS")]
    pub(crate) tokens: String,
    /// Print a JSON array of arrays
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Import {
    /// Directory with config.json and model.safetensors
    pub(crate) hf_dir: PathBuf,
    /// Run directory to make
    pub(crate) run_dir: PathBuf,
    /// Override a key of the run file to be written
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Export {
    /// Directory of a run
    pub(crate) run_dir: PathBuf,
    /// Model directory to make
    pub(crate) out_dir: PathBuf,
    /// Element type: f32 or bf16
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: String,
    /// Write the average of the weights over steps (train.ema)
    #[arg(long)]
    pub(crate) ema: bool,
    /// Split into files of at most this many bytes
    #[arg(long, default_value_t = 5_000_000_000, value_name = "BYTES")]
    pub(crate) max_shard_bytes: u64,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Program {
    #[command(subcommand)]
    pub(crate) what: ProgramCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ProgramCommand {
    /// Print blocks, ops, shapes, FLOPs, bytes, lifetimes and the memory map of a rank
    Show {
        #[command(flatten)]
        run: RunArgs,
        /// Whose program
        #[arg(long, default_value_t = 0)]
        rank: usize,
        /// Leave out the ops
        #[arg(long)]
        brief: bool,
        /// Print the whole program as JSON
        #[arg(long)]
        json: bool,
    },
    /// Hold the programs of all ranks to every rule: shapes, writers, lifetimes, bytes, ids, messages, deadlock
    Check {
        #[command(flatten)]
        run: RunArgs,
        /// Print what was checked as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Data {
    #[command(subcommand)]
    pub(crate) what: DataCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Tokenise text or JSON lines, plain, .gz or .zst, into PREFIX.bin and PREFIX.idx
    Build {
        /// Files, folders or globs
        #[arg(required = true)]
        inputs: Vec<PathBuf>,
        /// Prefix of the dataset to make
        #[arg(short, long)]
        output: PathBuf,
        /// tokenizer.json to use; trained from the text if absent
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Vocabulary of the tokenizer that is trained
        #[arg(long, default_value_t = 4096)]
        vocab_size: usize,
        /// Field of JSON documents that holds the text ("text" if absent)
        #[arg(long)]
        field: Option<String>,
        /// Leave out JSON documents that cannot be read, and count them
        #[arg(long)]
        skip_bad: bool,
        /// Token that ends a document; the tokenizer's own if absent
        #[arg(long, value_name = "NAME")]
        eod: Option<String>,
        /// Threads; 0 for all cores
        #[arg(long, default_value_t = 0)]
        threads: usize,
        /// Replace a dataset that is there
        #[arg(long)]
        force: bool,
        /// Print the facts about the dataset as JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what is in a dataset: PREFIX of .bin/.idx, or llm.c shards
    Show {
        /// Prefix, file or folder
        path: PathBuf,
        /// tokenizer.json to decode with; the one beside the data if absent
        #[arg(long)]
        tokenizer: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Bench {
    #[command(subcommand)]
    pub(crate) what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Time the training step of a model (the 13.8M-parameter reference by default)
    Step(BenchStep),
    /// Measure kernels, messages and the sharing of cores, for layout = "auto" and compare
    Machine {
        /// File to write
        #[arg(short, long, default_value = crate::this_machine::FILE)]
        output: PathBuf,
        /// Fewer shapes and repetitions
        #[arg(long)]
        quick: bool,
        /// Print what was measured as JSON
        #[arg(long)]
        json: bool,
    },
    /// Predict steps of the reference model under many layouts, measure them, and compare
    Predict(BenchPredict),
    /// Time saving, resharding and loading of a model's state against dd on the same disk
    Checkpoint(BenchCheckpoint),
    /// Time collectives and messages between ranks of this machine
    Collectives {
        /// Ranks
        #[arg(long, default_value_t = 2)]
        ranks: usize,
        /// auto (shared memory), tcp, threads of one process, or mpi (mpiexec -n 4 phalanx bench collectives --transport mpi)
        #[arg(long, default_value = "auto")]
        transport: String,
        /// Largest buffer in bytes
        #[arg(long, default_value_t = 256 << 20, value_name = "BYTES")]
        max_bytes: usize,
        /// Milliseconds spent on each operation and size
        #[arg(long, default_value_t = 250, value_name = "MS")]
        budget_ms: u64,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BenchStep {
    /// Ranks to start on this machine; layout.dp, tp and pp must multiply to it
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) nproc: usize,
    /// Threads of a rank; 0 for its share of the cores
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// Timed steps
    #[arg(long, default_value_t = 10)]
    pub(crate) steps: usize,
    /// Override a key of the run file
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print time by op as well
    #[arg(long)]
    pub(crate) ops: bool,
    /// Read lines `step` on stdin and answer each with the seconds that a step took
    #[arg(long)]
    pub(crate) resident: bool,
    /// Keep to these instructions, though the processor has wider ones: avx512, avx2 or scalar
    #[arg(long, value_name = "NAME")]
    pub(crate) simd: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BenchPredict {
    /// Most ranks
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub(crate) nproc_max: usize,
    /// Timed steps of a layout in each round
    #[arg(long, default_value_t = 3)]
    pub(crate) steps: usize,
    /// Rounds in which the layouts take turns
    #[arg(long, default_value_t = 2)]
    pub(crate) rounds: usize,
    /// Override a key of the run file that is not part of the layout
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Calibration file of this machine
    #[arg(long, default_value = crate::this_machine::FILE, value_name = "FILE")]
    pub(crate) machine: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Compare {
    /// Directory of a run that was trained with --trace
    pub(crate) run_dir: PathBuf,
    /// Calibration file of the machine that it was trained on
    #[arg(long, default_value = crate::this_machine::FILE, value_name = "FILE")]
    pub(crate) machine: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
