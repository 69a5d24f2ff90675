//! Which ranks cannot be told apart: colours refined until every rank of a colour talks to as many of each other colour
//! (the coarsest equitable partition; 1-dimensional Weisfeiler-Leman).

use std::collections::BTreeMap;

use spec::random::mix;

use super::paths::{Crossings, Tier};
use super::{Disturbed, Mark};
use crate::mesh::{AXES, RankGrid};

/// The class of every rank, numbered by the first rank of each.
pub(super) fn classes(
    mesh: &RankGrid,
    disturbed: &Disturbed,
    tiers: &[Tier],
    crossings: &Crossings,
) -> Vec<u32> {
    let ranks = mesh.ranks();
    let mut kinds: Vec<&Mark> = disturbed.ranks.values().collect();
    kinds.sort_unstable();
    kinds.dedup();
    let mut signature: Vec<u64> = (0..ranks).map(|r| mix((r / mesh.width) as u64)).collect();
    for (rank, mark) in &disturbed.ranks {
        if *mark != Mark::default()
            && let Ok(kind) = kinds.binary_search(&mark)
        {
            signature[*rank] = mix(signature[*rank] ^ mix(!(kind as u64)));
        }
    }
    if !tiers.is_empty() {
        for (rank, s) in signature.iter_mut().enumerate() {
            *s = mix(*s ^ crossings.signature(mesh, rank));
            for tier in tiers {
                let rate = disturbed.tiers.get(&(tier.index, mesh.place(rank) / tier.accelerators));
                *s = mix(*s ^ rate.map_or(0, |r| mix(*r)));
            }
        }
    }
    let (mut class_of, mut count) = numbered(&signature);
    loop {
        refine(mesh, tiers, &class_of, &mut signature);
        let (next, found) = numbered(&signature);
        class_of = next;
        if found == count {
            return class_of;
        }
        count = found;
    }
}

/// Signatures of ranks from their classes and those of everyone they talk to.
fn refine(mesh: &RankGrid, tiers: &[Tier], class_of: &[u32], signature: &mut [u64]) {
    signature.iter_mut().zip(class_of).for_each(|(s, c)| *s = mix(u64::from(*c)));
    let mut sums = vec![0u64; class_of.len()];
    let mut fold = |of: &dyn Fn(usize) -> usize, salt: u64| {
        sums.fill(0);
        for (rank, c) in class_of.iter().enumerate() {
            let sum = &mut sums[of(rank)];
            *sum = sum.wrapping_add(mix(u64::from(*c) ^ salt));
        }
        for (rank, s) in signature.iter_mut().enumerate() {
            *s = mix(*s ^ sums[of(rank)].rotate_left(7));
        }
    };
    for (salt, axis) in AXES.into_iter().enumerate() {
        // Groups of one tell nothing.
        if axis.size(&mesh.placement) > 1 {
            fold(&|rank| mesh.group(axis, rank).0, mix(salt as u64 + 1));
        }
    }
    for (t, tier) in tiers.iter().enumerate() {
        fold(&|rank| mesh.place(rank) / tier.accelerators, mix(t as u64 + 101));
    }
    if mesh.stages > 1 {
        // Classes know their stage, so the sum over a column tells what is where in it.
        fold(&|rank| rank % mesh.width, mix(1001));
    }
}

fn numbered(signature: &[u64]) -> (Vec<u32>, usize) {
    let mut known: BTreeMap<u64, u32> = BTreeMap::new();
    let (mut last, mut last_class) = (None, 0);
    let class_of = signature
        .iter()
        .map(|s| {
            if last != Some(*s) {
                let next = known.len() as u32;
                (last, last_class) = (Some(*s), *known.entry(*s).or_insert(next));
            }
            last_class
        })
        .collect();
    (class_of, known.len())
}
