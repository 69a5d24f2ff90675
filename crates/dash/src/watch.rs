//! Threads that follow the journals of runs, one for each run, and what they know.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use journal::tail::{Look, Tail, lines_between, sample};
use spec::{Error, Result};

use crate::run::Run;

/// Between two looks at a journal while somebody watches, and while nobody does.
const POLL: Duration = Duration::from_millis(20);
const POLL_UNWATCHED: Duration = Duration::from_millis(500);

/// Between two looks at the journals of other ranks, and at which there are.
const POLL_RANKS: Duration = Duration::from_millis(250);
const POLL_FILES: Duration = Duration::from_secs(2);

/// After a file could not be read.
const POLL_FAILED: Duration = Duration::from_secs(1);

/// Journals of other ranks that are followed: each holds a file open, and a process may open 1,024 by default.
const RANKS_MAX: usize = 512;

/// Read of the end of another rank's journal: the latest steps and, where ops are recorded, some of those.
const RANK_BACK_BYTES: u64 = 256 << 10;

/// A journal longer than this is shown by samples until it was read.
const PREVIEW_BYTES: u64 = 8 << 20;
const PREVIEW_SAMPLES: u64 = 1000;
const PREVIEW_BACK_BYTES: u64 = 64 << 10;

/// Read of a journal between two signs of progress.
const BUDGET_BYTES: u64 = 16 << 20;

/// What is asked about a run besides its journals: the binary knows run files and the planner, this crate does not.
pub trait Lookup: Send + Sync {
    /// Steps that the run file asks for.
    fn steps_wanted(&self, dir: &Path) -> Option<u64>;

    /// What the planner expects of each op of a step, on ranks of so many threads; or why it cannot say.
    ///
    /// # Errors
    /// If the run file or the calibration of the machine cannot be read.
    fn expected(&self, dir: &Path, threads: Option<usize>) -> Result<Vec<Expected>>;
}

/// An op's seconds in a step as planned.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// Its id in the step program.
    pub op: u64,
    /// The rank that runs it.
    pub rank: usize,
    /// Seconds of all its runs in a step.
    pub s: f64,
}

/// Runs being followed. Dropping it ends its threads.
pub struct Watch {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What threads share.
pub struct Shared {
    runs: Mutex<Vec<Run>>,
    changed: Condvar,
    viewers: AtomicUsize,
    over: AtomicBool,
}

impl Watch {
    /// Follows the runs in `dirs`, each a directory with journals.
    ///
    /// # Errors
    /// If one is no directory of a run.
    pub fn new(dirs: &[PathBuf], lookup: &Arc<dyn Lookup>) -> Result<Watch> {
        dirs.iter().try_for_each(|dir| check(dir))?;
        let runs = names(dirs).into_iter().zip(dirs).map(|(name, dir)| Run::new(name, dir.clone())).collect();
        let shared = Arc::new(Shared {
            runs: Mutex::new(runs),
            changed: Condvar::new(),
            viewers: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        });
        let mut watch = Watch { shared: shared.clone(), threads: Vec::new() };
        for (index, dir) in dirs.iter().enumerate() {
            let mut follower = Follower {
                index,
                dir: dir.clone(),
                shared: shared.clone(),
                lookup: lookup.clone(),
                ranks: Vec::new(),
            };
            let thread = std::thread::Builder::new().name(format!("watch {index}"));
            let thread = thread.spawn(move || follower.follow());
            watch.threads.push(thread.map_err(|e| Error::failure(format!("start a thread: {e}")))?);
        }
        Ok(watch)
    }

