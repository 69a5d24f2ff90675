//! One rank's view of the world: its peers, how to reach each, and what it shares with them.

use crate::control::{Control, publish};
use crate::link::Io;
use crate::memory::Mapping;
use crate::p2p::{Inbox, Outbox};
use crate::progress::{Patience, Worker};
use rustix::fd::OwnedFd;
use spec::{Error, Result};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

/// What carries messages between two ranks. A library that serves whole groups (NCCL) is none: it is the device's own, and
/// keeps to the deadline and the losses of the world by a [`Watch`](crate::Watch).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Memory of one process.
    Threads,
    /// Memory shared by the processes of a host.
    Shm,
    /// Sockets between hosts.
    Tcp,
    /// The site's MPI library.
    Mpi,
}

impl Transport {
    /// The name in lower case, as in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Threads => "threads",
            Transport::Shm => "shm",
            Transport::Tcp => "tcp",
            Transport::Mpi => "mpi",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

pub(crate) struct Core {
    pub(crate) rank: usize,
    pub(crate) timeout: Duration,
    pub(crate) patience: Patience,
    pub(crate) peers: Vec<Peer>,
    /// This rank's own control segment.
    pub(crate) control: Control,
    /// This rank's place among the ranks of its host.
    pub(crate) neighbour: usize,
    pub(crate) failure: Arc<Failure>,
    pub(crate) segments: Segments,
    pub(crate) inbox: Mutex<Inbox>,
    pub(crate) outbox: Mutex<Outbox>,
    pub(crate) worker: Worker,
    pub(crate) groups: AtomicUsize,
    pub(crate) sent: Sent,
    /// Sockets to the other ranks; none between threads.
    pub(crate) io: OnceLock<Io>,
}

/// Another rank, or this one.
pub(crate) struct Peer {
    /// Where it runs, for messages: `pid 12 on host-a`.
    pub(crate) place: String,
    /// Number of its host, the same on all ranks.
    pub(crate) host: usize,
    pub(crate) transport: Transport,
    /// Its control segment and its place among this host's ranks, if it is a neighbour.
    pub(crate) near: Option<Near>,
}

pub(crate) struct Near {
    pub(crate) control: Control,
    pub(crate) index: usize,
}

impl Core {
    /// A rank without sockets; its own entry in `peers` has its control segment.
    pub(crate) fn new(
        rank: usize,
        timeout: Duration,
        patience: Patience,
        peers: Vec<Peer>,
        failure: Arc<Failure>,
    ) -> Result<Core> {
        let own = peers.get(rank).and_then(|p| p.near.as_ref());
        let own =
            own.ok_or_else(|| Error::failure(format!("rank {rank} is not among {} ranks", peers.len())))?;
        Ok(Core {
            rank,
            timeout,
            patience,
            control: own.control.clone(),
            neighbour: own.index,
            peers,
            failure,
            segments: Segments::default(),
            inbox: Mutex::default(),
            outbox: Mutex::default(),
            worker: Worker::default(),
            groups: AtomicUsize::new(0),
            sent: Sent::default(),
            io: OnceLock::new(),
        })
    }

    pub(crate) fn size(&self) -> usize {
        self.peers.len()
    }

    /// Lets messages advance that do so only when somebody asks.
    pub(crate) fn progress(&self) {
        if let Some(io) = self.io.get() {
            io.progress(self);
        }
    }

    /// Whether there are such messages.
    pub(crate) fn has_mpi(&self) -> bool {
        self.io.get().is_some_and(Io::has_mpi)
    }

    pub(crate) fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The control segment of a neighbour.
    pub(crate) fn near(&self, rank: usize) -> Result<&Near> {
        self.peers[rank]
            .near
            .as_ref()
            .ok_or_else(|| Error::failure(format!("rank {rank} shares no memory with rank {}", self.rank)))
    }

