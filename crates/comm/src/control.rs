//! What one rank shows its neighbours in memory: a bell, its sends, and a slot per group.
//!
//! Every word has one writer, the owner of the segment, except the bell (anyone rings it) and the state of a send
//! (the receiver marks it taken). Pages are taken when first touched, so the fixed sizes cost address space only.

use crate::memory::Mapping;
use rustix::thread::futex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Most ranks on one host.
pub(crate) const MAX_LOCAL: usize = 256;
/// Most groups that a rank joins in its life: groups are made at the start, a handful per axis of the mesh.
pub(crate) const MAX_GROUPS: usize = 256;
/// Most messages of one rank that its neighbours have not taken yet.
pub(crate) const MAX_SENDS: usize = 1024;
/// Bytes of one of the two halves of a group's staging area: several of them fit a core's cache.
pub(crate) const STAGE_BYTES: usize = 256 << 10;
/// Words of the part of a group's slot where an all-to-all tells each peer where to read.
const TABLE_WORDS: usize = 2 * MAX_LOCAL;

const LINE: usize = 64;
const PAGE: usize = 4096;
const RINGS: usize = PAGE;
const RING_BYTES: usize = LINE + MAX_SENDS * 4;
const SENDS: usize = (RINGS + MAX_LOCAL * RING_BYTES).next_multiple_of(PAGE);
const SEND_BYTES: usize = 2 * LINE;
const GROUPS: usize = (SENDS + MAX_SENDS * SEND_BYTES).next_multiple_of(PAGE);
const HEADER: usize = 2 * LINE;
const SLOT_TABLES: usize = LINE + 2 * HEADER;
const SLOT_STAGES: usize = (SLOT_TABLES + 2 * TABLE_WORDS * 8).next_multiple_of(PAGE);
const SLOT_BYTES: usize = SLOT_STAGES + 2 * STAGE_BYTES;

/// Size of a control segment.
pub(crate) const CONTROL_BYTES: usize = GROUPS + MAX_GROUPS * SLOT_BYTES;

/// Words that describe an operation or a message; see `header.rs`.
pub(crate) const HEADER_WORDS: usize = 8;

/// Words in one place: a header and the location of a buffer.
pub(crate) const WORDS: usize = HEADER_WORDS + 2;

/// A view of a control segment, one's own or a neighbour's.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    mapping: Arc<Mapping>,
    /// Whether its ranks are threads of one process, which makes futexes cheaper.
    private: bool,
}

impl Control {
    pub(crate) fn new(mapping: Arc<Mapping>, private: bool) -> Control {
        assert!(mapping.bytes() >= CONTROL_BYTES);
        Control { mapping, private }
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        assert!(offset <= CONTROL_BYTES - 4 && offset.is_multiple_of(4));
        // SAFETY: inside the mapping and aligned; all access is atomic.
        unsafe { &*self.mapping.ptr().add(offset).cast::<AtomicU32>() }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        assert!(offset <= CONTROL_BYTES - 8 && offset.is_multiple_of(8));
        // SAFETY: inside the mapping and aligned; all access is atomic.
        unsafe { &*self.mapping.ptr().add(offset).cast::<AtomicU64>() }
    }

