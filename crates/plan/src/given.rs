//! A layout as people write it: `tp=8,pp=16,micro_batch=1,zero=1`.

use std::collections::BTreeMap;

use spec::{ContextMode, Error, Layout, PipelineSchedule, Recompute, Result, Zero, suggest};

use crate::estimate::Problem;
use crate::placement::{Order, Placement};

/// Keys of a written layout, named as in answers, and what they take.
const KEYS: [(&str, &str); 15] = [
    ("dp", "a count"),
    ("tp", "a count"),
    ("pp", "a count"),
    ("cp", "a count"),
    ("context", "ring or heads"),
    ("ep", "a count"),
    ("shard", "a count"),
    ("zero", "0, 1, 2 or 3"),
    ("sequence_parallel", "true or false"),
    ("schedule", "1f1b, interleaved, zero-bubble or gpipe"),
    ("chunks", "a count"),
    ("stage_layers", "layers of each stage, chunk by chunk, like 2/3/3"),
    ("micro_batch", "a count"),
    ("recompute", "none, selective or full"),
    ("order", "tp-cp-dp-pp or tp-cp-pp-dp"),
];

/// Short names that other planners and papers use.
const ALSO: [(&str, &str); 8] = [
    ("sp", "sequence_parallel"),
    ("vpp", "chunks"),
    ("vp", "chunks"),
    ("mbs", "micro_batch"),
    ("fsdp", "shard"),
    ("ckpt", "recompute"),
    ("activation_recompute", "recompute"),
    ("mb", "micro_batch"),
];

/// A layout and which of its choices were not written but filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Given {
    /// The layout.
    pub placement: Placement,
    /// What was filled in, as `key=value`.
    pub filled: Vec<String>,
}

/// The multiples of `inner` around `n` accelerators, as far as the machine has them.
fn multiples(n: usize, inner: usize, most: usize) -> String {
    let around = [n / inner * inner, n.div_ceil(inner) * inner];
    let there: Vec<String> = around
        .into_iter()
        .filter(|m| (1..=most).contains(m))
        .map(|m| format!("--accelerators {m}"))
        .collect();
    match there.is_empty() {
        true => format!("smaller axes fit: the machine has {most} accelerators"),
        false => format!("{} would do", there.join(" or ")),
    }
}

/// How to get as many accelerators as a layout has ranks, if the machine does.
fn as_many(ranks: usize, cluster: &spec::Cluster) -> String {
    match cluster.accelerators_max {
        most if ranks <= most => format!("give --accelerators {ranks}, or leave dp out"),
        most => format!("leave dp out: {} has {most} accelerators", cluster.name),
    }
}

/// Reads a layout for `problem`. What is not written takes what the training stack does by default: `dp` follows from
/// the accelerators, ZeRO is 3 for stacks that shard parameters and else 1, the sequence is split where the stack does.
///
/// # Errors
/// If a key or value is unknown, or the layout is impossible on this problem: the message says why.
pub fn parse(text: &str, problem: &Problem, format: spec::NumberFormat) -> Result<Given> {
    let mut w = Written { values: split(text)?, filled: Vec::new() };
    let (tp, pp, cp) = (w.count_or("tp", 1)?, w.count_or("pp", 1)?, w.count_or("cp", 1)?);
    let dp = w.dp(text, [tp, pp, cp], &problem.cluster)?;
    let splits = problem.software.sequence_parallel && (problem.sequence / cp).is_multiple_of(tp);
    let sequence_parallel = match w.choice("sequence_parallel", &FLAGS)? {
        Some(given) => given,
        None => tp > 1 && w.fill("sequence_parallel", splits),
    };
    let zero = match w.word("zero") {
        Some(value) => value.parse().map_err(|_| wrong("zero", &value))?,
        None if dp * cp == 1 => w.fill("zero", 0),
        None => w.fill("zero", if problem.software.fsdp { 3 } else { 1 }),
    };
    let zero = Zero::try_from(zero).map_err(|e| Error::user(e).hint("0 shards nothing, 3 everything"))?;
    let chunks = w.count_or("chunks", 1)?;
    let usual = if chunks > 1 { PipelineSchedule::Interleaved } else { PipelineSchedule::OneFOneB };
    let schedule = w.choice("schedule", &SCHEDULES)?.unwrap_or(usual);
    let recompute = match w.word("recompute") {
        Some(word) => Recompute::parse(&word).ok_or_else(|| wrong("recompute", &word))?,
        None => {
            w.fill("recompute", Recompute::None.name());
            Recompute::None
        }
    };
    let order = w.choice("order", &ORDERS)?.unwrap_or_default();
    let micro_batch = match w.count("micro_batch")? {
        Some(given) => given,
        None => w.fill("micro_batch", 1),
    };
    let layout = Layout {
        dp,
        tp,
        pp,
        sequence_parallel,
        zero,
        shard: w.count("shard")?.filter(|shard| *shard != dp),
        schedule,
        chunks,
        stage_layers: stage_layers(w.values.get("stage_layers"))?,
        micro_batch,
        recompute,
        cp,
        context: w.choice("context", &CONTEXTS)?.unwrap_or_default(),
        ep: w.count_or("ep", 1)?,
        ..Placement::foreign()
    };
    let placement = Placement { layout, format, order };
    check(&placement, problem).map_err(|e| e.context(format!("layout {text}")))?;
    Ok(Given { placement, filled: w.filled })
}

