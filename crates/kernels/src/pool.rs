//! A fixed set of threads that share out the tasks of one call at a time.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::simd::ask_rows;

/// How often an idle worker looks for work before it parks: some tens of microseconds, longer than the gap
/// between two ops, short enough that a waiting rank does not burn a core.
const SPINS: usize = if cfg!(miri) { 10 } else { 2000 };

/// A pool of `threads` threads, the caller being one of them.
///
/// Nothing is allocated after [`Pool::new`].
pub struct Pool {
    shared: Arc<Shared>,
    /// Held for the length of a run, so that two callers take turns.
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

type Task = dyn Fn(usize, usize) + Sync;

/// The job of a pool that never ran.
static NOTHING: fn(usize, usize) = |_, _| {};

struct Shared {
    /// Run number in the upper half, unclaimed tasks in the lower: one exchange claims a task of that very run.
    state: AtomicU64,
    /// The run's closure and its number of tasks. Written only while no task is unclaimed or unfinished.
    job: UnsafeCell<(*const Task, usize)>,
    done: AtomicUsize,
    sleepers: AtomicUsize,
    caller_waits: AtomicBool,
    stop: AtomicBool,
    /// Workers that have begun to serve.
    started: Mutex<usize>,
    ready: Condvar,
    lock: Mutex<()>,
    work: Condvar,
    finished: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the one caller that holds `turn`, before the store to `state` that makes tasks
// claimable, and read only by threads that claimed a task of that run, which the caller waits for.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer in `job` is never followed outside a run.
unsafe impl Send for Shared {}

impl Pool {
    /// Starts `threads - 1` workers; the caller is the other thread (0 counts as 1). Where the system refuses a thread
    /// the pool has fewer, which changes no result.
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new((&NOTHING as &Task, 0)),
            done: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            caller_waits: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            started: Mutex::new(0),
            ready: Condvar::new(),
            lock: Mutex::new(()),
            work: Condvar::new(),
            finished: Condvar::new(),
            panic: Mutex::new(None),
        });
        let start = |thread| {
            let shared = Arc::clone(&shared);
            let name = format!("kernels-{thread}");
            std::thread::Builder::new().name(name).spawn(move || shared.serve(thread)).ok()
        };
        let workers: Vec<_> = (1..threads).map_while(start).collect();
        // A thread allocates while it starts, so all have started when this returns.
        let mut started = lock(&shared.started);
        while *started < workers.len() {
            started = shared.ready.wait(started).unwrap_or_else(PoisonError::into_inner);
        }
        drop(started);
        Pool { shared, turn: Mutex::new(()), workers }
    }

    /// The number of threads that take part in a run.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(task, thread)` once for each task in `0..tasks`, with `thread < self.threads()`, and returns
    /// when all are done. Tasks are claimed in order; which thread gets which is left to chance, so `f` must give
    /// the same result either way.
    ///
    /// A run must not be started from inside a task of the same pool.
    ///
    /// # Panics
    /// With the first panic of a task, after all tasks have ended.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        if self.workers.is_empty() || tasks <= 1 {
            for task in 0..tasks {
                f(task, 0);
            }
            return;
        }
        assert!(tasks < u32::MAX as usize, "{tasks} tasks do not fit in 32 bits");
        let shared = &*self.shared;
        let turn = lock(&self.turn);
        // SAFETY: no task of the last run is left (its `run` waited), so nobody reads `job`. The lifetime is
        // erased, but `finish` below returns only when no thread can call `f` any more.
        unsafe {
            *shared.job.get() =
                (std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const Task>(f), tasks);
        }
        shared.done.store(0, Ordering::Relaxed);
        let run = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) & u64::from(u32::MAX);
        shared.state.store(run << 32 | tasks as u64, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = lock(&shared.lock);
            shared.work.notify_all();
        }
        while shared.claim_and_call(0) {}
        shared.finish(tasks);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Calls `f(task, pool, ws)` for each of so many tasks, the longest first by what `cost` says of each. Some at the front, see
    /// [`together`], are done by all threads, one after the other; then each thread takes one at a time, and is alone with it
    /// and its share of `ws`: what it works on stays in the caches of one core.
    ///
    /// # Panics
    /// As [`Pool::run`].
    pub fn deal(
        &self,
        (tasks, cost): (usize, &dyn Fn(usize) -> u64),
        ws: &mut [f32],
        f: &(dyn Fn(usize, &Pool, &mut [f32]) + Sync),
    ) {
        /// A pool of the caller alone, which has no state.
        static ALONE: LazyLock<Pool> = LazyLock::new(|| Pool::new(1));
        let first = together((tasks, cost), self.threads());
        for task in 0..first {
            f(task, self, ws);
        }
        let room = ws.len() / self.threads();
        let rooms = Parts::new(ws);
        self.run(tasks - first, &|task, thread| {
            // SAFETY: a thread has its own part, and one task at a time.
            f(first + task, &ALONE, unsafe { rooms.part(thread * room..(thread + 1) * room) });
        });
    }

    /// Splits `rows` rows of about `cost` elements each into ranges worth a task, and calls `f(range, thread)`.
    pub(crate) fn rows(&self, rows: usize, cost: usize, f: &(dyn Fn(Range<usize>, usize) + Sync)) {
        /// Elements that make a task worth claiming: a few microseconds of streaming work.
        const GRAIN: usize = 1 << 14;
        let least = GRAIN.div_ceil(cost.max(1));
        // About four tasks a thread even out threads that run at unequal speed.
        let size = rows.div_ceil(4 * self.threads()).max(least).max(1);
        self.run(rows.div_ceil(size), &|task, thread| f(task * size..rows.min((task + 1) * size), thread));
    }
}

