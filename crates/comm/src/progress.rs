//! How operations advance: as futures, polled by the caller or by the rank's communication thread.
//!
//! There is no waker and no reactor. A future looks at memory; whoever polls it spins for a moment and then sleeps on
//! the rank's bell, which is rung by everyone who makes progress for the rank.

use crate::awake::Awake;
use crate::control::publish;
use crate::element::OpTag;
use crate::inner::Core;
use crate::waiting::Words;
use spec::{Error, Result};
use std::cell::Cell;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Longest sleep without a look at the clock: the bound on how late a deadline or a missed bell is noticed.
const MAX_NAP: Duration = Duration::from_millis(50);
/// The same where messages come over MPI, whose library rings no bell.
const MPI_NAP: Duration = Duration::from_micros(100);

fn nap(core: &Core) -> Duration {
    if core.has_mpi() { MPI_NAP } else { MAX_NAP }
}
/// Polls between two looks at the clock while spinning.
const POLLS_PER_LOOK: u32 = 32;

thread_local! {
    /// Whether the poll under way comes after a sleep, so that a look at the clock costs nothing.
    static LOOK: Cell<bool> = const { Cell::new(false) };
    /// Whether a future gave way without waiting for anything.
    static RUNNABLE: Cell<bool> = const { Cell::new(false) };
}

/// How long to poll before sleeping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Polling without a pause: the one waited for is running and about to be done.
    pub(crate) spin: Duration,
    /// After that, polling and offering the core to others in turn: it may be waiting for this core.
    pub(crate) offer: Duration,
}

/// Waits until `check` gives a value. When the deadline passes, the world fails with what `missing` says.
pub(crate) async fn until<T>(
    core: &Core,
    missing: impl Fn() -> String,
    mut check: impl FnMut() -> Option<Result<T>>,
) -> Result<T> {
    let mut awake: Option<Awake> = None;
    let mut words = Words::new();
    let mut polls = 0u32;
    poll_fn(move |_| {
        if let Some(result) = check() {
            return Poll::Ready(result);
        }
        core.progress();
        if let Some(error) = core.failure.get() {
            return Poll::Ready(Err(error));
        }
        polls = polls.wrapping_add(1);
        if polls.is_multiple_of(POLLS_PER_LOOK) || LOOK.get() {
            let waited = awake.get_or_insert_with(Awake::begin).paused(MAX_NAP);
            if waited >= core.timeout {
                // A last look: progress made while this thread was not scheduled counts.
                return Poll::Ready(check().unwrap_or_else(|| Err(core.timed_out(&missing()))));
            }
            words.speak(|| format!("rank {}", core.rank), waited, &missing);
        }
        Poll::Pending
    })
    .await
}

/// Lets other operations of the rank advance between two pieces of work.
pub(crate) async fn give_way() {
    let mut gave = false;
    poll_fn(|_| {
        if std::mem::replace(&mut gave, true) {
            return Poll::Ready(());
        }
        RUNNABLE.set(true);
        Poll::Pending
    })
    .await;
}

fn poll_once<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Runs an operation in the calling thread.
pub(crate) fn drive<F: Future>(core: &Core, future: F) -> F::Output {
    let mut future = pin!(future);
    let mut poll = || match poll_once(future.as_mut()) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    };
    loop {
        if let Some(output) = spin(core.patience, &mut poll) {
            return output;
        }
        let mut output = None;
        core.control.bell().sleep(nap(core), || {
            LOOK.set(true);
            output = poll();
            LOOK.set(false);
            output.is_some() || RUNNABLE.take()
        });
        if let Some(output) = output {
            return output;
        }
    }
}

fn spin<T>(patience: Patience, poll: &mut impl FnMut() -> Option<T>) -> Option<T> {
    let mut began = None;
    loop {
        for _ in 0..POLLS_PER_LOOK {
            if let Some(output) = poll() {
                return Some(output);
            }
            std::hint::spin_loop();
        }
        RUNNABLE.set(false);
        let now = Instant::now();
        if now - *began.get_or_insert(now) >= patience.spin {
            break;
        }
    }
    let began = Instant::now();
    while began.elapsed() < patience.offer {
        std::thread::yield_now();
        if let Some(output) = poll() {
            return Some(output);
        }
    }
    None
}

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The communication thread of a rank; it starts with the first asynchronous operation.
#[derive(Default)]
pub(crate) struct Worker {
    queue: Mutex<Queue>,
    signal: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: Vec<Job>,
    thread: Option<std::thread::JoinHandle<()>>,
    stop: bool,
}

