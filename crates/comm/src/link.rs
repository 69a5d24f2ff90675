//! Connections to the other ranks, served by one thread per rank.
//!
//! Every pair of ranks has a connection: TCP or a pipe of MPI between hosts, which carries messages; a Unix socket within
//! one, which carries nothing but the files of shared memory. All bring bad news: a socket that ends without a farewell is
//! a rank that died, and an abort is passed to all. Of MPI's ranks the launcher notices when one dies, and ends all.

mod read;
mod way;

use self::read::Reader;
pub(crate) use self::way::Way;
use self::way::{MpiSide, SendError, Source};
use crate::control::publish;
use crate::element::RawSlice;
use crate::header::{Header, Space};
use crate::inner::Core;
use crate::mpi::pipes::Pipes;
use crate::os::os_error;
use crate::p2p::{Payload, here_or_left};
use crate::seal::{Seal, Seals, TAG_BYTES};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, Shutdown};
use spec::{Error, Result};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How often a rank shows that it is alive.
const BEAT: Duration = Duration::from_millis(250);
/// Without a beat for so long a rank is mentioned when a wait times out: six beats, so not for a busy machine.
const SILENT: Duration = Duration::from_millis(1500);
/// How long a closing rank waits for its last words to be read.
const LINGER: Duration = Duration::from_secs(2);
/// Longest reason of an abort that travels.
const MAX_TEXT_BYTES: usize = 16 << 10;
/// A frame's head: kind, payload bytes, and the words of a header.
const HEAD_BYTES: usize = 80;
/// Bytes of a sealed body that are read for its tag, then given to the socket at once: few enough to stay in a core's cache
/// in between, and so many that most messages wake the other side once.
const PIECE_BYTES: usize = 512 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Kind {
    Message = 1,
    /// A message was taken by its receive.
    Credit = 2,
    Beat = 3,
    Abort = 4,
    Farewell = 5,
    /// Shared memory, with its file: words hold its id and size.
    Share = 6,
    Unshare = 7,
}

impl Kind {
    const ALL: [Kind; 7] =
        [Kind::Message, Kind::Credit, Kind::Beat, Kind::Abort, Kind::Farewell, Kind::Share, Kind::Unshare];
}

/// The connections of a rank.
pub(crate) struct Io {
    links: Vec<Option<Link>>,
    wake: OwnedFd,
    closing: AtomicBool,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    began: Instant,
    /// Payload bytes of messages.
    sent: AtomicU64,
    mpi: Option<MpiSide>,
}

/// A connection to another rank, and its seals where others could change what it carries. A Unix socket needs none once
/// both ends have shown who they are; MPI's messages are the launcher's to guard.
pub(crate) struct Line {
    pub(crate) way: Way,
    pub(crate) seals: Option<Seals>,
}

struct Link {
    way: Way,
    /// Whether heads and bodies carry tags.
    is_sealed: bool,
    /// What seals frames, in the order of the queue: taken with its lock held.
    seal: Option<Mutex<Seal>>,
    /// What opens them, until the thread takes it.
    open: Mutex<Option<Seal>>,
    out: Mutex<VecDeque<Frame>>,
    left: AtomicBool,
    /// This side has ended its stream.
    ended: AtomicBool,
    /// Milliseconds after `Io::began` at which the peer last showed life.
    heard: AtomicU64,
    /// The last heartbeat seen in shared memory.
    beat: AtomicU64,
    /// Why frames do not go, where the reading side does not find out.
    failure: OnceLock<String>,
}

struct Frame {
    head: [u8; HEAD_BYTES],
    body: Body,
    file: Option<OwnedFd>,
    written: usize,
    tags: Option<Tags>,
}

/// The tags of a frame that is being written to a sealed connection.
struct Tags {
    head: [u8; TAG_BYTES],
    /// Known when all of the body is `summed`.
    body: [u8; TAG_BYTES],
    summed: usize,
}

enum Body {
    Owned(Vec<u8>),
    /// The sender waits until the flag is set.
    InPlace(RawSlice, Arc<AtomicBool>),
}

impl Frame {
    fn new(kind: Kind, words: &[u64; 8], body: Vec<u8>) -> Frame {
        Frame::of(head(kind, body.len(), words), Body::Owned(body))
    }

