//! No wait is silent: what is waited for is said on stderr, first after a few seconds and then regularly.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When a wait is first spoken of: what takes less is no wait.
const FIRST: Duration = Duration::from_secs(5);
/// From then on, for the first minute.
const OFTEN: Duration = Duration::from_secs(10);
/// And after that.
const SELDOM: Duration = Duration::from_secs(60);

/// A wait under way; it is spoken of until this is dropped. A thread of its own does it, because what waits may be
/// blocked (in a look-up of a name, say).
///
/// ```
/// let waiting = comm::Waiting::begin("rank 0", "ranks 2, 3 to join at head:29500");
/// waiting.now_for("rank 3 to join at head:29500");
/// drop(waiting);
/// ```
#[derive(Debug)]
pub struct Waiting {
    shared: Arc<Spoken>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Spoken {
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Debug)]
struct State {
    what: String,
    is_over: bool,
}

impl Waiting {
    /// `who` waits for `what`, from now on: said as `WHO waited 5 s for WHAT`.
    pub fn begin(who: impl Into<String>, what: impl Into<String>) -> Waiting {
        Waiting::begin_at(Instant::now(), who, what)
    }

    /// The same for a wait that began earlier.
    pub(crate) fn begin_at(began: Instant, who: impl Into<String>, what: impl Into<String>) -> Waiting {
        let who = who.into();
        let state = Mutex::new(State { what: what.into(), is_over: false });
        let shared = Arc::new(Spoken { state, over: Condvar::new() });
        let speaker = shared.clone();
        let speak = move || speaker.speak(began, &mut |seconds, what| say(&who, seconds, what));
        // A wait that cannot be spoken of is still a wait.
        let thread =
            std::thread::Builder::new().name("waiting".into()).stack_size(64 << 10).spawn(speak).ok();
        Waiting { shared, thread }
    }

    /// What is waited for has changed.
    pub fn now_for(&self, what: impl Into<String>) {
        self.shared.state().what = what.into();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.over.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Spoken {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn speak(&self, began: Instant, say: &mut dyn FnMut(u64, &str)) {
        let mut words = Words::new();
        let mut state = self.state();
        while !state.is_over {
            let waited = began.elapsed();
            if words.are_due(waited) {
                say(waited.as_secs(), &state.what);
            }
            let pause = words.next.saturating_sub(began.elapsed());
            state = self.over.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn say(who: &str, seconds: u64, what: &str) {
    let line = format!("{who} waited {seconds} s for {what}\n");
    // Nobody is left to tell when stderr is closed.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// When a wait is spoken of.
pub(crate) struct Words {
    next: Duration,
}

impl Words {
    pub(crate) fn new() -> Words {
        Words { next: FIRST }
    }

    fn are_due(&mut self, waited: Duration) -> bool {
        let due = waited >= self.next;
        if due {
            self.next = after(waited);
        }
        due
    }

    /// Says what is waited for if it is time to, for a wait that looks at the clock itself.
    pub(crate) fn speak(
        &mut self,
        who: impl FnOnce() -> String,
        waited: Duration,
        what: impl FnOnce() -> String,
    ) {
        if self.are_due(waited) {
            say(&who(), waited.as_secs(), &what());
        }
    }
}

/// When to speak again after having spoken at `waited`.
fn after(waited: Duration) -> Duration {
    let step = if waited < SELDOM { OFTEN } else { SELDOM };
    let steps = waited.as_secs() / step.as_secs() + 1;
    step * u32::try_from(steps).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_spoken_of_at_5_10_20_seconds_and_then_every_minute() {
        let times = std::iter::successors(Some(FIRST), |at| Some(after(*at)));
        let spoken: Vec<u64> = times.take(10).map(|at| at.as_secs()).collect();
        assert_eq!(spoken, [5, 10, 20, 30, 40, 50, 60, 120, 180, 240]);
    }

    #[test]
    fn what_is_said_is_what_is_waited_for_now() {
        let state = Mutex::new(State { what: "a".into(), is_over: false });
        let shared = Spoken { state, over: Condvar::new() };
        let long_ago = Instant::now() - Duration::from_secs(7);
        let (told, said) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            s.spawn(|| {
                shared.speak(long_ago, &mut |seconds, what| told.send((seconds, what.to_owned())).unwrap())
            });
            assert_eq!(said.recv().unwrap(), (7, "a".to_owned()));
            shared.state().is_over = true;
            shared.over.notify_all();
        });
    }
}
