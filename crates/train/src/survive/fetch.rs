//! State from the memory of ranks: each asks for regions by name, and whoever holds them sends just those.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use ckpt::{Kind, Region, for_each_copy};
use serde::{Deserialize, Serialize};
use spec::{Error, Result};

use super::choose::Choice;
use super::share::{Outline, Share};
use crate::mesh::Mesh;
use crate::state::{Source, Want};

/// Elements that ranks send each other at once, about: bounds what lies in memory twice.
const ELEMENTS_AT_ONCE: usize = 1 << 24;

/// What a rank needed, as it came from ranks that held it.
#[derive(Debug, Default)]
pub(crate) struct Fetched(HashMap<(Kind, String), Vec<Parts>>);

/// Regions of a tensor and their elements.
type Parts = (Vec<Region>, Vec<f32>);

impl Source for Fetched {
    fn read_regions(&self, name: &str, kind: Kind, regions: &[Region], out: &mut [f32]) -> Result<()> {
        let found = self.0.get(&(kind, name.to_owned()));
        let found = found.and_then(|all| all.iter().find(|(r, _)| r == regions));
        let Some((_, data)) = found.filter(|(_, data)| data.len() == out.len()) else {
            return Err(Error::failure(format!("memory has no such regions of {kind} {name}")));
        };
        out.copy_from_slice(data);
        Ok(())
    }
}

/// What a rank gives and what it wants, told to all.
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    /// Owner and pieces of each share that it gives.
    gives: Vec<(usize, Vec<Outline>)>,
    wants: Vec<Want>,
}

/// Moves the chosen state from who holds it to who wants it; collective over all ranks of the mesh. `held` has at least the
/// shares that this rank is chosen to give.
///
/// # Errors
/// If a rank is lost, or some element that is wanted is with nobody.
pub(crate) fn fetch(mesh: &Mesh, choice: &Choice, held: &[Share], wants: Vec<Want>) -> Result<Fetched> {
    let me = mesh.rank();
    let given = |owner: usize| {
        held.iter().find(|s| (s.label.step, s.label.era, s.label.owner) == (choice.step, choice.era, owner))
    };
    let mut gives = Vec::new();
    for owner in choice.givers.iter().enumerate().filter(|(_, giver)| **giver == me).map(|(owner, _)| owner) {
        let share = given(owner).ok_or_else(|| Error::failure("a share that was to be given is gone"))?;
        gives.push((owner, share.outlines.to_vec()));
    }
    let offer = serde_json::to_vec(&Offer { gives, wants: wants.clone() })
        .map_err(|e| Error::failure(format!("say what is wanted: {e}")))?;
    let offers: Vec<Offer> = mesh
        .exchange(&offer)?
        .iter()
        .map(|o| serde_json::from_slice(o).map_err(|e| Error::failure(format!("hear what is wanted: {e}"))))
        .collect::<Result<_>>()?;
    let board = Board::of(&offers);
    let mut fetched: Vec<Vec<f32>> = Vec::with_capacity(wants.len());
    for want in &wants {
        fetched.push(vec![0.0; want.regions.iter().map(Region::len).sum()]);
    }
    let mut filled = vec![0_usize; wants.len()];
    for tensors in board.batches() {
        deal(mesh, &tensors, &given, &mut fetched, &mut filled)?;
    }
    let mut all = Fetched::default();
    for ((want, data), filled) in wants.into_iter().zip(fetched).zip(filled) {
        if filled != data.len() {
            return Err(Error::failure(format!(
                "ranks hold {filled} of {} elements of {} {}",
                data.len(),
                want.kind,
                want.name
            )));
        }
        all.0.entry((want.kind, want.name)).or_default().push((want.regions, data));
    }
    Ok(all)
}