    fn of(head: [u8; HEAD_BYTES], body: Body) -> Frame {
        Frame { head, body, file: None, written: 0, tags: None }
    }

    fn body(&self) -> &[u8] {
        match &self.body {
            Body::Owned(bytes) => bytes,
            // SAFETY: the sender keeps the buffer until the flag is set or the frame is withdrawn under the lock.
            Body::InPlace(span, _) => unsafe { std::slice::from_raw_parts(span.as_ptr(), span.bytes()) },
        }
    }

    /// Whether something of it was written, or its number given: it must be ended then.
    fn has_begun(&self) -> bool {
        self.written > 0 || self.tags.is_some()
    }

    /// Writes what the socket takes; whether that was all. The queue's lock must be held.
    fn write(&mut self, link: &Link) -> Result<bool, SendError> {
        let tags = if link.is_sealed { TAG_BYTES } else { 0 };
        let bytes = self.body().len();
        let total = HEAD_BYTES + tags + bytes + if bytes > 0 { tags } else { 0 };
        while self.written < total {
            if let Some(seal) = &link.seal {
                self.seal(&mut seal.lock().unwrap_or_else(PoisonError::into_inner));
            }
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files: Vec<_> = self.file.iter().filter(|_| self.written == 0).map(AsFd::as_fd).collect();
            if !files.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&files));
            }
            match link.way.send(&self.rest(), &mut control) {
                Ok(n) => self.written += n,
                Err(SendError::Socket(Errno::INTR)) => {}
                Err(SendError::Socket(Errno::AGAIN)) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        if let Body::InPlace(_, sent) = &self.body {
            sent.store(true, Ordering::Release);
        }
        Ok(true)
    }

    /// Gives the frame its tags as far as they are needed: a piece of the body is read for its tag just before the
    /// socket reads it.
    fn seal(&mut self, seal: &mut Seal) {
        let bytes = self.body().len();
        let mut tags = self.tags.take().unwrap_or_else(|| {
            let head = seal.tag(&self.head);
            if bytes > 0 {
                seal.begin_body();
            }
            Tags { head, body: [0; TAG_BYTES], summed: 0 }
        });
        let is_written = self.written >= HEAD_BYTES + TAG_BYTES + tags.summed;
        if tags.summed < bytes && (is_written || tags.summed == 0) {
            let end = bytes.min(tags.summed + PIECE_BYTES);
            seal.update(&self.body()[tags.summed..end]);
            tags.summed = end;
            if end == bytes {
                tags.body = seal.body_tag();
            }
        }
        self.tags = Some(tags);
    }

    /// What is to be written next, in order.
    fn rest(&self) -> [IoSlice<'_>; 4] {
        let body = self.body();
        let parts: [&[u8]; 4] = match &self.tags {
            None => [&self.head, &[], body, &[]],
            Some(tags) if tags.summed == body.len() && !body.is_empty() => {
                [&self.head, &tags.head, body, &tags.body]
            }
            Some(tags) => [&self.head, &tags.head, &body[..tags.summed], &[]],
        };
        let mut skip = self.written;
        parts.map(|part| {
            let skipped = skip.min(part.len());
            skip -= skipped;
            IoSlice::new(&part[skipped..])
        })
    }
}

fn head(kind: Kind, bytes: usize, words: &[u64; 8]) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    let all = [kind as u64, bytes as u64].into_iter().chain(*words);
    for (place, word) in head.chunks_exact_mut(8).zip(all) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    head
}

