//! The calibration file: what was measured on a machine, as text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use spec::{Error, Result, guard_toml};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// The version of the file that this program reads and writes.
pub const VERSION: i128 = 1;

/// What to do about a file that cannot be used.
const AGAIN: &str = "measure this machine again: phalanx bench machine";

/// A machine as measured: rates of kernels by kind and shape, times of messages by size.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// Its name.
    pub host: String,
    /// Its processor.
    pub cpu: String,
    /// Its cores.
    pub cores: usize,
    /// Its memory, bytes.
    pub memory_bytes: usize,
    /// Version of the program that measured.
    pub phalanx: String,
    /// When, as an ISO date in UTC.
    pub measured: String,
    /// Seconds between the end of one op and the start of the next.
    pub op_gap_s: f64,
    /// How far a median of the measurements lies above what the tables hold, as a share: the noise of the machine.
    pub spread: f64,
    /// Factor on time where more threads want to run than there are cores, beside their share of the cores.
    pub crowding: f64,
    /// Kernels by what ran and how.
    pub kernels: BTreeMap<KernelKey, Vec<Sample>>,
    /// Messages by what was sent over what.
    pub links: BTreeMap<LinkKey, Vec<Message>>,
}

/// Which kernel, on which storage, under which conditions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KernelKey {
    /// The op's kind, see [`crate::kernel`].
    pub kind: String,
    /// Storage of parameters and activations: `f32` or `bf16`.
    pub storage: String,
    /// Beside what.
    pub at: Conditions,
}

/// Threads of a rank, and ranks that compute at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conditions {
    /// Threads of each rank.
    pub threads: usize,
    /// Ranks that compute at the same time, this one included.
    pub beside: usize,
}

/// The rate at one shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Rows, then two sizes that depend on the kind (for products: inner and outer width).
    pub shape: [f64; 3],
    /// FLOP/s of products and attention, bytes/s of all others.
    pub per_s: f64,
}

/// Which operation between how many ranks over what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkKey {
    /// `shm` or `tcp`.
    pub transport: String,
    /// `all_reduce`, `all_gather`, `reduce_scatter` or `send`.
    pub op: String,
    /// Ranks.
    pub ranks: usize,
}

/// The time of one size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Message {
    /// Bytes of the whole buffer.
    pub bytes: f64,
    /// Seconds.
    pub s: f64,
}

impl Machine {
    /// Reads a calibration file; `path` is for messages.
    ///
    /// # Errors
    /// Text that is not TOML, another version, missing or unknown keys, tables cut off, and rates that are not finite
    /// and above 0: each with file, line and a hint.
    pub fn parse(path: &str, text: &str) -> Result<Machine> {
        Reader { path, text }.machine().map_err(|e| e.hint(AGAIN))
    }

    /// The best rate of matrix products that ranks reach together, FLOP/s.
    pub(crate) fn product_rate(&self) -> f64 {
        let products = self.kernels.iter().filter(|(k, _)| k.kind == "linear");
        let rates = products.flat_map(|(k, samples)| samples.iter().map(|s| s.per_s * k.at.beside as f64));
        rates.fold(0.0, f64::max)
    }

    /// The file's text; [`Machine::parse`] reads it back.
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        self.write(&mut out).expect("writing to a string");
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        writeln!(
            out,
            "# Written by `phalanx bench machine`; `phalanx train`, `plan` and `compare` read it."
        )?;
        writeln!(out, "version = {VERSION}\n\n[machine]")?;
        for (key, value) in [
            ("host", &self.host),
            ("cpu", &self.cpu),
            ("phalanx", &self.phalanx),
            ("measured", &self.measured),
        ] {
            writeln!(out, "{key} = {}", toml::Value::from(value.as_str()))?;
        }
        writeln!(out, "cores = {}\nmemory_bytes = {}", self.cores, self.memory_bytes)?;
        writeln!(out, "op_gap_s = {:e}", self.op_gap_s)?;
        writeln!(out, "spread = {:.4}\ncrowding = {:.4}", self.spread, self.crowding)?;
        writeln!(out, "# so that a file cut short is noticed")?;
        writeln!(out, "kernels = {}\nlinks = {}", self.kernels.len(), self.links.len())?;
        for (key, samples) in &self.kernels {
            writeln!(out, "\n[[kernel]]\nkind = \"{}\"\nstorage = \"{}\"", key.kind, key.storage)?;
            writeln!(out, "threads = {}\nbeside = {}\nsamples = [", key.at.threads, key.at.beside)?;
            for Sample { shape: [a, b, c], per_s } in samples {
                writeln!(out, "  [{a}, {b}, {c}, {per_s:.4e}],")?;
            }
            writeln!(out, "]")?;
        }
        for (key, messages) in &self.links {
            writeln!(out, "\n[[link]]\ntransport = \"{}\"\nop = \"{}\"", key.transport, key.op)?;
            writeln!(out, "ranks = {}\nsamples = [", key.ranks)?;
            for Message { bytes, s } in messages {
                writeln!(out, "  [{bytes}, {s:.4e}],")?;
            }
            writeln!(out, "]")?;
        }
        Ok(())
    }
}

