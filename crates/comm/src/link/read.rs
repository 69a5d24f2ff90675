//! The reading side of a connection: frames come in pieces, and payloads go straight to where they are wanted.

use super::{HEAD_BYTES, Io, Kind, Link, MAX_TEXT_BYTES, PIECE_BYTES, Source};
use crate::header::{Header, mismatch};
use crate::inner::{Address, Core, PeerSegment};
use crate::memory::Mapping;
use crate::os::os_error;
use crate::p2p::{Incoming, Lane, Target, Waiting};
use crate::seal::{Seal, TAG_BYTES};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// Most bytes read from one connection before the others get a turn.
const TURN_BYTES: usize = 8 << 20;

/// Memory for a message that no receive waits for, before any of it has arrived.
const FIRST_BYTES: usize = 64 << 10;

/// What is being read from one connection.
pub(super) struct Reader {
    /// With its tag, where there are tags.
    head: [u8; HEAD_BYTES + TAG_BYTES],
    got: usize,
    seal: Option<Seal>,
    files: VecDeque<OwnedFd>,
    payload: Option<Reading>,
}

struct Reading {
    sink: Sink,
    bytes: usize,
    done: usize,
    tag: [u8; TAG_BYTES],
    tag_got: usize,
}

enum Sink {
    Waiting(Arc<Waiting>),
    Incoming(Arc<Incoming>),
    Text(Vec<u8>),
}

impl Reader {
    pub(super) fn new(seal: Option<Seal>) -> Reader {
        Reader { head: [0; HEAD_BYTES + TAG_BYTES], got: 0, seal, files: VecDeque::new(), payload: None }
    }

    /// Reads what there is, up to a turn's worth. An error says how the connection ended.
    pub(super) fn read(
        &mut self,
        core: &Core,
        io: &Io,
        rank: usize,
        link: &Link,
        source: &mut Source<'_>,
    ) -> Result<(), String> {
        let mut budget = TURN_BYTES;
        let head_bytes = HEAD_BYTES + if self.seal.is_some() { TAG_BYTES } else { 0 };
        while budget > 0 {
            let read = match &mut self.payload {
                Some(reading) => reading.read(source, self.seal.as_mut()),
                None => receive(source, &mut self.head[self.got..head_bytes], &mut self.files)
                    .inspect(|n| self.got += n),
            };
            match read {
                Ok(0) => return Err("its connection closed".into()),
                Ok(n) => budget = budget.saturating_sub(n),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(e) => return Err(os_error("its connection failed", &e.into()).to_string()),
            }
            io.heard(link);
            if self.payload.as_ref().is_some_and(|r| r.is_whole(self.seal.is_some())) {
                if let Some(reading) = self.payload.take() {
                    let is_true = self.seal.as_mut().is_none_or(|seal| seal.is_body_tag(&reading.tag));
                    is_true.then_some(()).ok_or(FOREIGN)?;
                    reading.finish(core);
                }
            } else if self.got == head_bytes {
                self.got = 0;
                self.check_head()?;
                self.begin(core, rank, link)?;
            }
        }
        Ok(())
    }

    /// Nothing of a head counts, not even how much follows, before it is known whose it is.
    fn check_head(&mut self) -> Result<(), String> {
        let Some(seal) = &mut self.seal else { return Ok(()) };
        let (head, tag) = self.head.split_at(HEAD_BYTES);
        let is_true = tag.try_into().is_ok_and(|tag| seal.is_tag(head, tag));
        is_true.then_some(()).ok_or_else(|| FOREIGN.into())
    }

