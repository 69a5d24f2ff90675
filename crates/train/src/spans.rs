use std::time::Instant;

/// One op's start and end in nanoseconds since the recorder was made, see [`Spans::origin_us`].
#[derive(Clone, Copy, Debug)]
pub struct Span {
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
}

/// Records the ops of a step, if asked to, into room made beforehand.
pub struct Spans {
    origin: Instant,
    origin_us: u64,
    on: bool,
    spans: Vec<Span>,
}

impl Spans {
    /// A recorder that is off, with room for `ops` ops when on.
    pub fn new(ops: usize, on: bool) -> Spans {
        Spans {
            origin: Instant::now(),
            origin_us: crate::now_us(),
            on,
            spans: Vec::with_capacity(if on { ops } else { 0 }),
        }
    }

    /// When the recorder was made, in microseconds since 1970: spans of several ranks share one time line.
    pub fn origin_us(&self) -> u64 {
        self.origin_us
    }

    /// Forgets the step before.
    pub(crate) fn begin(&mut self) {
        self.spans.clear();
    }

    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Records an op that ends now, and returns the time.
    pub(crate) fn push(&mut self, block: usize, op: usize, micro_batch: usize, start_ns: u64) -> u64 {
        let end_ns = self.now();
        // Room is fixed so that recording never allocates; a program that outgrows it loses its last ops.
        if self.on && self.spans.len() < self.spans.capacity() {
            self.spans.push(Span {
                block: block as u32,
                op: op as u32,
                micro_batch: micro_batch as u32,
                start_ns,
                end_ns,
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
            self.spans.push(Span {
                block: block as u32,
                op: op as u32,
                micro_batch: micro_batch as u32,
                start_ns,
                end_ns,
            });
        }
    }

    /// The ops of the last step in order.
    pub fn all(&self) -> &[Span] {
        &self.spans
    }

    /// Whether ops are recorded.
    pub fn is_on(&self) -> bool {
        self.on
    }
}
