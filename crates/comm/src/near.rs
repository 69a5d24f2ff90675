//! Collectives between neighbours: ranks that see each other's memory.
//!
//! Members *meet*: each raises a counter of its own and waits until all counters have come as far. Between two
//! meetings everyone may read what the others brought. Buffers in shared memory are read and written where they lie;
//! others pass through a staging area, a chunk at a time. What a member brings to a meeting stays in place until the
//! next but one, because nobody comes to the next before having read it.

use crate::control::{Control, MAX_LOCAL, STAGE_BYTES, WORDS, publish};
use crate::element::RawSlice;
use crate::header::{Header, mismatch};
use crate::inner::{Address, Core, Location, Touch};
use crate::progress::{give_way, until};
use crate::sum::{Into, Sum, Tree};
use smallvec::SmallVec;
use spec::{Error, Result, shares};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Up to this size a buffer is staged before the members meet: one meeting instead of two.
const SMALL_BYTES: usize = 16 << 10;
/// The same for buffers that are shared, between two members: copying more costs more than a second meeting. Among
/// more members, who are likely to share cores, a meeting costs more than the copy.
const TINY_BYTES: usize = 2 << 10;
/// Up to as many members everyone adds the whole of a staged chunk instead of a share: again one meeting less.
const ADD_ALL_MAX: usize = 4;
/// Bytes worked on before other operations of the rank get a turn.
const TURN_BYTES: usize = 2 << 20;

/// The members of a group on this host, in the order of the group.
pub(crate) struct Neighbours {
    pub(crate) ranks: Vec<usize>,
    pub(crate) me: usize,
    controls: Vec<Control>,
    /// Each member's place for this group in its control segment.
    slots: Vec<usize>,
    /// The meetings so far.
    step: AtomicU64,
    stages: [Vec<Address>; 2],
    tree: Tree,
}

impl Neighbours {
    pub(crate) fn new(core: &Core, ranks: Vec<usize>, slots: Vec<usize>) -> Result<Neighbours> {
        assert!(ranks.len() <= MAX_LOCAL && ranks.len() == slots.len());
        let me = ranks.iter().position(|&r| r == core.rank).unwrap_or(0);
        let controls =
            ranks.iter().map(|&r| Ok(core.near(r)?.control.clone())).collect::<Result<Vec<_>>>()?;
        let stages =
            [0, 1].map(|half| controls.iter().zip(&slots).map(|(c, &s)| Address(c.stage(s, half))).collect());
        let tree = Tree::new(ranks.len());
        Ok(Neighbours { ranks, me, controls, slots, step: AtomicU64::new(0), stages, tree })
    }

    fn size(&self) -> usize {
        self.ranks.len()
    }

    fn has_come(&self, member: usize, step: u64) -> bool {
        self.controls[member].step(self.slots[member]).load(Ordering::Acquire) >= step
    }
}

/// The members whose buffers are shared, and where they lie.
type Brought = SmallVec<[(usize, Location); FEW]>;

/// Members for whom an operation allocates nothing.
const FEW: usize = 16;

/// One collective operation of the members.
pub(crate) struct Meeting<'a> {
    pub(crate) core: &'a Core,
    pub(crate) near: &'a Neighbours,
    pub(crate) header: Header,
}

