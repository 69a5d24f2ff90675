//! How ranks that are processes find each other: cards in the store, then a connection for every pair.

mod door;
mod via;

use crate::awake::Awake;
use crate::control::{CONTROL_BYTES, Control, MAX_LOCAL};
use crate::inner::{Core, Failure, Near, Peer, Transport};
use crate::link::{Io, Line, Way};
use crate::memory::Mapping;
use crate::mpi::Mpi;
use crate::mpi::pipes::Pipes;
use crate::os::{is_out_of_files, os_error, raise_file_limit};
use crate::seal::Seals;
use crate::secret::random;
use crate::waiting::Waiting;
use crate::world::{Bootstrap, TransportChoice, patience};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use spec::{Error, Result};
use std::cell::Cell;
use std::net::{SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a rank that waits for others looks whether one of them has given up.
const LOOK: Duration = Duration::from_millis(250);
/// What may lie between two looks, where the store is slow.
const LONGEST_LOOK: Duration = Duration::from_secs(20);
/// How often it looks which of them are missing, which costs the store more.
const LOOK_FOR_MISSING: Duration = Duration::from_secs(2);

/// Identifies this host among the hosts of a job: its name, its boot, and its network namespace. Ranks for which it
/// is equal can share memory.
pub fn host_id() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_string();
    let name = read("/proc/sys/kernel/hostname");
    let boot = read("/proc/sys/kernel/random/boot_id");
    let net = std::fs::read_link("/proc/self/ns/net").map(|p| p.display().to_string()).unwrap_or_default();
    let net: String = net.chars().filter(char::is_ascii_digit).collect();
    format!("{name}/{}-{net}", boot.get(..8).unwrap_or("unknown"))
}

/// What a rank tells the others through the store.
#[derive(Clone, Debug, PartialEq)]
struct Card {
    fingerprint: u128,
    host: String,
    pid: u32,
    /// Name of the Unix socket, in the abstract namespace: it leaves nothing behind.
    near: String,
    far: SocketAddr,
    /// Part of the proofs of those who connect, so that they hold for this card alone.
    token: u128,
    mpi: HasMpi,
}

/// What a rank can do over MPI, as its card says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HasMpi {
    No,
    /// It can start it, together with all others.
    Can,
    /// It was told to use nothing else.
    Must,
}

impl HasMpi {
    const ALL: [(HasMpi, &str); 3] = [(HasMpi::No, "no"), (HasMpi::Can, "can"), (HasMpi::Must, "must")];

    fn of(b: &Bootstrap) -> HasMpi {
        match b.transport {
            TransportChoice::Mpi => HasMpi::Must,
            TransportChoice::Auto if b.has_mpi => HasMpi::Can,
            _ => HasMpi::No,
        }
    }
}

impl Card {
    fn encode(&self) -> String {
        let Card { fingerprint, host, pid, near, far, token, mpi } = self;
        let mpi = HasMpi::ALL.iter().find(|(has, _)| has == mpi).map_or("", |(_, word)| word);
        format!("{fingerprint:032x}\n{host}\n{pid}\n{near}\n{far}\n{token:032x}\n{mpi}")
    }

    fn decode(bytes: &[u8]) -> Option<Card> {
        let mut lines = std::str::from_utf8(bytes).ok()?.split('\n');
        Some(Card {
            fingerprint: u128::from_str_radix(lines.next()?, 16).ok()?,
            host: lines.next()?.into(),
            pid: lines.next()?.parse().ok()?,
            near: lines.next()?.into(),
            far: lines.next()?.parse().ok()?,
            token: u128::from_str_radix(lines.next()?, 16).ok()?,
            mpi: {
                let word = lines.next()?;
                HasMpi::ALL.iter().find(|(_, own)| *own == word)?.0
            },
        })
    }

    fn place(&self) -> String {
        format!("pid {} on {}", self.pid, self.host.split('/').next().unwrap_or(&self.host))
    }
}

pub(crate) fn connect(b: &Bootstrap) -> Result<Arc<Core>> {
    if b.rank >= b.world || b.world > crate::sum::MAX_RANKS {
        return Err(Error::user(format!("rank {} of {} ranks", b.rank, b.world))
            .hint(format!("ranks count from 0, and there are at most {}", crate::sum::MAX_RANKS)));
    }
    raise_file_limit();
    let gave_up = format!("{}/gave-up", b.session);
    join(b, &gave_up).inspect_err(|error| {
        // So that the others need not wait for their own deadlines. If the store is gone they know anyway.
        let _ = b.store.compare_set(&gave_up, None, format!("rank {}: {error}", b.rank));
    })
}

