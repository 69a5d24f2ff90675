//! No command works for longer than two seconds without saying on what.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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

impl Drop for Busy {
    fn drop(&mut self) {
        self.going_on = None;
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
    }
}
