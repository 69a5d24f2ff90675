//! The other nodes as the agent sees them: none, or behind a rendezvous.

use crate::net::{self, ReservedPort};
use crate::options::{Backend, Options};
use crate::rendezvous::{Driver, Setup};
use crate::secret::Trust;
use crate::signals::Signals;
use comm::StoreServer;
use elastic::rendezvous::{Closed, Member, News, NodeId, Offer, Rules, Seat, Wish};
use rustix::event::Timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::BorrowedFd;
use spec::{Error, Result};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// torchrun's default ports.
const STATIC_PORT: u16 = 29500;
const DYNAMIC_PORT: u16 = 29400;

/// Tells the agents of this process apart, so that several can take part in one job.
static SERIAL: AtomicU32 = AtomicU32::new(0);

/// The nodes of the job.
pub(super) enum Group {
    Single(Single),
    Many(Many),
}

/// What came of waiting for the others to be done.
pub(super) enum Finished {
    Done(Closed),
    Signal(i32),
    Regroup(String),
}

impl Group {
    pub(super) fn start(
        options: &Options,
        nproc: usize,
        run_id: &str,
        trust: &Trust,
        bind: Option<IpAddr>,
    ) -> Result<Group> {
        if options.is_single() {
            Single::start(options, trust).map(Group::Single)
        } else {
            Many::start(options, nproc, run_id, trust, bind).map(Group::Many)
        }
    }

    /// `host:port` of the agents' store, for the workers.
    pub(super) fn store(&self) -> String {
        match self {
            Group::Single(one) => one.server.addr().to_string(),
            Group::Many(many) => many.driver.endpoint(),
        }
    }

    /// Becomes readable when another node has something to say.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Group::Single(_) => None,
            Group::Many(many) => Some(many.driver.fd()),
        }
    }

    /// What there is to know of the round, if anything.
    pub(super) fn news(&mut self) -> Option<Result<News>> {
        match self {
            Group::Single(one) => one.given_seat.take().map(|seat| Ok(News::Seated(seat))),
            Group::Many(many) => {
                let news = many.driver.news();
                if let Some(Ok(News::Seated(seat))) = &news {
                    many.round = seat.round;
                }
                news
            }
        }
    }

    /// Whether there is news that no descriptor tells of.
    pub(super) fn has_news(&self) -> bool {
        matches!(self, Group::Single(one) if one.given_seat.is_some())
    }

    /// Asks for a place for `nproc` workers in the next round; it comes as news. Some may go on from the last one.
    pub(super) fn ask(&mut self, nproc: usize, keeps: bool) -> Result<()> {
        match self {
            Group::Single(one) => one.given_seat = Some(one.seat(nproc, keeps)?),
            Group::Many(many) => {
                // A port is offered before it is known whether this node becomes group rank 0.
                let reserved = ReservedPort::any()?;
                many.driver.wish(Wish::Join, Some(Offer { master_port: reserved.port, nproc }));
                many.reserved = Some(reserved);
            }
        }
        Ok(())
    }

    /// Tells the other nodes that the workers can recover, and whether they have done a step in this round.
    pub(super) fn note(&self, stepped: bool) {
        if let Group::Many(many) = self {
            many.driver.note(stepped.then_some(many.round));
        }
    }

    /// How long a node may be gone before the others are told.
    pub(super) fn silence(&self) -> Duration {
        match self {
            Group::Single(_) => Duration::ZERO,
            Group::Many(many) => many.dead_after,
        }
    }

    /// Says that this node's workers have succeeded, and waits for the others'.
    pub(super) fn finish(&mut self, signals: &Signals, stopping: &[i32]) -> Result<Finished> {
        let Group::Many(many) = self else { return Ok(Finished::Done(Closed::Succeeded)) };
        match many.settle(Wish::Finish(many.round), signals, stopping, None)? {
            Heard::Signal(signal) => Ok(Finished::Signal(signal)),
            Heard::News(News::Closed(closed)) => Ok(Finished::Done(closed)),
            Heard::News(news) => Ok(Finished::Regroup(words(&news))),
            Heard::Nothing => Err(Error::failure("the rendezvous fell silent")),
        }
    }

    /// Calls for a new round after a failure; says so if the job was closed meanwhile.
    pub(super) fn regroup(&mut self, why: &str, signals: &Signals) -> Result<Option<Closed>> {
        let Group::Many(many) = self else { return Ok(None) };
        let wish = Wish::Regroup(many.round, why.to_owned());
        match many.settle(wish, signals, &[], None)? {
            Heard::News(News::Closed(closed)) => Ok(Some(closed)),
            _ => Ok(None),
        }
    }

    /// Ends the job for all nodes; waits a bounded time for them to see it. Errors have nobody to go to any more.
    pub(super) fn close(&mut self, why: &str, signals: &Signals) {
        self.part_with(Wish::Close(why.to_owned()), signals);
    }

    /// Goes, so that the others can go on without this node at once.
    pub(super) fn leave(&mut self, why: &str, signals: &Signals) {
        self.part_with(Wish::Leave(why.to_owned()), signals);
    }

    fn part_with(&mut self, wish: Wish, signals: &Signals) {
        if let Group::Many(many) = self {
            let until = Some(Instant::now() + many.close_timeout);
            let _ = many.settle(wish, signals, &[], until);
        }
    }
}

