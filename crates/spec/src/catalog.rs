//! The catalogue: what machines are made of, as data with provenance.

mod meaning;
mod parse;
mod quantity;
mod schema;

use std::collections::{BTreeMap, BTreeSet};

pub use meaning::Meaning;
pub use quantity::{Dimension, Direction, Measure, Quantity, Sparsity};
pub use schema::EntryKind;
use schema::{Want, keys};

use crate::suggest::plain;
use crate::{Error, Result};

/// The files that ship with the program.
const BUILTIN: &[(&str, &str)] = &[
    ("catalog/sources.toml", include_str!("../../../catalog/sources.toml")),
    ("catalog/accelerators.toml", include_str!("../../../catalog/accelerators.toml")),
    ("catalog/fabrics.toml", include_str!("../../../catalog/fabrics.toml")),
    ("catalog/nodes.toml", include_str!("../../../catalog/nodes.toml")),
    ("catalog/storage.toml", include_str!("../../../catalog/storage.toml")),
    ("catalog/prices.toml", include_str!("../../../catalog/prices.toml")),
    ("catalog/failures.toml", include_str!("../../../catalog/failures.toml")),
    ("catalog/ownership.toml", include_str!("../../../catalog/ownership.toml")),
    ("catalog/platforms.toml", include_str!("../../../catalog/platforms.toml")),
    ("catalog/workstations.toml", include_str!("../../../catalog/workstations.toml")),
    ("catalog/names.toml", include_str!("../../../catalog/names.toml")),
    ("catalog/trained.toml", include_str!("../../../catalog/trained.toml")),
];

/// Accelerators, nodes, fabrics, storage, prices, failure rates and platforms, by name.
///
/// Every number carries its unit, source and date; conflicting sources are kept as ranges.
///
/// ```
/// let catalog = spec::Catalog::builtin()?;
/// let cluster = catalog.cluster("dgx-superpod-h100-64su", None)?;
/// assert_eq!(cluster.accelerators, 16_384);
/// # Ok::<(), spec::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Catalog {
    sources: BTreeMap<String, Source>,
    entries: BTreeMap<(EntryKind, String), Entry>,
}

/// Where numbers come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The publication.
    pub what: String,
    /// Of publication, or of reading.
    pub date: String,
    /// How far to trust it.
    pub grade: String,
}

/// One entry with what it inherits from its base.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What it describes.
    pub kind: EntryKind,
    /// Its name.
    pub name: String,
    /// `file:line` where it is written.
    pub place: String,
    pub(crate) base: Option<String>,
    /// Keys, dotted for tables of numbers (`peak.bf16`).
    pub fields: BTreeMap<String, Field>,
}

/// The value of one key.
#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    /// Free text or a word.
    Text(String),
    /// Several texts.
    List(Vec<String>),
    /// True or false.
    Flag(bool),
    /// The name of another entry.
    Ref(String),
    /// A number with provenance.
    Number(Quantity),
}

/// One line of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What it describes.
    pub kind: EntryKind,
    /// Its name.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// Accelerators of a platform or node; of a platform, what its largest job gets.
    pub accelerators: Option<usize>,
}

/// What [`Catalog::check`] counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Entries of all kinds.
    pub entries: usize,
    /// Numbers, all with unit, source and date.
    pub numbers: usize,
    /// Numbers whose sources disagree, kept as ranges.
    pub ranges: usize,
    /// Platforms that resolve to a cluster.
    pub platforms: usize,
}

/// Keys that a base does not hand on: they are of one entry alone.
const OWN_KEYS: [&str; 2] = ["aliases", "usual"];

impl Catalog {
    /// The catalogue that ships with the program.
    ///
    /// # Errors
    /// If an entry that ships is wrong, which a test rules out.
    pub fn builtin() -> Result<Self> {
        Self::with_files(&[])
    }

    /// The built-in catalogue and the user's files, given as (path, text). The user's entries replace built-in
    /// ones of the same kind and name, or change them where `base` is their own name; two of the same name in the
    /// user's files are an error.
    ///
    /// # Errors
    /// What [`Catalog::check`] refuses, and text that is not TOML, with its place.
    pub fn with_files(files: &[(&str, &str)]) -> Result<Self> {
        Self::over(BUILTIN, files)
    }