    /// What the threads know, for those who show it.
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Waits until every journal was read to its end once.
    pub fn wait_until_read(&self) {
        let mut runs = self.shared.runs();
        while runs.iter().any(|r| !r.is_read) {
            runs = self.shared.wait(runs, POLL_UNWATCHED);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// The runs, as they are now.
    pub fn runs(&self) -> MutexGuard<'_, Vec<Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something changed, for no longer than `timeout`.
    pub fn wait<'a>(&self, runs: MutexGuard<'a, Vec<Run>>, timeout: Duration) -> MutexGuard<'a, Vec<Run>> {
        self.changed.wait_timeout(runs, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    /// While it lives, journals are looked at more often.
    pub fn view(self: &Arc<Shared>) -> Viewer {
        self.viewers.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_all();
        Viewer(self.clone())
    }

    /// Whether the watch was given up.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Somebody who looks on.
pub struct Viewer(Arc<Shared>);

impl Drop for Viewer {
    fn drop(&mut self) {
        self.0.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Says what is wrong with a directory that holds no run. One without a journal yet is waited for.
fn check(dir: &Path) -> Result<()> {
    let wrong =
        |what: String| Err(Error::user(what).hint("give the directory of a run, as its run.dir says"));
    match std::fs::metadata(dir) {
        Err(e) => {
            Err(Error::io("read run directory", dir, &e)
                .hint("give the directory of a run, as its run.dir says"))
        }
        Ok(meta) if !meta.is_dir() => wrong(format!("{} is no directory", dir.display())),
        Ok(_) if journal::files(dir)?.is_empty() && !dir.join("run.toml").exists() => {
            wrong(format!("{} holds no journal and no run.toml", dir.display()))
        }
        Ok(_) => Ok(()),
    }
}

/// Shortest ends of the paths that tell them apart.
fn names(dirs: &[PathBuf]) -> Vec<String> {
    let parts = |dir: &PathBuf, n: usize| {
        let full = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
        let all: Vec<String> =
            full.components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
        all[all.len().saturating_sub(n)..].join("/")
    };
    let deepest = dirs.iter().map(|d| d.components().count() + 16).max().unwrap_or(1);
    for n in 1..=deepest {
        let names: Vec<String> = dirs.iter().map(|d| parts(d, n)).collect();
        let mut unique = names.clone();
        unique.sort();
        unique.dedup();
        if unique.len() == names.len() {
            return names;
        }
    }
    // The same directory twice.
    dirs.iter().enumerate().map(|(i, d)| format!("{} #{}", parts(d, 1), i + 1)).collect()
}

struct Follower {
    index: usize,
    dir: PathBuf,
    shared: Arc<Shared>,
    lookup: Arc<dyn Lookup>,
    ranks: Vec<(usize, Tail)>,
}

impl Follower {
    fn follow(&mut self) {
        while !self.shared.is_over() {
            let mut tail = Tail::whole(journal::path(&self.dir, 0));
            self.preview(tail.path());
            if self.read(&mut tail).is_some() {
                self.stay(&mut tail);
            }
        }
    }

    /// Changes the run and tells everybody.
    fn change(&self, with: impl FnOnce(&mut Run)) {
        with(&mut self.shared.runs()[self.index]);
        self.shared.changed.notify_all();
    }

    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut runs = self.shared.runs();
        // Others notify too; a new viewer is what ends a long pause early.
        let viewers = self.shared.viewers.load(Ordering::Relaxed);
        while let Some(left) = until.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) {
            runs = self.shared.wait(runs, left);
            if self.shared.is_over() || self.shared.viewers.load(Ordering::Relaxed) > viewers {
                return;
            }
        }
    }

    /// Shows samples of a long journal at once. A file that cannot be read is told of when it is read.
    fn preview(&self, path: &Path) {
        let len = std::fs::metadata(path).map_or(0, |m| m.len());
        if len < PREVIEW_BYTES {
            return;
        }
        let mut shown = Run::new(String::new(), self.dir.clone());
        let _ = lines_between(path, 0, 1, &mut |found| shown.observe(&found));
        if let Ok(records) = sample(path, PREVIEW_SAMPLES) {
            shown.preview(&records);
            let _ = Tail::end(path.to_owned(), PREVIEW_BACK_BYTES).look(u64::MAX, &mut |f| shown.observe(&f));
        }
        shown.steps_wanted = self.lookup.steps_wanted(&self.dir);
        shown.progress = (0, len);
        self.change(|run| {
            shown.name.clone_from(&run.name);
            run.steps_wanted = shown.steps_wanted;
            run.replace(shown);
        });
    }

    /// Reads all of the journal; none if the watch is over or the file changed under it.
    fn read(&mut self, tail: &mut Tail) -> Option<()> {
        let mut read = Run::new(self.shared.runs()[self.index].name.clone(), self.dir.clone());
        loop {
            match tail.look(BUDGET_BYTES, &mut |found| read.observe(&found)) {
                Ok(Look::AtEnd | Look::Gone) => break,
                Ok(Look::More) => {
                    let progress = tail.progress();
                    self.change(|run| {
                        run.progress = progress;
                        run.facts += 1;
                    });
                }
                Ok(Look::Restarted) => return None,
                Err(e) => return self.failed(&e),
            }
            if self.shared.is_over() {
                return None;
            }
        }
        read.progress = tail.progress();
        let wanted = self.lookup.steps_wanted(&self.dir);
        self.change(|run| {
            run.steps_wanted = wanted;
            run.replace(read);
        });
        Some(())
    }

    fn failed(&self, e: &std::io::Error) -> Option<()> {
        let why = e.to_string();
        self.change(|run| {
            run.damage = (run.damage.0.max(1), Some(why));
            run.facts += 1;
        });
        self.pause(POLL_FAILED);
        None
    }

    /// Follows what is appended, until the file is another or the watch is over.
    fn stay(&mut self, tail: &mut Tail) {
        self.ranks.clear();
        let (mut files_at, mut ranks_at, mut was_read) = (None::<Instant>, None::<Instant>, false);
        let due = |at: &mut Option<Instant>, every: Duration| {
            let due = at.is_none_or(|at| at.elapsed() >= every);
            if due {
                *at = Some(Instant::now());
            }
            due
        };
        while !self.shared.is_over() {
            let mut found = Vec::new();
            match tail.look(BUDGET_BYTES, &mut |f| found.push(f)) {
                Ok(Look::Restarted) => return,
                Ok(_) => {}
                Err(e) => {
                    self.failed(&e);
                    return;
                }
            }
            if due(&mut files_at, POLL_FILES) {
                self.find_ranks();
            }
            let look_at_ranks = due(&mut ranks_at, POLL_RANKS);
            let others = if look_at_ranks { self.look_at_ranks() } else { Vec::new() };
            let started = found
                .iter()
                .any(|f| matches!(&f.line, journal::line::Line::Record(journal::Record::RunStarted { .. })));
            let wanted = if started { self.lookup.steps_wanted(&self.dir) } else { None };
            if !found.is_empty() || !others.is_empty() || !was_read {
                let progress = tail.progress();
                self.change(|run| {
                    run.steps_wanted = wanted.or(run.steps_wanted);
                    found.iter().for_each(|f| run.observe(f));
                    others.iter().for_each(|(rank, f)| run.observe_rank(*rank, f));
                    run.progress = progress;
                    run.is_read = true;
                });
                was_read = true;
            }
            let watched = self.shared.viewers.load(Ordering::Relaxed) > 0;
            self.pause(if watched { POLL } else { POLL_UNWATCHED });
        }
    }

    fn find_ranks(&mut self) {
        let files = journal::files(&self.dir).unwrap_or_default();
        let others: Vec<_> = files.into_iter().filter(|(rank, _)| *rank > 0).collect();
        let unread = others.len().saturating_sub(RANKS_MAX);
        for (rank, path) in others.into_iter().take(RANKS_MAX) {
            if !self.ranks.iter().any(|(r, _)| *r == rank) {
                // Its first record says where it runs.
                let _ = lines_between(&path, 0, 1, &mut |f| self.change(|run| run.observe_rank(rank, &f)));
                self.ranks.push((rank, Tail::end(path, RANK_BACK_BYTES)));
            }
        }
        if unread > 0 {
            self.change(|run| run.ranks_unread = unread);
        }
    }

    fn look_at_ranks(&mut self) -> Vec<(usize, journal::tail::Found)> {
        let mut all = Vec::new();
        for (rank, tail) in &mut self.ranks {
            // What is gone or cannot be read is looked for again next time.
            let _ = tail.look(BUDGET_BYTES, &mut |f| all.push((*rank, f)));
        }
        all
    }
}

#[cfg(test)]
mod tests;
