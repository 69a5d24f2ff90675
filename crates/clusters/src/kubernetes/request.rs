//! What is asked for, and what of it cannot be.

use spec::{Error, Result};

use crate::yaml::map;
use crate::{Memory, Time, Yaml, name};

/// What keeps the pods: the cluster must have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `batch/v1` Job with indexed completions; every cluster has it.
    Job,
    /// `jobset.x-k8s.io/v1alpha2`: restarts all pods together.
    JobSet,
    /// `trainer.kubeflow.org/v1alpha1` TrainJob of Kubeflow's Trainer, with a TrainingRuntime of its own.
    TrainJob,
    /// `leaderworkerset.x-k8s.io/v1`: a group that is recreated together and never ends by itself.
    LeaderWorkerSet,
}

/// Where checkpoints live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// A claim that is there.
    Claim(String),
    /// A new claim.
    New {
        /// Its size.
        size: Memory,
        /// Its storage class; the cluster's default if absent.
        class: Option<String>,
    },
}

/// A variable whose value is kept by the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// The variable.
    pub variable: String,
    /// Name of the secret.
    pub secret: String,
    /// Key in it.
    pub key: String,
}

impl Secret {
    /// Reads `VARIABLE=SECRET/KEY`.
    ///
    /// # Errors
    /// Another form; the value itself, most likely, which must not stand in a manifest.
    pub fn parse(text: &str) -> Result<Secret> {
        let parts = text.split_once('=').and_then(|(v, rest)| rest.split_once('/').map(|(s, k)| (v, s, k)));
        // What stands behind the variable is not repeated: it may be the secret.
        let shown = text.split('=').next().unwrap_or_default();
        let (variable, secret, key) = parts.ok_or_else(|| {
            Error::user(format!("--secret-env {shown}=...: expected VARIABLE=SECRET/KEY"))
                .hint("kubectl create secret generic SECRET --from-literal KEY=VALUE keeps it in the cluster")
        })?;
        name::variable("--secret-env", variable)?;
        name::subdomain("--secret-env", secret)?;
        let is_key = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if key.is_empty() || !key.chars().all(is_key) {
            return Err(Error::user(format!(
                "--secret-env {shown}={secret}/...: the key is none of a secret"
            )));
        }
        Ok(Secret { variable: variable.into(), secret: secret.into(), key: key.into() })
    }
}

/// A run file that goes along as a config map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFile {
    /// Its name without folders.
    pub name: String,
    /// What is in it.
    pub text: String,
}

/// What is asked for; [`Request::new`] is one pod with one rank.
#[derive(Clone, Debug)]
pub struct Request {
    /// What keeps the pods.
    pub kind: Kind,
    /// Name of the job and of all that belongs to it.
    pub name: String,
    /// Namespace; the one that `kubectl` uses if absent.
    pub namespace: Option<String>,
    /// Image with `phalanx` in its path.
    pub image: String,
    /// Secret for pulling it.
    pub pull_secret: Option<String>,
    /// Pods, one for each node.
    pub nodes: usize,
    /// Ranks in each.
    pub ranks_per_node: usize,
    /// GPUs of each pod, as `nvidia.com/gpu`.
    pub gpus_per_node: Option<usize>,
    /// Cores of each pod.
    pub cpus_per_node: usize,
    /// Memory of each pod, shared memory included.
    pub memory: Memory,
    /// Most of it that may be shared memory.
    pub shared_memory: Memory,
    /// Where the run lives.
    pub storage: Storage,
    /// Time limit of the whole job.
    pub time: Option<Time>,
    /// From the request to stop to the end.
    pub grace: Time,
    /// Starts after failures.
    pub restarts: u32,
    /// Longest time without a record in the run's journals before a pod counts as hung; no probes if absent.
    pub silence: Option<Time>,
    /// Variables.
    pub env: Vec<(String, String)>,
    /// Variables kept as secrets.
    pub secrets: Vec<Secret>,
    /// Labels of nodes to run on.
    pub node_labels: Vec<(String, String)>,
    /// Kueue's queue.
    pub queue: Option<String>,
    /// Directory of the run, seen from the volume.
    pub run_dir: String,
    /// A run file to bring along: its argument is [`Request::run_file_path`].
    pub run_file: Option<RunFile>,
    /// What each rank runs: a program and its arguments.
    pub command: Vec<String>,
}

/// Kinds append indices of jobs and pods to the name, and the result is a label still: `-node-0-99999`.
const SUFFIX: usize = 13;

/// Nobody trains on more nodes; an index beyond would not fit into [`SUFFIX`].
const NODES_MAX: usize = 100_000;

impl Request {
    /// One pod of one rank that runs `command`, with a new claim of 100 GiB.
    pub fn new(
        kind: Kind,
        name: impl Into<String>,
        image: impl Into<String>,
        command: Vec<String>,
    ) -> Request {
        let gib = |n: u64| Memory { bytes: n << 30 };
        Request {
            kind,
            name: name.into(),
            namespace: None,
            image: image.into(),
            pull_secret: None,
            nodes: 1,
            ranks_per_node: 1,
            gpus_per_node: None,
            cpus_per_node: 1,
            memory: gib(4),
            shared_memory: gib(1),
            storage: Storage::New { size: gib(100), class: None },
            time: None,
            grace: Time { seconds: 120 },
            restarts: 3,
            silence: None,
            env: Vec::new(),
            secrets: Vec::new(),
            node_labels: Vec::new(),
            queue: None,
            run_dir: "runs/default".into(),
            run_file: None,
            command,
        }
    }

