//! Ranks at each other's doors: each calls those below it and lets in those above, all at once and with one deadline.
//!
//! | who | bytes |
//! | --- | --- |
//! | caller | what this is, the ranks of both, its nonce |
//! | door | what this is, its nonce, its proof |
//! | caller | its proof; a neighbour's, with the file of its control memory |
//! | door | a welcome; a neighbour's, with its file |
//!
//! A proof holds for this session, these two ranks, the tokens on their cards, this way to talk and both nonces: one for
//! another door, or from another time, opens nothing. Who brings none is never heard of again, and keeps nobody waiting.

use super::{Card, Doors, Met, Wait, names, timespec, via};
use crate::os::{is_out_of_files, os_error};
use crate::seal::Seals;
use crate::secret::{KEY_BYTES, Key, NONCE_BYTES, random};
use rustix::event::{PollFd, PollFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use spec::Result;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::time::{Duration, Instant};

/// First bytes in both directions; the last one is the version.
const MAGIC: [u8; 8] = *b"PHXCOM\0\x02";
const CALL_BYTES: usize = MAGIC.len() + 8 + NONCE_BYTES;
const ANSWER_BYTES: usize = MAGIC.len() + NONCE_BYTES + KEY_BYTES;
const LONGEST: usize = ANSWER_BYTES;
/// Most callers at once that have not shown who they are: those of the largest job all at once, and as many strangers.
const MAX_STRANGERS: usize = 512;
/// Who has said nothing for so long is no rank in need of a moment.
const SILENT: Duration = Duration::from_secs(1);
/// Times that a rank is called whose door closes before it says anything: one that strangers besiege may do so.
const CALLS: u32 = 3;

/// A conversation on its way.
struct Talk {
    socket: OwnedFd,
    is_near: bool,
    /// What was heard of the next part.
    heard: [u8; LONGEST],
    got: usize,
    file: Option<OwnedFd>,
    part: Part,
    since: Instant,
}

/// What is to come next.
enum Part {
    /// An answer of a rank that was called, for the `call`-th time.
    Answer { rank: usize, nonce: [u8; NONCE_BYTES], call: u32 },
    /// A welcome of a rank that has proved who it is.
    Welcome { rank: usize, key: Key },
    /// A call, of anybody.
    Call,
    /// The proof of whoever says to be `rank`.
    Proof { rank: usize, key: Key },
}

impl Part {
    fn bytes(&self) -> usize {
        match self {
            Part::Answer { .. } => ANSWER_BYTES,
            Part::Welcome { .. } => MAGIC.len(),
            Part::Call => CALL_BYTES,
            Part::Proof { .. } => KEY_BYTES,
        }
    }

    /// The rank that was called by this one.
    fn called(&self) -> Option<usize> {
        match self {
            Part::Answer { rank, .. } | Part::Welcome { rank, .. } => Some(*rank),
            Part::Call | Part::Proof { .. } => None,
        }
    }
}

/// What came of hearing somebody out.
enum Heard {
    /// Nothing yet, or not all.
    More,
    Done(usize),
    /// Not one of the job's, or gone.
    Stranger(std::io::Error),
}

/// Makes a connection to every other rank, or, unless `has_far`, to every neighbour.
pub(super) fn meet(
    wait: &Wait<'_>,
    cards: &[Card],
    near: &[usize],
    has_far: bool,
    doors: &Doors,
    file: &OwnedFd,
) -> Result<Vec<Option<Met>>> {
    let met = (0..cards.len()).map(|_| None).collect();
    let mut meeting = Meeting { wait, cards, near, has_far, doors, file, met, talks: Vec::new() };
    for rank in (0..wait.b.rank).filter(|rank| has_far || near.contains(rank)) {
        let talk = meeting.call(rank, 1)?;
        meeting.talks.push(talk);
    }
    let spoken = wait.begin(meeting.missing());
    while (0..cards.len()).any(|rank| rank != wait.b.rank && meeting.lacks(rank)) {
        spoken.now_for(meeting.missing());
        meeting.turn()?;
    }
    Ok(meeting.met)
}

struct Meeting<'a> {
    wait: &'a Wait<'a>,
    cards: &'a [Card],
    near: &'a [usize],
    has_far: bool,
    doors: &'a Doors,
    file: &'a OwnedFd,
    met: Vec<Option<Met>>,
    talks: Vec<Talk>,
}

