use crate::connect;
use crate::control::{CONTROL_BYTES, Control, MAX_LOCAL};
use crate::element::{ElementType, OpTag, RawSlice};
use crate::group::Group;
use crate::inner::{Core, Failure, Near, Peer, Transport};
use crate::memory::Mapping;
use crate::progress::Patience;
use crate::store::StoreClient;
use crate::watch::Watch;
use rustix::fd::OwnedFd;
use spec::{Error, Result};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Default deadline of every wait. Long enough for a rank that saves a checkpoint while others wait, short enough
/// that a stopped job is noticed the same minute.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a caller polls before it sleeps, where every rank has a core. Waking a thread on an idle core takes about
/// 50 us on a virtual machine: with less patience than that, ranks in step would take turns to put each other to sleep.
const PATIENT: Patience = Patience { spin: Duration::from_micros(4), offer: Duration::from_micros(100) };
/// The same where ranks outnumber cores: the rank that is waited for needs this core.
const CROWDED: Patience = Patience { spin: Duration::ZERO, offer: Duration::from_micros(100) };

/// Which transports a world may use between ranks of one host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransportChoice {
    /// Shared memory within a host; between hosts MPI where all ranks may use it, else TCP.
    #[default]
    Auto,
    /// Shared memory only: all ranks must be on one host.
    Shm,
    /// TCP only, even within a host.
    Tcp,
    /// MPI only, even within a host.
    Mpi,
}

/// What a rank that is a process needs to find the others.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    /// This rank, below `world`.
    pub rank: usize,
    /// Number of ranks.
    pub world: usize,
    /// This rank's number on its host, for messages.
    pub local_rank: usize,
    /// Number of ranks that the launcher started on this host, for messages and waiting strategy.
    pub local_world: usize,
    /// Identifies the host: ranks with equal ids share memory. See [`host_id`](crate::host_id).
    pub host: String,
    /// Where the ranks meet.
    pub store: StoreClient,
    /// Prefix of the keys used there: one per world, a new one after each restart.
    pub session: String,
    /// Of everything that must be equal on all ranks: the configuration and the binary.
    pub fingerprint: [u8; 16],
    /// Which transports may be used.
    pub transport: TransportChoice,
    /// Whether this rank was started so that MPI can find the others, and has a library for it.
    pub has_mpi: bool,
    /// Deadline for connecting and of every wait afterwards.
    pub timeout: Duration,
    /// Address to accept TCP connections on; by default the one that the store sees.
    pub bind: Option<IpAddr>,
    /// A SOCKS proxy (version 5, no login) to connect to ranks of other hosts through.
    pub via: Option<SocketAddr>,
}

impl Bootstrap {
    /// One rank of `world`, with defaults for the rest.
    pub fn new(rank: usize, world: usize, store: StoreClient, session: impl Into<String>) -> Bootstrap {
        Bootstrap {
            rank,
            world,
            local_rank: rank,
            local_world: world,
            host: connect::host_id(),
            store,
            session: session.into(),
            fingerprint: [0; 16],
            transport: TransportChoice::Auto,
            has_mpi: false,
            timeout: DEFAULT_TIMEOUT,
            bind: None,
            via: None,
        }
    }
}

/// One rank's membership of a job. Dropping it leaves the job in good order; operations that others still expect of
/// this rank then fail and name it.
pub struct World {
    pub(crate) core: Arc<Core>,
    all: Group,
}

impl World {
    /// `n` ranks as threads of this process: give one to each thread.
    ///
    /// # Errors
    /// `n` is 0 or too large for one host, or memory is short.
    pub fn threads(n: usize) -> Result<Vec<World>> {
        World::threads_with(n, DEFAULT_TIMEOUT)
    }

    /// The same with a deadline of one's own.
    ///
    /// # Errors
    /// As [`World::threads`].
    pub fn threads_with(n: usize, timeout: Duration) -> Result<Vec<World>> {
        if !(1..=MAX_LOCAL).contains(&n) {
            return Err(Error::user(format!("{n} ranks as threads, expected 1 to {MAX_LOCAL}")));
        }
        let failure = Arc::new(Failure::default());
        let controls = (0..n)
            .map(|_| Ok(Control::new(Arc::new(Mapping::anonymous(CONTROL_BYTES)?), true)))
            .collect::<Result<Vec<_>>>()?;
        let core = |rank: usize| {
            let peers = controls.iter().enumerate().map(|(index, control)| Peer {
                place: "a thread of this process".into(),
                host: 0,
                transport: Transport::Threads,
                near: Some(Near { control: control.clone(), index }),
            });
            Ok(Arc::new(Core::new(rank, timeout, patience(n), peers.collect(), failure.clone())?))
        };
        let cores = (0..n).map(core).collect::<Result<Vec<_>>>()?;
        cores.into_iter().map(World::new).collect()
    }

    /// Joins the other ranks of a job, each a process. Collective: returns when all have come.
    ///
    /// # Errors
    /// Ranks that do not come in time, come twice, or were started with another fingerprint (all are named), and
    /// hosts that cannot be reached.
    pub fn connect(bootstrap: &Bootstrap) -> Result<World> {
        World::new(connect::connect(bootstrap)?)
    }

    fn new(core: Arc<Core>) -> Result<World> {
        let all = Group::whole(&core)?;
        Ok(World { core, all })
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.core.rank
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.core.size()
    }

    /// What carries messages to `rank`.
    pub fn transport(&self, rank: usize) -> Transport {
        self.core.peers[rank].transport
    }

