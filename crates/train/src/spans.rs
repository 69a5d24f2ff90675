use std::time::Instant;

/// One op's start and end in nanoseconds since the recorder was made, see [`Spans::origin_us`].
#[derive(Clone, Copy, Debug)]
pub struct OpSpan {
    /// Block of the program.
    pub block: u32,
    /// Op of the block.
    pub op: u32,
    /// Which micro-batch.
    pub micro_batch: u32,
    /// Start.
    pub start_ns: u64,
    /// End.
    pub end_ns: u64,
    /// CPU time since the op before, if [`Spans::watch_cpu`] was asked for; else 0.
    pub cpu_ns: u64,
}

/// Whose CPU time spans hold beside their start and end: on a machine that others use too, it tells how long an op
/// works, apart from how long it waits for a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuClock {
    /// The thread that runs the ops, for a rank of one thread.
    Thread,
    /// All threads of the process.
    Process,
}

impl CpuClock {
    fn now_ns(self) -> u64 {
        let clock = match self {
            CpuClock::Thread => libc::CLOCK_THREAD_CPUTIME_ID,
            CpuClock::Process => libc::CLOCK_PROCESS_CPUTIME_ID,
        };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock is one of the system's and `time` is a place for its answer.
        let known = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
        if known { time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 } else { 0 }
    }
}

/// Records the ops of a step, if asked to, into room made beforehand.
pub struct Spans {
    origin: Instant,
    origin_us: u64,
    on: bool,
    cpu: Option<CpuClock>,
    /// What the clock showed at the last op's end.
    cpu_ns: u64,
    spans: Vec<OpSpan>,
}

impl Spans {
    /// A recorder that is off, with room for `ops` ops when on.
    pub fn new(ops: usize, on: bool) -> Spans {
        Spans {
            origin: Instant::now(),
            origin_us: crate::now_us(),
            on,
            cpu: None,
            cpu_ns: 0,
            spans: Vec::with_capacity(if on { ops } else { 0 }),
        }
    }

    /// When the recorder was made, in microseconds since 1970: spans of several ranks share one time line.
    pub fn origin_us(&self) -> u64 {
        self.origin_us
    }

    /// From the next step on, spans hold the CPU time of `clock` as well. It costs a system call for each op.
    pub fn watch_cpu(&mut self, clock: CpuClock) {
        self.cpu = Some(clock);
    }

    /// Whether ops are recorded.
    pub(crate) fn on(&self) -> bool {
        self.on
    }

    /// Forgets the step before.
    pub(crate) fn begin(&mut self) {
        self.spans.clear();
        self.since_last();
    }

    /// CPU time since this was last asked.
    fn since_last(&mut self) -> u64 {
        let Some(clock) = self.cpu else { return 0 };
        let now = clock.now_ns();
        now.saturating_sub(std::mem::replace(&mut self.cpu_ns, now))
    }

    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Records an op that ends now, and returns the time.
    pub(crate) fn push(&mut self, block: usize, op: usize, micro_batch: usize, start_ns: u64) -> u64 {
        let end_ns = self.now();
        // Room is fixed so that recording never allocates; a program that outgrows it loses its last ops.
        if self.on && self.spans.len() < self.spans.capacity() {
            let cpu_ns = self.since_last();
            self.spans.push(OpSpan {
                block: block as u32,
                op: op as u32,
                micro_batch: micro_batch as u32,
                start_ns,
                end_ns,
                cpu_ns,
            });
        }
        end_ns
    }

    /// Records an op that went on beside others.
    pub(crate) fn push_between(
        &mut self,
        block: usize,
        op: usize,
        micro_batch: usize,
        began: Instant,
        ended: Instant,
    ) {
        let ns = |t: Instant| {
            u64::try_from(t.saturating_duration_since(self.origin).as_nanos()).unwrap_or(u64::MAX)
        };
        if self.on && self.spans.len() < self.spans.capacity() {
            let (start_ns, end_ns) = (ns(began), ns(ended));
            self.spans.push(OpSpan {
                block: block as u32,
                op: op as u32,
                micro_batch: micro_batch as u32,
                start_ns,
                end_ns,
                cpu_ns: 0,
            });
        }
    }

    /// The ops of the last step in order.
    pub fn all(&self) -> &[OpSpan] {
        &self.spans
    }

    /// Whether ops are recorded.
    pub(crate) fn is_on(&self) -> bool {
        self.on
    }
}