impl Meeting<'_> {
    /// Whether a connection to another rank is wanted and not there.
    fn lacks(&self, rank: usize) -> bool {
        self.met[rank].is_none() && (self.has_far || self.near.contains(&rank))
    }

    fn missing(&self) -> String {
        let own = self.wait.b.rank;
        let unmet = |ranks: std::ops::Range<usize>| ranks.filter(|r| self.lacks(*r));
        match unmet(own + 1..self.met.len()).next() {
            Some(_) => names(unmet(own + 1..self.met.len())) + " to connect",
            None => names(unmet(0..own)) + " to answer",
        }
    }

    fn place(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.cards[rank].place())
    }

    /// Calls a rank. A call goes through before anybody answers it, so nobody waits in a circle.
    fn call(&self, rank: usize, call: u32) -> Result<Talk> {
        let (b, is_near) = (self.wait.b, self.near.contains(&rank));
        let failed = |e: std::io::Error| {
            self.wait.kept(&format!("rank {} cannot reach {}", b.rank, self.place(rank)), &e)
        };
        let left = self.wait.next(|| names([rank]))?.max(Duration::from_secs(1));
        let left = left.max(self.wait.left());
        let socket: OwnedFd = if is_near {
            UnixAddr::from_abstract_name(&self.cards[rank].near)
                .and_then(|a| UnixStream::connect_addr(&a))
                .map_err(failed)?
                .into()
        } else {
            via::connect(&self.cards[rank].far, b.via.as_ref(), left).map_err(failed)?.into()
        };
        rustix::io::ioctl_fionbio(&socket, true).map_err(|e| failed(e.into()))?;
        let nonce = random()?;
        let ranks = [b.rank, rank].map(|r| (r as u32).to_le_bytes());
        match say(&socket, &[&MAGIC[..], &ranks.concat(), &nonce].concat(), None) {
            Err(_) if call < CALLS => return self.call(rank, call + 1),
            said => said.map_err(failed)?,
        }
        Ok(Talk::new(socket, is_near, Part::Answer { rank, nonce, call }))
    }

    /// Hears everybody who has something to say, and lets in those who are new at the doors.
    fn turn(&mut self) -> Result<()> {
        let slice = self.wait.next(|| self.missing())?;
        let mut polled =
            vec![PollFd::new(&self.doors.near, PollFlags::IN), PollFd::new(&self.doors.far, PollFlags::IN)];
        polled.extend(self.talks.iter().map(|talk| PollFd::new(&talk.socket, PollFlags::IN)));
        let _ = rustix::event::poll(&mut polled, Some(&timespec(slice)));
        let ready: Vec<bool> = polled.iter().map(|p| !p.revents().is_empty()).collect();
        drop(polled);
        let talks = std::mem::take(&mut self.talks);
        for (mut talk, is_ready) in talks.into_iter().zip(&ready[2..]) {
            match if *is_ready { self.hear(&mut talk)? } else { Heard::More } {
                Heard::More => self.talks.push(talk),
                Heard::Done(rank) => self.welcome(rank, talk),
                Heard::Stranger(why) => self.lose(talk, why)?,
            }
        }
        if ready[0] || ready[1] { self.admit() } else { Ok(()) }
    }

    /// Takes in who is at the doors.
    fn admit(&mut self) -> Result<()> {
        loop {
            let near = self.doors.near.accept().map(|(stream, _)| (OwnedFd::from(stream), true));
            let caller = near.or_else(|_| {
                let (stream, _) = self.doors.far.accept()?;
                stream.set_nodelay(true)?;
                Ok((stream.into(), false))
            });
            let (socket, is_near) = match caller {
                Ok(caller) => caller,
                Err(e) if is_out_of_files(&e) && self.drop_stranger(SILENT) => continue,
                Err(e) if is_out_of_files(&e) => {
                    return Err(os_error(&format!("rank {} answers other ranks", self.wait.b.rank), &e));
                }
                // Nobody more, or somebody who has left again.
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => continue,
            };
            if rustix::io::ioctl_fionbio(&socket, true).is_err() {
                continue;
            }
            if self.talks.iter().filter(|talk| talk.part.called().is_none()).count() >= MAX_STRANGERS {
                self.drop_stranger(Duration::ZERO);
            }
            self.talks.push(Talk::new(socket, is_near, Part::Call));
        }
    }

    /// Makes room by one caller that has been here for so long and not said who it is: one that says nothing, if there is
    /// any, the oldest.
    fn drop_stranger(&mut self, at_least: Duration) -> bool {
        let is_stranger = |talk: &Talk| matches!(talk.part, Part::Call) && talk.since.elapsed() >= at_least;
        let silent = self.talks.iter().position(|talk| is_stranger(talk) && talk.got == 0);
        let any = silent.or_else(|| self.talks.iter().position(is_stranger));
        any.map(|at| self.talks.remove(at)).is_some()
    }

    /// Hears one out as far as it has spoken, and answers.
    fn hear(&self, talk: &mut Talk) -> Result<Heard> {
        match talk.hear() {
            Ok(true) => {}
            Ok(false) => return Ok(Heard::More),
            Err(e) if is_out_of_files(&e) => {
                return Err(os_error(&format!("rank {} answers other ranks", self.wait.b.rank), &e));
            }
            Err(e) => return Ok(Heard::Stranger(e)),
        }
        let foreign = || Ok(Heard::Stranger(std::io::Error::other("not a rank of this job")));
        let (own, heard) = (self.wait.b.rank, talk.heard);
        talk.got = 0;
        if !matches!(talk.part, Part::Proof { .. }) && !heard.starts_with(&MAGIC) {
            return foreign();
        }
        let rest = &heard[MAGIC.len()..talk.part.bytes().max(MAGIC.len())];
        let (said, next) = match &talk.part {
            Part::Call => {
                let (ranks, theirs) = rest.split_at(8);
                let number =
                    |at: usize| ranks[at..at + 4].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
                let rank = number(0);
                let is_expected = rank > own && rank < self.met.len() && self.lacks(rank);
                if !is_expected || number(4) != own || talk.is_near != self.near.contains(&rank) {
                    return foreign();
                }
                let nonce: [u8; NONCE_BYTES] = random()?;
                let key = self.key([rank, own], talk.is_near, [theirs, &nonce]);
                let proof = key.prove("door", &[]);
                (say(&talk.socket, &[&MAGIC[..], &nonce, &proof].concat(), None), Part::Proof { rank, key })
            }
            Part::Answer { rank, nonce, .. } => {
                let (theirs, proof) = rest.split_at(NONCE_BYTES);
                let key = self.key([own, *rank], talk.is_near, [nonce, theirs]);
                if !is_proof(&key, proof, "door") {
                    return foreign();
                }
                let file = talk.is_near.then_some(self.file);
                let said = say(&talk.socket, &key.prove("caller", &[]), file);
                (said, Part::Welcome { rank: *rank, key })
            }
            Part::Proof { rank, key } => {
                if !is_proof(key, &heard[..KEY_BYTES], "caller")
                    || self.met[*rank].is_some()
                    || talk.file.is_some() != talk.is_near
                {
                    return foreign();
                }
                let doing = || format!("{} hung up on rank {own}", self.place(*rank));
                say(&talk.socket, &MAGIC, talk.is_near.then_some(self.file))
                    .map_err(|e| self.wait.kept(&doing(), &e))?;
                return Ok(Heard::Done(*rank));
            }
            Part::Welcome { rank, .. } => {
                return if talk.file.is_some() == talk.is_near { Ok(Heard::Done(*rank)) } else { foreign() };
            }
        };
        match said {
            Ok(()) => talk.part = next,
            Err(e) => return Ok(Heard::Stranger(e)),
        }
        Ok(Heard::More)
    }

    fn welcome(&mut self, rank: usize, talk: Talk) {
        let is_caller = talk.part.called().is_some();
        let (Part::Welcome { key, .. } | Part::Proof { key, .. }) = talk.part else { return };
        // What two processes of one host say to each other, nobody else can change.
        let is_bare = cfg!(feature = "bench-untagged") && self.wait.b.session.starts_with("untagged");
        let seals = (!talk.is_near && !is_bare).then(|| Seals::new(&key, is_caller));
        self.met[rank] = Some(Met { socket: talk.socket, memory: talk.file, seals });
    }

    /// A conversation has ended early. Strangers are none of ours; a rank that was called is missed, by name.
    fn lose(&mut self, talk: Talk, why: std::io::Error) -> Result<()> {
        let Some(rank) = talk.part.called() else { return Ok(()) };
        let (Part::Answer { call, .. }, true) = (talk.part, why.kind() != ErrorKind::Other) else {
            let doing = format!("{} did not answer rank {}", self.place(rank), self.wait.b.rank);
            return Err(self.wait.kept(&doing, &why));
        };
        if call == CALLS {
            let doing = format!("{} did not answer rank {}", self.place(rank), self.wait.b.rank);
            return Err(self.wait.kept(&doing, &why));
        }
        let again = self.call(rank, call + 1)?;
        self.talks.push(again);
        Ok(())
    }

    /// The key of a connection: of the job's secret and all that both sides must agree on.
    fn key(&self, ranks: [usize; 2], is_near: bool, nonces: [&[u8]; 2]) -> Key {
        let [caller, door] = ranks.map(|rank| self.cards[rank].token.to_le_bytes());
        let numbers = ranks.map(|rank| (rank as u64).to_le_bytes());
        let parts = [
            &MAGIC[..],
            self.wait.b.session.as_bytes(),
            &numbers[0],
            &numbers[1],
            &caller,
            &door,
            &[u8::from(is_near)],
            nonces[0],
            nonces[1],
        ];
        self.wait.b.store.secret().derive("door", &parts)
    }
}