    /// Whether a neighbour has closed its world in good order.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        match &self.peers[rank].near {
            Some(near) => near.control.left().load(Ordering::Acquire) != 0,
            None => self.io.get().is_some_and(|io| io.has_left(rank)),
        }
    }

    /// Ends every operation of every rank with `why`; the first reason stays, and comes back as the error.
    pub(crate) fn fail(&self, why: &str) -> Error {
        let first = self.told(why);
        if first {
            if let Some(io) = self.io.get() {
                io.abort(why);
            }
            self.wake_neighbours();
        }
        self.failure.get().unwrap_or_else(|| Error::failure(why))
    }

    /// Another rank says that the world has failed, or this one has found out; whether it is the first word.
    pub(crate) fn told(&self, why: &str) -> bool {
        if let Some(io) = self.io.get() {
            // Before the failure is there to be seen: whoever sees it may ask at once.
            self.failure.note_silence(io.silence());
        }
        self.failure.set(why)
    }

    /// Rings the bells that this rank can reach: its own and, between threads, everyone's.
    pub(crate) fn wake_neighbours(&self) {
        publish();
        for near in self.peers.iter().filter_map(|p| p.near.as_ref()) {
            near.control.bell().ring();
        }
    }

    /// A peer has shown or sent what no rank of this program does.
    #[cold]
    pub(crate) fn broken(&self, rank: usize, how: &str) -> Error {
        self.fail(&format!(
            "rank {rank} ({}) {how}: its memory or this program is damaged",
            self.peers[rank].place
        ))
    }

    pub(crate) fn timed_out(&self, missing: &str) -> Error {
        let silent = self.io.get().map(|io| io.silent_ranks()).unwrap_or_default();
        let mut why = format!("rank {}: waited {:.1} s for {missing}", self.rank, self.timeout.as_secs_f64());
        for (rank, age) in silent {
            why += &format!(
                "; rank {rank} ({}) has given no sign of life for {:.1} s",
                self.peers[rank].place,
                age.as_secs_f64()
            );
        }
        self.fail(&why)
    }

    /// A range of this rank's memory as others can name it.
    pub(crate) fn locate(&self, ptr: *const u8, bytes: usize) -> Location {
        if self.io.get().is_none() {
            return Location { segment: DIRECT, offset: ptr as u64 };
        }
        let own = self.segments.own();
        own.iter()
            .find_map(|(id, mapping)| mapping.offset_of(ptr, bytes).map(|offset| (*id, offset)))
            .map_or(Location::NONE, |(segment, offset)| Location { segment, offset: offset as u64 })
    }

    /// The address here of what `rank` named; `None` until its segment has arrived. It may be used for as long as a
    /// [`Core::touch`] is held that was taken before.
    pub(crate) fn resolve(&self, rank: usize, location: Location, bytes: usize) -> Option<Result<Address>> {
        if location.segment == DIRECT && self.io.get().is_none() {
            return Some(Ok(Address(location.offset as *mut u8)));
        }
        if rank == self.rank {
            let own = self.segments.own();
            let mapping = own.iter().find(|(id, _)| *id == location.segment).map(|(_, m)| m.clone());
            return Some(self.inside(mapping.as_deref(), rank, location, bytes));
        }
        let peers = self.segments.peers();
        let mapping = peers.iter().find(|s| s.rank == rank && s.id == location.segment)?;
        Some(self.inside(Some(&mapping.mapping), rank, location, bytes))
    }

    fn inside(
        &self,
        mapping: Option<&Mapping>,
        rank: usize,
        location: Location,
        bytes: usize,
    ) -> Result<Address> {
        mapping
            .filter(|m| (location.offset as usize).checked_add(bytes).is_some_and(|end| end <= m.bytes()))
            .map(|m| Address(m.ptr().wrapping_add(location.offset as usize)))
            .ok_or_else(|| self.broken(rank, &format!("named {bytes} bytes outside its shared memory")))
    }
}

/// An address that may cross threads; the operation that holds it answers for the memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Address(pub(crate) *mut u8);

impl Address {
    /// The address `bytes` further on.
    pub(crate) fn plus(self, bytes: usize) -> Address {
        Address(self.0.wrapping_add(bytes))
    }
}

// SAFETY: an address is a number; whoever dereferences it answers for the memory.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// Payload bytes sent, by group: a counter for each, which lives as long as the world.
#[derive(Default)]
pub(crate) struct Sent(Mutex<Vec<(u32, Arc<AtomicU64>)>>);