/// This node alone.
pub(super) struct Single {
    given_seat: Option<Seat>,
    /// The port that the user asked for; else each round gets a free one, so that a worker that clings to the last
    /// one does no harm.
    given: Option<u16>,
    reserved: Option<ReservedPort>,
    master_addr: String,
    round: u64,
    server: StoreServer,
}

impl Single {
    fn start(options: &Options, trust: &Trust) -> Result<Single> {
        let server = StoreServer::start_with(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), &trust.secret)?;
        let given = options.master_port.filter(|_| !options.standalone);
        let master_addr = options.local_addr.clone().unwrap_or_else(|| options.master_addr.clone());
        Ok(Single { given_seat: None, given, reserved: None, master_addr, round: 0, server })
    }

    fn seat(&mut self, nproc: usize, keeps: bool) -> Result<Seat> {
        // The old reservation goes first: a given port is reserved anew.
        self.reserved = None;
        let reserved = match self.given.map_or_else(ReservedPort::any, ReservedPort::at) {
            // A worker that goes on may have it still; the new ones take another.
            Err(_) if keeps => ReservedPort::any()?,
            reserved => reserved?,
        };
        let master_port = reserved.port;
        self.reserved = Some(reserved);
        let round = self.round;
        self.round += 1;
        Ok(Seat {
            round,
            group_rank: 0,
            group_world: 1,
            base_rank: 0,
            world: nproc,
            role_base_rank: 0,
            role_world: nproc,
            master_addr: self.master_addr.clone(),
            master_port,
            nodes: vec![net::host_name()],
        })
    }
}

/// This node and others.
pub(super) struct Many {
    driver: Driver,
    close_timeout: Duration,
    dead_after: Duration,
    round: u64,
    reserved: Option<ReservedPort>,
    /// Last in order, so that the driver's connections go first.
    _server: Option<StoreServer>,
}

enum Heard {
    Signal(i32),
    News(News),
    Nothing,
}

impl Many {
    fn start(
        options: &Options,
        nproc: usize,
        run_id: &str,
        trust: &Trust,
        bind: Option<IpAddr>,
    ) -> Result<Many> {
        let is_static = options.backend == Backend::Static;
        let (host, port) = match (&options.endpoint, is_static) {
            (Some(endpoint), true) => net::split_endpoint(endpoint, STATIC_PORT)?,
            (Some(endpoint), false) => net::split_endpoint(endpoint, DYNAMIC_PORT)?,
            (None, _) => (options.master_addr.clone(), options.master_port.unwrap_or(STATIC_PORT)),
        };
        trust.check(&host, port)?;
        let must_host = options.is_host.or(is_static.then_some(options.node_rank == 0));
        let server = host_store(&host, port, must_host, trust, bind)?;
        let port = server.as_ref().map_or(port, |s| s.addr().port());
        let endpoint = net::join_endpoint(&host, port);
        let chosen = bind.filter(|ip| !ip.is_unspecified()).map(|ip| ip.to_string());
        let addr = options.local_addr.clone().or(chosen).unwrap_or_default();
        if !addr.is_empty() {
            // This agent listens there too: the store may move to it.
            trust.check(&addr, port)?;
        }
        let id = NodeId {
            node_rank: options.node_rank,
            addr,
            pid: std::process::id(),
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
        };
        let me = Member {
            id,
            host: net::host_name(),
            nproc,
            role: options.role.clone(),
            master_port: 0,
            door: 0,
            standby: 0,
        };
        let driver = Driver::start(Setup {
            endpoint,
            secret: trust.secret.clone(),
            bind,
            run_id: run_id.to_owned(),
            me,
            rules: Rules { min: options.min_nodes, max: options.max_nodes, is_static },
            times: options.times,
            patient: options.max_restarts > 0,
            is_host: server.is_some(),
            interval: options.monitor_interval,
        })?;
        let (close_timeout, dead_after) = (options.times.close, options.times.dead_after());
        Ok(Many { driver, close_timeout, dead_after, round: 0, reserved: None, _server: server })
    }

