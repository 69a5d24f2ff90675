//! What frames go through: a socket, or a pipe of MPI.

use super::{Io, LINGER, Link, Reader};
use crate::inner::Core;
use crate::mpi::pipes::Pipes;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where the frames of a connection go.
pub(crate) enum Way {
    Socket(OwnedFd),
    /// To this rank.
    Mpi(Arc<Pipes>, usize),
}

impl Way {
    pub(super) fn socket(&self) -> Option<&OwnedFd> {
        match self {
            Way::Socket(socket) => Some(socket),
            Way::Mpi(..) => None,
        }
    }

    /// Gives away as much of `parts` as goes now.
    pub(super) fn send(
        &self,
        parts: &[IoSlice<'_>],
        control: &mut SendAncillaryBuffer<'_, '_, '_>,
    ) -> Result<usize, SendError> {
        match self {
            Way::Socket(socket) => {
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                rustix::net::sendmsg(socket, parts, control, flags).map_err(SendError::Socket)
            }
            Way::Mpi(pipes, to) => match pipes.send(*to, parts) {
                Ok(0) => Err(SendError::Socket(Errno::AGAIN)),
                Ok(n) => Ok(n),
                Err(e) => Err(SendError::Mpi(e.to_string())),
            },
        }
    }

    /// Ends this connection for both sides.
    pub(super) fn shut(&self, how: rustix::net::Shutdown) {
        if let Way::Socket(socket) = self {
            let _ = rustix::net::shutdown(socket, how);
        }
    }
}

/// Why frames do not go.
pub(super) enum SendError {
    Socket(Errno),
    /// Nobody else would notice: no pipe has an end that the other side sees.
    Mpi(String),
}

/// What frames are read from.
pub(super) enum Source<'a> {
    Socket(&'a OwnedFd),
    /// One message of a pipe, as far as it was not read yet.
    Message(&'a [u8]),
}

impl Source<'_> {
    pub(super) fn receive(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self {
            Source::Socket(socket) => rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT).map(|(n, _)| n),
            Source::Message([]) => Err(Errno::AGAIN),
            Source::Message(rest) => {
                let (now, later) = rest.split_at(buffer.len().min(rest.len()));
                buffer[..now.len()].copy_from_slice(now);
                *rest = later;
                Ok(now.len())
            }
        }
    }
}

/// How soon the connection thread looks for messages again after one has come; whoever waits for one looks by itself.
const BUSY: Duration = Duration::from_micros(100);
const BUSY_FOR: Duration = Duration::from_millis(5);
/// And when none has come for a while: what the library has begun goes on only when it is called.
const IDLE: Duration = Duration::from_millis(1);

/// The side of a world's connections that goes over MPI.
pub(super) struct MpiSide {
    pub(super) pipes: Arc<Pipes>,
    readers: Mutex<Vec<Option<Reader>>>,
    /// Whether some frame did not go at once.
    pub(super) has_frames: AtomicBool,
}

impl MpiSide {
    pub(super) fn new(pipes: Arc<Pipes>, links: &[Option<Link>]) -> MpiSide {
        let is_ours = |link: &&Link| link.way.socket().is_none();
        let readers = links.iter().map(|l| l.as_ref().filter(is_ours).map(Link::reader)).collect();
        MpiSide { pipes, readers: Mutex::new(readers), has_frames: AtomicBool::new(false) }
    }

    /// When the connection thread is to look again, having found something last at `found`.
    pub(super) fn nap(found: Instant) -> Duration {
        if found.elapsed() < BUSY_FOR { BUSY } else { IDLE }
    }
}

impl Io {
    /// Takes in what has come over MPI and gives away what waits; whether there was anything. If another thread is at it,
    /// nothing is done.
    pub(crate) fn progress(&self, core: &Core) -> bool {
        let Some(mpi) = &self.mpi else { return false };
        let Ok(mut readers) = mpi.readers.try_lock() else { return false };
        let mut any = false;
        if mpi.has_frames.swap(false, Ordering::AcqRel) {
            let over_mpi = || self.each().filter(|(_, link)| link.way.socket().is_none());
            let flushed = over_mpi().fold(true, |all, (_, link)| link.flush() && all);
            if !flushed {
                mpi.has_frames.store(true, Ordering::Release);
            }
            any = flushed;
        }
        let received = mpi.pipes.receive(|rank, bytes| {
            let Some(link) = self.links.get(rank).and_then(Option::as_ref) else { return };
            let Some(reader) = readers.get_mut(rank).and_then(Option::as_mut) else { return };
            let mut source = Source::Message(bytes);
            if let Err(end) = reader.read(core, self, rank, link, &mut source) {
                self.ended(core, rank, link, &end);
                readers[rank] = None;
            }
        });
        match received {
            Ok(received) => any | received,
            Err(e) => {
                core.fail(&format!("rank {} gave up: {e}", core.rank));
                false
            }
        }
    }

    /// How long a closing rank stays. Over MPI as long as any wait: it must hear everybody's farewell, because the library
    /// takes messages that nobody has received for a mistake, and ending MPI waits for everybody in any case.
    pub(super) fn linger(&self, core: &Core) -> Duration {
        if self.has_mpi() && core.failure.get().is_none() { core.timeout.max(LINGER) } else { LINGER }
    }

    /// Whether everything was sent and everybody has said farewell, or all has failed.
    pub(super) fn may_close_pipes(&self, core: &Core) -> bool {
        let Some(mpi) = &self.mpi else { return true };
        let over_mpi = || self.each().filter(|(_, link)| link.way.socket().is_none());
        let flushed = over_mpi().fold(true, |all, (_, link)| link.flush() && all);
        let have_left =
            core.failure.get().is_some() || over_mpi().all(|(_, l)| l.left.load(Ordering::Acquire));
        flushed && have_left && mpi.pipes.is_drained()
    }

    /// Whether a rank that is reached over MPI takes signs of life: neither side has begun to leave.
    pub(super) fn is_open_pipe(&self, link: &Link) -> bool {
        let leaves = self.closing.load(Ordering::SeqCst) || link.left.load(Ordering::Acquire);
        link.way.socket().is_none() && !leaves
    }

    /// What only the side that sends has noticed.
    pub(super) fn report_failures(&self, core: &Core) {
        if core.failure.get().is_none()
            && let Some((rank, why)) = self.each().find_map(|(rank, l)| Some((rank, l.failure.get()?)))
        {
            core.fail(&format!("rank {} cannot reach rank {rank}: {why}", core.rank));
            core.ring();
        }
    }

    /// Whether some of this world's messages go over MPI, which must be called for them to go on.
    pub(crate) fn has_mpi(&self) -> bool {
        self.mpi.is_some()
    }
}
