use std::path::PathBuf;

use clap::{Args as ClapArgs, Parser, ValueEnum};

const SLURM_EXAMPLES: &str = "\
Examples:
  Two nodes with four GPUs each, asked to save two minutes before the time limit, then queued again:
    phalanx launch slurm --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 --time 4:00:00 --partition gpu \\
      -- train RUN.toml
  Nine runs, three at a time:
    phalanx launch slurm --sweep optim.lr=1e-3,3e-4,1e-4 --sweep train.seed=1,2,3 --at-once 3 -- train RUN.toml
  Look first:
    phalanx launch slurm --nodes 2 --dry-run -- train RUN.toml";

/// Write a batch script that trains to the end, over time limits, preemptions and failures, and submit it
#[derive(Debug, Parser)]
#[command(name = "phalanx launch slurm", bin_name = "phalanx launch slurm", max_term_width = 100, after_help = SLURM_EXAMPLES)]
pub(crate) struct Slurm {
    /// Nodes
    #[arg(long, short = 'N', default_value_t = 1, value_name = "N")]
    pub(crate) nodes: usize,
    /// Ranks on each node; one for each of its GPUs, else one, if absent
    #[arg(long, value_name = "N")]
    pub(crate) ntasks_per_node: Option<usize>,
    /// Ranks in all, equally many on each node
    #[arg(long, short = 'n', value_name = "N")]
    pub(crate) ntasks: Option<usize>,
    /// GPUs of each node
    #[arg(long, value_name = "N")]
    pub(crate) gpus_per_node: Option<usize>,
    /// Cores of each rank
    #[arg(long, short = 'c', value_name = "N")]
    pub(crate) cpus_per_task: Option<usize>,
    /// Memory of each node, for example 64G, in Slurm's sense of GiB
    #[arg(long, value_name = "AMOUNT")]
    pub(crate) mem: Option<String>,
    /// Time limit of each start, for example 30 (minutes), 4:00:00, 2-12:00:00, 4h
    #[arg(long, short = 't', value_name = "TIME")]
    pub(crate) time: Option<String>,
    /// Time that saving takes: the job is asked to stop so long before its time limit
    #[arg(long, default_value = "120s", value_name = "TIME")]
    pub(crate) grace: String,
    /// Partition
    #[arg(long, short = 'p', value_name = "NAME")]
    pub(crate) partition: Option<String>,
    /// Account to charge
    #[arg(long, short = 'A', value_name = "NAME")]
    pub(crate) account: Option<String>,
    /// Quality of service
    #[arg(long, short = 'q', value_name = "NAME")]
    pub(crate) qos: Option<String>,
    /// Features that nodes must have
    #[arg(long, short = 'C', value_name = "LIST")]
    pub(crate) constraint: Option<String>,
    /// Name of the job, of its script and of its log
    #[arg(long, short = 'J', default_value = "phalanx", value_name = "NAME")]
    pub(crate) job_name: String,
    /// Log; NAME-%j.log in the present folder if absent
    #[arg(long, short = 'o', value_name = "PATTERN")]
    pub(crate) output: Option<String>,
    /// Any other option of sbatch, as NAME or NAME=VALUE
    #[arg(long, value_name = "OPTION")]
    pub(crate) sbatch: Vec<String>,
    /// A line to run before training, for example "module load cuda"
    #[arg(long, value_name = "LINE")]
    pub(crate) setup: Vec<String>,
    /// Starts after a failure, in the same allocation
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(crate) restarts: u32,
    /// Do not queue the job again, whatever ends it
    #[arg(long)]
    pub(crate) no_requeue: bool,
    /// A run for each value of a key, as an array; several give every combination
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub(crate) sweep: Vec<String>,
    /// Runs of the array that may run at a time
    #[arg(long, value_name = "N", requires = "sweep")]
    pub(crate) at_once: Option<usize>,
    /// Script to write; NAME.sbatch if absent
    #[arg(long, value_name = "FILE")]
    pub(crate) script: Option<PathBuf>,
    /// Print the script, and submit nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// `train` and its arguments
    #[arg(last = true, required = true, value_name = "train ...")]
    pub(crate) command: Vec<String>,
}