    /// Wishes and waits for the answer: that the round or the job is over, or that this node has left.
    fn settle(
        &self,
        wish: Wish,
        signals: &Signals,
        stopping: &[i32],
        until: Option<Instant>,
    ) -> Result<Heard> {
        self.driver.wish(wish, None);
        loop {
            match self.hear(signals, stopping, until)? {
                Heard::News(News::Seated(_)) => {}
                heard => return Ok(heard),
            }
        }
    }

    /// Waits for a signal of `stopping` or for news; the rendezvous thread has deadlines of its own.
    fn hear(&self, signals: &Signals, stopping: &[i32], until: Option<Instant>) -> Result<Heard> {
        loop {
            while let Some(signal) = signals.next() {
                if stopping.contains(&signal) {
                    return Ok(Heard::Signal(signal));
                }
            }
            match self.driver.news() {
                Some(Ok(News::Refused(what, hint))) => return Err(Error::failure(what).hint(hint)),
                Some(news) => return news.map(Heard::News),
                None => {}
            }
            let left = until.map(|u| u.saturating_duration_since(Instant::now()));
            if left.is_some_and(|l| l.is_zero()) {
                return Ok(Heard::Nothing);
            }
            let mut fds = [
                PollFd::from_borrowed_fd(signals.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.driver.fd(), PollFlags::IN),
            ];
            wait_for(&mut fds, left)?;
        }
    }
}

/// Polls; an interruption counts as a wake-up.
pub(super) fn wait_for(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<()> {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(Error::failure(format!("wait for the workers: {e}"))),
    }
}

fn words(news: &News) -> String {
    match news {
        News::Regroup(why) | News::Closed(Closed::Failed(why)) => why.clone(),
        _ => "the nodes meet again".to_owned(),
    }
}

/// Starts the job's store if this node is to have it: `must` says so, or else the endpoint is this machine's and its
/// port is free.
fn host_store(
    host: &str,
    port: u16,
    must: Option<bool>,
    trust: &Trust,
    bind: Option<IpAddr>,
) -> Result<Option<StoreServer>> {
    if must == Some(false) || (must.is_none() && !net::is_local(host)) {
        return Ok(None);
    }
    let ip = match (bind, host.parse()) {
        (Some(ip), _) | (None, Ok(ip)) => ip,
        (None, Err(_)) => net::bindable(host, port),
    };
    let bind = SocketAddr::new(ip, port);
    let free = TcpListener::bind(bind).map(drop);
    match free {
        Ok(()) => match StoreServer::start_with(bind, &trust.secret) {
            Ok(server) => Ok(Some(server)),
            Err(_) if must.is_none() => Ok(None),
            Err(e) => Err(e),
        },
        // Another agent of this machine has it.
        Err(e) if must.is_none() && e.kind() == std::io::ErrorKind::AddrInUse => Ok(None),
        Err(e) => Err(Error::user(format!("this node is to run the job's store at {bind}: {e}")).hint(
            match e.kind() {
                std::io::ErrorKind::AddrInUse => "another job may use the port: give all nodes another one",
                _ => "the address must be one of this machine's; the other nodes take another --node-rank or is_host=0",
            },
        )),
    }
}