impl Link {
    fn new(line: Line) -> Link {
        let (is_sealed, (seal, open)) = match line.seals {
            Some(Seals { out, r#in }) => (true, (Some(Mutex::new(out)), Some(r#in))),
            None => (false, (None, None)),
        };
        let (out, left, ended, heard, beat) = Default::default();
        let failure = OnceLock::new();
        Link {
            way: line.way,
            is_sealed,
            seal,
            open: Mutex::new(open),
            out,
            left,
            ended,
            heard,
            beat,
            failure,
        }
    }

    fn reader(&self) -> Reader {
        Reader::new(self.open.lock().unwrap_or_else(PoisonError::into_inner).take())
    }

    fn out(&self) -> MutexGuard<'_, VecDeque<Frame>> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes as much of the queue as the socket takes; whether it is empty.
    fn flush(&self) -> bool {
        let mut out = self.out();
        while let Some(frame) = out.front_mut() {
            match frame.write(self) {
                Ok(true) => drop(out.pop_front()),
                Ok(false) => return false,
                // The reading side will find the connection closed and say so.
                Err(SendError::Socket(_)) => out.clear(),
                Err(SendError::Mpi(why)) => {
                    out.clear();
                    let _ = self.failure.set(why);
                }
            }
        }
        true
    }

    /// Queues a frame and writes what can be written; whether anything is left for the thread.
    fn push(&self, frame: Frame) -> bool {
        self.out().push_back(frame);
        !self.flush()
    }
}

/// Sends a message to another host.
///
/// # Safety
/// As [`crate::p2p::send`].
pub(crate) async unsafe fn send(
    core: &Core,
    header: Header,
    to: usize,
    buffer: RawSlice,
    payload: Payload,
) -> Result<()> {
    let (io, link) = link(core, to)?;
    io.sent.fetch_add(buffer.bytes() as u64, Ordering::Relaxed);
    let sent = Arc::new(AtomicBool::new(false));
    let head = head(Kind::Message, buffer.bytes(), &header.encode());
    let mut frame = Frame::of(head, Body::InPlace(buffer, sent.clone()));
    {
        let mut out = link.out();
        if out.is_empty() && frame.write(link).unwrap_or(false) {
            return Ok(());
        }
        if payload == Payload::Copied {
            frame.body = Body::Owned(frame.body().to_vec());
        }
        out.push_back(frame);
    }
    io.wake_for(link);
    if payload == Payload::Copied {
        return Ok(());
    }
    let _withdraw = Withdraw { link, sent: &sent };
    let what = || format!("rank {to} ({}) to take {header}", core.peers[to].place);
    here_or_left(core, to, what, || sent.load(Ordering::Acquire).then_some(Ok(()))).await
}

/// Keeps the queue away from a buffer that is about to go: a frame that is half written is ended from a copy.
struct Withdraw<'a> {
    link: &'a Link,
    sent: &'a Arc<AtomicBool>,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        if !self.sent.load(Ordering::Acquire) {
            let ours = |f: &Frame| matches!(&f.body, Body::InPlace(_, sent) if Arc::ptr_eq(sent, self.sent));
            let mut out = self.link.out();
            out.retain(|frame| !ours(frame) || frame.has_begun());
            if let Some(frame) = out.iter_mut().find(|f| ours(f)) {
                frame.body = Body::Owned(frame.body().to_vec());
            }
        }
    }
}

/// Tells the sender that one of its messages was received.
pub(crate) fn credit(core: &Core, header: &Header, to: usize) {
    if header.group.space == Space::User
        && let Ok((io, link)) = link(core, to)
        && link.push(Frame::new(Kind::Credit, &header.encode(), Vec::new()))
    {
        io.wake_for(link);
    }
}

fn link(core: &Core, rank: usize) -> Result<(&Io, &Link)> {
    core.io
        .get()
        .and_then(|io| Some((io, io.links[rank].as_ref()?)))
        .ok_or_else(|| Error::failure(format!("rank {} has no connection to rank {rank}", core.rank)))
}

