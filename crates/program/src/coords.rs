//! Where a rank lies in the mesh, and whom it talks to.

use serde::Serialize;
use spec::Layout;

use crate::op::Axis;
use crate::params::Replication;

/// A rank's place on each axis. Ranks count tp fastest, then cp, dp, pp.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Coords {
    /// Data-parallel index.
    pub dp: usize,
    /// Tensor-parallel index.
    pub tp: usize,
    /// Context-parallel index.
    pub cp: usize,
    /// Pipeline stage.
    pub pp: usize,
}

impl Coords {
    /// Where `rank` lies.
    pub fn of(rank: usize, layout: &Layout) -> Coords {
        let (tp, rest) = (rank % layout.tp, rank / layout.tp);
        let (cp, rest) = (rest % layout.cp, rest / layout.cp);
        Coords { tp, cp, dp: rest % layout.dp, pp: rest / layout.dp }
    }

    /// The rank at these coordinates.
    pub fn rank(self, layout: &Layout) -> usize {
        self.pp * layout.stage_ranks() + self.in_stage(layout)
    }

    /// The ranks that differ from this one along `axis` only, by their place on it. Along ep these are the neighbours
    /// that hold all experts together.
    pub fn peers(self, axis: Axis, layout: &Layout) -> Vec<usize> {
        match axis {
            Axis::Dp => (0..layout.dp).map(|dp| Coords { dp, ..self }.rank(layout)).collect(),
            Axis::Tp => (0..layout.tp).map(|tp| Coords { tp, ..self }.rank(layout)).collect(),
            Axis::Pp => (0..layout.pp).map(|pp| Coords { pp, ..self }.rank(layout)).collect(),
            Axis::Cp => (0..layout.cp).map(|cp| Coords { cp, ..self }.rank(layout)).collect(),
            Axis::Ep => {
                let first = self.rank(layout) - self.ep(layout);
                (first..first + layout.ep).collect()
            }
        }
    }

    /// Expert-parallel index.
    pub fn ep(self, layout: &Layout) -> usize {
        self.in_stage(layout) % layout.ep
    }

    /// How many ranks hold the same elements of a parameter, and which of them this one is: (count, index).
    ///
    /// ```
    /// use program::{Coords, Replication};
    /// let layout = spec::Layout { dp: 2, cp: 2, tp: 2, ep: 4, ..spec::Layout::default() };
    /// let coords = Coords::of(5, &layout);
    /// assert_eq!(coords.replicas(Replication::Data, &layout), (4, 2));
    /// assert_eq!(coords.replica_ranks(Replication::Data, &layout), [1, 3, 5, 7]);
    /// assert_eq!(coords.replicas(Replication::Expert, &layout), (2, 1));
    /// assert_eq!(coords.replica_ranks(Replication::Expert, &layout), [1, 5]);
    /// ```
    pub fn replicas(self, replication: Replication, layout: &Layout) -> (usize, usize) {
        match replication {
            Replication::Data => (layout.replicas(), self.dp * layout.cp + self.cp),
            Replication::Expert => (layout.expert_replicas(), self.in_stage(layout) / layout.ep),
        }
    }

    /// Those ranks, by their index.
    pub fn replica_ranks(self, replication: Replication, layout: &Layout) -> Vec<usize> {
        let (count, index) = self.replicas(replication, layout);
        let apart = match replication {
            Replication::Data => layout.tp,
            Replication::Expert => layout.ep,
        };
        let first = self.rank(layout) - index * apart;
        (0..count).map(|i| first + i * apart).collect()
    }

    /// Of the ranks that hold the same elements, how many shard them together under ZeRO, and which of these this one is:
    /// (count, index). They are neighbours.
    pub fn shards(self, replication: Replication, layout: &Layout) -> (usize, usize) {
        let count = match replication {
            Replication::Data => layout.shards(),
            Replication::Expert => layout.expert_shards(),
        };
        (count, self.replicas(replication, layout).1 % count)
    }

    /// Of the ranks that hold the same elements, how many own the same shard under ZeRO, one in each group that shards,
    /// and which of these this one is: (count, index).
    pub fn owners(self, replication: Replication, layout: &Layout) -> (usize, usize) {
        let (count, index) = self.replicas(replication, layout);
        let (shards, _) = self.shards(replication, layout);
        (count / shards, index / shards)
    }

    /// Counted over the ranks of the stage.
    fn in_stage(self, layout: &Layout) -> usize {
        (self.dp * layout.cp + self.cp) * layout.tp + self.tp
    }
}

/// The ranks that an op's messages go between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Members {
    /// Those that differ along one axis of the mesh.
    Axis(Axis),
    /// Those that hold the same elements of a parameter.
    Replicas(Replication),
    /// Of those, the ones that shard them together under ZeRO: each owns a part.
    Shards(Replication),
    /// Of those, the ones that own the same part, one in each group that shards.
    Owners(Replication),
    /// First and last stage of the pipeline, which both hold a tied table.
    Ends,
    /// All.
    World,
}

impl Members {
    /// The ranks, by their index in the group; the one at `coords` is among them, except that stages between the ends
    /// do not belong to [`Members::Ends`].
    ///
    /// ```
    /// use program::{Axis, Coords, Members};
    /// let layout = spec::Layout { dp: 2, tp: 2, pp: 2, ..spec::Layout::default() };
    /// let coords = Coords::of(5, &layout);
    /// assert_eq!(Members::Axis(Axis::Tp).ranks(coords, &layout), [4, 5]);
    /// assert_eq!(Members::Ends.ranks(coords, &layout), [1, 5]);
    ///
    /// let layout = spec::Layout { dp: 4, tp: 2, zero: spec::Zero::Parameters, shard: Some(2), ..layout };
    /// let coords = Coords::of(5, &spec::Layout { pp: 1, ..layout.clone() });
    /// assert_eq!(Members::Replicas(program::Replication::Data).ranks(coords, &layout), [1, 3, 5, 7]);
    /// assert_eq!(Members::Shards(program::Replication::Data).ranks(coords, &layout), [5, 7]);
    /// assert_eq!(Members::Owners(program::Replication::Data).ranks(coords, &layout), [1, 5]);
    /// ```
    pub fn ranks(self, coords: Coords, layout: &Layout) -> Vec<usize> {
        match self {
            Members::Axis(axis) => coords.peers(axis, layout),
            Members::Replicas(replication) => coords.replica_ranks(replication, layout),
            Members::Shards(replication) => {
                let all = coords.replica_ranks(replication, layout);
                let (count, index) = coords.shards(replication, layout);
                let first = coords.replicas(replication, layout).1 - index;
                all[first..first + count].to_vec()
            }
            Members::Owners(replication) => {
                let all = coords.replica_ranks(replication, layout);
                let (count, index) = coords.shards(replication, layout);
                all.into_iter().skip(index).step_by(count).collect()
            }
            Members::Ends => {
                let mut ends = vec![0, layout.pp - 1];
                ends.dedup();
                ends.into_iter().map(|pp| Coords { pp, ..coords }.rank(layout)).collect()
            }
            Members::World => (0..layout.world()).collect(),
        }
    }
}