    /// What `files` add to `base`.
    pub(crate) fn over(base: &[(&str, &str)], files: &[(&str, &str)]) -> Result<Self> {
        let mut catalog = Catalog { sources: BTreeMap::new(), entries: BTreeMap::new() };
        catalog.add(base)?;
        if !files.is_empty() {
            catalog.add(files)?;
        }
        catalog.inherit()?;
        catalog.check()?;
        Ok(catalog)
    }

    fn add(&mut self, files: &[(&str, &str)]) -> Result<()> {
        let mut seen: BTreeMap<(EntryKind, String), String> = BTreeMap::new();
        for (path, text) in files {
            let parsed = parse::file(path, text)?;
            self.sources.extend(parsed.sources);
            for mut entry in parsed.entries {
                let id = (entry.kind, entry.name.clone());
                if let Some(first) = seen.insert(id.clone(), entry.place.clone()) {
                    let what = format!(
                        "{}: {}.{} is already defined at {first}",
                        entry.place, entry.kind, entry.name
                    );
                    return Err(Error::user(what).hint("rename one of them"));
                }
                if let Some(old) = self.entries.get(&id)
                    && entry.base.as_ref() == Some(&entry.name)
                {
                    entry.base.clone_from(&old.base);
                    for (key, field) in &old.fields {
                        entry.fields.entry(key.clone()).or_insert_with(|| field.clone());
                    }
                }
                self.entries.insert(id, entry);
            }
        }
        Ok(())
    }

    /// Copies into each entry what its chain of bases has and it lacks.
    fn inherit(&mut self) -> Result<()> {
        let ids: Vec<_> = self.entries.keys().cloned().collect();
        for id in ids {
            let mut merged = self.entries[&id].clone();
            let mut chain = vec![id.1.clone()];
            let mut next = merged.base.clone();
            while let Some(name) = next {
                let place = &merged.place;
                if chain.contains(&name) {
                    chain.push(name);
                    let what =
                        format!("{place}: {}.{} has a cycle of bases: {}", id.0, id.1, chain.join(" -> "));
                    return Err(Error::user(what).hint("remove one `base` of the cycle"));
                }
                let base = self
                    .get(id.0, &name)
                    .map_err(|e| e.context(format!("{place}: {}.{}.base", id.0, id.1)))?;
                for (key, field) in &base.fields {
                    if !OWN_KEYS.contains(&key.as_str()) {
                        merged.fields.entry(key.clone()).or_insert_with(|| field.clone());
                    }
                }
                next = base.base.clone();
                chain.push(name);
            }
            self.entries.insert(id, merged);
        }
        Ok(())
    }

    /// Checks that required keys are there, that references and sources exist, and that every platform resolves.
    ///
    /// # Errors
    /// Names the first key, reference or source that is missing or wrong, with its file and line.
    pub fn check(&self) -> Result<Checked> {
        let mut checked = Checked { entries: self.entries.len(), numbers: 0, ranges: 0, platforms: 0 };
        let mut names: BTreeMap<(EntryKind, String), &Entry> = BTreeMap::new();
        for entry in self.entries.values() {
            names.insert((entry.kind, plain(&entry.name, ".")), entry);
        }
        for entry in self.entries.values() {
            let path = |key: &str| format!("{}: {}.{}.{key}", entry.place, entry.kind, entry.name);
            for (key, want, required) in keys(entry.kind) {
                let found = match want {
                    Want::Numbers(..) => entry.fields.keys().any(|k| k.split('.').next() == Some(key)),
                    _ => entry.fields.contains_key(*key),
                };
                if *required && !found {
                    return Err(Error::user(format!("{} is missing", path(key)))
                        .hint("add it, or a `base` that has it"));
                }
                if let (Want::Ref(kind), Some(Field::Ref(name))) = (want, entry.fields.get(*key)) {
                    self.get(*kind, name).map_err(|e| e.context(path(key)))?;
                }
            }
            for (key, field) in &entry.fields {
                if let Field::Number(q) = field {
                    checked.numbers += 1;
                    checked.ranges += usize::from(q.measure.low < q.measure.high);
                    self.check_source(q).map_err(|e| e.context(path(key)))?;
                }
            }
            for alias in entry.aliases() {
                if let Some(other) = names.insert((entry.kind, plain(alias, ".")), entry)
                    && other.name != entry.name
                {
                    let what = format!("{}: \"{alias}\" already names {}", path("aliases"), other.name);
                    return Err(Error::user(what).hint("a name stands for one entry: take another alias"));
                }
            }
            self.check_machines(entry).map_err(|e| e.context(&entry.place))?;
            checked.platforms += usize::from(entry.kind == EntryKind::Platform);
        }
        Ok(checked)
    }