/// A tensor: where its pieces lie, and who wants what of it.
#[derive(Default)]
struct Tensor<'a> {
    cols: usize,
    elements: usize,
    /// Giver, owner of the share, first element in the share's data, outline.
    pieces: Vec<(usize, usize, usize, &'a Outline)>,
    /// Rank, number among its wants, regions.
    wants: Vec<(usize, usize, &'a [Region])>,
}

/// All tensors, in an order that is the same for all ranks.
struct Board<'a>(BTreeMap<(Kind, &'a str), Tensor<'a>>);

impl<'a> Board<'a> {
    fn of(offers: &'a [Offer]) -> Board<'a> {
        let mut board: BTreeMap<(Kind, &str), Tensor<'_>> = BTreeMap::new();
        for (rank, offer) in offers.iter().enumerate() {
            for (owner, outlines) in &offer.gives {
                let mut first = 0;
                for outline in outlines.iter() {
                    let tensor = board.entry((outline.kind, &outline.name)).or_default();
                    tensor.cols = outline.cols();
                    tensor.elements = outline.shape.iter().product();
                    tensor.pieces.push((rank, *owner, first, outline));
                    first += outline.len();
                }
            }
        }
        for (rank, offer) in offers.iter().enumerate() {
            for (i, want) in offer.wants.iter().enumerate() {
                if let Some(tensor) = board.get_mut(&(want.kind, want.name.as_str())) {
                    tensor.wants.push((rank, i, &want.regions));
                }
            }
        }
        Board(board)
    }

    /// Runs of tensors that are dealt out together.
    fn batches(&self) -> Vec<Vec<&Tensor<'a>>> {
        let mut batches: Vec<Vec<&Tensor<'a>>> = Vec::new();
        let mut room = 0;
        for tensor in self.0.values() {
            match batches.last_mut().filter(|_| room >= tensor.elements) {
                Some(batch) => {
                    room -= tensor.elements;
                    batch.push(tensor);
                }
                None => {
                    room = ELEMENTS_AT_ONCE.saturating_sub(tensor.elements);
                    batches.push(vec![tensor]);
                }
            }
        }
        batches
    }
}

impl Tensor<'_> {
    /// Calls `each` with giver, owner, rank that wants and number of its want, and first elements in the share's data and
    /// in the want, and elements, of every run: in the same order on all ranks.
    fn runs(&self, each: &mut dyn FnMut(&Moved)) {
        for &(rank, want, regions) in &self.wants {
            let mut to = 0;
            for region in regions {
                for &(giver, owner, first, outline) in &self.pieces {
                    let mut from = first;
                    for held in &outline.boxes {
                        let _ = for_each_copy(held, region, self.cols, |run| {
                            let (from, to) = (from + run.from, to + run.to);
                            each(&Moved { giver, owner, rank, want, from, to, len: run.len });
                            Ok::<(), ()>(())
                        });
                        from += held.len();
                    }
                }
                to += region.len();
            }
        }
    }
}

/// A run of elements from a share to a want.
struct Moved {
    giver: usize,
    owner: usize,
    rank: usize,
    want: usize,
    from: usize,
    to: usize,
    len: usize,
}

/// Moves what is wanted of some tensors.
fn deal<'s>(
    mesh: &Mesh,
    tensors: &[&Tensor<'_>],
    given: &dyn Fn(usize) -> Option<&'s Share>,
    fetched: &mut [Vec<f32>],
    filled: &mut [usize],
) -> Result<()> {
    let (me, n) = (mesh.rank(), mesh.size());
    let (mut sent, mut comes) = (vec![Vec::new(); n], vec![0_usize; n]);
    for tensor in tensors {
        tensor.runs(&mut |m| {
            if m.giver == me
                && let Some(share) = given(m.owner)
            {
                sent[m.rank].extend_from_slice(&share.data[m.from..m.from + m.len]);
            }
            if m.rank == me {
                comes[m.giver] += m.len;
            }
        });
    }
    let sent_parts = ranges(sent.iter().map(Vec::len));
    let come_parts = ranges(comes.iter().copied());
    let mut received = vec![0.0; comes.iter().sum()];
    mesh.deal(&sent.concat(), &sent_parts, &mut received, &come_parts)?;
    let mut at: Vec<usize> = come_parts.iter().map(|r| r.start).collect();
    for tensor in tensors {
        tensor.runs(&mut |m| {
            if m.rank == me {
                let from = at[m.giver];
                fetched[m.want][m.to..m.to + m.len].copy_from_slice(&received[from..from + m.len]);
                at[m.giver] += m.len;
                filled[m.want] += m.len;
            }
        });
    }
    Ok(())
}