    /// Where a run file of this name is found in the pod.
    pub fn run_file_path(name: &str) -> String {
        format!("{}/{name}", super::pod::RUN_FILE_DIR)
    }

    pub(crate) fn run_file_map(&self) -> String {
        format!("{}-run", self.name)
    }

    pub(crate) fn claim(&self) -> Option<String> {
        match &self.storage {
            Storage::Claim(name) => Some(name.clone()),
            Storage::New { .. } => Some(format!("{}-runs", self.name)),
        }
    }

    pub(crate) fn metadata(&self, name: &str) -> Yaml {
        let labels = map! { "app.kubernetes.io/name" => "phalanx", "app.kubernetes.io/instance" => self.name.as_str() };
        map! { "name" => name }.with("namespace", self.namespace.as_deref()).with("labels", Some(labels))
    }

    pub(crate) fn check(&self) -> Result<()> {
        name::label("--name", &self.name, SUFFIX)?;
        name::image("--image", &self.image)?;
        if let Some(namespace) = &self.namespace {
            name::label("--namespace", namespace, 0)?;
        }
        let secret = self.pull_secret.as_ref().map(|s| ("--pull-secret", s));
        let claim = match &self.storage {
            Storage::Claim(name) => Some(("--claim", name)),
            Storage::New { class, .. } => class.as_ref().map(|c| ("--storage-class", c)),
        };
        let queue = self.queue.as_ref().map(|q| ("--queue", q));
        for (flag, text) in [secret, claim, queue].into_iter().flatten() {
            name::subdomain(flag, text)?;
        }
        self.check_sizes()?;
        self.check_variables()?;
        match self.run_file.as_ref().filter(|file| file.text.len() > RUN_FILE_BYTES_MAX) {
            Some(file) => Err(Error::user(format!(
                "{}: {} bytes, expected at most {RUN_FILE_BYTES_MAX} in a config map",
                file.name,
                file.text.len()
            ))),
            None => Ok(()),
        }
    }

    fn check_sizes(&self) -> Result<()> {
        let counts = [
            ("--nodes", Some(self.nodes)),
            ("--ranks-per-node", Some(self.ranks_per_node)),
            ("--gpus-per-node", self.gpus_per_node),
            ("--cpus-per-node", Some(self.cpus_per_node)),
        ];
        if let Some((flag, _)) = counts.into_iter().find(|(_, n)| *n == Some(0)) {
            return Err(Error::user(format!("{flag}=0: expected at least one")));
        }
        if self.nodes > NODES_MAX {
            return Err(Error::user(format!("--nodes={}: expected at most {NODES_MAX}", self.nodes)));
        }
        if let Some(gpus) = self.gpus_per_node.filter(|gpus| *gpus < self.ranks_per_node) {
            return Err(Error::user(format!(
                "--gpus-per-node={gpus} is less than --ranks-per-node={}: each rank drives one GPU",
                self.ranks_per_node
            ))
            .hint(format!("--ranks-per-node={gpus}")));
        }
        if self.shared_memory >= self.memory {
            return Err(Error::user(format!(
                "--shm={} leaves nothing of --memory={}: shared memory counts as the pod's",
                self.shared_memory.quantity(),
                self.memory.quantity()
            ))
            .hint("raise --memory"));
        }
        if let Some(time) = self.time.filter(|time| *time <= self.grace) {
            return Err(Error::user(format!("--time={time} is no longer than --grace={}", self.grace))
                .hint("--grace is the time that saving takes"));
        }
        if self.time.is_some() && self.kind == Kind::LeaderWorkerSet {
            return Err(
                Error::user("--time: a LeaderWorkerSet has no time limit").hint("--kind jobset has one")
            );
        }
        Ok(())
    }

    /// Whether agents must prove to each other that they are of the job, and nothing was said of how.
    pub(crate) fn needs_secret(&self) -> bool {
        let given =
            self.env.iter().map(|(variable, _)| variable).chain(self.secrets.iter().map(|s| &s.variable));
        let mut said = given
            .filter(|v| ["PHALANX_SECRET", "PHALANX_SECRET_FILE", "PHALANX_INSECURE"].contains(&v.as_str()));
        self.nodes > 1 && said.next().is_none()
    }

    fn check_variables(&self) -> Result<()> {
        if self.env.iter().any(|(variable, _)| variable == "PHALANX_SECRET") {
            return Err(Error::user("--env PHALANX_SECRET: the job's secret must not stand in a manifest")
                .hint("--secret-env PHALANX_SECRET=SECRET/KEY names it"));
        }
        let plain = self.env.iter().map(|(variable, _)| ("--env", variable));
        let names = plain.chain(self.secrets.iter().map(|s| ("--secret-env", &s.variable)));
        let mut seen = Vec::new();
        for (flag, variable) in names {
            name::variable(flag, variable)?;
            if variable.starts_with("PET_") {
                return Err(Error::user(format!("{flag} {variable}: the manifest itself sets it"))
                    .hint("flags of this command decide the numbers of nodes and ranks"));
            }
            if seen.contains(&variable) {
                return Err(Error::user(format!("{flag} {variable} is given twice")));
            }
            seen.push(variable);
        }
        // Kubernetes replaces $(NAME) in arguments, and the shell's habit is not meant.
        match self.command.iter().find(|word| word.contains("$(")) {
            Some(word) => Err(Error::user(format!("{word}: Kubernetes would replace what stands in $(...)"))
                .hint("give the value itself")),
            None => Ok(()),
        }
    }
}

/// A config map holds at most 1 MiB (Kubernetes' manual: "cannot exceed 1 MiB"); its other fields need some of it.
const RUN_FILE_BYTES_MAX: usize = 1_000_000;