    /// Platforms and nodes make clusters, and what names mean is there.
    fn check_machines(&self, entry: &Entry) -> Result<()> {
        match entry.kind {
            EntryKind::Platform | EntryKind::Node => self.cluster(&entry.name, None).map(drop),
            EntryKind::Accelerator => {
                entry.text("usual").map_or(Ok(()), |name| self.cluster(name, None).map(drop))
            }
            EntryKind::Name => {
                entry.list("means").iter().try_for_each(|name| self.cluster(name, None).map(drop))?;
                entry.list("see").iter().try_for_each(|name| self.named(name).map(drop))
            }
            _ => Ok(()),
        }
    }

    /// A source is a key of the `source` tables, or text that says where to look.
    fn check_source(&self, q: &Quantity) -> Result<()> {
        let free_text = q.source.contains(' ') || q.source.contains("://");
        if free_text || self.sources.contains_key(&q.source) {
            return Ok(());
        }
        let error = Error::user(format!("unknown source \"{}\"", q.source));
        Err(match nearest(&q.source, self.sources.keys().map(String::as_str)) {
            Some(near) => error.hint(format!("did you mean `{near}`?")),
            None => error.hint("define [source.NAME], or write the publication out"),
        })
    }

    /// The entry of that kind and name or alias; case, blanks and dashes do not matter.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    pub fn get(&self, kind: EntryKind, name: &str) -> Result<&Entry> {
        if let Some(entry) = self.entries.get(&(kind, name.to_owned())) {
            return Ok(entry);
        }
        let wanted = plain(name, ".");
        let named =
            |e: &&Entry| plain(&e.name, ".") == wanted || e.aliases().any(|a| plain(a, ".") == wanted);
        self.of_kind(kind).find(named).ok_or_else(|| {
            let known: Vec<&str> = self
                .of_kind(kind)
                .flat_map(|e| std::iter::once(e.name.as_str()).chain(e.aliases()))
                .collect();
            let error = Error::user(format!("unknown {kind} \"{name}\""));
            match nearest(name, known.iter().copied()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!("`phalanx catalog list {kind}` shows all names")),
            }
        })
    }

    fn of_kind(&self, kind: EntryKind) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(move |e| e.kind == kind)
    }

    /// All entries, or those of one kind, by name.
    pub fn list(&self, kind: Option<EntryKind>) -> Vec<Listed> {
        self.entries
            .values()
            .filter(|e| kind.is_none_or(|k| k == e.kind))
            .map(|e| Listed {
                kind: e.kind,
                name: e.name.clone(),
                title: e.text("title").unwrap_or_default().to_owned(),
                accelerators: match e.kind {
                    EntryKind::Platform => self.cluster(&e.name, None).ok().map(|c| c.accelerators),
                    EntryKind::Node => e.measure("accelerators").map(|m| m.value as usize),
                    _ => None,
                },
            })
            .collect()
    }

    /// Every entry that bears that name, of any kind.
    ///
    /// # Errors
    /// If there is none, with the nearest name of any kind.
    pub fn named(&self, name: &str) -> Result<Vec<&Entry>> {
        let mut named: Vec<&Entry> =
            EntryKind::ALL.into_iter().filter_map(|kind| self.get(kind, name).ok()).collect();
        // A platform of so many scalable units is an entry without them; a maker's name in front is none's.
        if named.is_empty()
            && let Ok(meaning) = self.meaning(name)
        {
            named.push(meaning.machine);
        }
        if named.is_empty() {
            let error = Error::user(format!("nothing in the catalogue is called \"{name}\""));
            return Err(match nearest_name(name, &self.names()) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint("`phalanx catalog list` shows all names"),
            });
        }
        Ok(named)
    }

    /// Everything known about a name: each entry that bears it, its numbers with sources, and the sources.
    ///
    /// # Errors
    /// If there is none, with the nearest name of any kind.
    pub fn show(&self, name: &str) -> Result<String> {
        use std::fmt::Write;
        let mut out = String::new();
        let mut used = BTreeSet::new();
        for entry in self.named(name)? {
            // Writing to a string cannot fail.
            let _ = writeln!(out, "{} {} ({})", entry.kind, entry.name, entry.place);
            let width = entry.fields.keys().map(String::len).max().unwrap_or(0).max("largest job".len());
            for (key, field) in &entry.fields {
                let _ = match field {
                    Field::Text(text) | Field::Ref(text) => writeln!(out, "  {key:<width$}  {text}"),
                    Field::List(all) => writeln!(out, "  {key:<width$}  {}", all.join(", ")),
                    Field::Flag(flag) => writeln!(out, "  {key:<width$}  {flag}"),
                    Field::Number(q) => {
                        used.insert(q.source.as_str());
                        writeln!(out, "  {key:<width$}  {q}")
                    }
                };
            }
            if entry.kind == EntryKind::Platform
                && let Ok(cluster) = self.cluster(name, None)
            {
                let _ = writeln!(
                    out,
                    "  {:<width$}  {} of {}",
                    "largest job", cluster.accelerators, cluster.accelerator.name
                );
            }
        }
        for key in used {
            if let Some(s) = self.sources.get(key) {
                let _ = writeln!(out, "[{key}] {} ({}, {})", s.what, s.date, s.grade);
            }
        }
        Ok(out)
    }

    /// Names and aliases of all entries, for suggestions and completion.
    pub fn names(&self) -> Vec<String> {
        let names = |e: &Entry| {
            std::iter::once(e.name.clone()).chain(e.aliases().map(str::to_owned)).collect::<Vec<_>>()
        };
        self.entries.values().flat_map(names).collect()
    }

    /// The source of that key.
    pub fn source(&self, key: &str) -> Option<&Source> {
        self.sources.get(key)
    }

    /// Names and aliases of what can stand for a cluster, for suggestions and completion.
    pub fn cluster_names(&self) -> Vec<String> {
        [EntryKind::Platform, EntryKind::Node, EntryKind::Accelerator, EntryKind::Name]
            .into_iter()
            .flat_map(|kind| self.of_kind(kind))
            .flat_map(|e| std::iter::once(e.name.clone()).chain(e.aliases().map(str::to_owned)))
            .collect()
    }
}

