//! A rank's end of the socket to its agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use comm::{Secret, StoreClient};
use elastic::{Orders, Report};
use spec::{Error, Result};

/// Between two signs of life.
const BEAT_EVERY: Duration = Duration::from_millis(100);
/// An agent that takes no word for so long is as good as gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long to look for a store that a later round has made useless.
const STORE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a rank is doing, for a thread that tells of it: written by the executor, a few instructions an op.
#[derive(Debug, Default)]
pub struct Pulse {
    ops: AtomicU64,
    computes: AtomicBool,
}

impl Pulse {
    /// An op's kernel begins.
    pub(crate) fn begin(&self) {
        self.computes.store(true, Ordering::Relaxed);
    }

    /// It ended.
    pub(crate) fn end(&self) {
        self.ops.fetch_add(1, Ordering::Relaxed);
        self.computes.store(false, Ordering::Relaxed);
    }

    fn beat(&self) -> Report {
        // Whatever is no kernel waits: for ranks, disks, people.
        let waits = !self.computes.load(Ordering::Relaxed);
        Report::Beat { ops: self.ops.load(Ordering::Relaxed), waits }
    }
}

/// The agent that started this rank, watches it, and says where to go when another is lost.
pub struct Agent {
    said: Said,
    orders: Receiver<Orders>,
    /// Orders that were looked at and not yet obeyed.
    next: Option<Orders>,
    meeting: Arc<Mutex<Option<Orders>>>,
    /// What the stores of orders ask for.
    secret: Secret,
    pulse: Arc<Pulse>,
    beats: Option<JoinHandle<()>>,
    is_over: Arc<AtomicBool>,
    hears: Option<JoinHandle<()>>,
    stream: UnixStream,
}

#[derive(Clone)]
struct Said(Arc<Mutex<UnixStream>>);

impl Said {
    fn say(&self, report: &Report) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(report.line().as_bytes())
    }
}

impl Agent {
    /// Takes the rank's end of the socket, says that orders will be obeyed, and begins to show signs of life. `secret` is
    /// the job's.
    ///
    /// # Errors
    /// If the socket cannot be used, or there is no thread.
    pub fn new(stream: UnixStream, secret: Secret) -> Result<Agent> {
        let failed = |e: std::io::Error| Error::failure(format!("talk to the agent: {e}"));
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(failed)?;
        let said = Said(Arc::new(Mutex::new(stream.try_clone().map_err(failed)?)));
        said.say(&Report::CanRecover).map_err(failed)?;
        let (pulse, is_over) = (Arc::new(Pulse::default()), Arc::new(AtomicBool::new(false)));
        let beats = {
            let (said, pulse, is_over) = (said.clone(), pulse.clone(), is_over.clone());
            move || {
                while !is_over.load(Ordering::Acquire) && said.say(&pulse.beat()).is_ok() {
                    std::thread::park_timeout(BEAT_EVERY);
                }
            }
        };
        let meeting: Arc<Mutex<Option<Orders>>> = Arc::default();
        let (tell, orders) = channel();
        let hears = {
            let lines = BufReader::new(stream.try_clone().map_err(failed)?);
            let (meeting, secret) = (meeting.clone(), secret.clone());
            move || {
                for line in lines.lines() {
                    let Ok(orders) = line.map_err(failed).and_then(|line| Orders::read(&line)) else {
                        return;
                    };
                    leave_meeting(&meeting, &secret, &orders);
                    if tell.send(orders).is_err() {
                        return;
                    }
                }
            }
        };
        let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let beats = thread("beats").spawn(beats).map_err(failed)?;
        let hears = thread("orders").spawn(hears).map_err(failed)?;
        let (next, beats, hears) = (None, Some(beats), Some(hears));
        Ok(Agent { said, orders, next, meeting, secret, pulse, beats, is_over, hears, stream })
    }

