//! A thread that looks after ways of NCCL: what is late, lost or wrong ends by the deadline and the words of the world,
//! where NCCL alone would wait for ever.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use comm::{Awake, Waiting, Watch};
use spec::{Error, Result};

use crate::events::Words;
use crate::nccl::{Communicator, Said, describe};

/// Between two looks.
const TICK: Duration = Duration::from_millis(20);

/// Between two looks at what is about to be done.
const SHORT: Duration = Duration::from_micros(100);

/// How long the world may take to find out whom NCCL misses.
const GRACE: Duration = Duration::from_secs(3);

/// Waits that are worth a word.
const LONG: Duration = Duration::from_secs(1);

/// Words of a way: which message is under way, how many were begun, how many are over.
pub(crate) const WORDS: usize = 3;

/// What is looked after: shared by the thread and by whoever waits for the card.
pub(crate) struct Looked {
    pub(crate) watch: Watch,
    pub(crate) rank: usize,
    pub(crate) ways: Vec<Seen>,
    /// Names of messages by the number that marks give them.
    pub(crate) names: Vec<String>,
    pub(crate) words: Words,
    failure: Mutex<Option<String>>,
    is_over: AtomicBool,
}

/// A way, as it is looked at.
pub(crate) struct Seen {
    pub(crate) communicator: Communicator,
    /// For people.
    pub(crate) name: String,
    /// Other ranks of the world.
    pub(crate) others: Vec<usize>,
}

impl Looked {
    /// Nothing yet, of a rank of the world.
    pub(crate) fn new(watch: Watch, rank: usize, names: Vec<String>, words: Words) -> Looked {
        let (ways, failure, is_over) = Default::default();
        Looked { watch, rank, ways, names, words, failure, is_over }
    }

    fn held(&self) -> MutexGuard<'_, Option<String>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What way `i` says: the number of its message, whether it is under way, how many were begun.
    fn marks(&self, i: usize) -> (usize, bool, u32) {
        let word = |k: usize| self.words.read(i * WORDS + k);
        let (over, begun) = (word(2), word(1));
        (word(0) as usize, begun != over, begun)
    }

    /// The message of a way that is under way, or was last.
    fn message(&self, i: usize) -> String {
        let name = self.names.get(self.marks(i).0).map_or("a message", String::as_str);
        format!("{name} among {} over NCCL", self.ways[i].name)
    }

    fn missing(&self, i: usize) -> String {
        let others: Vec<String> = self.ways[i].others.iter().map(usize::to_string).collect();
        let ranks = if others.len() == 1 { "rank" } else { "ranks" };
        format!("{ranks} {} in {}", others.join(", "), self.message(i))
    }

    /// Looks for a loss. The first is kept, and ends whatever is under way.
    ///
    /// # Errors
    /// What was lost, now or before.
    pub(crate) fn check(&self) -> Result<()> {
        let mut held = self.held();
        if held.is_none() {
            let wrong = (0..self.ways.len()).find_map(|i| match self.ways[i].communicator.state() {
                Said::SUCCESS | Said::IN_PROGRESS => None,
                said => Some((i, said)),
            });
            *held = match (self.watch.failure(), wrong) {
                (None, None) => return Ok(()),
                (Some(failure), wrong) => Some(self.lost(&failure, wrong.map(|(i, _)| i))),
                (None, Some((i, said))) => Some(self.refused(i, said)),
            };
            self.abort();
        }
        Err(Error::failure(held.clone().unwrap_or_default()))
    }

    /// The world has failed: in which message this rank was, if in one. What NCCL has given up goes on with the next.
    fn lost(&self, failure: &Error, given_up: Option<usize>) -> String {
        let at = given_up.or_else(|| (0..self.ways.len()).find(|&i| self.marks(i).1));
        at.map_or_else(|| failure.to_string(), |i| format!("{}: {failure}", self.message(i)))
    }

