//! Where ranks are: their coordinates, their places on the machine, and the groups that talk.

use plan::placement::{Order, Placement};
use spec::Layout;

/// Groups that talk, all within a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Axis {
    Tensor,
    Context,
    Expert,
    /// Ranks with the same dense parameters.
    All,
    /// Those that a parameter is sharded over.
    Near,
    /// Those with the same shard.
    Far,
    /// Ranks with the same experts.
    ExpertAll,
    /// Those that these experts are sharded over.
    ExpertNear,
    /// Those with the same shard of them.
    ExpertFar,
}

/// All of them.
pub(crate) const AXES: [Axis; 9] = [
    Axis::Tensor,
    Axis::Context,
    Axis::Expert,
    Axis::All,
    Axis::Near,
    Axis::Far,
    Axis::ExpertAll,
    Axis::ExpertNear,
    Axis::ExpertFar,
];

impl Axis {
    /// Members, and how far apart they are among the ranks of a stage.
    pub(crate) fn cut(self, placement: &Placement) -> (usize, usize) {
        let l = &placement.layout;
        let (shard, expert) = (l.shards(), l.expert_shards());
        match self {
            Axis::Tensor => (l.tp, 1),
            Axis::Context => (l.cp, l.tp),
            Axis::Expert => (l.ep, 1),
            Axis::All => (l.replicas(), l.tp),
            Axis::Near => (shard, l.tp),
            Axis::Far => ((l.replicas() / shard).max(1), l.tp * shard),
            Axis::ExpertAll => (l.expert_replicas().max(1), l.ep),
            Axis::ExpertNear => (expert, l.ep),
            Axis::ExpertFar => ((l.expert_replicas() / expert).max(1), l.ep * expert),
        }
    }

    pub(crate) fn size(self, placement: &Placement) -> usize {
        self.cut(placement).0
    }
}

/// The ranks of a layout: `stage * width + q`, where `q` counts tp first, then cp, then dp.
#[derive(Clone, Debug)]
pub(crate) struct RankGrid {
    pub(crate) placement: Placement,
    /// Ranks of a stage.
    pub(crate) width: usize,
    pub(crate) stages: usize,
}

impl RankGrid {
    pub(crate) fn of(placement: &Placement) -> Self {
        let layout: &Layout = &placement.layout;
        RankGrid { width: layout.stage_ranks(), stages: layout.pp, placement: placement.clone() }
    }

    pub(crate) fn ranks(&self) -> usize {
        self.width * self.stages
    }

    /// Which accelerator of the machine a rank has.
    pub(crate) fn place(&self, rank: usize) -> usize {
        let (stage, q) = (rank / self.width, rank % self.width);
        match self.placement.order {
            Order::TpCpDpPp => rank,
            Order::TpCpPpDp => {
                let inner = self.placement.layout.tp * self.placement.layout.cp;
                (q / inner) * inner * self.stages + stage * inner + q % inner
            }
        }
    }

    /// The first member of a rank's group on an axis, and how far apart members are.
    pub(crate) fn group(&self, axis: Axis, rank: usize) -> (usize, usize, usize) {
        let (size, stride) = axis.cut(&self.placement);
        let (stage, q) = (rank / self.width, rank % self.width);
        let first = q / (size * stride) * (size * stride) + q % stride;
        (stage * self.width + first, size, stride)
    }

    /// Members of a rank's group on an axis.
    pub(crate) fn members(&self, axis: Axis, rank: usize) -> impl Iterator<Item = usize> + use<> {
        let (first, size, stride) = self.group(axis, rank);
        (0..size).map(move |i| first + i * stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::NumberFormat;

    #[test]
    fn groups_and_places_are_those_of_the_layout() {
        let layout = Layout { dp: 4, tp: 2, pp: 2, cp: 2, ep: 4, shard: Some(2), ..Layout::default() };
        let placement = Placement::of(layout, NumberFormat::Bf16);
        let mesh = RankGrid::of(&placement);
        let check = |axis: Axis, rank: usize, expected: &[usize]| {
            assert_eq!(mesh.members(axis, rank).collect::<Vec<_>>(), expected, "{axis:?}");
        };
        check(Axis::Tensor, 19, &[18, 19]);
        check(Axis::Context, 4, &[4, 6]);
        check(Axis::Expert, 5, &[4, 5, 6, 7]);
        check(Axis::Near, 1, &[1, 3, 5, 7]);
        check(Axis::Far, 1, &[1, 9]);
        check(Axis::ExpertAll, 1, &[1, 5, 9, 13]);
        check(Axis::ExpertNear, 1, &[1, 5]);
        check(Axis::ExpertFar, 1, &[1, 9]);
        assert_eq!(mesh.place(17), 17);
        let mesh = RankGrid::of(&Placement { order: Order::TpCpPpDp, ..placement });
        assert_eq!([0, 3, 4, 16, 20].map(|r| mesh.place(r)), [0, 3, 8, 4, 12]);
        let mut all: Vec<usize> = (0..mesh.ranks()).map(|r| mesh.place(r)).collect();
        all.sort_unstable();
        assert_eq!(all, (0..mesh.ranks()).collect::<Vec<_>>());
    }
}
