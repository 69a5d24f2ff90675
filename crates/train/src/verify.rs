//! Silent corruption found: weights and moments hashed, compared with what other ranks hold alike and with what they were
//! when nobody had reason to change them.
//!
//! Two things are compared. What several ranks hold alike (replicas along dp; what every rank along tp holds; both ends
//! of a pipeline) must be alike: that is seen within so many steps as lie between comparisons, since a copy that is other
//! stays other. And between the end of a step and the update of the next nobody writes to weights and moments, whoever
//! holds them: what is other then has changed by itself, and the rank is known although no other has a copy.

mod hash;
mod mend;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use ckpt::Region;
use half::bf16;
use program::{BufferId, GroupBuffers, GroupId, Owned, ParamGroup, Program};
use spec::random::{GOLDEN, scatter};
use spec::{DType, Error, Result};

use crate::exec::Executor;
use crate::resolve;
use crate::state::{Run, runs};

/// What is kept of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Store {
    /// As kernels read it: in the run's precision.
    Param,
    /// In f32, where the precision is another.
    Master,
    ExpAvg,
    ExpAvgSq,
    Average,
}

impl Store {
    fn of(b: &GroupBuffers) -> impl Iterator<Item = (Store, BufferId)> {
        let master = b.master.map(|id| (Store::Master, id));
        let second = b.exp_avg_sq.map(|id| (Store::ExpAvgSq, id));
        let moments = [(Store::ExpAvg, b.exp_avg)].into_iter().chain(second);
        let average = b.average.map(|id| (Store::Average, id));
        [(Store::Param, b.param)].into_iter().chain(master).chain(moments).chain(average)
    }

    fn words(self, name: &str) -> String {
        match self {
            Store::Param => name.to_owned(),
            Store::Master => format!("{name} (f32 copy)"),
            Store::ExpAvg => format!("{name} (first moment)"),
            Store::ExpAvgSq => format!("{name} (second moment)"),
            Store::Average => format!("{name} (average over steps)"),
        }
    }
}

/// A part of a buffer that is a part of one parameter, and its hash.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    buffer: BufferId,
    store: Store,
    /// In the buffer's elements.
    first: usize,
    count: usize,
    name: String,
    /// Tells what it is from what others hold: equal on all ranks that hold the same.
    key: u64,
    sum: u64,
}

/// Hashes of all that a rank holds between steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    pub(crate) parts: Vec<Part>,
    /// Of what this rank saves, by parameter: over all ranks each element is in one of them.
    pub(crate) own: BTreeMap<String, u64>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    key: u64,
    /// Which parameter, and what of it.
    pub(crate) what: String,
    /// The ranks whose copy it is, as far as that can be told; all that differ if not.
    pub(crate) ranks: Vec<usize>,
    /// The ranks that hold it as it should be.
    pub(crate) peers: Vec<usize>,
    /// It is other than it was after the step before.
    pub(crate) at_rest: bool,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranks: Vec<String> = self.ranks.iter().map(usize::to_string).collect();
        let (plural, ranks) = (if ranks.len() == 1 { "" } else { "s" }, ranks.join(", "));
        let what = &self.what;
        match (self.at_rest, self.peers.is_empty()) {
            (true, _) => write!(f, "rank{plural} {ranks}: {what} changed between two steps"),
            (false, false) => write!(f, "rank{plural} {ranks}: {what} is not what the other ranks hold"),
            (false, true) => {
                write!(f, "rank{plural} {ranks}: {what} differs, and no majority says whose is right")
            }
        }
    }
}

/// What came of a comparison; the same on all ranks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Compared {
    pub(crate) findings: Vec<Finding>,
    /// Copies that were compared with another.
    pub(crate) copies: u64,
    /// Sum over all ranks of what each saves.
    pub(crate) hash: u64,
}

/// More findings than these are counted, not named: a rank whose memory fails holds little that is right.
pub(crate) const NAMED_MAX: usize = 4;