/// Ends the wait of all who are still about to meet in `session`, for a reason; where they have met, nothing happens.
///
/// # Errors
/// The store cannot be reached.
pub fn give_up(store: &crate::StoreClient, session: &str, why: &str) -> Result<()> {
    store.compare_set(&format!("{session}/gave-up"), None, why).map(|_| ())
}

fn join(b: &Bootstrap, gave_up: &str) -> Result<Arc<Core>> {
    let began = Instant::now();
    let wait = Wait { b, gave_up, began, awake: Cell::new(Awake::begin()) };
    let doors = Doors::open(b)?;
    let own = publish(b, &doors)?;
    let cards = collect(&wait, &own)?;
    check_fingerprints(b, &cards)?;
    let near = neighbours(b, &cards)?;
    let pipes = pipes(b, &cards)?;
    let (mapping, file) = Mapping::shared("phalanx-control", CONTROL_BYTES)?;
    let control = Control::new(Arc::new(mapping), false);
    let met = door::meet(&wait, &cards, &near, pipes.is_none(), &doors, &file)?;

    let mut lines = Vec::with_capacity(b.world);
    let mut peers = Vec::with_capacity(b.world);
    let mut hosts: Vec<&str> = Vec::new();
    for (rank, met) in met.into_iter().enumerate() {
        let index = near.iter().position(|&r| r == rank);
        let (line, memory) = match met {
            Some(Met { socket, memory, seals }) => (Some(Line { way: Way::Socket(socket), seals }), memory),
            None => {
                let pipes = pipes.clone().filter(|_| rank != b.rank);
                (pipes.map(|pipes| Line { way: Way::Mpi(pipes, rank), seals: None }), None)
            }
        };
        let theirs = match memory {
            Some(file) => {
                let mapping = Mapping::of_file(&file, CONTROL_BYTES)
                    .map_err(|e| e.context(format!("rank {rank} ({})", cards[rank].place())))?;
                Some(Control::new(Arc::new(mapping), false))
            }
            None if rank == b.rank => Some(control.clone()),
            None => None,
        };
        let host = match (b.transport, hosts.iter().position(|h| *h == cards[rank].host)) {
            (TransportChoice::Tcp | TransportChoice::Mpi, _) => rank,
            (_, Some(host)) => host,
            (_, None) => {
                hosts.push(&cards[rank].host);
                hosts.len() - 1
            }
        };
        peers.push(Peer {
            place: cards[rank].place(),
            host,
            transport: match (index, &pipes) {
                (Some(_), _) => Transport::Shm,
                (None, Some(_)) => Transport::Mpi,
                (None, None) => Transport::Tcp,
            },
            near: theirs.zip(index).map(|(control, index)| Near { control, index }),
        });
        lines.push(line);
    }
    let patience = patience(near.len().max(b.local_world));
    let core = Arc::new(Core::new(b.rank, b.timeout, patience, peers, Arc::new(Failure::default()))?);
    Io::start(&core, lines, pipes)?;
    Ok(core)
}

/// Waiting for other ranks while connecting.
struct Wait<'a> {
    b: &'a Bootstrap,
    gave_up: &'a str,
    began: Instant,
    awake: Cell<Awake>,
}

impl Wait<'_> {
    fn begin(&self, what: impl Into<String>) -> Waiting {
        Waiting::begin_at(self.began, format!("rank {} of {}", self.b.rank, self.b.world), what)
    }

    /// What kept this rank from another. One that is gone has a reason, and a moment to say it; without it the others
    /// would name the rank and not the cause.
    fn kept(&self, doing: &str, e: &std::io::Error) -> Error {
        const MOMENT: Duration = Duration::from_secs(1);
        let is_own = matches!(Errno::from_io_error(e), Some(Errno::MFILE | Errno::NFILE));
        let why = (!is_own).then(|| self.b.store.get(self.gave_up, MOMENT).ok()).flatten();
        why.map_or_else(|| os_error(doing, e), |why| did_not_start(&why))
    }

    fn left(&self) -> Duration {
        self.b.timeout.saturating_sub(self.awake.get().now())
    }

    /// The time until the next look; fails if the deadline has passed or a rank has given up.
    fn next(&self, missing: impl Fn() -> String) -> Result<Duration> {
        if let Some(why) = self.b.store.try_get(self.gave_up)? {
            return Err(did_not_start(&why));
        }
        let mut awake = self.awake.get();
        awake.paused(LONGEST_LOOK);
        self.awake.set(awake);
        let left = self.left();
        if left.is_zero() {
            return Err(Error::failure(format!(
                "rank {} of {} waited {:.1} s for {}",
                self.b.rank,
                self.b.world,
                self.b.timeout.as_secs_f64(),
                missing()
            ))
            .hint("check that every rank was started, with the same world size and rendezvous address"));
        }
        Ok(left.min(LOOK))
    }
}