    /// A frame's head is complete.
    fn begin(&mut self, core: &Core, rank: usize, link: &Link) -> Result<(), String> {
        let mut words = [0; 10];
        for (word, bytes) in words.iter_mut().zip(self.head[..HEAD_BYTES].chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        let bytes = words[1] as usize;
        let kind = Kind::ALL.into_iter().find(|k| *k as u64 == words[0]);
        let kind = kind.ok_or_else(|| format!("it sent a frame of unknown kind {}", words[0]))?;
        if bytes > 0 && !matches!(kind, Kind::Message | Kind::Abort)
            || bytes > MAX_TEXT_BYTES && kind == Kind::Abort
        {
            return Err(format!("it sent a frame of kind {} with {bytes} bytes", words[0]));
        }
        if kind != Kind::Share && !self.files.is_empty() {
            return Err("it sent a file that was not asked for".into());
        }
        let header =
            || Header::decode(&words[2..]).ok_or_else(|| "it sent a message that cannot be read".to_string());
        match kind {
            Kind::Message => {
                let header = header()?;
                if header.bytes() != bytes {
                    return Err(format!("it sent {bytes} bytes as {header}"));
                }
                let target = core.inbox().begin(rank, header);
                let sink = match target {
                    Ok(Target::Waiting(waiting)) => Sink::Waiting(waiting),
                    Ok(Target::Incoming(incoming)) => Sink::Incoming(incoming),
                    Err(ours) => {
                        core.fail(&mismatch(core.rank, &ours, rank, &header));
                        core.ring();
                        return Err("it did something else".into());
                    }
                };
                let reading = Reading::new(sink, bytes);
                match bytes {
                    0 => reading.finish(core),
                    _ => self.payload = Some(reading),
                }
            }
            Kind::Credit => {
                let header = header()?;
                core.outbox().taken(&Lane { peer: rank, group: header.group, channel: header.channel });
                core.ring();
            }
            Kind::Beat => {}
            Kind::Abort => {
                self.payload = (bytes > 0).then(|| Reading::new(Sink::Text(vec![0; bytes]), bytes));
            }
            Kind::Farewell => {
                link.left.store(true, Ordering::Release);
                core.ring();
            }
            Kind::Share => {
                let (Some(file), true) = (self.files.pop_front(), self.files.is_empty()) else {
                    return Err("it shared memory without its file, or with others".into());
                };
                let mapping = Mapping::of_file(&file, words[3] as usize)
                    .map_err(|e| format!("it shared memory that cannot be used: {e}"))?;
                core.segments.add_peer(PeerSegment { rank, id: words[2], mapping });
                core.ring();
            }
            Kind::Unshare => core.segments.drop_peer(rank, words[2]),
        }
        if let (Some(_), Some(seal)) = (&self.payload, &mut self.seal) {
            seal.begin_body();
        }
        Ok(())
    }
}

impl Reading {
    fn new(sink: Sink, bytes: usize) -> Reading {
        Reading { sink, bytes, done: 0, tag: [0; TAG_BYTES], tag_got: 0 }
    }

    fn is_whole(&self, is_sealed: bool) -> bool {
        self.done == self.bytes && (!is_sealed || self.tag_got == TAG_BYTES)
    }

    fn read(&mut self, source: &mut Source<'_>, mut seal: Option<&mut Seal>) -> Result<usize, Errno> {
        if self.done == self.bytes {
            let n = source.receive(&mut self.tag[self.tag_got..])?;
            self.tag_got += n;
            return Ok(n);
        }
        // What is received is looked at for its tag while it is in the cache.
        let most = if seal.is_some() { PIECE_BYTES } else { usize::MAX };
        let mut receive = |buffer: &mut [u8]| {
            let at_most = buffer.len().min(most);
            let n = source.receive(&mut buffer[..at_most])?;
            if let Some(seal) = &mut seal {
                seal.update(&buffer[..n]);
            }
            Ok(n)
        };
        let n = match &mut self.sink {
            Sink::Waiting(waiting) => {
                let cancelled = waiting.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
                if *cancelled {
                    let mut waste = [0; 4096];
                    let n = waste.len().min(self.bytes - self.done);
                    receive(&mut waste[..n])
                } else {
                    let at = Address(waiting.buffer.as_ptr().wrapping_add(self.done));
                    // SAFETY: the receive keeps its buffer of `bytes` bytes until it sets `cancelled`, whose lock we hold.
                    receive(unsafe { std::slice::from_raw_parts_mut(at.0, self.bytes - self.done) })
                }
            }
            Sink::Incoming(incoming) => {
                let mut payload = incoming.payload.lock().unwrap_or_else(PoisonError::into_inner);
                if self.done == payload.len() {
                    // Grows as bytes arrive: a length alone cannot make this rank allocate.
                    let more = (self.bytes - self.done).min(self.done.max(FIRST_BYTES));
                    payload.try_reserve_exact(more).map_err(|_| Errno::NOMEM)?;
                    payload.resize(self.done + more, 0);
                }
                receive(&mut payload[self.done..])
            }
            Sink::Text(text) => receive(&mut text[self.done..]),
        }?;
        self.done += n;
        Ok(n)
    }

