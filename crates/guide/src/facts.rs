//! What claims are computed from: catalogue facts and planner answers, with a record of the sources used.

use std::collections::BTreeSet;

use plan::answer::{Answer, Question, estimate_given};
use plan::calibration::Calibration;
use plan::models;
use plan::shape::Shape;
use spec::{Catalog, Cluster, EntryKind, Error, Measure, NumberFormat, Result};

use crate::verdict::{Rule, of_readings};
use crate::{Agreement, Claim, Read, Stated, Verdict};

/// Facts, and which sources they came from since the last claim was closed.
pub(crate) struct Facts<'a> {
    pub(crate) catalog: &'a Catalog,
    calibration: &'a Calibration,
    used: BTreeSet<String>,
}

impl<'a> Facts<'a> {
    pub(crate) fn new(catalog: &'a Catalog, calibration: &'a Calibration) -> Self {
        Facts { catalog, calibration, used: BTreeSet::new() }
    }

    /// A number of the catalogue, in base units.
    pub(crate) fn number(&mut self, kind: EntryKind, name: &str, key: &str) -> Result<Measure> {
        let entry = self.catalog.get(kind, name)?;
        let quantity = entry.number(key).ok_or_else(|| {
            Error::user(format!("{kind}.{name} has no {key}")).hint("add it to the catalogue with its source")
        })?;
        let written = match self.catalog.source(&quantity.source) {
            Some(source) => format!("{} ({})", source.what, quantity.date),
            None => format!("{} ({})", quantity.source, quantity.date),
        };
        self.used.insert(written);
        Ok(quantity.measure)
    }

    /// A word or text of the catalogue.
    pub(crate) fn text(&mut self, kind: EntryKind, name: &str, key: &str) -> Result<&'a str> {
        let entry = self.catalog.get(kind, name)?;
        self.used.insert(format!("catalogue, {kind} {}", entry.name));
        entry.text(key).ok_or_else(|| {
            Error::user(format!("{kind}.{name} has no {key}")).hint("add it to the catalogue with its source")
        })
    }

    /// A machine, as the planner resolves it.
    pub(crate) fn cluster(&mut self, name: &str, accelerators: Option<usize>) -> Result<Cluster> {
        let cluster = self.catalog.cluster(name, accelerators)?;
        self.used.insert(format!("catalogue, platform {}", cluster.name));
        Ok(cluster)
    }

    /// A model of the catalogue.
    pub(crate) fn model(&mut self, name: &str) -> Result<Shape> {
        let shape = models::find(name)?;
        self.used.insert(format!("catalogue, model {}", shape.model.name));
        Ok(shape)
    }

    /// What the planner makes of one layout, in bf16.
    pub(crate) fn planned(&mut self, job: Case<'_>) -> Result<Answer> {
        let question = Question {
            shape: self.model(job.model)?,
            cluster: self.cluster(job.cluster, Some(job.accelerators))?,
            software: None,
            format: NumberFormat::Bf16,
            sequence: job.sequence,
            sequences: job.sequences,
            tokens: job.tokens,
            keep: 1,
            trainable_only: false,
            strategy: None,
            optimizer: Default::default(),
        };
        self.used.insert("phalanx plan".to_owned());
        estimate_given(question, job.layout, self.calibration)
    }

    /// Says that a figure follows by arithmetic.
    pub(crate) fn arithmetic(&mut self) {
        self.used.insert("arithmetic".to_owned());
    }

    /// The sources used since the last call.
    pub(crate) fn sources(&mut self) -> String {
        std::mem::take(&mut self.used).into_iter().collect::<Vec<_>>().join("; ")
    }
}

/// One layout to estimate.
#[derive(Clone, Copy)]
pub(crate) struct Case<'a> {
    pub(crate) model: &'a str,
    pub(crate) cluster: &'a str,
    pub(crate) accelerators: usize,
    pub(crate) sequence: usize,
    pub(crate) sequences: usize,
    pub(crate) tokens: Option<f64>,
    pub(crate) layout: &'a str,
}

/// What was found about one claim: parts, each with readings.
pub(crate) struct Found {
    parts: Vec<(Rule, Vec<Read>)>,
    note: Option<String>,
}

impl Found {
    /// A claim whose readings decide by `rule`.
    pub(crate) fn by(rule: Rule) -> Self {
        Found { parts: vec![(rule, Vec::new())], note: None }
    }

    /// A claim that is true where a reading agrees.
    pub(crate) fn new() -> Self {
        Found::by(Rule::Readings)
    }

    /// The next part of the claim: the worst part decides.
    pub(crate) fn and(mut self) -> Self {
        self.parts.push((Rule::Readings, Vec::new()));
        self
    }

    /// A figure of today.
    pub(crate) fn reads(
        self,
        of: impl Into<String>,
        ours: Measure,
        unit: &'static str,
        stated: Stated,
    ) -> Self {
        self.push(of.into(), Some(ours), unit, stated, Some(stated.against(ours)), None)
    }

    /// A figure that was replaced since.
    pub(crate) fn read(
        self,
        until: &str,
        of: impl Into<String>,
        ours: Measure,
        unit: &'static str,
        stated: Stated,
    ) -> Self {
        self.push(of.into(), Some(ours), unit, stated, Some(stated.against(ours)), Some(until.to_owned()))
    }