/// How many tasks [`Pool::deal`] gives to all threads together, of which the longest come first: as many as let all of it end
/// soonest, each thread that is free taking the longest task that is left.
pub fn together((tasks, cost): (usize, &dyn Fn(usize) -> u64), threads: usize) -> usize {
    /// All threads at one task take so many twelfths of an even share of it: they send each other what they write.
    const TWELFTHS: u64 = 16;
    let even = |tasks: Range<usize>| tasks.map(cost).sum::<u64>().div_ceil(threads as u64);
    let alone = |first: usize| {
        let mut busy = vec![0; threads];
        for task in first..tasks {
            let Some(free) = busy.iter_mut().min() else { break };
            *free += cost(task);
        }
        busy.into_iter().max().unwrap_or(0)
    };
    let mut best = (u64::MAX, 0);
    // What is left of whole rounds over the threads is not more than there are threads.
    for first in 0..=tasks.min(threads) {
        let alone = alone(first);
        best = best.min((even(0..first) * TWELFTHS / 12 + alone, first));
        // Within a twelfth of even shares there is nothing to gain.
        if alone * 12 <= even(first..tasks) * 13 {
            break;
        }
    }
    best.1
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = lock(&self.shared.lock);
            self.shared.work.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so it cannot have panicked.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn serve(&self, thread: usize) {
        *lock(&self.started) += 1;
        self.ready.notify_one();
        let mut spins = 0;
        while !self.stop.load(Ordering::Relaxed) {
            if self.claim_and_call(thread) {
                spins = 0;
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.park();
                spins = 0;
            }
        }
    }

    fn idle(&self) -> bool {
        self.state.load(Ordering::SeqCst) as u32 == 0 && !self.stop.load(Ordering::SeqCst)
    }

    fn park(&self) {
        let mut guard = lock(&self.lock);
        // Counted before the last look at `state`: a caller either sees this sleeper or is seen by it.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.idle() {
            guard = self.work.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Claims one task and runs it; false if none is left.
    fn claim_and_call(&self, thread: usize) -> bool {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            if state as u32 == 0 {
                return false;
            }
            match self.state.compare_exchange_weak(state, state - 1, Ordering::SeqCst, Ordering::Acquire) {
                Ok(_) => break,
                Err(now) => state = now,
            }
        }
        let left = state as u32 as usize;
        // SAFETY: a task of this run was claimed and is not done, so the caller still waits and `f` is alive.
        let (f, tasks) = unsafe { *self.job.get() };
        // SAFETY: as above.
        let f = unsafe { &*f };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(tasks - left, thread))) {
            lock(&self.panic).get_or_insert(payload);
        }
        if self.done.fetch_add(1, Ordering::SeqCst) + 1 == tasks && self.caller_waits.load(Ordering::SeqCst) {
            let _guard = lock(&self.lock);
            self.finished.notify_one();
        }
        true
    }

    /// Waits until all `tasks` tasks are done.
    fn finish(&self, tasks: usize) {
        for _ in 0..SPINS {
            if self.done.load(Ordering::Acquire) == tasks {
                return;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.lock);
        self.caller_waits.store(true, Ordering::SeqCst);
        while self.done.load(Ordering::SeqCst) != tasks {
            guard = self.finished.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.caller_waits.store(false, Ordering::SeqCst);
    }
}

/// The data behind these locks is valid at every moment, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A slice that several tasks write, each its own part.
pub(crate) struct Parts<'a, T> {
    start: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: parts handed out are disjoint by the contract of `part`, and `T: Send` lets them cross threads.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(crate) fn new(whole: &'a mut [T]) -> Self {
        Parts { start: whole.as_mut_ptr(), len: whole.len(), life: std::marker::PhantomData }
    }

    /// Asks for rows that are about to be written, as [`ask_rows`] does.
    #[inline(always)]
    pub(crate) fn ask(&self, at: usize, shape: (usize, usize), ld: usize) {
        ask_rows(self.start.wrapping_add(at), shape, ld);
    }

    /// The part `range`.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "parts are disjoint by contract, as with split_at_mut")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {}", self.len);
        // SAFETY: in bounds by the assertion, disjoint by contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_tasks_are_done_together_and_the_rest_alone() {
        for (costs, threads, expected) in [
            (&[20, 20, 20, 15, 1, 1][..], 2, 0),
            (&[20, 20, 20, 1, 1], 2, 1),
            (&[7, 7, 7, 7, 7, 7], 4, 2),
            (&[20, 20, 20, 15, 1, 1], 1, 0),
            (&[20], 2, 1),
            (&[20, 20], 2, 0),
            (&[20, 5, 5], 2, 1),
            (&[20, 20, 20, 15, 1, 1], 8, 4),
            (&[9, 1, 1, 1, 1], 4, 1),
            (&[], 3, 0),
        ] {
            let cost = |i: usize| costs[i];
            assert_eq!(together((costs.len(), &cost), threads), expected, "{costs:?} on {threads}");
            let (pool, mut ws) = (Pool::new(threads), vec![0.0; 7 * threads]);
            let done: Vec<AtomicUsize> = costs.iter().map(|_| AtomicUsize::new(0)).collect();
            pool.deal((costs.len(), &cost), &mut ws, &|task, on, ws| {
                let (threads, room) = if task < expected { (threads, 7 * threads) } else { (1, 7) };
                assert_eq!((on.threads(), ws.len()), (threads, room));
                ws.fill(task as f32);
                done[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [0, 1, 2, 3, 7] {
            let pool = Pool::new(threads);
            for tasks in [0, 1, 2, 5, if cfg!(miri) { 50 } else { 1000 }] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, thread| {
                    assert!(thread < pool.threads());
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn runs_follow_each_other_closely() {
        let runs = if cfg!(miri) { 20 } else { 2000 };
        let pool = Pool::new(3);
        let sum = AtomicUsize::new(0);
        for _ in 0..runs {
            pool.run(4, &|task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.load(Ordering::Relaxed), runs * 6);
    }

    #[test]
    fn two_callers_take_turns() {
        let runs = if cfg!(miri) { 10 } else { 200 };
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..runs {
                        pool.run(3, &|_, _| {
                            sum.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 2 * 3 * runs);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(8, &|task, _| assert!(task != 5, "task {task} fails"));
        }));
        let payload = caught.expect_err("the panic is passed on");
        assert_eq!(payload.downcast_ref::<String>().map(String::as_str), Some("task 5 fails"));
        pool.run(8, &|_, _| {});
    }
}