const KUBERNETES_EXAMPLES: &str = "\
Examples:
  Two nodes with eight GPUs each:
    phalanx launch kubernetes --kind jobset --image ghcr.io/you/phalanx:0.1.0 --nodes 2 --gpus-per-node 8 \\
      --cpus-per-node 96 --memory 900GiB --shm 64GiB --storage 2TiB -- train RUN.toml | kubectl apply -f -
  A claim and a secret that are there:
    phalanx launch kubernetes --image ghcr.io/you/phalanx:0.1.0 --claim runs \\
      --secret-env HF_TOKEN=hugging-face/token -- train RUN.toml";

/// Write manifests for Kubernetes: pods that find each other, keep checkpoints and are started again
#[derive(Debug, Parser)]
#[command(name = "phalanx launch kubernetes", bin_name = "phalanx launch kubernetes", max_term_width = 100, after_help = KUBERNETES_EXAMPLES)]
pub(crate) struct Kubernetes {
    /// What keeps the pods; the cluster must have it
    #[arg(long, default_value = "job")]
    pub(crate) kind: KubernetesKind,
    /// Image with phalanx in its path (see Containerfile)
    #[arg(long, value_name = "IMAGE")]
    pub(crate) image: Option<String>,
    /// Name of the job and of all that belongs to it
    #[arg(long, default_value = "phalanx", value_name = "NAME")]
    pub(crate) name: String,
    /// Namespace; kubectl's own if absent
    #[arg(long, short = 'n', value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Pods, one for each node
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) nodes: usize,
    /// Ranks in each pod; one for each of its GPUs, else one, if absent
    #[arg(long, value_name = "N")]
    pub(crate) ranks_per_node: Option<usize>,
    /// GPUs of each pod (nvidia.com/gpu)
    #[arg(long, value_name = "N")]
    pub(crate) gpus_per_node: Option<usize>,
    /// Cores of each pod; one for each rank if absent
    #[arg(long, value_name = "N")]
    pub(crate) cpus_per_node: Option<usize>,
    /// Memory of each pod, shared memory included
    #[arg(long, default_value = "4GiB", value_name = "AMOUNT")]
    pub(crate) memory: String,
    /// Most of it that may be shared memory; a quarter if absent
    #[arg(long, value_name = "AMOUNT")]
    pub(crate) shm: Option<String>,
    /// Size of a new claim for runs
    #[arg(long, default_value = "100GiB", value_name = "AMOUNT", conflicts_with = "claim")]
    pub(crate) storage: String,
    /// Storage class of the new claim; the cluster's default if absent
    #[arg(long, value_name = "NAME", conflicts_with = "claim")]
    pub(crate) storage_class: Option<String>,
    /// A claim that is there, for runs
    #[arg(long, value_name = "NAME")]
    pub(crate) claim: Option<String>,
    /// Time limit of the whole job
    #[arg(long, value_name = "TIME")]
    pub(crate) time: Option<String>,
    /// Time that saving takes: pods get so long between the request to stop and the end
    #[arg(long, default_value = "120s", value_name = "TIME")]
    pub(crate) grace: String,
    /// Starts after failures
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(crate) restarts: u32,
    /// End pods without a journal record for so long; also the longest that a start may take
    #[arg(long, default_value = "30m", value_name = "TIME")]
    pub(crate) silence: String,
    /// A variable, NAME=VALUE
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) env: Vec<String>,
    /// A variable whose value is a key of a secret
    #[arg(long, value_name = "NAME=SECRET/KEY")]
    pub(crate) secret_env: Vec<String>,
    /// Secret for pulling the image
    #[arg(long, value_name = "NAME")]
    pub(crate) pull_secret: Option<String>,
    /// A label that nodes must have
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) node_label: Vec<String>,
    /// Queue of Kueue to wait in
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// `train` and its arguments; paths in them are seen from the volume, but RUN.toml goes along
    #[arg(last = true, required = true, value_name = "train ...")]
    pub(crate) command: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum KubernetesKind {
    /// Indexed Job with a headless service: in every cluster
    Job,
    /// JobSet: all pods start again together
    Jobset,
    /// TrainJob of Kubeflow's Trainer
    Trainjob,
    /// LeaderWorkerSet: stays until it is deleted
    Leaderworkerset,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct Alive {
    /// Directory of a run
    #[arg(value_name = "RUN_DIR")]
    pub(crate) run_dir: PathBuf,
    /// Longest time since a record
    #[arg(long, default_value = "30m", value_name = "TIME")]
    pub(crate) within: String,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
