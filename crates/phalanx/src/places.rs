//! A rank of `phalanx train` under an agent that can bring ranks together again: how it comes to its place in a world.

use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use comm::World;
use elastic::Orders;
use launch::RankEnv;
use launch::rank_env::Launcher;
use spec::{Context, Result, RunSpec};
use train::{Agent, Beginning, Device, DirLock, Mesh, Way};

use crate::args::Train;
use crate::ranks::{self, MEET_TIMEOUT};
use crate::{device, output};

/// The agent of this rank, if there is one that starts lost ranks again, and this rank's first orders.
pub(crate) fn agent(env: &RankEnv) -> Result<Option<(Agent, Orders)>> {
    let number = std::env::var(elastic::AGENT_FD).ok().and_then(|fd| fd.parse::<i32>().ok());
    let Some(fd) = number.filter(|_| env.agent_store.is_some()) else { return Ok(None) };
    if env.launcher != Launcher::Phalanx || !ranks::has_restarts() || !is_socket(fd) {
        return Ok(None);
    }
    // SAFETY: the agent made it for this process; nothing else here uses it.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    Ok(Some((Agent::new(stream, launch::secret_from_env()?)?, ranks::first_orders(env))))
}

/// Whether it is a socket of this process, which what this process starts does not inherit from now on.
fn is_socket(fd: i32) -> bool {
    // SAFETY: plain system calls about a number; the structure is filled in before it is read.
    unsafe {
        let mut stat = std::mem::zeroed::<libc::stat>();
        libc::fstat(fd, &mut stat) == 0
            && stat.st_mode & libc::S_IFMT == libc::S_IFSOCK
            && libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == 0
    }
}

/// How ranks of this command find their places.
pub(crate) struct Places {
    args: Train,
    lock: Option<DirLock>,
}

impl Places {
    pub(crate) fn new(args: &Train) -> Places {
        Places { args: args.clone(), lock: None }
    }
}

impl Way for Places {
    fn run(&self, orders: &Orders) -> Result<(RunSpec, String)> {
        crate::train::load_again(&self.args, orders.world, orders.round > 0)
    }

    fn connect(&self, orders: &Orders, run: &RunSpec) -> Result<World> {
        let store = launch::connect(&orders.store, MEET_TIMEOUT).context("meet the other ranks")?;
        let transport = crate::train::transport(&self.args);
        ranks::world(orders, store, &run.to_toml(), transport, Duration::from_secs(run.run.timeout_s))
    }

    fn begin(&self, orders: &Orders, run: &RunSpec) -> Result<Beginning> {
        let mut asked = crate::train::asked(&self.args);
        asked.restarted |= orders.round > 0;
        let mut begin = match orders.rank {
            0 => crate::train::begin(&self.args, run, asked)?,
            _ => Beginning::decide(run, asked)?,
        };
        begin.prepare(run, &|_| {})?;
        Ok(begin)
    }

    fn lead(&mut self, orders: &Orders, run: &RunSpec) -> Result<()> {
        if self.lock.is_none() && !ranks::started_by_us() {
            self.lock = Some(crate::train::own(run, orders.round == 0 && crate::train::fresh(&self.args))?);
        }
        Ok(())
    }

    fn follow(&mut self) {
        self.lock = None;
    }

    fn device(&self, orders: &Orders, run: &RunSpec, mesh: &Mesh) -> Result<Box<dyn Device>> {
        let share = (output::threads(0) / orders.local_world.max(1)).max(1);
        let threads = run.run.threads.unwrap_or(share);
        let device = device::open(&run.run, orders.local_rank, threads)?;
        device::agree(mesh, &*device)?;
        Ok(device)
    }
}