impl Sent {
    fn groups(&self) -> MutexGuard<'_, Vec<(u32, Arc<AtomicU64>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn counter(&self, group: u32) -> Arc<AtomicU64> {
        let counter = Arc::new(AtomicU64::new(0));
        self.groups().push((group, counter.clone()));
        counter
    }

    pub(crate) fn by_group(&self) -> Vec<(u32, u64)> {
        self.groups().iter().map(|(group, bytes)| (*group, bytes.load(Ordering::Relaxed))).collect()
    }
}

/// Where a buffer lies, in words that mean the same to all neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) segment: u64,
    pub(crate) offset: u64,
}

/// The segment of plain addresses, between threads.
const DIRECT: u64 = u64::MAX;

impl Location {
    /// Memory that neighbours cannot reach.
    pub(crate) const NONE: Location = Location { segment: u64::MAX - 1, offset: 0 };

    pub(crate) fn is_shared(self) -> bool {
        self.segment != Location::NONE.segment
    }
}

/// Memory that this rank shows its neighbours, and theirs as mapped here.
#[derive(Default)]
pub(crate) struct Segments {
    own: RwLock<Vec<(u64, Arc<Mapping>)>>,
    peers: RwLock<Vec<PeerSegment>>,
    made: AtomicUsize,
    /// Operations that may be inside memory of peers, and what peers have taken back meanwhile.
    touching: AtomicUsize,
    retired: Mutex<Vec<PeerSegment>>,
    has_retired: AtomicBool,
}

pub(crate) struct PeerSegment {
    pub(crate) rank: usize,
    pub(crate) id: u64,
    pub(crate) mapping: Mapping,
}

impl Segments {
    fn own(&self) -> std::sync::RwLockReadGuard<'_, Vec<(u64, Arc<Mapping>)>> {
        self.own.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn peers(&self) -> std::sync::RwLockReadGuard<'_, Vec<PeerSegment>> {
        self.peers.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add_peer(&self, segment: PeerSegment) {
        self.peers.write().unwrap_or_else(PoisonError::into_inner).push(segment);
    }

    /// A peer takes memory back; it is unmapped once no operation can be inside it.
    pub(crate) fn drop_peer(&self, rank: usize, id: u64) {
        let mut peers = self.peers.write().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = peers.iter().position(|s| s.rank == rank && s.id == id) else { return };
        let segment = peers.swap_remove(at);
        drop(peers);
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).push(segment);
        self.has_retired.store(true, Ordering::SeqCst);
        self.unmap_retired();
    }

    #[cfg(test)]
    pub(crate) fn retired(&self) -> usize {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn unmap_retired(&self) {
        let mut retired = self.retired.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock: whoever found a retired segment before it was retired counts here.
        if self.touching.load(Ordering::SeqCst) == 0 {
            self.has_retired.store(false, Ordering::SeqCst);
            retired.clear();
        }
    }
}

impl Core {
    /// Makes memory that neighbours can reach by [`Core::locate`]; its file, unless ranks are threads.
    pub(crate) fn share(&self, bytes: usize) -> Result<(u64, Arc<Mapping>, Option<Arc<OwnedFd>>)> {
        if self.io.get().is_none() {
            let mapping = Arc::new(Mapping::anonymous(bytes)?);
            mapping.prefer_huge();
            return Ok((self.adopt(&mapping, None)?, mapping, None));
        }
        let (mapping, file) = Mapping::shared("phalanx-arena", bytes)?;
        mapping.populate()?;
        let (mapping, file) = (Arc::new(mapping), Arc::new(file));
        Ok((self.adopt(&mapping, Some(&file))?, mapping, Some(file)))
    }

    /// Lets neighbours reach memory that is there already.
    pub(crate) fn adopt(&self, mapping: &Arc<Mapping>, file: Option<&Arc<OwnedFd>>) -> Result<u64> {
        let id = self.segments.made.fetch_add(1, Ordering::Relaxed) as u64;
        if let (Some(io), Some(file)) = (self.io.get(), file) {
            let mut own = self.segments.own.write().unwrap_or_else(PoisonError::into_inner);
            own.push((id, mapping.clone()));
            drop(own);
            io.share(self, id, mapping.bytes(), file)?;
        }
        Ok(id)
    }

    /// Takes it back; no operation may be using it. After a failure neighbours keep it: they may not know yet.
    pub(crate) fn unshare(&self, id: u64) {
        let mut own = self.segments.own.write().unwrap_or_else(PoisonError::into_inner);
        own.retain(|(other, _)| *other != id);
        drop(own);
        if let Some(io) = self.io.get().filter(|_| self.failure.get().is_none()) {
            io.unshare(self, id);
        }
    }