    fn finish(self, core: &Core) {
        match self.sink {
            Sink::Waiting(waiting) => waiting.complete.store(true, Ordering::Release),
            Sink::Incoming(incoming) => incoming.complete.store(true, Ordering::Release),
            Sink::Text(text) => {
                core.told(&String::from_utf8_lossy(&text));
            }
        }
        core.ring();
    }
}

/// What is wrong with a connection whose tags are.
const FOREIGN: &str = "what came from it does not carry the job's seal: something between the ranks has changed, \
                       repeated or left out a frame";

/// Receives bytes and the files that come with them, which only sockets can carry.
fn receive(
    source: &mut Source<'_>,
    buffer: &mut [u8],
    files: &mut VecDeque<OwnedFd>,
) -> Result<usize, Errno> {
    let Source::Socket(socket) = source else { return source.receive(buffer) };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    if message.flags.contains(ReturnFlags::CTRUNC) {
        // A file came and could not be opened here.
        return Err(Errno::MFILE);
    }
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            files.extend(received);
        }
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{Io, Kind, Line, Link, Way, head};
    use super::*;
    use crate::control::{CONTROL_BYTES, Control};
    use crate::element::{ElementType, OpTag, Order};
    use crate::header::{GroupKey, OpKind, Space};
    use crate::inner::{Failure, Near, Peer, Transport};
    use rustix::event::{EventfdFlags, eventfd};
    use std::time::{Duration, Instant};

    /// Rank 0 of two, whose peer is the other end of a socket.
    fn rank() -> (Core, Io, OwnedFd) {
        let control = Control::new(Arc::new(Mapping::anonymous(CONTROL_BYTES).unwrap()), false);
        let peer = |host, transport, near| Peer { place: "pid 1 on h".into(), host, transport, near };
        let own = peer(0, Transport::Shm, Some(Near { control, index: 0 }));
        let peers = vec![own, peer(1, Transport::Tcp, None)];
        let patience = crate::world::patience(2);
        let core =
            Core::new(0, Duration::from_secs(1), patience, peers, Arc::new(Failure::default())).unwrap();
        let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
        let link = Link::new(Line { way: Way::Socket(here.into()), seals: None });
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let (closing, thread, sent) = Default::default();
        let links = vec![None, Some(link)];
        (core, Io { links, wake, closing, thread, began: Instant::now(), sent, mpi: None }, there.into())
    }

    fn frame(kind: Kind, message: u64, body: &[u8]) -> Vec<u8> {
        let header = Header {
            kind: OpKind::Send,
            element: ElementType::U8,
            order: Order::Tree,
            root: 0,
            group: GroupKey { id: 3, space: Space::User },
            channel: 1,
            seq: message,
            tag: OpTag(7),
            count: body.len() as u64,
            detail: 0,
            message,
            part: body.len() as u64,
        };
        [&head(kind, body.len(), &header.encode())[..], body].concat()
    }

    #[test]
    fn fuzzed_frames_end_the_connection_at_worst() {
        let all = [
            frame(Kind::Message, 0, &[5; 300]),
            frame(Kind::Beat, 0, &[]),
            frame(Kind::Message, 1, &[]),
            frame(Kind::Credit, 0, &[]),
            frame(Kind::Unshare, 0, &[]),
            frame(Kind::Farewell, 0, &[]),
            frame(Kind::Abort, 0, b"rank 1 gave up"),
        ];
        let good: Vec<Vec<u8>> = all.iter().cloned().chain([all.concat()]).collect();
        let (core, io, there) = rank();
        crate::fuzz_test::fuzz(
            "frames",
            &good,
            &[],
            |input| input,
            |input| {
                *core.inbox() = Default::default();
                let link = io.links[1].as_ref().unwrap();
                let mut reader = Reader::new(None);
                // No more at a time than the socket takes.
                input.chunks(32 << 10).all(|chunk| {
                    assert_eq!(rustix::io::write(&there, chunk).unwrap(), chunk.len());
                    let socket = link.way.socket().unwrap();
                    let read = reader.read(&core, &io, 1, link, &mut Source::Socket(socket));
                    while rustix::net::recv(socket, &mut [0u8; 4096][..], RecvFlags::DONTWAIT).is_ok() {}
                    read.is_ok()
                })
            },
        );
    }
}
