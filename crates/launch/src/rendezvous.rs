//! Carries the protocol out: a thread that reads and writes the store and keeps time for [`Node::step`].

use crate::door::Doors;
use crate::heir::Standby;
use comm::{Awake, Secret, StoreClient, Tries, Waiting};
use elastic::rendezvous::{Action, Agreed, Member, News, Node, NodeId, Offer, Rules, Times, Wish};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use spec::{Error, Result};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Writes that lose against another node's in a row before the thread takes a breath.
const WRITES_IN_A_ROW: usize = 16;
/// One attempt to reach the store, so that the end of the agent is noticed between two.
const CONNECT_SLICE: Duration = Duration::from_secs(1);
/// What a turn may take, whose calls of the store have deadlines of their own.
const LONGEST_TURN: Duration = Duration::from_secs(30);
/// Added to the pause between two looks for each node, so that the store's load does not grow with their square.
const PAUSE_PER_NODE: Duration = Duration::from_micros(500);

/// What the thread needs to know.
pub(crate) struct Setup {
    /// `host:port` of the store.
    pub(crate) endpoint: String,
    /// What those who may use the store hold.
    pub(crate) secret: Secret,
    /// Where to listen, if that was chosen; else at this node's address.
    pub(crate) bind: Option<IpAddr>,
    pub(crate) run_id: String,
    /// This node; an empty address is replaced by the one that reaches the store.
    pub(crate) me: Member,
    pub(crate) rules: Rules,
    pub(crate) times: Times,
    /// Whether to wait for another node in place of a lost one.
    pub(crate) patient: bool,
    /// Whether this agent runs the store.
    pub(crate) is_host: bool,
    /// Pause between two looks.
    pub(crate) interval: Duration,
}

/// What the agent tells the thread.
enum Word {
    Wish(Wish, Option<Offer>),
    /// The workers can recover, and the last round in which they did a step.
    Progress(Option<u64>),
}

/// The agent's handle on the thread. The thread ends when this is dropped.
pub(crate) struct Driver {
    wishes: Sender<Word>,
    news: Receiver<Result<News>>,
    wake: Arc<OwnedFd>,
    endpoint: Endpoint,
}

/// `host:port` of the store, which moves when its host dies.
type Endpoint = Arc<Mutex<String>>;

impl Driver {
    pub(crate) fn start(setup: Setup) -> Result<Driver> {
        let failed = |e: std::io::Error| Error::failure(format!("start the rendezvous: {e}"));
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = Arc::new(eventfd(0, flags).map_err(|e| failed(e.into()))?);
        let (wishes, wished) = channel();
        let (told, news) = channel();
        let teller = Teller { told: Some(told), wake: Arc::clone(&wake) };
        let endpoint = Arc::new(Mutex::new(setup.endpoint.clone()));
        let there = Arc::clone(&endpoint);
        let thread = move || {
            if let Err(error) = drive(setup, &wished, &teller, &there) {
                teller.tell(Err(error));
            }
        };
        std::thread::Builder::new().name("launch-rendezvous".into()).spawn(thread).map_err(failed)?;
        Ok(Driver { wishes, news, wake, endpoint })
    }

    /// Where the store is.
    pub(crate) fn endpoint(&self) -> String {
        self.endpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what the node wants.
    pub(crate) fn wish(&self, wish: Wish, offer: Option<Offer>) {
        // A thread that has ended left its error in the news.
        let _ = self.wishes.send(Word::Wish(wish, offer));
    }

    /// The workers can recover; those of the round `stepped` have done a step.
    pub(crate) fn note(&self, stepped: Option<u64>) {
        let _ = self.wishes.send(Word::Progress(stepped));
    }

    /// What came, if anything did. After an error nothing more comes.
    pub(crate) fn news(&self) -> Option<Result<News>> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.wake, &mut count);
        match self.news.try_recv() {
            Ok(news) => Some(news),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::failure("the rendezvous thread has ended"))),
        }
    }

    /// Becomes readable when there is news.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

struct Teller {
    told: Option<Sender<Result<News>>>,
    wake: Arc<OwnedFd>,
}

impl Teller {
    fn tell(&self, news: Result<News>) {
        if let Some(told) = &self.told {
            // The agent may be gone; then nobody wants to know.
            let _ = told.send(news);
        }
        self.wake();
    }

    fn wake(&self) {
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        // In this order: who wakes must find that nothing more comes.
        self.told = None;
        self.wake();
    }
}