    /// Held while memory of other ranks is read or written, and refused once the world has failed: see
    /// [`Core::quiesce`].
    pub(crate) fn touch(&self) -> Result<Touch<'_>> {
        if !self.control.is_private() {
            self.segments.touching.fetch_add(1, Ordering::SeqCst);
            return Ok(Touch::Mapped(&self.segments));
        }
        let word = self.control.touching();
        word.fetch_add(1, Ordering::SeqCst);
        let touch = Touch::Private(word);
        publish();
        match self.failure.get() {
            Some(error) => Err(error),
            None => Ok(touch),
        }
    }

    /// After a failure, waits until no other thread is inside this rank's buffers, which are about to be given back.
    /// Between processes there is no need: shared memory stays mapped while a [`Touch`] is held.
    pub(crate) fn quiesce(&self) {
        if !self.control.is_private() {
            return;
        }
        publish();
        for (_, near) in self.peers.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
            while near.near.as_ref().is_some_and(|n| n.control.touching().load(Ordering::SeqCst) != 0) {
                std::thread::yield_now();
            }
        }
    }
}

/// See [`Core::touch`].
pub(crate) enum Touch<'a> {
    /// Of threads' own memory.
    Private(&'a AtomicU32),
    /// Of memory that a peer may take back at any time.
    Mapped(&'a Segments),
}

impl Drop for Touch<'_> {
    fn drop(&mut self) {
        match self {
            Touch::Private(word) => drop(word.fetch_sub(1, Ordering::SeqCst)),
            Touch::Mapped(segments) => {
                let last = segments.touching.fetch_sub(1, Ordering::SeqCst) == 1;
                if last && segments.has_retired.load(Ordering::SeqCst) {
                    segments.unmap_retired();
                }
            }
        }
    }
}

/// Whether an error says that another rank failed: the rank that reports it is a victim, not the cause.
pub fn blames_peer(error: &str) -> bool {
    [" was lost: its connection", " gave up: ", " left while rank "].iter().any(|part| error.contains(part))
}

/// The rank that an error of a failed world blames, if it names one.
///
/// ```
/// let lost = "rank 2 (pid 7 on a) was lost: its connection ended";
/// assert_eq!(comm::blamed(lost), Some(2));
/// assert_eq!(comm::blamed("rank 0 gave up: disk full"), Some(0));
/// assert_eq!(comm::blamed("rank 1: waited 3.0 s for rank 2 to come"), None);
/// ```
pub fn blamed(error: &str) -> Option<usize> {
    let parts = [" was lost: ", " gave up: ", " left while rank "];
    let before = parts.iter().filter_map(|part| error.find(part)).min()?;
    let from = error[..before].rfind("rank ")? + "rank ".len();
    error[from..before].split(' ').next()?.parse().ok()
}

/// Why the world has failed, if it has. Threads share it, and with it what must outlive each of them.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    set: AtomicBool,
    why: Mutex<Option<String>>,
    /// How long the quietest other rank had been silent then, where ranks give signs of life.
    silence: OnceLock<Duration>,
    kept: Mutex<Vec<Arc<Mapping>>>,
}

impl Failure {
    /// Whether this was the first.
    pub(crate) fn set(&self, why: &str) -> bool {
        let mut first = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = first.is_none();
        first.get_or_insert_with(|| why.to_string());
        self.set.store(true, Ordering::Release);
        is_first
    }

    /// Keeps how long the quietest other rank had been silent when the world failed; the first word stays.
    pub(crate) fn note_silence(&self, silence: Duration) {
        let _ = self.silence.set(silence);
    }

    pub(crate) fn silence(&self) -> Option<Duration> {
        self.silence.get().copied()
    }

    /// Keeps memory that messages of a thread lie in until all threads are gone: they may be read after it has left.
    pub(crate) fn keep(&self, mapping: Arc<Mapping>) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(mapping);
    }

    pub(crate) fn get(&self) -> Option<Error> {
        if !self.set.load(Ordering::Acquire) {
            return None;
        }
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Some(Error::failure(why.unwrap_or_default()))
    }
}