fn did_not_start(why: &[u8]) -> Error {
    Error::failure(format!("the job did not start: {}", String::from_utf8_lossy(why)))
}

fn names(ranks: impl IntoIterator<Item = usize>) -> String {
    const SHOWN: usize = 8;
    let ranks: Vec<usize> = ranks.into_iter().collect();
    let shown: Vec<String> = ranks.iter().take(SHOWN).map(|r| format!("rank {r}")).collect();
    let more = ranks.len().saturating_sub(SHOWN);
    shown.join(", ") + &if more > 0 { format!(" and {more} more") } else { String::new() }
}

fn key(b: &Bootstrap, rank: usize) -> String {
    format!("{}/rank/{rank}", b.session)
}

/// Puts this rank's card into the store, where there must not be another one.
fn publish(b: &Bootstrap, doors: &Doors) -> Result<Card> {
    let own = Card {
        fingerprint: u128::from_be_bytes(b.fingerprint),
        host: b.host.replace('\n', " "),
        pid: std::process::id(),
        near: doors.name.clone(),
        far: doors.far.local_addr().map_err(|e| Error::failure(format!("listen for other ranks: {e}")))?,
        token: u128::from_le_bytes(random()?),
        mpi: HasMpi::of(b),
    };
    let there = b.store.compare_set(&key(b, b.rank), None, own.encode())?;
    if there == own.encode().as_bytes() {
        return Ok(own);
    }
    let other = Card::decode(&there).map_or_else(|| "another process".into(), |card| card.place());
    Err(Error::user(format!("rank {} of session {} was already taken by {other}", b.rank, b.session))
        .hint("give every process a rank of its own, and every job a session of its own"))
}

fn collect(wait: &Wait<'_>, own: &Card) -> Result<Vec<Card>> {
    let b = wait.b;
    let keys: Vec<String> = (0..b.world).map(|rank| key(b, rank)).collect();
    let missing = || {
        let there = b.store.keys(&format!("{}/rank/", b.session)).unwrap_or_default();
        let is_here = |rank: &usize| there.contains(&keys[*rank]);
        (names((0..b.world).filter(|rank| !is_here(rank))) + " to come", (0..b.world).find(is_here))
    };
    let mut spoken: Option<Waiting> = None;
    let mut looked = Instant::now();
    loop {
        let slice = wait.next(|| missing().0)?;
        if b.store.wait(&keys, slice).is_ok() {
            break;
        }
        if looked.elapsed() < LOOK_FOR_MISSING {
            continue;
        }
        looked = Instant::now();
        let (missing, first) = missing();
        let what = format!("{missing} to the store at {}", b.store.addr());
        // One rank speaks for all.
        match &spoken {
            _ if first != Some(b.rank) => spoken = None,
            Some(spoken) => spoken.now_for(what),
            None => spoken = Some(wait.begin(what)),
        }
    }
    drop(spoken);
    let card = |rank: usize| {
        if rank == b.rank {
            return Ok(own.clone());
        }
        let bytes = b.store.get(&keys[rank], LOOK)?;
        Card::decode(&bytes)
            .ok_or_else(|| Error::failure(format!("rank {rank} left a card that cannot be read")))
    };
    (0..b.world).map(card).collect()
}

fn check_fingerprints(b: &Bootstrap, cards: &[Card]) -> Result<()> {
    let Some(other) = cards.iter().position(|c| c.fingerprint != cards[0].fingerprint) else { return Ok(()) };
    let show = |rank: usize| {
        let short = format!("{:032x}", cards[rank].fingerprint);
        format!("rank {rank} ({}) has {}", cards[rank].place(), &short[..8])
    };
    Err(Error::user(format!(
        "ranks of session {} were started with different configurations or binaries: {}, {}",
        b.session,
        show(0),
        show(other)
    ))
    .hint("start all ranks from one binary, with the same run file and overrides"))
}

