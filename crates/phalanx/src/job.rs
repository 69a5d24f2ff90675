//! Being one rank of a job that a launcher started.

use std::process::ExitCode;
use std::time::Duration;

use comm::{Bootstrap, World};
use launch::{Launcher, RankEnv, RankStore};
use serde_json::{Map, Value};
use spec::{Context as _, DType, Error, Layout, ModelSpec, Result};
use train::{Cpu, Device, Mesh};

use crate::Request;

/// How long ranks wait for each other when they start and when they end.
const MEET_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a rank may be silent before the others give it up.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// This process as one rank of a job, or alone.
///
/// `phalanx launch`, torchrun, Slurm's srun and MPI's mpirun are known by what they leave in the environment.
#[derive(Debug)]
pub struct Job {
    /// Place and way to the others; `None` alone.
    ranks: Option<(RankEnv, RankStore)>,
}

impl Job {
    /// Finds this process's place among the ranks, and meets them at the job's store.
    ///
    /// # Errors
    /// If what launchers leave in the environment contradicts itself, or the other ranks cannot be met.
    pub fn join() -> Result<Job> {
        let Some(env) = RankEnv::read()?.filter(|env| env.world > 1) else { return Ok(Job { ranks: None }) };
        let store = env.store(MEET_TIMEOUT).context("meet the other ranks")?;
        Ok(Job { ranks: Some((env, store)) })
    }

    /// Which rank this is.
    pub fn rank(&self) -> usize {
        self.ranks.as_ref().map_or(0, |(env, _)| env.rank)
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        self.ranks.as_ref().map_or(1, |(env, _)| env.world)
    }

    /// A layout whose data parallelism takes the ranks that its other axes leave over.
    ///
    /// # Errors
    /// If they do not divide the ranks.
    pub fn spread(&self, layout: Layout) -> Result<Layout> {
        let ranks = Layout { dp: 1, ..layout.clone() }.world();
        if !self.world().is_multiple_of(ranks) {
            return Err(Error::user(format!(
                "a layout of {ranks} ranks for each replica, but {} ranks",
                self.world()
            ))
            .hint("start a multiple of them, or change tp, pp or cp"));
        }
        Ok(Layout { dp: self.world() / ranks, ..layout })
    }

    /// This rank's part of training `model` in float32 on global batches of `sequences` times `sequence` tokens.
    pub fn request<'a>(
        &self,
        model: &'a ModelSpec,
        layout: &'a Layout,
        sequence: usize,
        sequences: usize,
    ) -> Request<'a> {
        let (mode, loss) = Default::default();
        Request {
            model,
            layout,
            sequence,
            sequences,
            precision: DType::F32,
            rank: self.rank(),
            mode,
            loss,
            documents: false,
        }
    }

    /// Connects all ranks, in the groups of a layout. Collective, once.
    ///
    /// # Errors
    /// If ranks do not come, were built from another version or have another layout, or are not as many as the layout's.
    pub fn mesh(&self, layout: &Layout) -> Result<Mesh> {
        layout.validate_world(self.world())?;
        let Some((env, store)) = &self.ranks else { return Ok(Mesh::alone()) };
        let mut b = Bootstrap::new(env.rank, env.world, store.client.clone(), env.session.clone());
        (b.local_rank, b.local_world, b.timeout) = (env.local_rank, env.local_world, SILENCE_MAX);
        b.bind = launch::bind_from_env()?;
        b.fingerprint = launch::fingerprint(&format!("{layout:?}"));
        Mesh::new(World::connect(&b)?, layout)
    }

    /// The cores of this machine that are this rank's.
    pub fn device(&self) -> Box<dyn Device> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let sharing = match &self.ranks {
            // Slurm shows a rank its own cores only.
            Some((env, _)) if env.launcher != Launcher::Slurm => env.local_world.max(1),
            _ => 1,
        };
        Box::new(Cpu::new((cores / sharing).max(1)))
    }

    /// Ends this rank's part; the rank that hosts the store stays until all have left.
    ///
    /// # Errors
    /// If some rank does not end.
    pub fn leave(self) -> Result<()> {
        self.ranks.map_or(Ok(()), |(_, store)| store.leave(MEET_TIMEOUT))
    }
}

/// A layout from its keys: `tp=2,pp=2,zero=1`; the empty text is one rank.
///
/// ```
/// assert_eq!(phalanx::layout("tp=2,pp=2")?.world(), 4);
/// assert!(phalanx::layout("tq=2").is_err());
/// # Ok::<(), phalanx::Error>(())
/// ```
///
/// # Errors
/// A key that no layout has, or a value that it cannot have.
pub fn layout(keys: &str) -> Result<Layout> {
    let keys = keys.split(',').map(str::trim).filter(|key| !key.is_empty());
    let fields = keys.map(|key| {
        let (name, value) = key.split_once('=').ok_or_else(|| wrong(key, "no value"))?;
        // Numbers and truth values are JSON; names are not.
        let value = value.parse::<Value>().unwrap_or_else(|_| value.into());
        Ok((name.to_owned(), value))
    });
    let fields: Map<String, Value> = fields.collect::<Result<_>>()?;
    serde_json::from_value(Value::Object(fields.clone())).map_err(|e| {
        let keys: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        wrong(&keys.join(","), &e.to_string())
    })
}

fn wrong(keys: &str, what: &str) -> Error {
    Error::user(format!("layout {keys}: {what}")).hint("give keys of a layout, such as tp=2,pp=2,zero=1")
}

/// Says what went wrong, to people and to the launcher; 0, or 2 where the input was wrong and 1 where something failed.
pub fn exit(done: Result<()>) -> ExitCode {
    let Err(e) = done else { return ExitCode::SUCCESS };
    let hint = e.hint_text().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    launch::record_error("error", &format!("{e}{hint}"));
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("error: {e}{hint}\n").as_bytes());
    e.exit_code().into()
}
