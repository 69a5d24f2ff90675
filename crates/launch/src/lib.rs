//! Start, watch and stop ranks: the local agent.
//!
//! [`run`] starts one group of workers under the contract of PyTorch's `torchrun`: the same flags, environment,
//! log folders, error files and exit status, so that an unmodified PyTorch script trains under it. [`LocalJob`] is the
//! same agent for a program that starts its own ranks on this machine, and [`RankEnv`] is the other side: what a rank
//! reads from the environment, whether torchrun, Slurm, MPI or Phalanx started it.
//!
//! ```text
//! flags -> options -> agent --+-- worker      one child: its own session, killed with the agent
//!                             +-- warden      outlives the agent for a moment to kill what is left
//!                             +-- logs, tail  folders, redirects, tee
//!                             +-- failure     error files, root cause table
//!                             +-- link        reports of a worker that can recover, and its orders
//!                             +-- rendezvous  who takes part; a thread that drives `elastic::rendezvous`
//!                                 +-- door    an agent's death is known at once
//!                                 +-- heir    the store moves when its host dies
//! ```
//!
//! The agent is one control thread. It blocks in `poll` on the workers' pidfds, the signal pipe and the rendezvous
//! thread, so it reacts to a death at once, and every wait has a deadline. What follows from a death is decided by
//! `elastic::crew`: workers that can recover keep their processes.
//!
//! Beyond torchrun's variables a worker gets `PHALANX_STORE` (`host:port` of the agents' store), `PHALANX_SESSION` (run
//! id and round, a prefix for keys in it), `PHALANX_SECRET` (what the job's processes prove to each other that they are of
//! it), `PHALANX_BIND` where `--bind` was given, `PHALANX_AGENT_FD` (see `elastic::Report`), `PHALANX_ELASTIC` (1 where
//! workers that can recover are to do so: with `--max-restarts`, `--nnodes MIN:MAX` or `--min-nproc`) and `PHALANX_JOB`
//! (marks the processes of the launch, so that none is left).
//!
//! # Differences from torchrun
//!
//! - A node that vanishes, or fails for good, is told to all survivors, who stop their workers at once, unless these can
//!   meet again without being started over.
//! - When the agent that hosts the store is killed, and the workers can recover, the store moves to another.
//! - Time stamps of several machines are never compared: a node is dead when its heartbeat counter stands still.
//! - Workers cannot outlive the agent, not even when it is killed with SIGKILL.
//! - A launcher stopped by signal `n` exits with `128 + n` instead of 1.
//! - `SIGUSR1` and `SIGUSR2` reach the workers, so a batch system's warning can start a checkpoint.
//! - A program that is not a Python script is run directly, without `--no-python`.

// Both panic when nobody reads: `cli::say` does not.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod flags;
mod options;

mod agent;
mod bind;
mod door;
mod failure;
mod heir;
mod link;
mod local;
mod logs;
mod net;
mod secret;
mod signals;
mod tail;
mod warden;
mod worker;
mod worker_env;

pub mod rank_env;
mod rendezvous;

mod bootstrap;
mod cli;
mod mpi_store;
mod torch_store;

pub use agent::{Outcome, run};
pub use bind::{Bind, from_env as bind_from_env, proxy_from_env};
pub use bootstrap::{RankStore, connect, fingerprint};
pub use cli::cli;
pub use failure::{Failure, record_error};
pub use flags::{Parsed, help};
pub use local::LocalJob;
pub use logs::Streams;
pub use options::{Backend, NprocPerNode, Options, Saving};
pub use rank_env::{Launcher, RankEnv};
pub use secret::from_env as secret_from_env;
