//! A copy of one rank's share of the state, in memory.

use std::sync::Arc;

use ckpt::{Kind, Region};
use serde::{Deserialize, Serialize};
use spec::{Error, Result};

use crate::exec::Executor;

/// Which share it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Label {
    /// Steps done.
    pub(crate) step: u64,
    /// The meeting whose layout dealt the shares: later ones have larger numbers.
    pub(crate) era: u64,
    /// Of so many shares.
    pub(crate) shares: usize,
    /// The rank that it was dealt to.
    pub(crate) owner: usize,
}

/// What a piece of a share is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outline {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) shape: Vec<usize>,
    pub(crate) boxes: Vec<Region>,
}

impl Outline {
    pub(crate) fn len(&self) -> usize {
        self.boxes.iter().map(Region::len).sum()
    }

    /// Columns of the tensor seen as a matrix.
    pub(crate) fn cols(&self) -> usize {
        match self.shape.as_slice() {
            [n] => *n,
            dims => dims.iter().skip(1).product(),
        }
    }
}

/// A share: parameters and moments, each element of the model on exactly one rank.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    pub(crate) label: Label,
    pub(crate) outlines: Arc<Vec<Outline>>,
    /// Of all pieces, in their order.
    pub(crate) data: Vec<f32>,
}

impl Share {
    /// Copies this rank's own share as it is now.
    ///
    /// # Errors
    /// If the device is lost, or there is no memory for it.
    pub(crate) fn take(exec: &Executor, step: u64, era: u64) -> Result<Share> {
        let state = exec.state()?;
        let outlines = Arc::new(outlines(&state));
        let (shares, owner) = (exec.program.layout.world(), exec.program.rank);
        let mut share = Share { label: Label { step, era, shares, owner }, outlines, data: Vec::new() };
        share.make_room()?;
        share.fill(&state, step);
        Ok(share)
    }

    /// Copies the same share as it is after `step`.
    pub(crate) fn refresh(&mut self, exec: &Executor, step: u64) -> Result<()> {
        self.fill(&exec.state()?, step);
        Ok(())
    }

    fn fill(&mut self, state: &crate::State<'_>, step: u64) {
        self.data.clear();
        state.data().for_each(|data| self.data.extend_from_slice(data));
        self.label.step = step;
    }

    /// Reserves memory for the data of all pieces.
    pub(crate) fn make_room(&mut self) -> Result<()> {
        let len = self.outlines.iter().map(Outline::len).sum();
        self.data.try_reserve_exact(len).map_err(|_| {
            Error::failure(format!("no memory for a copy of {len} elements of the state"))
                .hint("checkpoint.memory_every=0 makes no copies: a lost rank costs the steps since a checkpoint then")
        })
    }
}

pub(crate) fn outlines(state: &crate::State<'_>) -> Vec<Outline> {
    let outline = |p: ckpt::Piece<'_>| Outline {
        name: p.name.to_owned(),
        kind: p.kind,
        shape: p.global_shape.to_vec(),
        boxes: p.boxes,
    };
    state.pieces().map(outline).collect()
}