    /// Whether a word is right.
    pub(crate) fn says(self, of: impl Into<String>, stated: &'static str, right: bool) -> Self {
        let agrees = if right { Agreement::Yes } else { Agreement::No };
        self.push(of.into(), None, "", Stated::Word(stated), Some(agrees), None)
    }

    /// A figure that is beside the claim: shown, not compared.
    pub(crate) fn shows(self, of: impl Into<String>, ours: Measure, unit: &'static str) -> Self {
        self.push(of.into(), Some(ours), unit, Stated::Word(""), None, None)
    }

    /// What else to know.
    pub(crate) fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    fn push(
        mut self,
        of: String,
        ours: Option<Measure>,
        unit: &'static str,
        stated: Stated,
        agrees: Option<Agreement>,
        until: Option<String>,
    ) -> Self {
        let read = Read {
            of,
            value: ours.map(|m| m.value),
            low: ours.map(|m| m.low),
            high: ours.map(|m| m.high),
            unit,
            stated: written(stated, unit),
            agrees,
            until,
        };
        if let Some(part) = self.parts.last_mut() {
            part.1.push(read);
        }
        self
    }

    /// The claim with its verdict.
    pub(crate) fn close(self, number: usize, claim: &str, source: String) -> Claim {
        let verdict = self.parts.iter().map(|(rule, readings)| {
            let compared: Vec<(Agreement, bool)> =
                readings.iter().filter_map(|r| Some((r.agrees?, r.until.is_none()))).collect();
            of_readings(*rule, &compared)
        });
        let verdict = verdict.max().unwrap_or(Verdict::Unconfirmed);
        let readings: Vec<Read> = self.parts.into_iter().flat_map(|p| p.1).collect();
        let ours = match readings.is_empty() {
            true => "no public figure".to_owned(),
            false => readings.iter().map(one).collect::<Vec<_>>().join("; "),
        };
        let source = if source.is_empty() { "none found".to_owned() } else { source };
        Claim { number, claim: claim.to_owned(), ours, source, verdict, note: self.note, readings }
    }
}

/// A reading as text: `1,620 GPU-days at 300 TFLOP/s`.
fn one(read: &Read) -> String {
    let Some(value) = read.value else { return read.of.clone() };
    let mut out = with_unit(value, read.unit);
    if let (Some(low), Some(high)) = (read.low, read.high)
        && low < high
    {
        let _ = std::fmt::Write::write_fmt(&mut out, format_args!(" ({} to {})", shown(low), shown(high)));
    }
    if !read.of.is_empty() {
        out = format!("{out} {}", read.of);
    }
    match &read.until {
        Some(date) => format!("{out} (until {date})"),
        None => out,
    }
}

fn written(stated: Stated, unit: &str) -> String {
    match stated {
        Stated::Exactly(x) => with_unit(x, unit),
        Stated::About(x) => format!("about {}", with_unit(x, unit)),
        Stated::Range(a, b) | Stated::Within(a, b) => format!("{} to {}", shown(a), with_unit(b, unit)),
        Stated::AtLeast(x) => format!("{} or more", with_unit(x, unit)),
        Stated::Order(x) => format!("of the order of {}", with_unit(x, unit)),
        Stated::Word(word) => word.to_owned(),
    }
}

/// Dollars stand in front; a unit may say what the dollars are for: `$/h`.
fn with_unit(x: f64, unit: &str) -> String {
    match unit.strip_prefix('$') {
        Some("") => format!("${}", shown(x)),
        Some(per) => format!("${}{per}", shown(x)),
        None if unit == "%" => format!("{} %", shown(x)),
        None if unit.is_empty() => shown(x),
        None => format!("{} {unit}", shown(x)),
    }
}

/// Whole numbers in full with commas up to a hundred million, else three significant digits.
fn shown(x: f64) -> String {
    let size = x.abs();
    if size >= 1e15 {
        return format!("{x:.2e}");
    }
    if size >= 1e9 {
        return format!("{}B", trimmed(x / 1e9));
    }
    if size >= 1e7 {
        return format!("{}M", trimmed(x / 1e6));
    }
    if size >= 1000.0 {
        let digits = format!("{:.0}", size);
        let mut out = String::new();
        for (i, c) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                out.push(',');
            }
            out.push(c);
        }
        return if x < 0.0 { format!("-{out}") } else { out };
    }
    trimmed(x)
}

/// At most four significant digits without trailing zeros.
fn trimmed(x: f64) -> String {
    let digits = match x.abs() {
        a if a >= 100.0 => 1,
        a if a >= 1.0 => 2,
        a if a >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{x:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_read_as_people_write_them() {
        let check = |x: f64, unit: &str, expected: &str| assert_eq!(with_unit(x, unit), expected);
        check(230_400.0, "$", "$230,400");
        check(1_440_000.0, "$", "$1,440,000");
        check(46.3e6, "$", "$46.3M");
        check(4.2, "$/h", "$4.2/h");
        check(1620.37, "GPU-days", "1,620 GPU-days");
        check(989.0, "TFLOP/s", "989 TFLOP/s");
        check(3.35, "TB/s", "3.35 TB/s");
        check(65.64, "%", "65.64 %");
        check(4.2e22, "FLOP", "4.20e22 FLOP");
        check(0.0123, "h", "0.0123 h");
        check(3.0, "dims", "3 dims");
    }
}