    pub(crate) fn bell(&self) -> Bell<'_> {
        let flags = if self.private { futex::Flags::PRIVATE } else { futex::Flags::empty() };
        Bell { word: self.word32(0), sleepers: self.word32(4), flags }
    }

    /// Counts up while the rank lives.
    pub(crate) fn heartbeat(&self) -> &AtomicU64 {
        self.word64(LINE)
    }

    /// Set once the rank has left in good order.
    pub(crate) fn left(&self) -> &AtomicU32 {
        self.word32(LINE + 8)
    }

    /// How many sends to neighbour `to` were ever posted.
    pub(crate) fn ring_tail(&self, to: usize) -> &AtomicU64 {
        debug_assert!(to < MAX_LOCAL);
        self.word64(RINGS + to * RING_BYTES)
    }

    /// The send posted `at`-th to neighbour `to`.
    pub(crate) fn ring_entry(&self, to: usize, at: u64) -> &AtomicU32 {
        self.word32(RINGS + to * RING_BYTES + LINE + (at as usize % MAX_SENDS) * 4)
    }

    /// How many of the rank's operations are reading or writing memory of other threads right now.
    pub(crate) fn touching(&self) -> &AtomicU32 {
        self.word32(LINE + 12)
    }

    /// Whether the ranks are threads of one process.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    pub(crate) fn send_state(&self, send: usize) -> &AtomicU32 {
        debug_assert!(send < MAX_SENDS);
        self.word32(SENDS + send * SEND_BYTES)
    }

    pub(crate) fn send_header(&self, send: usize) -> Words<'_> {
        Words { control: self, offset: SENDS + send * SEND_BYTES + 16 }
    }

    /// How many meetings of the group in `slot` this rank has come to.
    pub(crate) fn step(&self, slot: usize) -> &AtomicU64 {
        debug_assert!(slot < MAX_GROUPS);
        self.word64(GROUPS + slot * SLOT_BYTES)
    }

    /// What this rank brings to the meeting `step`; meetings alternate between two places.
    pub(crate) fn header(&self, slot: usize, step: u64) -> Words<'_> {
        Words { control: self, offset: GROUPS + slot * SLOT_BYTES + LINE + (step % 2) as usize * HEADER }
    }

    /// Two words for each member: where in this rank's buffer its part begins, and its length.
    pub(crate) fn table(&self, slot: usize, step: u64, member: usize) -> [&AtomicU64; 2] {
        debug_assert!(member < MAX_LOCAL);
        let half = (step % 2) as usize * TABLE_WORDS * 8;
        let at = GROUPS + slot * SLOT_BYTES + SLOT_TABLES + half + member * 16;
        [self.word64(at), self.word64(at + 8)]
    }

    pub(crate) fn stage(&self, slot: usize, step: u64) -> *mut u8 {
        let offset = GROUPS + slot * SLOT_BYTES + SLOT_STAGES + (step % 2) as usize * STAGE_BYTES;
        self.mapping.ptr().wrapping_add(offset)
    }
}

/// A run of words that are published by a later release of another word.
pub(crate) struct Words<'a> {
    control: &'a Control,
    offset: usize,
}

impl Words<'_> {
    pub(crate) fn write(&self, words: &[u64; WORDS]) {
        for (i, word) in words.iter().enumerate() {
            self.control.word64(self.offset + i * 8).store(*word, Ordering::Relaxed);
        }
    }

    pub(crate) fn read(&self) -> [u64; WORDS] {
        std::array::from_fn(|i| self.control.word64(self.offset + i * 8).load(Ordering::Relaxed))
    }
}

const _: () = assert!(WORDS * 8 <= HEADER && 16 + WORDS * 8 <= SEND_BYTES);

/// What the threads of a rank sleep on. Whoever makes progress for a rank rings its bell.
pub(crate) struct Bell<'a> {
    word: &'a AtomicU32,
    sleepers: &'a AtomicU32,
    flags: futex::Flags,
}

impl Bell<'_> {
    /// Wakes the rank if it sleeps. Call [`publish`] between making progress and ringing.
    pub(crate) fn ring(&self) {
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.word.fetch_add(1, Ordering::SeqCst);
            // The only failures are of arguments; a missed wake-up is bounded by the sleeper's own timeout.
            let _ = futex::wake(self.word, self.flags, i32::MAX as u32);
        }
    }

    /// Sleeps until the bell rings or `at_most` has passed, unless `ready` says so just before.
    pub(crate) fn sleep(&self, at_most: Duration, ready: impl FnOnce() -> bool) {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let heard = self.word.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !ready() {
            let timeout = futex::Timespec {
                tv_sec: at_most.as_secs() as i64,
                tv_nsec: i64::from(at_most.subsec_nanos()),
            };
            let _ = futex::wait(self.word, self.flags, heard, Some(&timeout));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Orders one's own progress before the look at who sleeps. With the fence in [`Bell::sleep`], either the sleeper
/// sees the progress or we see the sleeper.
pub(crate) fn publish() {
    fence(Ordering::SeqCst);
}