const FLAGS: [(&str, bool); 8] = [
    ("true", true),
    ("yes", true),
    ("on", true),
    ("1", true),
    ("false", false),
    ("no", false),
    ("off", false),
    ("0", false),
];

const SCHEDULES: [(&str, PipelineSchedule); 6] = [
    ("1f1b", PipelineSchedule::OneFOneB),
    ("interleaved", PipelineSchedule::Interleaved),
    ("zero-bubble", PipelineSchedule::ZeroBubble),
    ("zb", PipelineSchedule::ZeroBubble),
    ("zb-h1", PipelineSchedule::ZeroBubble),
    ("gpipe", PipelineSchedule::Gpipe),
];

const ORDERS: [(&str, Order); 2] = [("tp-cp-dp-pp", Order::TpCpDpPp), ("tp-cp-pp-dp", Order::TpCpPpDp)];

const CONTEXTS: [(&str, ContextMode); 3] =
    [("ring", ContextMode::Ring), ("heads", ContextMode::Heads), ("ulysses", ContextMode::Heads)];

/// What is written of a layout, and what was filled in.
struct Written {
    values: BTreeMap<&'static str, String>,
    filled: Vec<String>,
}

impl Written {
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        match value.parse() {
            Ok(n) if (1..=MAX).contains(&n) => Ok(Some(n)),
            _ => Err(not(key, value, &format!("a count from 1 to {MAX}"))),
        }
    }

    fn count_or(&self, key: &str, usual: usize) -> Result<usize> {
        Ok(self.count(key)?.unwrap_or(usual))
    }

    fn word(&self, key: &str) -> Option<String> {
        self.values.get(key).map(|value| value.to_ascii_lowercase())
    }

    fn choice<T: Copy>(&self, key: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(value) = self.word(key) else { return Ok(None) };
        let found = words.iter().find(|(word, _)| *word == value);
        found.map(|(_, meant)| Some(*meant)).ok_or_else(|| wrong(key, &value))
    }

    fn fill<T: std::fmt::Display>(&mut self, key: &str, value: T) -> T {
        self.filled.push(format!("{key}={value}"));
        value
    }

    /// The replicas: what is left of the accelerators, which the axes must use up.
    fn dp(&mut self, text: &str, [tp, pp, cp]: [usize; 3], cluster: &spec::Cluster) -> Result<usize> {
        let (n, inner) = (cluster.accelerators, tp * pp * cp);
        match self.count("dp")? {
            Some(dp) if dp * inner == n => Ok(dp),
            Some(dp) => Err(Error::user(format!(
                "layout {text}: dp x tp x pp x cp = {dp} x {tp} x {pp} x {cp} = {} is not the {n} accelerators",
                dp * inner
            ))
            .hint(as_many(dp * inner, cluster))),
            None if n.is_multiple_of(inner) => Ok(self.fill("dp", n / inner)),
            None => Err(Error::user(format!(
                "layout {text}: tp x pp x cp = {tp} x {pp} x {cp} = {inner} does not divide {n} accelerators"
            ))
            .hint(multiples(n, inner, cluster.accelerators_max))),
        }
    }
}