fn is_proof(key: &Key, proof: &[u8], purpose: &str) -> bool {
    proof.try_into().is_ok_and(|proof: &[u8; KEY_BYTES]| key.is_proof(proof, purpose, &[]))
}

impl Talk {
    fn new(socket: OwnedFd, is_near: bool, part: Part) -> Talk {
        Talk { socket, is_near, heard: [0; LONGEST], got: 0, file: None, part, since: Instant::now() }
    }

    /// Reads what there is of the part that is to come, and no byte beyond; whether it is whole.
    fn hear(&mut self) -> std::io::Result<bool> {
        let bytes = self.part.bytes();
        while self.got < bytes {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let parts = &mut [IoSliceMut::new(&mut self.heard[self.got..bytes])];
            let message =
                match rustix::net::recvmsg(&self.socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                    Ok(message) => message,
                    Err(Errno::AGAIN) => return Ok(false),
                    Err(Errno::INTR) => continue,
                    Err(e) => return Err(e.into()),
                };
            let takes_file = self.is_near && matches!(self.part, Part::Proof { .. } | Part::Welcome { .. });
            if message.flags.contains(ReturnFlags::CTRUNC) && takes_file {
                // A file came and could not be opened here.
                return Err(Errno::MFILE.into());
            }
            if message.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.got += message.bytes;
            for part in control.drain() {
                if let RecvAncillaryMessage::ScmRights(mut files) = part {
                    self.file = self.file.take().or(files.next().filter(|_| takes_file));
                }
            }
        }
        Ok(true)
    }
}

/// Says something short, which always fits the buffer of a fresh socket, and hands over control memory.
fn say(socket: &OwnedFd, bytes: &[u8], file: Option<&OwnedFd>) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().map(AsFd::as_fd).collect();
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}
