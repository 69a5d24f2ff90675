//! No command works for longer than two seconds without saying on what.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;

/// After so much silence something is said for the first time, and after how much more each time again.
const FIRST: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_secs(20);

/// Says on stderr what is going on, until dropped.
pub(crate) struct Busy {
    what: Arc<Mutex<String>>,
    /// Taken away to end the watch.
    going_on: Option<Sender<()>>,
    watch: Option<JoinHandle<()>>,
}

/// Watches over something that may take long, `what` as in "reading the checkpoint".
pub(crate) fn busy(what: &str) -> Busy {
    let (going_on, ended) = mpsc::channel::<()>();
    let what = Arc::new(Mutex::new(what.to_owned()));
    let watched = what.clone();
    let began = Instant::now();
    let watch = std::thread::Builder::new().name("busy".to_owned()).spawn(move || {
        let mut wait = FIRST;
        while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
            let what = watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
            output::say(&format!("{what}, for {} s so far", began.elapsed().as_secs()));
            wait = AGAIN;
        }
    });
    // Without a thread for it nothing is said, and the work goes on.
    Busy { what, going_on: Some(going_on), watch: watch.ok() }
}

impl Busy {
    /// What is going on from now.
    pub(crate) fn now(&self, what: String) {
        *self.what.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }
}

/// A bar on a terminal, and words now and then elsewhere; gone when dropped.
pub(crate) struct Progress {
    bar: ProgressBar,
    busy: Option<Busy>,
}

impl Progress {
    /// Of something that may take long, `what` as for [`busy`]; `template` is of the bar.
    pub(crate) fn begin(what: &str, template: &str) -> Progress {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        let busy = bar.is_hidden().then(|| busy(what));
        Progress { bar, busy }
    }

    /// How far it is: a word for the bar, and what is said where there is none.
    pub(crate) fn now(&self, word: &str, done: u64, of: u64, said: impl FnOnce() -> String) {
        if let Some(busy) = &self.busy {
            busy.now(said());
            return;
        }
        self.bar.set_message(word.to_owned());
        self.bar.set_length(of);
        self.bar.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.going_on = None;
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
    }
}