    /// Where the executor shows that it lives.
    pub(crate) fn pulse(&self) -> Arc<Pulse> {
        self.pulse.clone()
    }

    /// Tells the agent; one that is gone need not know.
    pub(crate) fn say(&self, report: &Report) {
        let _ = self.said.say(report);
    }

    /// Whether there are orders of a later round than `round`.
    pub(crate) fn has_orders(&mut self, round: u64) -> bool {
        while let Ok(orders) = self.orders.try_recv() {
            self.keep(orders);
        }
        self.next.as_ref().is_some_and(|next| next.round > round)
    }

    /// The newest orders of a later round than `round`; `None` if none come in time or the agent is gone.
    pub(crate) fn orders(&mut self, round: u64, timeout: Duration) -> Option<Orders> {
        while !self.has_orders(round) {
            match self.orders.recv_timeout(timeout) {
                Ok(orders) => self.keep(orders),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
            }
        }
        self.next.take()
    }

    fn keep(&mut self, orders: Orders) {
        if self.next.as_ref().is_none_or(|next| next.round < orders.round) {
            self.next = Some(orders);
        }
    }

    /// Whether the agent has hung up.
    pub(crate) fn is_gone(&self) -> bool {
        self.hears.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// While this rank waits for others to come, later orders end the wait: some may never come.
    pub(crate) fn meets(&mut self, orders: Option<&Orders>) {
        *self.meeting.lock().unwrap_or_else(PoisonError::into_inner) = orders.cloned();
        let Some(orders) = orders else { return };
        // Those that came before were not held against this meeting.
        if self.has_orders(orders.round)
            && let Some(next) = &self.next
        {
            leave_meeting(&self.meeting, &self.secret, next);
        }
    }
}

/// Ends the meeting under way if `orders` are of a later round.
fn leave_meeting(meeting: &Mutex<Option<Orders>>, secret: &Secret, orders: &Orders) {
    let earlier = {
        let mut meeting = meeting.lock().unwrap_or_else(PoisonError::into_inner);
        meeting.take_if(|at| at.round < orders.round)
    };
    let Some(earlier) = earlier else { return };
    // The store may be gone with the host that it was on; then the wait ends by itself.
    if let Ok(store) = StoreClient::connect_with(&earlier.store, secret, STORE_TIMEOUT) {
        let _ = comm::give_up(&store, &earlier.session, &format!("met again in round {}", orders.round));
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        for thread in [self.beats.take(), self.hears.take()].into_iter().flatten() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(round: u64) -> Orders {
        Orders {
            round,
            rank: 0,
            world: 1,
            local_rank: 0,
            local_world: 1,
            store: "127.0.0.1:1".into(),
            session: format!("job/{round}"),
            why: "a test".into(),
        }
    }

    #[test]
    fn a_rank_says_that_it_lives_and_hears_the_newest_orders() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let mut agent = Agent::new(theirs, Secret::none()).expect("an agent");
        let mut lines = BufReader::new(ours.try_clone().expect("a socket")).lines();
        let mut next = || Report::read(&lines.next().expect("a line").expect("text")).expect("a report");
        assert_eq!(next(), Report::CanRecover);
        assert_eq!(next(), Report::Beat { ops: 0, waits: true });
        let pulse = agent.pulse();
        pulse.begin();
        while next() != (Report::Beat { ops: 0, waits: false }) {}
        pulse.end();
        while next() != (Report::Beat { ops: 1, waits: true }) {}

        assert!(!agent.has_orders(0));
        for round in [1, 3, 2] {
            (&ours).write_all(orders(round).line().as_bytes()).expect("heard");
        }
        ours.shutdown(std::net::Shutdown::Write).expect("shut");
        while !agent.has_orders(2) {}
        assert_eq!(agent.orders(2, BEAT_EVERY), Some(orders(3)));
        assert_eq!(agent.orders(3, Duration::from_secs(60)), None, "the agent is gone");
    }
}