impl Compared {
    /// What was found, in a sentence.
    pub(crate) fn words(&self) -> String {
        let mut named: Vec<String> = self.findings.iter().take(NAMED_MAX).map(Finding::to_string).collect();
        if self.findings.len() > NAMED_MAX {
            named.push(format!("and {} more", self.findings.len() - NAMED_MAX));
        }
        named.join("; ")
    }
}

impl Executor {
    /// Hashes all that this rank holds between steps, on as many threads as its device has.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn held(&self) -> Result<Held> {
        let p = &self.program;
        let mut held = Held::default();
        let mut jobs = Vec::new();
        for Stored { group, store, buffer, range, share } in stored(p) {
            let whole = resolve::whole(p, buffer);
            let bits = match p.buffer(buffer).dtype {
                DType::Bf16 => hash::Bits::Half(self.device.read::<bf16>(whole)?),
                _ => hash::Bits::Single(self.device.read::<f32>(whole)?),
            };
            let bits = std::sync::Arc::new(bits);
            for run in runs(group, range.clone()) {
                let at = held.parts.len();
                let name = run.part.name.clone();
                let (first, count) = (run.local.start - range.start, run.local.len());
                let key = key(&name, store, &run.regions());
                jobs.extend(pieces(&run, share).map(|(run, is_own)| hash::Job {
                    part: at,
                    is_own,
                    bits: bits.clone(),
                    at: run.local.start - range.start..run.local.end - range.start,
                    place: hash::Place::of(&run, seed(&name, store)),
                }));
                held.parts.push(Part { buffer, store, first, count, name, key, sum: 0 });
            }
        }
        let sums = hash::all(&jobs, self.device.threads());
        for (job, sum) in jobs.iter().zip(sums) {
            let part = &mut held.parts[job.part];
            part.sum = part.sum.wrapping_add(sum);
            if job.is_own {
                let own = held.own.entry(part.name.clone()).or_default();
                *own = own.wrapping_add(sum);
            }
        }
        Ok(held)
    }

    /// Compares what ranks hold alike, and what this rank holds with what it held `before`; collective.
    ///
    /// # Errors
    /// If a rank is lost.
    pub(crate) fn compare(&self, held: &Held, before: Option<&Held>) -> Result<Compared> {
        let said = self.mesh.exchange(&say(held, before))?;
        let said: Vec<Said> = said.iter().map(|bytes| hear(bytes)).collect::<Result<_>>()?;
        let mut compared = judge(&said);
        if compared.findings.is_empty() {
            return Ok(compared);
        }
        // Whoever holds it knows its name.
        let names: HashMap<u64, String> =
            held.parts.iter().map(|p| (p.key, p.store.words(&p.name))).collect();
        let mine: BTreeMap<u64, &String> =
            compared.findings.iter().filter_map(|f| Some((f.key, names.get(&f.key)?))).collect();
        let failed = |e: serde_json::Error| Error::failure(format!("name what was found: {e}"));
        let all = self.mesh.exchange(&serde_json::to_vec(&mine).map_err(failed)?)?;
        for bytes in &all {
            let theirs: BTreeMap<u64, String> = serde_json::from_slice(bytes).map_err(failed)?;
            for f in compared.findings.iter_mut().filter(|f| f.what.is_empty()) {
                f.what = theirs.get(&f.key).cloned().unwrap_or_default();
            }
        }
        Ok(compared)
    }
}

/// A buffer that is as it was until the next update.
struct Stored<'a> {
    group: &'a ParamGroup,
    store: Store,
    buffer: BufferId,
    /// The elements of the group in it.
    range: Range<usize>,
    /// Those that this rank saves.
    share: Owned,
}