impl Worker {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, core: &Arc<Core>, job: Job) -> Result<()> {
        let mut queue = self.lock();
        if queue.stop {
            return Err(Error::failure("the world is closed"));
        }
        if queue.thread.is_none() {
            let core = core.clone();
            let thread = std::thread::Builder::new()
                .name(format!("comm-{}", core.rank))
                .spawn(move || {
                    let run = AssertUnwindSafe(|| core.worker.run(&core));
                    if std::panic::catch_unwind(run).is_err() {
                        core.fail(&format!("rank {}: its communication thread panicked", core.rank));
                    }
                })
                .map_err(|e| Error::failure(format!("start the communication thread: {e}")))?;
            queue.thread = Some(thread);
        }
        queue.jobs.push(job);
        drop(queue);
        self.signal.notify_one();
        publish();
        core.control.bell().ring();
        Ok(())
    }

    /// Ends the thread once its operations have ended, which the deadline bounds.
    pub(crate) fn stop(&self, core: &Core) {
        let thread = {
            let mut queue = self.lock();
            queue.stop = true;
            queue.thread.take()
        };
        self.signal.notify_one();
        publish();
        core.control.bell().ring();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn run(&self, core: &Core) {
        let mut active: Vec<Job> = Vec::new();
        // Operations end at other times than they begin, so the thread alternates between taking and polling.
        loop {
            {
                let mut queue = self.lock();
                while active.is_empty() && queue.jobs.is_empty() {
                    if queue.stop {
                        return;
                    }
                    queue = self.signal.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
                active.append(&mut queue.jobs);
            }
            let mut sweep = || {
                let before = active.len();
                active.retain_mut(|job| poll_once(job.as_mut()).is_pending());
                let idle = active.len() == before && !RUNNABLE.take();
                (!idle).then_some(())
            };
            let patience = Patience { spin: Duration::ZERO, offer: Duration::ZERO };
            if spin(patience, &mut sweep).is_some() {
                continue;
            }
            core.control.bell().sleep(nap(core), || {
                LOOK.set(true);
                let advanced = sweep().is_some();
                LOOK.set(false);
                advanced || !self.lock().jobs.is_empty()
            });
        }
    }
}

/// When an operation was asked for, and when the rank worked on it.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// When it was started by the caller.
    pub posted: Instant,
    /// When its turn in the group came.
    pub began: Instant,
    /// When it was complete on this rank.
    pub ended: Instant,
}

/// An operation under way. Waiting gives its result; dropping waits and discards it.
#[must_use = "an operation's buffers may be touched until its handle has been waited for"]
pub struct Handle {
    tag: OpTag,
    state: Arc<State>,
    waited: bool,
}

#[derive(Default)]
struct State {
    result: Mutex<Option<Result<Times>>>,
    done: Condvar,
}

impl Handle {
    /// Starts `work` on the communication thread of `core`. `work` gives the time at which it began. With `eager` the
    /// caller polls it once first: a message may be on its way, or here, without that thread.
    pub(crate) fn start(
        core: &Arc<Core>,
        tag: OpTag,
        eager: bool,
        work: impl Future<Output = Result<Instant>> + Send + 'static,
    ) -> Result<Handle> {
        let posted = Instant::now();
        let state = Arc::new(State::default());
        let report = Report { state: state.clone(), result: None };
        let job = async move {
            let mut report = report;
            let result = work.await;
            report.result = Some(result.map(|began| Times { posted, began, ended: Instant::now() }));
        };
        let mut job: Job = Box::pin(job);
        if !eager || poll_once(job.as_mut()).is_pending() {
            core.worker.submit(core, job)?;
        }
        Ok(Handle { tag, state, waited: false })
    }

    /// The operation's tag.
    pub fn tag(&self) -> OpTag {
        self.tag
    }

    /// Whether the operation has ended, well or not.
    pub fn is_done(&self) -> bool {
        self.state.result.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits until the operation has ended.
    ///
    /// # Errors
    /// What made the operation fail: a mismatch, a deadline, a lost rank.
    pub fn wait(mut self) -> Result<Times> {
        self.waited = true;
        let result = self.state.wait().take();
        result.unwrap_or_else(|| Err(Error::failure("the operation's result was taken before")))
    }
}

impl State {
    fn wait(&self) -> MutexGuard<'_, Option<Result<Times>>> {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        while result.is_none() {
            result = self.done.wait(result).unwrap_or_else(PoisonError::into_inner);
        }
        result
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.waited {
            drop(self.state.wait());
        }
    }
}

/// Delivers the result even if the operation panics or its thread ends: nobody waits for ever.
struct Report {
    state: Arc<State>,
    result: Option<Result<Times>>,
}

impl Drop for Report {
    fn drop(&mut self) {
        let result = self.result.take();
        let result = result.unwrap_or_else(|| Err(Error::failure("the communication thread ended early")));
        *self.state.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.state.done.notify_all();
    }
}
