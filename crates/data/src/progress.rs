/// How far a long operation has come; the caller draws it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub stage: Stage,
    /// Bytes of input done.
    pub done_bytes: u64,
    /// Bytes of input in all; 0 where unknown.
    pub total_bytes: u64,
}

/// The parts of making a dataset, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Looking for and reading the sources.
    Collect,
    /// Counting words for the tokenizer.
    Count,
    /// Learning the tokenizer's merges; no bytes to count.
    Merge,
    /// Turning text into tokens.
    Encode,
}

/// Called now and then, perhaps from another thread than the caller's.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Sync);