fn stored(p: &Program) -> Vec<Stored<'_>> {
    let mut all = Vec::new();
    for (id, b) in (0..).map(GroupId).zip(&p.group_buffers) {
        for (store, buffer) in Store::of(b) {
            let (group, len) = (p.group(id), p.buffer(buffer).len());
            let range = if len == group.len() { 0..len } else { b.owned.range() };
            let is_saved = b.counts && (store != Store::Param || b.master.is_none());
            let share = if is_saved { p.share(id) } else { Owned { first: 0, count: 0 } };
            all.push(Stored { group, store, buffer, range, share });
        }
    }
    if let Some((group, buffer)) = p.expert_bias.as_ref().zip(p.io.expert_bias) {
        let count = if p.rank == 0 { group.len() } else { 0 };
        let (range, share) = (0..group.len(), Owned { first: 0, count });
        all.push(Stored { group, store: Store::Param, buffer, range, share });
    }
    all
}

/// What a rank says of what it holds.
struct Said {
    /// Key and hash.
    sums: Vec<(u64, u64)>,
    /// Keys of what changed by itself.
    changed: BTreeSet<u64>,
    own: u64,
}

fn say(held: &Held, before: Option<&Held>) -> Vec<u8> {
    let was: HashMap<u64, u64> = before.iter().flat_map(|b| &b.parts).map(|p| (p.key, p.sum)).collect();
    let changed = held.parts.iter().filter(|p| was.get(&p.key).is_some_and(|sum| *sum != p.sum));
    let changed: Vec<u64> = changed.map(|p| p.key).collect();
    let own = held.own.values().fold(0, |sum: u64, own| sum.wrapping_add(*own));
    let head = [own, changed.len() as u64];
    let sums = held.parts.iter().flat_map(|p| [p.key, p.sum]);
    head.into_iter().chain(changed).chain(sums).flat_map(u64::to_le_bytes).collect()
}

fn hear(bytes: &[u8]) -> Result<Said> {
    let mut words = bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
    let cut = || Error::failure("a rank's hashes are cut short");
    let (own, changed) = (words.next().ok_or_else(cut)?, words.next().ok_or_else(cut)?);
    let changed = (0..changed).map(|_| words.next().ok_or_else(cut)).collect::<Result<_>>()?;
    let mut sums = Vec::new();
    while let (Some(key), Some(sum)) = (words.next(), words.next()) {
        sums.push((key, sum));
    }
    Ok(Said { sums, changed, own })
}

/// Who holds what others do not; of three or more copies most are right, of two nobody knows.
fn judge(said: &[Said]) -> Compared {
    let mut holders: BTreeMap<u64, Vec<(usize, u64)>> = BTreeMap::new();
    for (rank, said) in said.iter().enumerate() {
        for (key, sum) in &said.sums {
            holders.entry(*key).or_default().push((rank, *sum));
        }
    }
    let hash = said.iter().fold(0_u64, |sum, s| sum.wrapping_add(s.own));
    let mut compared = Compared { hash, ..Compared::default() };
    for (key, holders) in holders {
        let changed: Vec<usize> =
            holders.iter().map(|(rank, _)| *rank).filter(|rank| said[*rank].changed.contains(&key)).collect();
        if holders.len() > 1 {
            compared.copies += holders.len() as u64;
        }
        // What has changed by itself is no witness.
        let witnesses: Vec<(usize, u64)> =
            holders.iter().filter(|(rank, _)| !changed.contains(rank)).copied().collect();
        let count = |sum: u64| witnesses.iter().filter(|(_, s)| *s == sum).count();
        let most = witnesses.iter().map(|(_, sum)| *sum).max_by_key(|sum| count(*sum));
        let right = most.filter(|sum| 2 * count(*sum) > witnesses.len());
        let peers: Vec<usize> =
            witnesses.iter().filter(|(_, sum)| Some(*sum) == right).map(|(rank, _)| *rank).collect();
        let odd: Vec<usize> =
            witnesses.iter().filter(|(_, sum)| Some(*sum) != right).map(|(rank, _)| *rank).collect();
        for (ranks, at_rest) in [(changed, true), (odd, false)] {
            if !ranks.is_empty() {
                let (peers, what) = (peers.clone(), String::new());
                compared.findings.push(Finding { key, what, ranks, peers, at_rest });
            }
        }
    }
    compared
}

