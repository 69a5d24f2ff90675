//! What people mean by the name of a machine: a platform, a node, an accelerator's usual node, a word for several.

use super::{Catalog, Entry, EntryKind, nearest};
use crate::{Error, Result};

/// What a name was taken for, and what else it could be.
#[derive(Clone, Debug)]
pub struct Meaning<'a> {
    /// The platform or node.
    pub machine: &'a Entry,
    /// Scalable units, where the name ends in them (`dgx-superpod-h100-64su`).
    pub units: Option<usize>,
    /// Accelerators, where the name tells them (`v5p-512`).
    pub accelerators: Option<usize>,
    /// Other machines that the name may stand for; empty where it is one machine's own.
    pub others: Vec<&'a str>,
    /// What the catalogue says of the name.
    pub note: Option<&'a str>,
}

impl Meaning<'_> {
    /// Which machine was taken and what else it could have been, where the name leaves that open.
    pub fn doubt(&self, typed: &str) -> Option<String> {
        if self.others.is_empty() {
            return None;
        }
        /// More names than anyone reads.
        const SHOWN: usize = 6;
        let shown = self.others.iter().take(SHOWN).copied().collect::<Vec<_>>().join(", ");
        let more = match self.others.len().saturating_sub(SHOWN) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let taken = &self.machine.name;
        let note = self.note.map(|note| format!("; {note}")).unwrap_or_default();
        Some(format!("\"{typed}\" is taken for {taken}; it could also be {shown}{more}{note}"))
    }
}

impl Catalog {
    /// The machine of that name. Case, blanks, dashes, a maker in front and a plural do not matter. In turn: a platform, a platform of so
    /// many scalable units, a node, a name with several meanings, a slice of TPUs as Google names it, an accelerator.
    ///
    /// # Errors
    /// A name that is not known, or one of a thing that nothing can be planned on; the hint says what to do instead.
    pub fn meaning(&self, name: &str) -> Result<Meaning<'_>> {
        let tidy = name.trim().to_lowercase().replace([' ', '_'], "-");
        let bare = MAKERS.iter().find_map(|maker| tidy.strip_prefix(maker)?.strip_prefix('-'));
        let spoken = std::iter::once(tidy.as_str()).chain(bare);
        let singular = spoken.clone().filter_map(|name| name.strip_suffix('s'));
        spoken
            .chain(singular)
            .find_map(|name| self.machine(name))
            .unwrap_or_else(|| Err(self.unknown_machine(name)))
    }

    fn machine(&self, tidy: &str) -> Option<Result<Meaning<'_>>> {
        let only =
            |machine, units| Meaning { machine, units, accelerators: None, others: Vec::new(), note: None };
        if let Ok(platform) = self.get(EntryKind::Platform, tidy) {
            return Some(Ok(only(platform, None)));
        }
        if let Some((stem, units)) = scalable_units(tidy)
            && let Ok(platform) = self.get(EntryKind::Platform, stem)
        {
            return Some(Ok(only(platform, Some(units))));
        }
        if let Ok(node) = self.get(EntryKind::Node, tidy) {
            return Some(Ok(only(node, None)));
        }
        if let Ok(word) = self.get(EntryKind::Name, tidy) {
            return Some(self.word(word));
        }
        if let Some((platform, accelerators)) = self.tpu_slice(tidy) {
            return Some(Ok(Meaning { accelerators: Some(accelerators), ..only(platform, None) }));
        }
        self.get(EntryKind::Accelerator, tidy).ok().map(|chip| self.usual(chip))
    }

    /// A name with several meanings, or with none that can be planned on.
    fn word<'a>(&'a self, word: &'a Entry) -> Result<Meaning<'a>> {
        let title = word.text("title").unwrap_or(&word.name);
        let note = word.text("note");
        if let Some((first, others)) = word.list("means").split_first() {
            let others = others.iter().map(String::as_str).collect();
            return Ok(Meaning { others, note, ..self.meaning(first)? });
        }
        if !word.list("see").is_empty() {
            let hint = format!(
                "`phalanx catalog show {}` has its figures; `phalanx catalog list platform` has machines",
                word.name
            );
            return Err(Error::user(format!("{title} is a part of machines and none itself")).hint(hint));
        }
        let why = note.unwrap_or("it publishes no figures");
        Err(Error::user(format!("{title}: {why}")).hint(format!(
            "ask {title} for a quote; plan on the kind of node that it offers (--cluster dgx-h100 --accelerators N), or \
             write its figures into a --catalog file"
        )))
    }

    /// An accelerator stands for its usual machine; every other one with it is what the name could also mean.
    fn usual<'a>(&'a self, chip: &'a Entry) -> Result<Meaning<'a>> {
        let nodes = |name: &str| -> Vec<&'a Entry> {
            self.of_kind(EntryKind::Node).filter(|n| n.text("accelerator") == Some(name)).collect()
        };
        let with = nodes(&chip.name);
        let platforms = self
            .of_kind(EntryKind::Platform)
            .filter(|p| with.iter().any(|n| p.text("node") == Some(n.name.as_str())));
        let all: Vec<&Entry> = with.iter().copied().chain(platforms).collect();
        let usual = chip.text("usual").and_then(|usual| all.iter().find(|e| e.name == usual));
        let Some(machine) = usual.or(all.first()).copied() else {
            let hint = "name its nodes in a --catalog file, or plan on a node of the catalogue: `phalanx catalog list node`";
            return Err(Error::user(format!("the catalogue has no node with {}", chip.name)).hint(hint));
        };
        let others = all.iter().map(|e| e.name.as_str()).filter(|name| *name != machine.name).collect();
        Ok(Meaning { machine, units: None, accelerators: None, others, note: None })
    }

    /// `v5p-512` is a slice of 512 TensorCores, two of which make a chip; names of generations with one count chips.
    fn tpu_slice(&self, tidy: &str) -> Option<(&Entry, usize)> {
        let (generation, count) = tidy.strip_prefix("tpu-").unwrap_or(tidy).rsplit_once('-')?;
        let count: usize = count.parse().ok()?;
        let generation = if generation == "v5litepod" { "v5e" } else { generation };
        let cores = match generation {
            "v3" | "v4" | "v5p" => 2,
            "v5e" | "v6e" => 1,
            _ => return None,
        };
        let platform = self.get(EntryKind::Platform, &format!("tpu-{generation}-pod")).ok()?;
        Some((platform, (count / cores).max(1)))
    }

    fn unknown_machine(&self, name: &str) -> Error {
        let error = Error::user(format!("unknown cluster \"{name}\""));
        let known = self.cluster_names();
        let rest = "`phalanx catalog list platform` and `list node` show all, --accelerators says how many of a node's kind, \
                    a --catalog file describes a machine of your own";
        match nearest(name, known.iter().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`? {rest}")),
            None => error.hint(rest),
        }
    }
}

/// Whose machines people name with the maker in front.
const MAKERS: [&str; 10] =
    ["nvidia", "geforce", "aws", "amazon", "google", "microsoft", "azure", "oracle", "amd", "intel"];

/// `dgx-superpod-h100-64su` is `dgx-superpod-h100` with 64 units.
fn scalable_units(name: &str) -> Option<(&str, usize)> {
    let (stem, last) = name.rsplit_once('-')?;
    let units = last.strip_suffix("su")?.parse().ok()?;
    Some((stem, units))
}