    /// NCCL has given up. The world mostly knows soon which rank is lost; else NCCL's word is what there is.
    fn refused(&self, i: usize, said: Said) -> String {
        let mut awake = Awake::begin();
        while awake.paused(TICK) < GRACE {
            if let Some(failure) = self.watch.failure() {
                return format!("{}: {failure}", self.message(i));
            }
            std::thread::park_timeout(TICK);
        }
        self.watch.fail(&format!("{}: {}", self.message(i), describe(said))).to_string()
    }

    /// What is `missing` was waited for until the deadline.
    fn late(&self, missing: &str) -> Error {
        let mut held = self.held();
        let failure = held.get_or_insert_with(|| self.watch.timed_out(missing).to_string()).clone();
        self.abort();
        Error::failure(failure)
    }

    fn abort(&self) {
        self.ways.iter().for_each(|way| way.communicator.abort());
    }

    /// Waits until `done`, which is about to be.
    ///
    /// # Errors
    /// As [`Looked::check`], or if the deadline passes over what is `missing`.
    pub(crate) fn until(&self, missing: &dyn Fn() -> String, done: &dyn Fn() -> bool) -> Result<()> {
        let mut awake = Awake::begin();
        let mut waiting = None;
        while !done() {
            self.check()?;
            let waited = awake.paused(SHORT);
            if waited >= self.watch.timeout() {
                return Err(self.late(&missing()));
            }
            if waited >= LONG && waiting.is_none() {
                waiting = Some(Waiting::begin(format!("rank {}", self.rank), missing()));
            }
            std::thread::park_timeout(SHORT);
        }
        self.check()
    }

    /// Waits until NCCL has taken what way `i` was given.
    ///
    /// # Errors
    /// As [`Looked::until`].
    pub(crate) fn taken(&self, i: usize) -> Result<()> {
        let done = || self.ways[i].communicator.state() != Said::IN_PROGRESS;
        self.until(&|| self.missing(i), &done)
    }

    /// Gives all communicators back in good order, if nothing is under way and nobody is lost; else ends them.
    pub(crate) fn leave(&self, is_idle: &dyn Fn() -> bool) {
        let within = |done: &dyn Fn() -> bool| {
            let mut awake = Awake::begin();
            while !done() && self.check().is_ok() && awake.paused(SHORT) < GRACE {
                std::thread::park_timeout(SHORT);
            }
            done() && self.check().is_ok()
        };
        if within(is_idle) {
            self.ways.iter().for_each(|way| way.communicator.finalise());
            let state = |way: &Seen| way.communicator.state() == Said::SUCCESS;
            if within(&|| self.ways.iter().all(state)) {
                self.ways.iter().for_each(|way| way.communicator.close());
            }
        }
        self.abort();
    }
}

/// The thread; it ends when this is dropped.
pub(crate) struct Lookout {
    pub(crate) looked: Arc<Looked>,
    thread: Option<JoinHandle<()>>,
}

impl Lookout {
    /// Looks after ways from now on.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub(crate) fn begin(looked: Looked) -> Result<Lookout> {
        let looked = Arc::new(looked);
        let own = looked.clone();
        let thread = std::thread::Builder::new().name("nccl".into()).spawn(move || look(&own));
        let thread = thread.map_err(|e| Error::failure(format!("start a thread: {e}")))?;
        Ok(Lookout { looked, thread: Some(thread) })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.looked.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn look(looked: &Looked) {
    let mut waits: Vec<(u32, Awake, Option<Waiting>)> =
        looked.ways.iter().map(|_| (0, Awake::begin(), None)).collect();
    while !looked.is_over.load(Ordering::Relaxed) && looked.check().is_ok() {
        for (i, (begun, awake, waiting)) in waits.iter_mut().enumerate() {
            let (_, under_way, now) = looked.marks(i);
            if !under_way || now != *begun {
                (*begun, *awake, *waiting) = (now, Awake::begin(), None);
                continue;
            }
            let waited = awake.paused(TICK);
            if waited >= looked.watch.timeout() {
                looked.late(&looked.missing(i));
                return;
            }
            if waited >= LONG && waiting.is_none() {
                *waiting = Some(Waiting::begin(format!("rank {}", looked.rank), looked.missing(i)));
            }
        }
        std::thread::park_timeout(TICK);
    }
}