/// A run cut where `share` begins and ends, and whether the piece is in it.
fn pieces<'a>(run: &Run<'a>, share: Owned) -> impl Iterator<Item = (Run<'a>, bool)> + use<'a> {
    let (start, end) = (run.local.start, run.local.end);
    let from = share.first.clamp(start, end);
    let to = (share.first + share.count).clamp(from, end);
    let (part, before) = (run.part, run.within.start);
    [(start..from, false), (from..to, true), (to..end, false)].into_iter().filter(|(r, _)| !r.is_empty()).map(
        move |(local, is_own)| {
            let within = before + local.start - start..before + local.end - start;
            (Run { part, local, within }, is_own)
        },
    )
}

/// What the elements of a parameter's store are hashed with; masters as the parameters that they are where there are none.
fn seed(name: &str, store: Store) -> u64 {
    let store = match store {
        Store::Param | Store::Master => 1,
        Store::ExpAvg => 2,
        Store::ExpAvgSq => 3,
        Store::Average => 4,
    };
    name.bytes().fold(store, |h: u64, b| scatter(h.wrapping_add(GOLDEN) ^ u64::from(b)))
}

fn key(name: &str, store: Store, regions: &[Region]) -> u64 {
    let words = format!("{store:?} {regions:?}");
    words.bytes().fold(seed(name, store), |h, b| scatter(h.wrapping_add(GOLDEN) ^ u64::from(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of hashes of one thing by rank, and the ranks where it changed by itself: who is named, and whether others are right.
    #[track_caller]
    fn check(sums: &[u64], changed: &[usize], expected: &[(&[usize], bool, bool)]) {
        let said: Vec<Said> = sums
            .iter()
            .enumerate()
            .map(|(rank, sum)| Said {
                sums: vec![(7, *sum), (100 + rank as u64, 5)],
                changed: changed.iter().filter(|c| **c == rank).map(|_| 7).collect(),
                own: 1,
            })
            .collect();
        let compared = judge(&said);
        let found: Vec<(&[usize], bool, bool)> =
            compared.findings.iter().map(|f| (f.ranks.as_slice(), f.at_rest, !f.peers.is_empty())).collect();
        assert_eq!(found, expected);
        assert_eq!(compared.hash, sums.len() as u64);
        assert_eq!(compared.copies, if sums.len() > 1 { sums.len() as u64 } else { 0 });
    }

    #[test]
    fn most_are_right_and_of_two_nobody_knows() {
        check(&[1, 1, 1], &[], &[]);
        check(&[1, 2, 1], &[], &[(&[1], false, true)]);
        check(&[2, 1, 1, 3], &[], &[(&[0, 1, 2, 3], false, false)]);
        check(&[1, 1, 1, 3], &[], &[(&[3], false, true)]);
        check(&[1, 2], &[], &[(&[0, 1], false, false)]);
        check(&[1], &[], &[]);
    }

    #[test]
    fn what_changed_by_itself_is_known_by_itself() {
        check(&[1], &[0], &[(&[0], true, false)]);
        check(&[1, 2], &[1], &[(&[1], true, true)]);
        // Both copies changed alike: no peer is left.
        check(&[2, 2], &[0, 1], &[(&[0, 1], true, false)]);
    }

    #[test]
    fn findings_are_sentences() {
        let f = |ranks: &[usize], peers: &[usize], at_rest| Finding {
            key: 0,
            what: Store::ExpAvg.words("head.weight"),
            ranks: ranks.to_vec(),
            peers: peers.to_vec(),
            at_rest,
        };
        let said = |f: Finding| f.to_string();
        assert_eq!(
            said(f(&[1], &[0, 2], false)),
            "rank 1: head.weight (first moment) is not what the other ranks hold"
        );
        assert_eq!(
            said(f(&[0, 1], &[], false)),
            "ranks 0, 1: head.weight (first moment) differs, and no majority says whose is right"
        );
        assert_eq!(said(f(&[1], &[], true)), "rank 1: head.weight (first moment) changed between two steps");
    }
}
