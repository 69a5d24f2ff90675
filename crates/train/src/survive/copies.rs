//! Copies of shares in memory: every rank keeps its own as of some step, and that of one other rank.
//!
//! A rank that is in the middle of an update has no state that is whole but its copy, so it keeps one of its own share; the
//! copy of the other's is in two buffers, so that one is whole while the next arrives. That makes three shares of memory.

use std::sync::Arc;

use spec::{Error, Result};

use super::choose::keepers;
use super::share::{Label, Outline, Share, outlines};
use crate::exec::Executor;

/// The copies that a rank keeps.
pub(crate) struct Copies {
    own: Share,
    theirs: [Kept; 2],
    /// Which of them arrives next.
    next: usize,
    /// The rank that keeps this one's, and the one whose is kept here.
    keeper: usize,
    kept: usize,
}

struct Kept {
    share: Share,
    /// All of it has arrived.
    is_whole: bool,
}

impl Copies {
    /// Deals out who keeps whose, and makes the first copies; collective over all ranks. What is `held` of this very state
    /// is used as it is.
    ///
    /// # Errors
    /// If a rank is lost, or memory is short: then all is held that was.
    pub(crate) fn new(exec: &Executor, step: u64, era: u64, held: &mut Vec<Share>) -> Result<Copies> {
        let rank = exec.program.rank;
        let keepers = keepers(&exec.mesh.hosts());
        let (keeper, kept) = (keepers[rank], keepers.iter().position(|k| *k == rank).unwrap_or(rank));
        let mine = serde_json::to_vec(&outlines(&exec.state()?))
            .map_err(|e| Error::failure(format!("name a share's pieces: {e}")))?;
        let theirs: Vec<Outline> = serde_json::from_slice(&exec.mesh.exchange(&mine)?[kept])
            .map_err(|e| Error::failure(format!("read the pieces of rank {kept}: {e}")))?;
        let label = Label { step, era, shares: exec.program.layout.world(), owner: kept };
        let mut next = Share { label, outlines: Arc::new(theirs), data: Vec::new() };
        next.make_room()?;
        let mut again = |owner: usize| {
            let label = Label { owner, ..label };
            held.iter().position(|share| share.label == label).map(|at| held.swap_remove(at))
        };
        let own = again(rank).map_or_else(|| Share::take(exec, step, era), Ok)?;
        let last = match again(kept) {
            Some(share) => Kept { share, is_whole: true },
            None => Kept { share: Share { data: Vec::new(), ..next.clone() }, is_whole: false },
        };
        let theirs = [Kept { share: next, is_whole: false }, last];
        let mut copies = Copies { own, theirs, next: 0, keeper, kept };
        match copies.refresh(exec, step) {
            Ok(()) => Ok(copies),
            Err(e) => {
                held.extend(copies.into_shares());
                Err(e)
            }
        }
    }

    /// Makes the copies those of `step`; collective. Whenever it is interrupted, and wherever, the ranks that are left hold
    /// either all of the former step or all of this one.
    ///
    /// # Errors
    /// If a rank is lost.
    pub(crate) fn refresh(&mut self, exec: &Executor, step: u64) -> Result<()> {
        let Kept { share, is_whole } = &mut self.theirs[self.next];
        *is_whole = false;
        if share.data.capacity() == 0 {
            share.make_room()?;
        }
        share.data.resize(share.outlines.iter().map(Outline::len).sum(), 0.0);
        let state = exec.state()?;
        exec.mesh.pass_on(self.keeper, state.data(), self.kept, &mut share.data)?;
        share.label.step = step;
        *is_whole = true;
        // Nobody lets go of the former step before everybody has this one.
        exec.mesh.barrier()?;
        if self.own.label.step != step {
            self.own.refresh(exec, step)?;
        }
        self.next = 1 - self.next;
        Ok(())
    }

    /// The step of this rank's own copy.
    pub(crate) fn step(&self) -> u64 {
        self.own.label.step
    }

    /// Bytes that they take.
    pub(crate) fn bytes(&self) -> usize {
        let elements = self.theirs.iter().map(|k| k.share.data.capacity()).sum::<usize>();
        (elements + self.own.data.capacity()) * size_of::<f32>()
    }

    /// What is whole of them.
    pub(crate) fn into_shares(self) -> Vec<Share> {
        let theirs = self.theirs.into_iter().filter(|k| k.is_whole).map(|k| k.share);
        std::iter::once(self.own).chain(theirs).collect()
    }
}