/// Pipes of MPI, if those who share no memory are to talk over it: it is started then, by all ranks alike.
fn pipes(b: &Bootstrap, cards: &[Card]) -> Result<Option<Arc<Pipes>>> {
    let must = |rank: usize| cards[rank].mpi == HasMpi::Must;
    if let (Some(one), Some(other)) =
        ((0..cards.len()).find(|r| must(*r)), (0..cards.len()).find(|r| !must(*r)))
    {
        return Err(Error::user(format!(
            "rank {one} ({}) was told to use MPI alone, rank {other} ({}) was not",
            cards[one].place(),
            cards[other].place()
        ))
        .hint("give all ranks the same --transport"));
    }
    let is_one_host = cards.iter().all(|c| c.host == cards[0].host);
    let wanted = must(0) || !is_one_host && cards.iter().all(|c| c.mpi == HasMpi::Can);
    if !wanted || cards.len() == 1 {
        return Ok(None);
    }
    let mpi = Mpi::start(b.timeout)?;
    mpi.check(b.rank, b.world)?;
    Ok(Some(Arc::new(Pipes::new(mpi)?)))
}

/// The ranks that share memory with this one, itself included, ascending.
fn neighbours(b: &Bootstrap, cards: &[Card]) -> Result<Vec<usize>> {
    let same = |rank: &usize| cards[*rank].host == cards[b.rank].host;
    match b.transport {
        TransportChoice::Tcp | TransportChoice::Mpi => return Ok(vec![b.rank]),
        TransportChoice::Shm => {
            if let Some(other) = (0..b.world).find(|rank| !same(rank)) {
                return Err(Error::user(format!(
                    "transport shm: rank {} is {}, but rank {other} is {}",
                    b.rank,
                    cards[b.rank].place(),
                    cards[other].place()
                ))
                .hint("use transport auto or tcp for ranks on several hosts"));
            }
        }
        TransportChoice::Auto => {}
    }
    let near: Vec<usize> = (0..b.world).filter(same).collect();
    if near.len() > MAX_LOCAL {
        return Err(Error::user(format!("{} ranks on one host, expected at most {MAX_LOCAL}", near.len())));
    }
    Ok(near)
}

/// Where other ranks knock.
struct Doors {
    near: UnixListener,
    name: String,
    far: TcpListener,
}

impl Doors {
    fn open(b: &Bootstrap) -> Result<Doors> {
        let name = format!("phalanx-{:016x}-{}", u64::from_le_bytes(random()?), b.rank);
        let ip = b.bind.unwrap_or_else(|| b.store.local_ip());
        let failed = |e: std::io::Error| {
            let error = os_error(&format!("listen for other ranks on {ip}"), &e);
            if is_out_of_files(&e) {
                error
            } else {
                error.hint("give an address of this host that the others can reach")
            }
        };
        let near =
            UnixAddr::from_abstract_name(&name).and_then(|a| UnixListener::bind_addr(&a)).map_err(failed)?;
        let far = TcpListener::bind((ip, 0)).map_err(failed)?;
        near.set_nonblocking(true).map_err(failed)?;
        far.set_nonblocking(true).map_err(failed)?;
        Ok(Doors { near, name, far })
    }
}

/// A connection to another rank, and its control memory if it is a neighbour.
struct Met {
    socket: OwnedFd,
    memory: Option<OwnedFd>,
    seals: Option<Seals>,
}

fn timespec(t: Duration) -> rustix::event::Timespec {
    rustix::event::Timespec { tv_sec: t.as_secs() as i64, tv_nsec: i64::from(t.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzzed_cards_are_refused_or_read() {
        let card = Card {
            fingerprint: 7,
            host: "head/1234-5".into(),
            pid: 12,
            near: "phalanx-1-0".into(),
            far: "10.0.0.1:4000".parse().unwrap(),
            token: u128::MAX,
            mpi: HasMpi::Can,
        };
        let good = vec![card.encode().into_bytes()];
        crate::fuzz_test::fuzz(
            "cards",
            &good,
            &["/", "\n"],
            |input| input,
            |input| Card::decode(input).is_some_and(|card| !card.place().is_empty()),
        );
    }
}