/// The thread: until the agent drops its handle, or the store is lost.
fn drive(mut setup: Setup, wished: &Receiver<Word>, teller: &Teller, endpoint: &Endpoint) -> Result<()> {
    let mut early = Vec::new();
    let Some(client) = connect(&setup, wished, &mut early)? else { return Ok(()) };
    if setup.me.id.addr.is_empty() {
        setup.me.id.addr = client.local_ip().to_string();
    }
    let ip = setup.bind.or_else(|| crate::net::ip_of(&setup.me.id.addr));
    let doors = Doors::open(ip);
    let standby = Standby::open(ip, &setup.secret);
    (setup.me.door, setup.me.standby) = (doors.port(), standby.port());
    let prefix = format!("rdzv/{}", setup.run_id);
    let node = Node::new(setup.me.clone(), setup.rules, setup.times, setup.patient, setup.is_host);
    let mut seen =
        Seen { client, prefix, raw: None, shared: Agreed::default(), beats: Vec::new(), looked: None };
    let mut this = Thread {
        setup,
        clock: Awake::begin(),
        node,
        doors,
        standby,
        next_beat: Duration::ZERO,
        trouble: None,
        contact: Duration::ZERO,
    };
    early.into_iter().for_each(|word| this.hear(word));
    let mut spoken: Option<Waiting> = None;
    loop {
        match (this.node.waits_for(&seen.shared), &spoken) {
            (None, _) => spoken = None,
            (Some(what), Some(spoken)) => spoken.now_for(what),
            (Some(what), None) => spoken = Some(Waiting::begin("phalanx launch:", what)),
        }
        let pause =
            this.setup.interval.max(PAUSE_PER_NODE * u32::try_from(seen.shared.members.len()).unwrap_or(0));
        this.clock.pause();
        let wish = wished.recv_timeout(pause);
        this.clock.paused(pause);
        match wish {
            Ok(word) => this.hear(word),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        let turned = this.turn(&mut seen, teller);
        this.clock.paused(LONGEST_TURN);
        match turned {
            Ok(()) => (this.trouble, this.contact) = (None, this.clock.now()),
            Err(error) => {
                // What is lost on a closed job is no loss.
                if let Some(closed) = seen.shared.closed.take() {
                    teller.tell(Ok(News::Closed(closed)));
                    return Ok(());
                }
                let since = *this.trouble.get_or_insert(this.clock.now());
                let hope = this.follow(&mut seen, endpoint);
                let patience = this.setup.times.heartbeat * if hope { 2 } else { 1 };
                if this.clock.now().saturating_sub(since) >= patience {
                    return Err(error.context("the job's store is lost").hint(
                        "the node that runs it (--rdzv-endpoint or --master-addr) is gone or cannot be reached",
                    ));
                }
            }
        }
    }
}

/// Connects to the store within the join time; `None` if the agent has gone or goes meanwhile.
fn connect(setup: &Setup, wished: &Receiver<Word>, early: &mut Vec<Word>) -> Result<Option<StoreClient>> {
    let mut tries = Tries::begin();
    let most = setup.times.join.as_secs();
    let spoken =
        Waiting::begin("phalanx launch:", format!("the job's store at {}, {most} s at most", setup.endpoint));
    loop {
        let slice = CONNECT_SLICE.min(setup.times.join.saturating_sub(tries.spent()));
        match StoreClient::connect_again(&setup.endpoint, &setup.secret, slice, &mut tries) {
            Ok(client) => return Ok(Some(client)),
            Err(e) if e.kind() == spec::Kind::User => {
                return Err(e.context("rendezvous").hint("another program may use that port"));
            }
            Err(e) if tries.spent() >= setup.times.join => {
                let seconds = setup.times.join.as_secs_f64();
                return Err(e.context(format!(
                    "the node that runs the job's store did not come within {seconds:.0} s"
                )));
            }
            Err(e) => spoken.now_for(format!("the job's store, {most} s at most: {e}")),
        }
        loop {
            match wished.try_recv() {
                // Nobody knows of this node yet: it goes without a word.
                Ok(Word::Wish(Wish::Leave(_) | Wish::Close(_), _)) => return Ok(None),
                Ok(word) => early.push(word),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Ok(None),
            }
        }
    }
}

struct Thread {
    setup: Setup,
    node: Node,
    doors: Doors,
    standby: Standby,
    clock: Awake,
    next_beat: Duration,
    trouble: Option<Duration>,
    /// When the store was last reached.
    contact: Duration,
}

/// What was last seen in the store.
struct Seen {
    client: StoreClient,
    prefix: String,
    raw: Option<Vec<u8>>,
    shared: Agreed,
    beats: Vec<(NodeId, i64)>,
    looked: Option<Duration>,
}

impl Thread {
    fn hear(&mut self, word: Word) {
        match word {
            Word::Wish(wish, offer) => self.node.wish(wish, offer, self.clock.now()),
            Word::Progress(stepped) => self.node.note(stepped),
        }
    }

    /// The nodes whose agents have died, of those that this one has an eye on.
    fn dead(&mut self, shared: &Agreed) -> Vec<NodeId> {
        let mut watched = self.node.watched(shared);
        for id in Standby::line(shared).filter(|id| id != self.node.id()) {
            if !watched.contains(&id) {
                watched.push(id);
            }
        }
        self.doors.look(shared, &watched)
    }

    /// The store is not reached: if its host has died, it moves. Whether there is hope.
    fn follow(&mut self, seen: &mut Seen, endpoint: &Endpoint) -> bool {
        let dead = self.dead(&seen.shared);
        let mut memory = seen.shared.clone();
        memory.recovers |= self.node.recovers();
        let times = (self.clock.now().saturating_sub(self.contact), self.setup.times.heartbeat);
        match self.standby.follow(self.node.id(), &seen.prefix, &memory, &dead, times) {
            None => false,
            Some(Ok(Some(moved))) => {
                let place = if moved.host == *self.node.id() { " on this node" } else { "" };
                crate::cli::say(&format!(
                    "phalanx launch: the job's store is now at {}{place}",
                    moved.endpoint
                ));
                self.node.moved(&moved.host);
                *endpoint.lock().unwrap_or_else(PoisonError::into_inner) = moved.endpoint;
                (seen.client, seen.raw, seen.looked) = (moved.client, None, None);
                seen.shared = memory;
                self.next_beat = Duration::ZERO;
                true
            }
            // Not enough are here, or the candidate is about to die too.
            Some(_) => true,
        }
    }

    /// One look, and all the writes that follow from it.
    fn turn(&mut self, seen: &mut Seen, teller: &Teller) -> Result<()> {
        let now = self.clock.now();
        if now >= self.next_beat {
            seen.client.add(&seen.beat_key(self.node.id()), 1)?;
            self.next_beat = now + self.setup.times.keep_alive_interval;
        }
        seen.read()?;
        let interval = self.setup.times.keep_alive_interval / 2;
        if seen.looked.is_none_or(|at| now.saturating_sub(at) >= interval) {
            seen.read_beats(&self.node)?;
            seen.looked = Some(now);
        }
        self.standby.note(&seen.shared);
        let gone = self.dead(&seen.shared);
        self.node.gone(gone);
        for _ in 0..WRITES_IN_A_ROW {
            let actions = self.node.step(&seen.shared, &seen.beats, self.clock.now());
            let mut wrote = false;
            for action in actions {
                match action {
                    Action::Put(next) => {
                        seen.write(&next)?;
                        wrote = true;
                    }
                    Action::Tell(news) => teller.tell(Ok(news)),
                }
            }
            if !wrote {
                break;
            }
        }
        Ok(())
    }
}

impl Seen {
    fn key(&self) -> String {
        format!("{}/state", self.prefix)
    }

    fn beat_key(&self, id: &NodeId) -> String {
        format!("{}/beat/{id}", self.prefix)
    }

    fn read(&mut self) -> Result<()> {
        let raw = self.client.try_get(&self.key())?;
        self.take(raw)
    }

    fn take(&mut self, raw: Option<Vec<u8>>) -> Result<()> {
        if raw == self.raw {
            return Ok(());
        }
        self.shared = match &raw {
            None => Agreed::default(),
            Some(bytes) => Agreed::read(bytes).map_err(|e| {
                Error::failure(format!("the rendezvous state under {} cannot be read: {e}", self.key()))
                    .hint("are all nodes of the same version, and is the store the job's own?")
            })?,
        };
        self.raw = raw;
        Ok(())
    }

    /// Writes `next` if the store still holds what was seen, and sees what is there now.
    fn write(&mut self, next: &Agreed) -> Result<()> {
        let bytes = serde_json::to_vec(next).map_err(|e| Error::failure(format!("rendezvous state: {e}")))?;
        let there = self.client.compare_set(&self.key(), self.raw.as_deref(), &bytes)?;
        self.take(Some(there).filter(|t| !t.is_empty()))
    }

    fn read_beats(&mut self, node: &Node) -> Result<()> {
        self.beats.clear();
        for id in node.watched(&self.shared) {
            let beat = self.client.try_get(&self.beat_key(&id))?;
            let number =
                beat.and_then(|b| String::from_utf8(b).ok()).and_then(|t| t.parse().ok()).unwrap_or(-1);
            self.beats.push((id, number));
        }
        Ok(())
    }
}