impl Entry {
    /// Text of a key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.fields.get(key)? {
            Field::Text(text) | Field::Ref(text) => Some(text),
            _ => None,
        }
    }

    /// A number of the entry in base units.
    pub fn number(&self, key: &str) -> Option<&Quantity> {
        match self.fields.get(key)? {
            Field::Number(q) => Some(q),
            _ => None,
        }
    }

    /// Value and range of a number in base units.
    pub fn measure(&self, key: &str) -> Option<Measure> {
        self.number(key).map(|q| q.measure)
    }

    /// Whether a flag is set.
    pub fn flag(&self, key: &str) -> bool {
        matches!(self.fields.get(key), Some(Field::Flag(true)))
    }

    /// Texts of a key; none where it is absent.
    pub fn list(&self, key: &str) -> &[String] {
        match self.fields.get(key) {
            Some(Field::List(texts)) => texts,
            _ => &[],
        }
    }

    fn aliases(&self) -> impl Iterator<Item = &str> {
        self.list("aliases").iter().map(String::as_str)
    }
}

/// The name nearest to `word`, if one is near enough to be meant: the shortest that has all its parts in any order,
/// else one of whose letters at most a third differ.
fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    let word = word.to_lowercase();
    let parts = |name: &str| -> Vec<String> {
        name.to_lowercase()
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|p| !p.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let wanted = parts(&word);
    let whole = known.clone().filter(|name| {
        let has = parts(name);
        !wanted.is_empty() && wanted.iter().all(|part| has.contains(part))
    });
    if let Some(name) = whole.min_by_key(|name| name.len()) {
        return Some(name);
    }
    let within = |name: &str| word.len().max(name.len()).div_ceil(3);
    let letters = word.chars().count();
    known
        // A name of a megabyte is not compared letter by letter.
        .filter(|name| letters.abs_diff(name.chars().count()) <= within(name))
        .map(|name| (crate::suggest::distance(&word, &name.to_lowercase()), name))
        .filter(|(d, name)| *d <= within(name))
        .min_by_key(|(d, name)| (*d, name.len()))
        .map(|(_, name)| name)
}

/// [`nearest`] over owned names.
pub(crate) fn nearest_name<'a>(word: &str, known: &'a [String]) -> Option<&'a str> {
    nearest(word, known.iter().map(String::as_str))
}

#[cfg(test)]
mod tests;