    /// Number of the host of `rank`, the same on all ranks. Where only sockets are used each rank counts as a host.
    pub fn host(&self, rank: usize) -> usize {
        self.core.peers[rank].host
    }

    /// Founds a group of `ranks`, whose order is the group's. Collective over its members only; a rank's groups have
    /// different ids, and groups without a common member may share one.
    ///
    /// # Errors
    /// This rank is no member, ranks are named twice or do not exist, members disagree, or some do not come.
    pub fn group(&self, ranks: &[usize], id: u32) -> Result<Group> {
        Group::found(&self.core, ranks, id)
    }

    /// The group of all ranks, in order. Its id is `u32::MAX`.
    pub fn all(&self) -> &Group {
        &self.all
    }

    /// [Payload bytes](Group::sent_bytes) that this rank has sent so far, for each group by its id in the order in which
    /// it joined them; the group of all comes first.
    pub fn sent(&self) -> Vec<(u32, u64)> {
        self.core.sent.by_group()
    }

    /// Payload bytes of messages that this rank has given to sockets so far, whatever operation they were part of.
    pub fn sent_by_socket(&self) -> u64 {
        self.core.io.get().map_or(0, |io| io.sent_bytes())
    }

    /// Memory of this rank that its neighbours can reach, so that collectives on it copy nothing. Every rank makes
    /// its own, of any size; nobody waits.
    ///
    /// # Errors
    /// Memory is short.
    pub fn alloc_shared(&self, bytes: usize) -> Result<SharedArena> {
        let (id, mapping, file) = self.core.share(bytes)?;
        Ok(SharedArena { core: self.core.clone(), id, mapping, file, bytes })
    }

    /// The same memory, as it is, in this world. Its former world must be one that no rank of this one uses any more: all
    /// have left it before they came here.
    ///
    /// # Errors
    /// A neighbour is lost.
    pub fn adopt(&self, arena: &SharedArena) -> Result<SharedArena> {
        let id = self.core.adopt(&arena.mapping, arena.file.as_ref())?;
        let (mapping, file) = (arena.mapping.clone(), arena.file.clone());
        Ok(SharedArena { core: self.core.clone(), id, mapping, file, bytes: arena.bytes })
    }

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// A rank is lost or does not come in time.
    pub fn barrier(&self) -> Result<()> {
        self.all.barrier(OpTag::default())
    }

    /// Ends every operation of every rank, now and later, with `reason`.
    pub fn abort(&self, reason: &str) {
        self.core.fail(&format!("rank {} gave up: {reason}", self.core.rank));
    }

    /// The error that all operations give since the world failed, if it has.
    pub fn failure(&self) -> Option<Error> {
        self.core.failure.get()
    }

    /// A look at the world for what goes on beside it.
    pub fn watch(&self) -> Watch {
        Watch::new(&self.core)
    }

    /// How long the quietest other rank had given no sign of life when this one knew that the world had failed: the time from
    /// a loss to its being known is no longer. `None` before, and between threads, which give none.
    pub fn silence(&self) -> Option<Duration> {
        self.core.failure.silence()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.core.fail(&format!("rank {} panicked", self.core.rank));
        }
        self.core.worker.stop(&self.core);
        if self.core.failure.get().is_none() {
            self.core.control.left().store(1, Ordering::SeqCst);
            self.core.wake_neighbours();
        }
        if let Some(io) = self.core.io.get() {
            io.close(&self.core);
        }
    }
}

/// How to wait, given the ranks of this host.
pub(crate) fn patience(local_world: usize) -> Patience {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if local_world <= cores { PATIENT } else { CROWDED }
}

/// Memory that neighbours can reach; freed on drop, which must come after the last operation that uses it.
///
/// The memory is zeroed and page-aligned. It is handed out as [`RawSlice`]s or as a raw pointer: which parts are whose at
/// what time is the executor's plan, and the arena does not check it.
pub struct SharedArena {
    core: Arc<Core>,
    id: u64,
    mapping: Arc<Mapping>,
    /// What neighbours map it by.
    file: Option<Arc<OwnedFd>>,
    bytes: usize,
}

impl SharedArena {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.ptr()
    }

    /// `count` elements at `offset` bytes.
    ///
    /// # Errors
    /// The range is not inside the arena, or the offset not aligned to the element.
    pub fn span(&self, offset: usize, count: usize, element: ElementType) -> Result<RawSlice> {
        let end = count.checked_mul(element.bytes()).and_then(|bytes| offset.checked_add(bytes));
        if end.is_none_or(|end| end > self.bytes) || !offset.is_multiple_of(element.bytes()) {
            return Err(Error::failure(format!(
                "{count} {element} at byte {offset} do not lie in an arena of {} bytes",
                self.bytes
            )));
        }
        Ok(RawSlice::new(self.mapping.ptr().wrapping_add(offset), count, element))
    }

    /// The elements of a span of this arena.
    ///
    /// # Safety
    /// No operation and no other reference touches them while the slice lives, and `T` is the span's element.
    pub unsafe fn slice_mut<T: crate::Element>(&mut self, span: RawSlice) -> &mut [T] {
        assert!(span.element == T::TYPE && self.mapping.offset_of(span.ptr, span.bytes()).is_some());
        // SAFETY: inside the mapping and of the right type; the caller vouches for the rest.
        unsafe { std::slice::from_raw_parts_mut(span.ptr.cast(), span.count) }
    }
}

impl Drop for SharedArena {
    fn drop(&mut self) {
        self.core.unshare(self.id);
    }
}
