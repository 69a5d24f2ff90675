//! Ranks with GPUs meet: which of their groups talk through NCCL, and the communicators of these.

use std::collections::HashMap;

use program::Program;
use spec::run::MessageChoice;
use spec::{Error, Result};
use train::Mesh;

use crate::agreement::{Facts, agree, refusal, summary};
use crate::cards::place;
use crate::device::Cuda;
use crate::driver::Stream;
use crate::nccl::{UniqueId, dotted, unique_id, version};
use crate::share_out::Wanted;
use crate::ways::{Plan, Speaker, Ways};

/// Bytes that parts of a sum take in each group unless it is said otherwise.
pub const STAGING_BYTES: usize = 32 << 20;

/// How a rank talks.
pub(crate) struct Talks {
    pub(crate) choice: MessageChoice,
    pub(crate) staging_bytes: usize,
    /// What NCCL carries; the host carries the rest.
    pub(crate) ways: Option<Ways>,
    /// Whether a stretch has no messages but NCCL's: the host's are not recorded.
    pub(crate) can_be_recorded: bool,
    /// For people.
    pub(crate) summary: Option<String>,
}

impl Default for Talks {
    fn default() -> Talks {
        let (choice, staging_bytes) = (MessageChoice::Auto, STAGING_BYTES);
        Talks { choice, staging_bytes, ways: None, can_be_recorded: true, summary: None }
    }
}

impl Talks {
    /// Leaves the ranks that it talked to.
    pub(crate) fn leave(&mut self, is_alone: bool) {
        if let Some(ways) = self.ways.take() {
            ways.leave();
        }
        (self.can_be_recorded, self.summary) = (is_alone, None);
    }

    /// As [`Ways::join`].
    pub(crate) fn join(&mut self, compute: &Stream) -> Result<()> {
        self.ways.as_mut().map_or(Ok(()), |ways| ways.join(compute))
    }

    /// As [`Ways::check`].
    pub(crate) fn check(&self) -> Result<()> {
        self.ways.as_ref().map_or(Ok(()), Ways::check)
    }
}

/// Makes the ways that a program needs. Collective over all ranks.
///
/// # Errors
/// If NCCL was asked for and cannot be had, or a rank is lost.
pub(crate) fn meet(d: &mut Cuda, program: &Program, mesh: &Mesh) -> Result<()> {
    let (choice, staging_bytes) = (d.talks.choice, d.talks.staging_bytes);
    if mesh.is_alone() {
        return Ok(());
    }
    if choice == MessageChoice::Host {
        d.talks.summary = Some(summary(choice, 0, None, ""));
        return Ok(());
    }
    let plan = Plan::of(program, mesh, staging_bytes);
    let facts = Facts { nccl: version().map_err(|e| e.to_string()), card: place(d.card.ordinal)? };
    let all = mesh.exchange(facts.write().as_bytes())?;
    let all: Vec<Facts> = all.iter().map(|text| Facts::read(&String::from_utf8_lossy(text))).collect();
    let (mut carried, mut refused): (Vec<Wanted>, Option<(String, String)>) = Default::default();
    for w in &plan.wanted {
        match agree(&w.ranks, &all) {
            Ok(()) => carried.push(w.clone()),
            Err(why) => drop(refused.get_or_insert((w.name(), why))),
        }
    }
    let (ids, verdicts) = exchange(mesh, &carried, refused.as_ref().map(|(_, why)| why.as_str()))?;
    if let (MessageChoice::Nccl, Some(why)) = (choice, verdicts.into_iter().find(|why| !why.is_empty())) {
        return Err(refusal(&why));
    }
    let nccl = facts.nccl.map(dotted).unwrap_or_default();
    let why = refused.as_ref().map(|(group, why)| (group.as_str(), why.as_str()));
    d.talks.summary = Some(summary(choice, carried.len(), why, &nccl));
    if carried.is_empty() {
        return Ok(());
    }
    let needed = carried.iter().map(|w| w.scratch_bytes).sum::<usize>();
    let Cuda { kernels, stream, arena, .. } = d;
    let ways = Ways::found(&plan, &carried, &ids, &mut Speaker { kernels, compute: stream, arena });
    let ways = ways.map_err(|e| e.context(format!("{} ({needed} bytes for messages)", d.place())))?;
    d.talks.can_be_recorded = plan.can_be_recorded(&carried);
    d.talks.ways = Some(ways);
    Ok(())
}

/// The ids of all communicators, each made by the first of its ranks; and why each rank cannot have what it wants, empty
/// if it can.
fn exchange(
    mesh: &Mesh,
    carried: &[Wanted],
    why: Option<&str>,
) -> Result<(HashMap<String, UniqueId>, Vec<String>)> {
    let mut mine = format!("{}\n", why.unwrap_or_default());
    for w in carried.iter().filter(|w| w.ranks.first() == Some(&mesh.rank())) {
        let id: String = unique_id()?.iter().map(|b| format!("{b:02x}")).collect();
        mine += &format!("{id} {}\n", w.id());
    }
    let (mut ids, mut verdicts) = (HashMap::new(), Vec::new());
    for theirs in mesh.exchange(mine.as_bytes())? {
        let text = String::from_utf8_lossy(&theirs);
        let mut lines = text.lines();
        verdicts.push(lines.next().unwrap_or_default().to_owned());
        for line in lines {
            let parsed = line.split_once(' ').and_then(|(id, of)| Some((of.to_owned(), bytes(id)?)));
            ids.extend([parsed.ok_or_else(|| Error::failure(format!("no id of NCCL: {line}")))?]);
        }
    }
    Ok((ids, verdicts))
}

fn bytes(hex: &str) -> Option<UniqueId> {
    let all: Option<Vec<u8>> =
        (0..hex.len() / 2).map(|i| u8::from_str_radix(hex.get(2 * i..2 * i + 2)?, 16).ok()).collect();
    all?.try_into().ok()
}
