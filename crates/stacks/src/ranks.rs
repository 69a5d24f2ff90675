use std::fmt::Write;

use plan::placement::{Order, Placement};
use serde::Serialize;

/// Where one rank lies and what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// The rank.
    pub rank: usize,
    /// Its node.
    pub node: usize,
    /// Its accelerator on that node.
    pub local_rank: usize,
    /// Which part of each split matrix.
    pub tp: usize,
    /// Which part of each sequence.
    pub cp: usize,
    /// Which replica.
    pub dp: usize,
    /// Which stage.
    pub pp: usize,
    /// Which experts.
    pub ep: usize,
}

/// All ranks of a layout on nodes of `per_node` accelerators, in order.
pub fn ranks(placement: &Placement, per_node: usize) -> impl Iterator<Item = Place> {
    let l = &placement.layout;
    let (tps, cps, dps, pps, eps, order) = (l.tp, l.cp, l.dp, l.pp, l.ep, placement.order);
    let per_node = per_node.max(1);
    (0..l.world()).map(move |rank| {
        let (tp, rest) = (rank % tps, rank / tps);
        let (cp, rest) = (rest % cps, rest / cps);
        let (dp, pp) = match order {
            Order::TpCpDpPp => (rest % dps, rest / dps),
            Order::TpCpPpDp => (rest / pps, rest % pps),
        };
        // Experts are spread over neighbours within a stage.
        let ep = (tp + tps * (cp + cps * dp)) % eps;
        Place { rank, node: rank / per_node, local_rank: rank % per_node, tp, cp, dp, pp, ep }
    })
}

/// The ranks as a table with a header.
pub fn rank_csv(placement: &Placement, per_node: usize) -> String {
    let mut out = String::from("rank,node,local_rank,tp,cp,dp,pp,ep\n");
    for p in ranks(placement, per_node) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{},{},{},{},{},{},{},{}",
            p.rank, p.node, p.local_rank, p.tp, p.cp, p.dp, p.pp, p.ep
        );
    }
    out
}