/// More ranks than any axis has; keeps products of axes far from overflow.
const MAX: usize = 1 << 15;

fn split(text: &str) -> Result<BTreeMap<&'static str, String>> {
    let mut written = BTreeMap::new();
    for part in text.split([',', ' ', ';']).filter(|p| !p.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            return Err(Error::user(format!("layout {text}: `{part}` is not KEY=VALUE"))
                .hint("write it like --layout tp=8,pp=16,micro_batch=1"));
        };
        let plain = key.trim().to_ascii_lowercase().replace('-', "_");
        let name = ALSO.iter().find(|a| a.0 == plain).map_or(plain.as_str(), |a| a.1);
        let Some((known, _)) = KEYS.iter().find(|k| k.0 == name) else {
            return Err(Error::user(format!("layout {text}: unknown key {key}"))
                .hint(suggest::hint(&plain, KEYS.iter().map(|k| k.0))));
        };
        if written.insert(*known, value.trim().to_owned()).is_some() {
            return Err(
                Error::user(format!("layout {text}: {known} is written twice")).hint("keep one of the two")
            );
        }
    }
    if written.is_empty() {
        return Err(
            Error::user("the layout is empty").hint("write it like --layout tp=8,pp=16,micro_batch=1")
        );
    }
    Ok(written)
}

/// Layers of each stage, chunk by chunk; empty where they are dealt evenly.
fn stage_layers(written: Option<&String>) -> Result<Vec<usize>> {
    let Some(value) = written else { return Ok(Vec::new()) };
    let counts = value.split('/').map(|n| n.parse().ok().filter(|n| (1..=MAX).contains(n)));
    counts.collect::<Option<_>>().ok_or_else(|| not("stage_layers", value, "counts with / between them"))
}

/// None of the words that a key takes.
fn wrong(key: &str, value: &str) -> Error {
    not(key, value, takes(key))
}

fn takes(key: &str) -> &'static str {
    KEYS.iter().find(|k| k.0 == key).map_or("", |k| k.1)
}

fn not(key: &str, value: &str, expected: &str) -> Error {
    let takes = takes(key);
    Error::user(format!("layout key {key}={value}, expected {expected}")).hint(format!("{key} takes {takes}"))
}

