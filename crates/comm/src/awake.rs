//! Deadlines stand still while this process does.

use std::time::{Duration, Instant};

/// What a busy machine may add to a pause. More is no pause: the process was stopped.
const SLACK: Duration = Duration::from_secs(2);

/// The time that this process was awake. Jobs are stopped by signals (`scontrol suspend`, a debugger) and with their
/// machine; whoever goes on then must not take the others, who were stopped too, for late.
///
/// ```
/// let mut awake = comm::Awake::begin();
/// let pause = std::time::Duration::from_millis(1);
/// std::thread::park_timeout(pause);
/// assert!(awake.paused(pause) <= awake.now());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Awake {
    looked: Instant,
    before: Duration,
}

impl Awake {
    /// From now on.
    pub fn begin() -> Awake {
        Awake { looked: Instant::now(), before: Duration::ZERO }
    }

    /// The time awake since the beginning.
    pub fn now(&self) -> Duration {
        self.before + self.looked.elapsed()
    }

    /// A pause that may begin now has nothing to do with what was before.
    pub fn pause(&mut self) {
        self.look(Instant::now(), Duration::MAX);
    }

    /// The time awake, where all that has passed since the last look is a pause of at most `asked`. One that took much
    /// longer was none, and does not count at all, so that the others have the time that they had.
    pub fn paused(&mut self, asked: Duration) -> Duration {
        self.look(Instant::now(), asked)
    }

    /// As if `by` had passed, awake.
    #[cfg(test)]
    pub(crate) fn skip(&mut self, by: Duration) {
        self.before += by;
    }

    fn look(&mut self, now: Instant, asked: Duration) -> Duration {
        let passed = now.saturating_duration_since(self.looked);
        self.looked = now;
        if passed <= asked.saturating_add(SLACK) {
            self.before += passed;
        }
        self.before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_was_stopped_for_does_not_count() {
        let seconds = Duration::from_secs;
        let mut awake = Awake::begin();
        let mut now = awake.looked;
        let mut check = |passed, asked, expected| {
            now += passed;
            assert_eq!(awake.look(now, asked), expected);
        };
        check(seconds(10), seconds(10), seconds(10));
        check(seconds(11), seconds(10), seconds(21));
        check(seconds(300), seconds(10), seconds(21));
        check(seconds(1), seconds(10), seconds(22));
        check(seconds(300), Duration::MAX, seconds(322));
    }
}