/// A file under way, so that every refusal can name file and line.
struct Reader<'a> {
    path: &'a str,
    text: &'a str,
}

/// A table with the line at which it begins.
struct Section<'a> {
    name: &'static str,
    line: usize,
    table: &'a DeTable<'a>,
}

impl Reader<'_> {
    fn machine(&self) -> Result<Machine> {
        let refuse = |byte, why: &str| {
            let what = why.split_whitespace().collect::<Vec<_>>().join(" ");
            self.wrong(self.line(byte), &format!("not TOML, or cut short: {what}"))
        };
        guard_toml(self.text).map_err(|e| refuse(e.byte, &e.why))?;
        let root = DeTable::parse(self.text)
            .map_err(|e| refuse(e.span().map_or(0, |span| span.start), e.message()))?;
        let root = Section { name: "the file", line: 1, table: root.get_ref() };
        self.known(&root, &["version", "machine", "kernel", "link"])?;
        let version = self.field(&root, "version")?;
        match integer(version.get_ref()) {
            Some(VERSION) => {}
            _ => return Err(self.wrong(self.at(version), &format!("version, expected {VERSION}"))),
        }
        let about = self.field(&root, "machine")?;
        let DeValue::Table(table) = about.get_ref() else {
            return Err(self.wrong(self.at(about), "machine, expected a table [machine]"));
        };
        let about = Section { name: "[machine]", line: self.at(about), table };
        let mut m = self.about(&about)?;
        m.kernels = self.kernels(&root)?;
        m.links = self.links(&root)?;
        for (key, found) in [("kernels", m.kernels.len()), ("links", m.links.len())] {
            let said = self.count_or_none(&about, key)?;
            if said != found {
                let last = self.text.lines().count();
                return Err(self.wrong(last, &format!("cut short: {found} of {said} {key}")));
            }
        }
        Ok(m)
    }

    /// All but the tables.
    fn about(&self, about: &Section<'_>) -> Result<Machine> {
        const KEYS: [&str; 11] = [
            "host",
            "cpu",
            "phalanx",
            "measured",
            "cores",
            "memory_bytes",
            "op_gap_s",
            "spread",
            "crowding",
            "kernels",
            "links",
        ];
        self.known(about, &KEYS)?;
        Ok(Machine {
            host: self.string(about, "host")?,
            cpu: self.string(about, "cpu")?,
            cores: self.count(about, "cores")?,
            memory_bytes: self.count(about, "memory_bytes")?,
            phalanx: self.string(about, "phalanx")?,
            measured: self.string(about, "measured")?,
            op_gap_s: self.number(about, "op_gap_s", 0.0)?,
            spread: self.number(about, "spread", 0.0)?,
            crowding: self.number(about, "crowding", 1.0)?,
            kernels: BTreeMap::new(),
            links: BTreeMap::new(),
        })
    }

    fn kernels(&self, root: &Section<'_>) -> Result<BTreeMap<KernelKey, Vec<Sample>>> {
        let mut kernels = BTreeMap::new();
        for section in self.list(root, "kernel", "[[kernel]]")? {
            self.known(&section, &["kind", "storage", "threads", "beside", "samples"])?;
            let key = KernelKey {
                kind: self.string(&section, "kind")?,
                storage: self.string(&section, "storage")?,
                at: Conditions {
                    threads: self.count(&section, "threads")?,
                    beside: self.count(&section, "beside")?,
                },
            };
            let samples = self.samples(&section, ["rows", "a size", "a size", "a rate"])?;
            let samples = samples.into_iter().map(|[a, b, c, per_s]| Sample { shape: [a, b, c], per_s });
            if kernels.insert(key, samples.collect()).is_some() {
                return Err(self.wrong(section.line, "this kernel is there twice"));
            }
        }
        Ok(kernels)
    }

    fn links(&self, root: &Section<'_>) -> Result<BTreeMap<LinkKey, Vec<Message>>> {
        let mut links = BTreeMap::new();
        for section in self.list(root, "link", "[[link]]")? {
            self.known(&section, &["transport", "op", "ranks", "samples"])?;
            let key = LinkKey {
                transport: self.string(&section, "transport")?,
                op: self.string(&section, "op")?,
                ranks: self.count(&section, "ranks")?,
            };
            let samples = self.samples(&section, ["bytes", "seconds"])?;
            let mut messages: Vec<Message> =
                samples.into_iter().map(|[bytes, s]| Message { bytes, s }).collect();
            messages.sort_by(|a, b| a.bytes.total_cmp(&b.bytes));
            if links.insert(key, messages).is_some() {
                return Err(self.wrong(section.line, "this link is there twice"));
            }
        }
        Ok(links)
    }

    fn line(&self, offset: usize) -> usize {
        1 + self.text.as_bytes()[..offset.min(self.text.len())].iter().filter(|b| **b == b'\n').count()
    }

    fn at<T>(&self, value: &Spanned<T>) -> usize {
        self.line(value.span().start)
    }

    fn wrong(&self, line: usize, what: &str) -> Error {
        Error::user(format!("{}:{line}: {what}", self.path))
    }

    fn known(&self, section: &Section<'_>, keys: &[&str]) -> Result<()> {
        match section.table.iter().find(|(k, _)| !keys.contains(&k.get_ref().as_ref())) {
            Some((key, _)) => {
                let what = format!("unknown key {} in {}", key.get_ref(), section.name);
                Err(self.wrong(self.at(key), &what))
            }
            None => Ok(()),
        }
    }

    fn field<'s>(&self, section: &Section<'s>, key: &str) -> Result<&'s Spanned<DeValue<'s>>> {
        let found = section.table.iter().find(|(k, _)| k.get_ref() == key);
        found
            .map(|(_, v)| v)
            .ok_or_else(|| self.wrong(section.line, &format!("{key} is missing in {}", section.name)))
    }

    fn string(&self, section: &Section<'_>, key: &str) -> Result<String> {
        let value = self.field(section, key)?;
        match value.get_ref() {
            DeValue::String(s) => Ok(s.to_string()),
            _ => Err(self.wrong(self.at(value), &format!("{key}, expected text in quotes"))),
        }
    }

    fn count(&self, section: &Section<'_>, key: &str) -> Result<usize> {
        match self.count_or_none(section, key)? {
            0 => {
                let value = self.field(section, key)?;
                Err(self.wrong(self.at(value), &format!("{key} = 0, expected a whole number from 1")))
            }
            n => Ok(n),
        }
    }

    fn count_or_none(&self, section: &Section<'_>, key: &str) -> Result<usize> {
        let value = self.field(section, key)?;
        let count = integer(value.get_ref()).and_then(|n| usize::try_from(n).ok());
        count.ok_or_else(|| self.wrong(self.at(value), &format!("{key}, expected a whole number from 0")))
    }

    fn number(&self, section: &Section<'_>, key: &str, least: f64) -> Result<f64> {
        let value = self.field(section, key)?;
        let x = float(value.get_ref()).filter(|x| x.is_finite() && *x >= least);
        x.ok_or_else(|| self.wrong(self.at(value), &format!("{key}, expected a finite number from {least}")))
    }

    /// The tables of an array; none if it is absent.
    fn list<'s>(&self, section: &Section<'s>, key: &str, name: &'static str) -> Result<Vec<Section<'s>>> {
        let Some((_, value)) = section.table.iter().find(|(k, _)| k.get_ref() == key) else {
            return Ok(Vec::new());
        };
        let wrong = |line| self.wrong(line, &format!("{key}, expected tables {name}"));
        let DeValue::Array(items) = value.get_ref() else { return Err(wrong(self.at(value))) };
        let mut out = Vec::new();
        for item in items {
            let DeValue::Table(table) = item.get_ref() else { return Err(wrong(self.at(item))) };
            out.push(Section { name, line: self.at(item), table });
        }
        Ok(out)
    }

    /// Rows of numbers that are all finite and above 0.
    fn samples<const N: usize>(&self, section: &Section<'_>, names: [&str; N]) -> Result<Vec<[f64; N]>> {
        let value = self.field(section, "samples")?;
        let expected = names.join(", ");
        let DeValue::Array(rows) = value.get_ref() else {
            return Err(self.wrong(self.at(value), &format!("samples, expected rows of [{expected}]")));
        };
        if rows.is_empty() {
            return Err(self.wrong(self.at(value), "samples, expected at least one"));
        }
        let mut out = Vec::with_capacity(rows.len());
        for row in rows {
            let numbers = match row.get_ref() {
                DeValue::Array(items) if items.len() == N => items,
                _ => return Err(self.wrong(self.at(row), &format!("a sample, expected [{expected}]"))),
            };
            let mut sample = [0.0; N];
            for (i, item) in numbers.iter().enumerate() {
                let x = float(item.get_ref());
                sample[i] = x.filter(|x| x.is_finite() && *x > 0.0).ok_or_else(|| {
                    let found = x.map_or_else(|| "no number".to_owned(), |x| x.to_string());
                    let what = format!(
                        "{} of a sample is {found}, expected a finite number above 0",
                        names[i].trim_start_matches("a ")
                    );
                    self.wrong(self.at(item), &what)
                })?;
            }
            out.push(sample);
        }
        Ok(out)
    }
}

fn integer(value: &DeValue<'_>) -> Option<i128> {
    match value {
        DeValue::Integer(x) => i128::from_str_radix(x.as_str(), x.radix()).ok(),
        _ => None,
    }
}

fn float(value: &DeValue<'_>) -> Option<f64> {
    match value {
        DeValue::Integer(_) => integer(value).map(|x| x as f64),
        DeValue::Float(x) => x.as_str().parse().ok(),
        _ => None,
    }
}