/// Why this layout is impossible, if it is.
fn check(placement: &Placement, p: &Problem) -> Result<()> {
    let l = &placement.layout;
    // Keys are written without the table that they have in a run file.
    let short = |e: Error| {
        let hint = e.hint_text().unwrap_or("see `phalanx help plan`").replace("layout.", "");
        let hint = hint.replace("batch.sequence=", "--sequence ");
        let hint = match hint.split_once("stage_layers=[") {
            Some((before, counts)) => {
                format!("{before}stage_layers={}", counts.trim_end_matches(']').replace(", ", "/"))
            }
            None => hint,
        };
        Error::user(e.to_string().replace("layout.", "")).hint(hint)
    };
    l.check(&p.shape.model, p.sequences, p.sequence, p.software.tolerance)
        .map_err(|broken| short(broken.into()))?;
    if l.pp == 1 && l.schedule == PipelineSchedule::Interleaved {
        return Err(Error::user("schedule=interleaved needs pp above 1").hint("leave chunks out"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::PRIOR;
    use crate::shape::Shape;
    use crate::software::Software;
    use spec::{Catalog, NumberFormat};

    fn problem(model: &str, n: usize) -> Problem {
        let cluster = Catalog::builtin().unwrap().cluster("dgx-superpod-h100", Some(n)).unwrap();
        Problem {
            shape: Shape::find(model).unwrap().unwrap(),
            software: Software::usual(&cluster.accelerator.family),
            cluster,
            constants: PRIOR,
            sequence: 2048,
            sequences: 1536,
            optimizer: Default::default(),
        }
    }

    #[test]
    fn multiples_are_those_that_the_machine_has() {
        for (n, inner, most, hint) in [
            (1000, 128, 1016, "--accelerators 896 would do"),
            (1000, 128, 2032, "--accelerators 896 or --accelerators 1024 would do"),
            (100, 128, 1016, "--accelerators 128 would do"),
            (100, 128, 100, "smaller axes fit: the machine has 100 accelerators"),
        ] {
            assert_eq!(multiples(n, inner, most), hint);
        }
    }

    #[test]
    fn the_rest_is_filled_in_and_said() {
        let p = problem("gpt3-175b", 1024);
        let given = parse("tp=8, pp=16, vpp=6, mbs=1, zero=1", &p, NumberFormat::Bf16).unwrap();
        let l = &given.placement.layout;
        assert_eq!((l.dp, l.tp, l.pp, l.chunks, l.zero), (8, 8, 16, 6, Zero::Optimizer));
        assert_eq!(l.schedule, PipelineSchedule::Interleaved);
        assert!(l.sequence_parallel);
        assert_eq!(given.filled, ["dp=8", "sequence_parallel=true", "recompute=none"]);
    }

    #[test]
    fn heads_are_dealt_where_that_is_written() {
        let p = problem("gpt3-175b", 1024);
        let given = parse("tp=8,pp=8,cp=4,context=Heads", &p, NumberFormat::Bf16).unwrap().placement;
        assert!(given.layout.deals_heads());
        assert_eq!(parse(&given.to_string(), &p, NumberFormat::Bf16).unwrap().placement, given);
        let ring = parse("tp=8,pp=8,cp=4", &p, NumberFormat::Bf16).unwrap().placement;
        assert!(ring.layout.has_ring() && ring != given);
    }

    #[test]
    fn impossible_layouts_are_refused_with_the_reason() {
        let check = |model: &str, n: usize, text: &str, part: &str| {
            let error = parse(text, &problem(model, n), NumberFormat::Bf16).unwrap_err();
            assert!(error.to_string().contains(part), "{text}: {error}");
            assert!(error.hint_text().is_some(), "{text}");
        };
        check("gpt3-175b", 1024, "tp=7", "7 does not divide 1024 accelerators");
        check("gpt3-175b", 1024, "tp=64", "tp = 64 does not divide the 96 query heads of gpt3-175b");
        check("gpt3-175b", 1024, "pp=128", "pp x chunks = 128 x 1 stages, but gpt3-175b has 96 layers");
        check("gpt3-175b", 1024, "dp=1000,tp=1", "is not the 1024 accelerators");
        check(
            "gpt3-175b",
            1024,
            "tp=8,pp=16,micro_batch=7",
            "micro_batch = 7 does not divide a rank's share of 192 sequences",
        );
        check(
            "gpt3-175b",
            1024,
            "tp=8,pp=16,chunks=7",
            "pp x chunks = 16 x 7 stages, but gpt3-175b has 96 layers",
        );
        check("gpt3-175b", 1024, "tp=8,ep=2", "has no experts");
        check("mixtral-8x7b", 64, "ep=3", "does not divide the 8 experts");
        check(
            "gpt3-175b",
            1024,
            "tp=8,schedule=zb,chunks=2",
            "needs schedule = \"interleaved\", found zero-bubble",
        );
        check("gpt3-175b", 1024, "tp", "is not KEY=VALUE");
        check("gpt3-175b", 1024, "tpp=8", "unknown key tpp");
        check("gpt3-175b", 1024, "tp=8,tp=4", "tp is written twice");
        check("gpt3-175b", 1024, "tp=0", "expected a count from 1");
        check("gpt3-175b", 1024, "tp=18446744073709551616", "expected a count from 1");
        check("gpt3-175b", 1024, "zero=4", "zero = 4");
        check("gpt3-175b", 1024, "tp=8,cp=2,context=tree", "context=tree, expected ring or heads");
        check("gpt3-175b", 1024, "tp=8,cp=8,context=heads", "cp = 8 does not divide the 12 query heads");
        check("gpt3-175b", 1024, "tp=8,shard=3", "shard = 3 does not divide dp = 128");
        check("gpt3-175b", 1024, "", "the layout is empty");
        check("gpt3-175b", 1024, "tp=8,pp=2,stage_layers=48", "stage_layers has 1 entries");
        check("gpt3-175b", 1024, "tp=8,pp=2,stage_layers=48/49", "adds up to 97 layers");
        check("gpt3-175b", 1024, "tp=8,pp=2,stage_layers=48/x", "counts with / between them");
    }
}