fn ranges(lens: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    lens.map(|len| {
        end += len;
        end - len..end
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use comm::World;
    use proptest::prelude::*;

    use super::super::choose::newest_whole;
    use super::super::share::Label;
    use super::*;

    const ROWS: usize = 12;
    const COLS: usize = 6;

    /// Columns `part` of `parts`, as a tensor-parallel rank has them, or a run of elements.
    fn region(by_columns: bool, parts: usize, part: usize) -> Region {
        let cut = |n: usize| n * part / parts..n * (part + 1) / parts;
        if by_columns {
            let cols = cut(COLS);
            return Region::rect(0, ROWS, cols.start, cols.len());
        }
        let run = cut(ROWS * COLS);
        Region::range(run.start, run.len())
    }

    fn value(region: &Region, i: usize) -> f32 {
        match *region {
            Region::Range { start, .. } => (start + i) as f32,
            Region::Box { row0, col0, cols, .. } => ((row0 + i / cols) * COLS + col0 + i % cols) as f32,
        }
    }

    fn share(owner: usize, shares: usize, by_columns: bool) -> Share {
        let region = region(by_columns, shares, owner);
        let outline = |kind| Outline { name: "w".into(), kind, shape: vec![ROWS, COLS], boxes: vec![region] };
        let data = Kind::ALL.iter().flat_map(|_| (0..region.len()).map(|i| value(&region, i))).collect();
        let label = Label { step: 3, era: 1, shares, owner };
        Share { label, outlines: Arc::new(Kind::ALL.map(outline).into()), data }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn everybody_gets_what_it_wants(
            shares in 1usize..5, lost in 0usize..5, ranks in 1usize..5, held_columns: bool, want_columns: bool,
        ) {
            // Rank r holds share r and that of the rank before it; `lost` came anew and holds nothing.
            let held = |rank: usize| -> Vec<Share> {
                let owners = if rank == lost || rank >= shares { vec![] } else { vec![rank, (rank + shares - 1) % shares] };
                owners.into_iter().map(|owner| share(owner, shares, held_columns)).collect()
            };
            let n = ranks.max(shares);
            let labels: Vec<Vec<Label>> = (0..n).map(|r| held(r).iter().map(|s| s.label).collect()).collect();
            let choice = newest_whole(&labels);
            prop_assert_eq!(choice.is_some(), shares > 1 || lost > 0);
            let Some(choice) = choice else { return Ok(()) };
            let worlds = World::threads(n).expect("threads");
            std::thread::scope(|s| {
                for world in worlds {
                    let choice = &choice;
                    s.spawn(move || {
                        let rank = world.rank();
                        let wanted = region(want_columns, ranks, rank.min(ranks - 1));
                        let want = |kind| Want { name: "w".into(), kind, regions: vec![wanted] };
                        let wants = if rank < ranks { Kind::ALL.map(want).into() } else { Vec::new() };
                        let mesh = Mesh::hall(world);
                        let fetched = fetch(&mesh, choice, &held(rank), wants).expect("all is there");
                        if rank < ranks {
                            let mut out = vec![0.0; wanted.len()];
                            fetched.read_regions("w", Kind::ExpAvg, &[wanted], &mut out).expect("fetched");
                            assert!(out.iter().enumerate().all(|(i, x)| *x == value(&wanted, i)), "{out:?}");
                        }
                        mesh.barrier().expect("all are done");
                    });
                }
            });
        }
    }
}