impl Io {
    /// Takes over one connection per rank (none for the rank itself) and starts the thread.
    pub(crate) fn start(core: &Arc<Core>, lines: Vec<Option<Line>>, pipes: Option<Arc<Pipes>>) -> Result<()> {
        let failed = |e: Errno| os_error(&format!("set up the connections of rank {}", core.rank), &e.into());
        let link = |line: Line| {
            line.way.socket().map_or(Ok(()), |s| rustix::io::ioctl_fionbio(s, true)).map_err(failed)?;
            Ok(Link::new(line))
        };
        let links = lines.into_iter().map(|line| line.map(link).transpose()).collect::<Result<Vec<_>>>()?;
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let (closing, thread, sent) = Default::default();
        let mpi = pipes.map(|pipes| MpiSide::new(pipes, &links));
        let io =
            core.io.get_or_init(|| Io { links, wake, closing, thread, began: Instant::now(), sent, mpi });
        let serving = core.clone();
        let thread = std::thread::Builder::new()
            .name(format!("link-{}", core.rank))
            .spawn(move || {
                if let Some(io) = serving.io.get() {
                    io.serve(&serving);
                }
            })
            .map_err(|e| Error::failure(format!("start the connection thread: {e}")))?;
        *io.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn each(&self) -> impl Iterator<Item = (usize, &Link)> {
        self.links.iter().enumerate().filter_map(|(rank, link)| Some((rank, link.as_ref()?)))
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Has the thread write what was left of a connection's queue.
    fn wake_for(&self, link: &Link) {
        self.leave_frames(link);
        self.wake();
    }

    fn leave_frames(&self, link: &Link) {
        if let (Some(mpi), None) = (&self.mpi, link.way.socket()) {
            mpi.has_frames.store(true, Ordering::Release);
        }
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.links[rank].as_ref().is_some_and(|l| l.left.load(Ordering::Acquire))
    }

    pub(crate) fn abort(&self, why: &str) {
        let mut end = why.len().min(MAX_TEXT_BYTES);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        for (_, link) in self.each() {
            link.push(Frame::new(Kind::Abort, &[0; 8], why[..end].into()));
            self.leave_frames(link);
        }
        self.wake();
    }

    /// Sends the file of new shared memory to all neighbours.
    pub(crate) fn share(&self, core: &Core, id: u64, bytes: usize, file: &OwnedFd) -> Result<()> {
        for (_, link) in self.each().filter(|(rank, _)| core.peers[*rank].near.is_some()) {
            let mut frame = Frame::new(Kind::Share, &[id, bytes as u64, 0, 0, 0, 0, 0, 0], Vec::new());
            let copy = file.try_clone().map_err(|e| os_error("share memory", &e))?;
            frame.file = Some(copy);
            link.push(frame);
        }
        self.wake();
        Ok(())
    }

    pub(crate) fn unshare(&self, core: &Core, id: u64) {
        for (_, link) in self.each().filter(|(rank, _)| core.peers[*rank].near.is_some()) {
            link.push(Frame::new(Kind::Unshare, &[id, 0, 0, 0, 0, 0, 0, 0], Vec::new()));
        }
        self.wake();
    }

    /// Ranks that have shown no sign of life for a while, and for how long.
    pub(crate) fn silent_ranks(&self) -> Vec<(usize, Duration)> {
        let now = self.began.elapsed();
        let age = |link: &Link| now.saturating_sub(Duration::from_millis(link.heard.load(Ordering::Relaxed)));
        let alive = |(_, link): &(usize, &Link)| !link.left.load(Ordering::Relaxed);
        self.each().filter(alive).map(|(rank, l)| (rank, age(l))).filter(|(_, age)| *age > SILENT).collect()
    }

    /// How long ago the rank last showed life that has been quiet for longest, of those that have not left.
    pub(crate) fn silence(&self) -> Duration {
        let now = self.began.elapsed();
        let heard = self.each().filter(|(_, link)| !link.left.load(Ordering::Relaxed));
        let heard = heard.map(|(_, link)| Duration::from_millis(link.heard.load(Ordering::Relaxed)));
        heard.min().map_or(Duration::ZERO, |at| now.saturating_sub(at))
    }

    /// Says farewell, or why not, waits a little for it to be read, and ends the thread.
    pub(crate) fn close(&self, core: &Core) {
        match core.failure.get() {
            // Whoever told us may not have told all others yet; they must not take our end for the cause.
            Some(why) => self.abort(&why.to_string()),
            None => {
                for (_, link) in self.each() {
                    link.push(Frame::new(Kind::Farewell, &[0; 8], Vec::new()));
                    self.leave_frames(link);
                }
            }
        }
        self.closing.store(true, Ordering::SeqCst);
        self.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn heard(&self, link: &Link) {
        link.heard.store(self.began.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    fn serve(&self, core: &Core) {
        let by_socket = |link: &&Link| link.way.socket().is_some();
        let mut readers: Vec<Option<Reader>> =
            self.links.iter().map(|l| l.as_ref().filter(by_socket).map(Link::reader)).collect();
        let mut next_beat = Instant::now();
        let mut found = Instant::now();
        let mut closing = None;
        loop {
            let now = Instant::now();
            if now >= next_beat {
                next_beat = now + BEAT;
                self.beat(core, &readers);
            }
            if self.closing.load(Ordering::SeqCst) {
                let until = *closing.get_or_insert_with(|| now + self.linger(core));
                if now >= until || self.may_close(core, &readers) {
                    return;
                }
            }
            let mut at_most = next_beat.saturating_duration_since(now);
            if self.has_mpi() {
                if self.progress(core) {
                    found = now;
                }
                self.report_failures(core);
                at_most = at_most.min(MpiSide::nap(found));
            }
            let ready = self.poll(&readers, at_most);
            for rank in ready {
                let Some(link) = &self.links[rank] else { continue };
                link.flush();
                let (Some(reader), Some(socket)) = (&mut readers[rank], link.way.socket()) else { continue };
                if let Err(end) = reader.read(core, self, rank, link, &mut Source::Socket(socket)) {
                    self.ended(core, rank, link, &end);
                    readers[rank] = None;
                }
            }
        }
    }

    /// Waits for something to do; the ranks whose sockets have it.
    fn poll(&self, readers: &[Option<Reader>], at_most: Duration) -> Vec<usize> {
        let mut ranks = vec![usize::MAX];
        let mut polled = vec![PollFd::new(&self.wake, PollFlags::IN)];
        for (rank, link) in self.each().filter(|(rank, _)| readers[*rank].is_some()) {
            let Some(socket) = link.way.socket() else { continue };
            let writing = if link.out().is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            polled.push(PollFd::new(socket, PollFlags::IN | writing));
            ranks.push(rank);
        }
        let timeout = rustix::event::Timespec {
            tv_sec: at_most.as_secs() as i64,
            tv_nsec: i64::from(at_most.subsec_nanos()),
        };
        let _ = rustix::event::poll(&mut polled, Some(&timeout));
        if !polled[0].revents().is_empty() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let ready = polled.iter().zip(ranks).skip(1).filter(|(p, _)| !p.revents().is_empty());
        ready.map(|(_, rank)| rank).collect()
    }

    /// Shows that this rank lives, and looks who else does.
    fn beat(&self, core: &Core, readers: &[Option<Reader>]) {
        core.control.heartbeat().fetch_add(1, Ordering::Relaxed);
        let is_open = |(rank, link): &(usize, &Link)| readers[*rank].is_some() || self.is_open_pipe(link);
        for (rank, link) in self.each().filter(is_open) {
            match &core.peers[rank].near {
                Some(near) => {
                    let beat = near.control.heartbeat().load(Ordering::Relaxed);
                    if link.beat.swap(beat, Ordering::Relaxed) != beat {
                        self.heard(link);
                    }
                }
                None => {
                    // A queue that does not move needs no more beats behind it.
                    if link.out().is_empty() && link.push(Frame::new(Kind::Beat, &[0; 8], Vec::new())) {
                        self.leave_frames(link);
                    }
                }
            }
        }
    }

    /// Whether everything is written and read: closing a socket with unread bytes in it would destroy what the other
    /// side has not read yet, so this side ends its stream first and waits for the other to do the same.
    fn may_close(&self, core: &Core, readers: &[Option<Reader>]) -> bool {
        let open = self.each().filter(|(rank, _)| readers[*rank].is_some());
        let sockets = open.fold(true, |all, (rank, link)| {
            let flushed = link.flush();
            let far = core.peers[rank].near.is_none();
            if flushed && far && !link.ended.swap(true, Ordering::Relaxed) {
                link.way.shut(Shutdown::Write);
            }
            all && flushed && !far
        });
        self.may_close_pipes(core) && sockets
    }

    fn ended(&self, core: &Core, rank: usize, link: &Link, how: &str) {
        link.out().clear();
        // The other side may be waiting for ours to end.
        link.way.shut(Shutdown::Both);
        if core.has_left(rank) || self.closing.load(Ordering::SeqCst) || core.failure.get().is_some() {
            link.left.store(true, Ordering::Release);
            core.ring();
            return;
        }
        core.fail(&format!("rank {rank} ({}) was lost: {how}", core.peers[rank].place));
        core.ring();
    }
}

impl Core {
    /// Wakes this rank's own threads after progress made for them.
    pub(crate) fn ring(&self) {
        publish();
        self.control.bell().ring();
    }
}