impl Meeting<'_> {
    /// The number of the next meeting. A group has one operation at a time, so nobody else advances it.
    fn next(&self) -> u64 {
        self.near.step.load(Ordering::Relaxed) + 1
    }

    /// Comes to the next meeting with a header, which must equal everyone's, and gives the locations of those whose
    /// buffers are shared.
    async fn meet(&self, location: Location) -> Result<Brought> {
        let (near, step) = (self.near, self.next());
        let mut words = [0; WORDS];
        words[..8].copy_from_slice(&self.header.encode());
        words[8..].copy_from_slice(&[location.segment, location.offset]);
        near.controls[near.me].header(near.slots[near.me], step).write(&words);
        self.come().await?;
        let mut brought = Brought::new();
        for member in 0..near.size() {
            // Read once: what is compared is what is used, whatever the member does to its memory.
            let theirs = self.words(member);
            if theirs[..8] != words[..8] {
                return Err(self.disagreement(near.ranks[member], &theirs));
            }
            let location = Location { segment: theirs[8], offset: theirs[9] };
            if location.is_shared() {
                brought.push((member, location));
            }
        }
        Ok(brought)
    }

    #[cold]
    fn disagreement(&self, rank: usize, words: &[u64]) -> Error {
        match Header::decode(words) {
            Some(theirs) => self.core.fail(&mismatch(self.core.rank, &self.header, rank, &theirs)),
            None => self.core.broken(rank, "came to a meeting with a header that cannot be read"),
        }
    }

    /// Comes to the next meeting of an operation that is known to be everyone's.
    async fn come(&self) -> Result<()> {
        let (near, step) = (self.near, self.next());
        near.step.store(step, Ordering::Relaxed);
        near.controls[near.me].step(near.slots[near.me]).store(step, Ordering::Release);
        publish();
        let mut waiting_for = 0;
        let mut all_here = || {
            while waiting_for < near.size() && near.has_come(waiting_for, step) {
                waiting_for += 1;
            }
            waiting_for == near.size()
        };
        if all_here() {
            // Only the last to come wakes the others: before that they would find someone missing.
            for control in &near.controls {
                control.bell().ring();
            }
            return Ok(());
        }
        until(
            self.core,
            || self.missing(step),
            || {
                if all_here() { Some(Ok(())) } else { self.left(step) }
            },
        )
        .await
    }

    fn left(&self, step: u64) -> Option<Result<()>> {
        let near = self.near;
        let gone = (0..near.size()).find(|&m| {
            near.controls[m].left().load(Ordering::Acquire) != 0 && !near.has_come(m, step) && m != near.me
        })?;
        let why = format!(
            "rank {} left while rank {} waited for it in {} of {}",
            near.ranks[gone], self.core.rank, self.header, self.header.group
        );
        Some(Err(self.core.fail(&why)))
    }

    fn missing(&self, step: u64) -> String {
        let near = self.near;
        let missing: Vec<String> = (0..near.size())
            .filter(|&m| !near.has_come(m, step))
            .map(|m| format!("rank {} ({})", near.ranks[m], self.core.peers[near.ranks[m]].place))
            .collect();
        format!("{} to come to {} of {}", missing.join(", "), self.header, self.header.group)
    }

    /// What a member brought to the last meeting.
    fn words(&self, member: usize) -> [u64; WORDS] {
        let step = self.near.step.load(Ordering::Relaxed);
        self.near.controls[member].header(self.near.slots[member], step).read()
    }

    /// Where the members' buffers of `bytes(member)` bytes lie, if all are shared. They may be used until the guard
    /// is dropped, which comes before the next meeting.
    async fn buffers(
        &self,
        brought: &Brought,
        bytes: impl Fn(usize) -> usize,
    ) -> Result<Option<(SmallVec<[Address; FEW]>, Touch<'_>)>> {
        if brought.len() < self.near.size() {
            return Ok(None);
        }
        let touch = self.core.touch()?;
        let mut addresses = SmallVec::with_capacity(brought.len());
        for &(member, location) in brought {
            addresses.push(self.resolve(member, location, bytes(member)).await?);
        }
        Ok(Some((addresses, touch)))
    }

    async fn resolve(&self, member: usize, location: Location, bytes: usize) -> Result<Address> {
        let rank = self.near.ranks[member];
        let look = || self.core.resolve(rank, location, bytes);
        match look() {
            Some(address) => address,
            None => until(self.core, || format!("the shared memory of rank {rank}"), look).await,
        }
    }

    fn shared(&self, buffer: RawSlice) -> Location {
        self.core.locate(buffer.as_ptr(), buffer.bytes())
    }

    fn stages(&self, step: u64) -> &[Address] {
        &self.near.stages[(step % 2) as usize]
    }

    pub(crate) async fn barrier(&self) -> Result<()> {
        self.meet(Location::NONE).await.map(drop)
    }

    /// # Safety
    /// `buffer` is this rank's alone, readable and writable, until the future has ended.
    pub(crate) async unsafe fn all_reduce(&self, buffer: RawSlice) -> Result<()> {
        let small = buffer.bytes() <= SMALL_BYTES;
        let always_staged = if self.near.size() == 2 { TINY_BYTES } else { SMALL_BYTES };
        let here = if buffer.bytes() <= always_staged { Location::NONE } else { self.shared(buffer) };
        let staged = small && !here.is_shared();
        if staged {
            // SAFETY: passed on from the caller.
            unsafe { self.stage_in(buffer, 0..buffer.count) };
        }
        let brought = self.meet(here).await?;
        if let Some((buffers, touch)) = self.buffers(&brought, |_| buffer.bytes()).await? {
            // SAFETY: as the caller's, of every member.
            unsafe { self.add_share(buffer, &buffers).await };
            drop(touch);
            return self.come().await;
        }
        if staged && brought.is_empty() {
            // SAFETY: passed on from the caller.
            unsafe { self.add_all(buffer) };
            return Ok(());
        }
        let chunk = STAGE_BYTES / buffer.element.bytes();
        for start in (0..buffer.count).step_by(chunk) {
            let part = buffer.part(&(start..buffer.count.min(start + chunk)));
            // SAFETY: passed on from the caller.
            unsafe { self.stage_in(part, 0..part.count) };
            self.come().await?;
            if self.near.size() <= ADD_ALL_MAX {
                // SAFETY: passed on from the caller.
                unsafe { self.add_all(part) };
                continue;
            }
            let stages = self.stages(self.next() - 1);
            let share = shares::aligned(part.count, self.near.size(), self.near.me);
            // SAFETY: between two meetings each member touches its own share of all stages.
            unsafe { self.sum(part, stages, stages).run(share.start, share.start, share.len()) };
            self.come().await?;
            // SAFETY: the stage is this rank's and complete; the caller vouches for the buffer.
            unsafe { copy(stages[self.near.me].0, part.as_ptr(), part.bytes()) };
        }
        Ok(())
    }

    fn sum<'s>(&'s self, buffer: RawSlice, sources: &'s [Address], destinations: &'s [Address]) -> Sum<'s> {
        Sum { tree: &self.near.tree, element: buffer.element, into: Into::Same, sources, destinations }
    }

    /// Copies a range of `buffer` to the start of this rank's stage for the next meeting.
    unsafe fn stage_in(&self, buffer: RawSlice, range: Range<usize>) {
        let part = buffer.part(&range);
        debug_assert!(part.bytes() <= STAGE_BYTES);
        let stage = self.stages(self.next())[self.near.me];
        // SAFETY: nobody reads this half of the stage until the next meeting; the caller vouches for the buffer.
        unsafe { copy(part.as_ptr(), stage.0, part.bytes()) };
    }

    /// Adds up everyone's stage of the last meeting.
    unsafe fn add_all(&self, to: RawSlice) {
        let stages = self.stages(self.next() - 1);
        // SAFETY: after the meeting all stages hold `to.count` elements; the caller vouches for the buffer.
        unsafe { self.sum(to, stages, &[Address(to.as_ptr())]).run(0, 0, to.count) };
    }

    /// Adds up this member's share of all buffers, in all buffers.
    async unsafe fn add_share(&self, buffer: RawSlice, buffers: &[Address]) {
        let share = shares::aligned(buffer.count, self.near.size(), self.near.me);
        let turn = TURN_BYTES / buffer.element.bytes();
        for start in share.clone().step_by(turn) {
            let count = turn.min(share.end - start);
            // SAFETY: each member touches its own share of all buffers, and nothing else does until the next meeting.
            unsafe { self.sum(buffer, buffers, buffers).run(start, start, count) };
            if start + count < share.end {
                give_way().await;
            }
        }
    }

    /// Sums everyone's `ranges[me]` to `output`.
    ///
    /// # Safety
    /// `input` is readable and unchanged by others and `output` this rank's alone until the future has ended; it may
    /// be exactly the own range of `input`, and has room for `ranges[me]` in the type of `into`.
    pub(crate) async unsafe fn reduce_scatter(
        &self,
        input: RawSlice,
        output: Address,
        into: Into,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let brought = self.meet(self.shared(input)).await?;
        let own = &ranges[self.near.me];
        let destinations = [output];
        if let Some((buffers, touch)) = self.buffers(&brought, |_| input.bytes()).await? {
            let sum = Sum { into, ..self.sum(input, &buffers, &destinations) };
            // SAFETY: members write their own range of their own input at most; others do not read that.
            unsafe { sum.run(own.start, 0, own.len()) };
            drop(touch);
            return self.come().await;
        }
        let chunk = STAGE_BYTES / self.near.size() / input.element.bytes();
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        for start in (0..longest).step_by(chunk) {
            let stage = self.stages(self.next())[self.near.me];
            for (member, range) in ranges.iter().enumerate() {
                let part = input.part(&window(range, start, chunk));
                let place = stage.plus(member * chunk * input.element.bytes()).0;
                // SAFETY: nobody reads this half of the stage until the next meeting.
                unsafe { copy(part.as_ptr(), place, part.bytes()) };
            }
            self.come().await?;
            let stages = self.stages(self.next() - 1);
            let sum = Sum { into, ..self.sum(input, stages, &destinations) };
            // SAFETY: after the meeting all stages hold this part of our range.
            unsafe { sum.run(self.near.me * chunk, start, window(own, start, chunk).len()) };
        }
        Ok(())
    }

    /// Copies everyone's `input` to `ranges` of `output`.
    ///
    /// # Safety
    /// `input` is readable and `output` this rank's alone until the future has ended; `input` may be exactly the own
    /// range of `output`. Their sizes are those of the ranges.
    pub(crate) async unsafe fn all_gather(
        &self,
        input: RawSlice,
        output: RawSlice,
        ranges: &[Range<usize>],
    ) -> Result<()> {
        let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
        let own = output.part(&ranges[self.near.me]);
        let bytes = |count: usize| count * input.element.bytes();
        if own.as_ptr() != input.as_ptr() {
            // SAFETY: both have the size of the own range.
            unsafe { copy(input.as_ptr(), own.as_ptr(), own.bytes()) };
        }
        if bytes(longest) > SMALL_BYTES {
            let brought = self.meet(self.shared(input)).await?;
            if let Some((buffers, touch)) = self.buffers(&brought, |m| bytes(ranges[m].len())).await? {
                for member in self.others() {
                    let to = output.part(&ranges[member]);
                    // SAFETY: the member's input stays as it is until the next meeting.
                    unsafe { self.copy_in_turns(buffers[member], to).await };
                }
                drop(touch);
                return self.come().await;
            }
        }
        let chunk = STAGE_BYTES / input.element.bytes();
        for start in (0..longest.max(1)).step_by(chunk) {
            // SAFETY: passed on from the caller.
            unsafe { self.stage_in(input, window(&(0..input.count), start, chunk)) };
            if bytes(longest) <= SMALL_BYTES {
                self.meet(Location::NONE).await?;
            } else {
                self.come().await?;
            }
            for member in self.others() {
                let to = output.part(&window(&ranges[member], start, chunk));
                // SAFETY: after the meeting the stage holds this part of the member's input.
                unsafe { copy(self.stages(self.next() - 1)[member].0, to.as_ptr(), to.bytes()) };
            }
        }
        Ok(())
    }

    /// The other members, each beginning after itself, so that not all read from one at the same time.
    fn others(&self) -> impl Iterator<Item = usize> {
        let (me, n) = (self.near.me, self.near.size());
        (1..n).map(move |i| (me + i) % n)
    }

    async unsafe fn copy_in_turns(&self, from: Address, to: RawSlice) {
        let bytes = to.bytes();
        for start in (0..bytes).step_by(TURN_BYTES) {
            let count = TURN_BYTES.min(bytes - start);
            // SAFETY: inside both buffers, for which the caller vouches.
            unsafe { copy(from.plus(start).0, to.as_ptr().wrapping_add(start), count) };
            if start + count < bytes {
                give_way().await;
            }
        }
    }

    /// Copies each member's `input_ranges[me]` to `output_ranges[member]`.
    ///
    /// # Safety
    /// `input` is readable and `output` this rank's alone until the future has ended; they do not overlap.
    pub(crate) async unsafe fn all_to_all(
        &self,
        input: RawSlice,
        input_ranges: &[Range<usize>],
        output: RawSlice,
        output_ranges: &[Range<usize>],
    ) -> Result<()> {
        let (near, n, element) = (self.near, self.near.size(), input.element);
        let table =
            |member: usize, to: usize, step: u64| near.controls[member].table(near.slots[member], step, to);
        let step = self.next();
        for (to, range) in input_ranges.iter().enumerate() {
            let [start, len] = table(near.me, to, step);
            start.store(range.start as u64, Ordering::Relaxed);
            len.store(range.len() as u64, Ordering::Relaxed);
        }
        let words =
            |member: usize, to: usize| table(member, to, step).map(|w| w.load(Ordering::Relaxed) as usize);
        let brought = self.meet(self.shared(input)).await?;
        // Read once: what is checked is what is used, whatever the member does to its table.
        let runs: Vec<[usize; 2]> = (0..n).map(|member| words(member, near.me)).collect();
        for (member, [_, theirs]) in runs.iter().enumerate() {
            let ours = output_ranges[member].len();
            if *theirs != ours {
                let why = format!(
                    "{}: rank {} sends {theirs} {element} to rank {}, which expects {ours}",
                    self.header, near.ranks[member], self.core.rank
                );
                return Err(self.core.fail(&why));
            }
        }
        let end = |m: usize| runs[m][0].saturating_add(runs[m][1]).saturating_mul(element.bytes());
        if let Some((buffers, touch)) = self.buffers(&brought, end).await? {
            for member in self.others().chain([near.me]) {
                let from = buffers[member].plus(runs[member][0] * element.bytes());
                // SAFETY: the member's input stays as it is until the next meeting.
                unsafe { self.copy_in_turns(from, output.part(&output_ranges[member])).await };
            }
            drop(touch);
            return self.come().await;
        }
        let chunk = STAGE_BYTES / n / element.bytes();
        let all = (0..n).flat_map(|m| (0..n).map(move |to| (m, to)));
        let longest = all.map(|(m, to)| words(m, to)[1]).max().unwrap_or(0);
        for start in (0..longest).step_by(chunk) {
            let place = |stage: Address, to: usize| stage.plus(to * chunk * element.bytes()).0;
            let stage = self.stages(self.next())[near.me];
            for (to, range) in input_ranges.iter().enumerate() {
                let part = input.part(&window(range, start, chunk));
                // SAFETY: nobody reads this half of the stage until the next meeting.
                unsafe { copy(part.as_ptr(), place(stage, to), part.bytes()) };
            }
            self.come().await?;
            for member in 0..n {
                let to = output.part(&window(&output_ranges[member], start, chunk));
                // SAFETY: after the meeting the stage holds this part of what the member sends us.
                unsafe {
                    copy(place(self.stages(self.next() - 1)[member], near.me), to.as_ptr(), to.bytes())
                };
            }
        }
        Ok(())
    }

    /// Copies the buffer of member `root` to everyone's.
    ///
    /// # Safety
    /// `buffer` is this rank's alone, and writable unless it is the root, until the future has ended.
    pub(crate) async unsafe fn broadcast(&self, buffer: RawSlice, root: usize) -> Result<()> {
        let is_root = self.near.me == root;
        if buffer.bytes() > SMALL_BYTES {
            let brought = self.meet(self.shared(buffer)).await?;
            if let Some(&(_, location)) = brought.iter().find(|(member, _)| *member == root) {
                if !is_root {
                    let _touch = self.core.touch()?;
                    let from = self.resolve(root, location, buffer.bytes()).await?;
                    // SAFETY: the root's buffer stays as it is until the next meeting.
                    unsafe { self.copy_in_turns(from, buffer).await };
                }
                return self.come().await;
            }
        }
        let chunk = STAGE_BYTES / buffer.element.bytes();
        for start in (0..buffer.count.max(1)).step_by(chunk) {
            let part = buffer.part(&window(&(0..buffer.count), start, chunk));
            if is_root {
                // SAFETY: passed on from the caller.
                unsafe { self.stage_in(part, 0..part.count) };
            }
            if buffer.bytes() <= SMALL_BYTES {
                self.meet(Location::NONE).await?;
            } else {
                self.come().await?;
            }
            if !is_root {
                // SAFETY: after the meeting the stage holds this part of the root's buffer.
                unsafe { copy(self.stages(self.next() - 1)[root].0, part.as_ptr(), part.bytes()) };
            }
        }
        Ok(())
    }
}

/// The part of `range` that a round of `chunk` elements moves, `start` elements in.
fn window(range: &Range<usize>, start: usize, chunk: usize) -> Range<usize> {
    let from = (range.start + start).min(range.end);
    from..(from + chunk).min(range.end)
}

/// # Safety
/// `from` is readable and `to` writable for `bytes`, and they do not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: passed on from the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
}
