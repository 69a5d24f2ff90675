//! What a rehearsal answers beside the time of its step: what each thing costs, what if, what it waited for.

use std::sync::atomic::Ordering;

use journal::Lane;
use journal::perfetto::{Slice, TraceWriter};
use plan::estimate::Problem;
use program::Pass;
use serde_json::{Value, json};
use sim::{Recording, Rehearsal};
use spec::{Error, Measure, Result};

use super::{Given, Steps, steps};

/// Things that happen in a step beyond which it is not kept: some 300 MB.
pub(super) const KEPT_MAX: usize = 5_000_000;
/// More things that go wrong than anyone wants the cost of, each.
const COSTS_MAX: usize = 16;
/// More ranks than anyone looks at.
const RANKS_MAX: usize = 256;
/// More than any link was ever made faster.
const FASTER_MAX: f64 = 1e3;

/// What if.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum AsIf {
    /// No rank were slower than others.
    EvenRanks,
    /// No link, switch or storage were worse than others.
    GoodLinks,
    /// The fabric between nodes were faster.
    Fabric(f64),
    /// Links inside nodes were.
    Domain(f64),
}

impl AsIf {
    pub(super) fn parse(text: &str) -> Result<Self> {
        let known = || {
            Error::user(format!("--as-if {text}: there is no such thing"))
                .hint("even-ranks, good-links, fabric=2 or domain=2")
        };
        match text.split_once('=') {
            None if text == "even-ranks" => Ok(AsIf::EvenRanks),
            None if text == "good-links" => Ok(AsIf::GoodLinks),
            Some((what @ ("fabric" | "domain"), by)) => {
                let by: Option<f64> =
                    by.parse().ok().filter(|by| (1.0 / FASTER_MAX..=FASTER_MAX).contains(by));
                let by = by.ok_or_else(|| {
                    Error::user(format!(
                        "--as-if {text}, expected a factor from {} to {FASTER_MAX}",
                        1.0 / FASTER_MAX
                    ))
                    .hint("how many times as fast, as fabric=2")
                })?;
                Ok(if what == "fabric" { AsIf::Fabric(by) } else { AsIf::Domain(by) })
            }
            _ => Err(known()),
        }
    }

    fn name(self) -> String {
        match self {
            AsIf::EvenRanks => "no rank were slow".to_owned(),
            AsIf::GoodLinks => "no link were bad".to_owned(),
            AsIf::Fabric(by) => format!("the fabric were {by} times as fast"),
            AsIf::Domain(by) => format!("links inside nodes were {by} times as fast"),
        }
    }

    /// The same job on such a machine.
    fn problem(self, problem: &Problem) -> Problem {
        let mut problem = problem.clone();
        let faster = |m: &mut Measure, by: f64| {
            (m.value, m.low, m.high) = (m.value * by, m.low * by, m.high * by);
        };
        match self {
            AsIf::EvenRanks | AsIf::GoodLinks => {}
            AsIf::Fabric(by) => faster(&mut problem.cluster.scale_out.bytes_per_s, by),
            AsIf::Domain(by) => {
                faster(&mut problem.cluster.scale_up.bytes_per_s, by);
                faster(&mut problem.cluster.scale_up.peer_bytes_per_s, by);
            }
        }
        problem
    }
}

impl Given<'_> {
    /// What each thing that goes wrong costs a step, in seconds: the step less what it would take without it.
    pub(super) fn costs(&self, rehearsal: &Rehearsal<'_>, with: &Steps) -> Result<Vec<Value>> {
        let mut out = Vec::new();
        let beyond: Vec<&str> = self.beyond().map(|(name, _)| name).collect();
        let names = self.scenario.names().into_iter().filter(|name| !beyond.contains(name));
        for name in names.take(COSTS_MAX) {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let without = steps(self.args, rehearsal, &self.scenario.without(name), self.stop, None)?;
            if without.last.is_whole {
                out.push(json!({ "of": name, "seconds": with.step_s - without.step_s }));
            }
        }
        Ok(out)
    }

    /// What goes wrong only in steps that are not played. Failures of days are lived, not played.
    fn beyond(&self) -> impl Iterator<Item = (&str, u64)> {
        let names = self.scenario.names();
        let lived = self.args.days.is_some();
        self.scenario
            .beyond(super::counted(self.args))
            .filter(move |(name, _)| !lived || names.contains(name))
    }

    /// The same as data: nothing is known of what it costs.
    pub(super) fn not_played(&self) -> Value {
        let steps = super::counted(self.args);
        let without = if self.args.days.is_some() { " without --days" } else { "" };
        let plays = |step: u64| format!("--steps {step}{without}");
        let said =
            |(name, step)| json!({ "of": name, "step": step, "steps": steps, "played_by": plays(step) });
        self.beyond().map(said).collect()
    }

    /// The step if things were otherwise.
    pub(super) fn as_if(&self, all: &[AsIf]) -> Result<Vec<Value>> {
        let mut out = Vec::new();
        for as_if in all {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            let problem = as_if.problem(&self.answer.problem);
            let scenario = match as_if {
                AsIf::EvenRanks => self.scenario.with_even_ranks(),
                AsIf::GoodLinks => self.scenario.with_good_links(),
                AsIf::Fabric(_) | AsIf::Domain(_) => self.scenario.clone(),
            };
            let given = Given { scenario: &scenario, ..*self };
            let rehearsal = given.rehearsal(&problem, 0.0)?;
            let played = steps(self.args, &rehearsal, &scenario, self.stop, None)?;
            if played.last.is_whole {
                out.push(json!({ "as_if": as_if.name(), "step_s": played.step_s }));
            }
        }
        Ok(out)
    }
}

/// The critical path: its seconds by what went on and by rank, the largest first.
pub(super) fn path(recording: &Recording<'_>) -> Value {
    let links = recording.critical_path();
    let sim::Shares { by_what: whats, by_rank: ranks } = sim::Shares::of(&links);
    let whats: Vec<Value> = whats.iter().map(|(what, s)| json!({ "what": what, "seconds": s })).collect();
    let ranks: Vec<Value> =
        ranks.iter().take(RANKS_MAX).map(|(rank, s)| json!({ "rank": rank, "seconds": s })).collect();
    let mut longest: Vec<_> = links.iter().collect();
    longest.sort_by(|a, b| f64::total_cmp(&(b.to_s - b.from_s), &(a.to_s - a.from_s)));
    longest.truncate(LONGEST);
    json!({ "by_what": whats, "by_rank": ranks, "links": links.len(), "longest": longest })
}

/// Links of the path that are shown one by one.
const LONGEST: usize = 16;

/// `0,5,17-19` as ranks of a job.
pub(super) fn ranks(text: &str, of: usize) -> Result<Vec<usize>> {
    let bad = |part: &str| {
        Error::user(format!("--ranks {text}: {part} is no rank or range of ranks"))
            .hint(format!("as 0,5,17-19; the job has ranks 0 to {}", of - 1))
    };
    let mut out = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let number = |n: &str| n.trim().parse::<usize>().ok().filter(|n| *n < of).ok_or_else(|| bad(part));
        let (from, to) = (number(from)?, number(to)?);
        if from > to {
            return Err(bad(part));
        }
        if to - from >= RANKS_MAX || out.len() + to - from >= RANKS_MAX {
            return Err(Error::user(format!("--ranks {text}: more than {RANKS_MAX} ranks"))
                .hint("name those that matter"));
        }
        out.extend(from..=to);
    }
    out.sort_unstable();
    out.dedup();
    Ok(out)
}

/// A recording that a file is to be made of.
pub(super) fn needed<'a, 'r>(recording: Option<&'a Recording<'r>>) -> Result<&'a Recording<'r>> {
    recording.ok_or_else(|| {
        Error::user(format!("more than {KEPT_MAX} things happen in the step, too many to keep"))
            .hint("give fewer --sequences")
    })
}

/// What ranks did, for <https://ui.perfetto.dev>.
pub(super) fn perfetto(recording: &Recording<'_>, ranks: &[usize]) -> Result<String> {
    const US: f64 = 1e6;
    let failed = |e: std::io::Error| Error::failure(format!("write a trace into memory: {e}"));
    let mut writer = TraceWriter::new(Vec::new()).map_err(failed)?;
    for &rank in ranks {
        for bar in recording.timeline(rank) {
            let lane = if bar.is_message { Lane::Comm } else { Lane::Compute };
            let name = match bar.of {
                Some((pass, _)) => format!("{} ({})", bar.what, pass_name(pass)),
                None => bar.what.to_owned(),
            };
            let args: Vec<(&str, u64)> = bar.of.iter().map(|of| ("micro_batch", of.1 as u64)).collect();
            let (start_us, end_us) = (bar.from_s * US, bar.to_s * US);
            writer
                .slice(&Slice { rank, lane, name: &name, start_us, end_us, args: &args })
                .map_err(failed)?;
        }
    }
    let bytes = writer.finish().map_err(failed)?;
    String::from_utf8(bytes).map_err(|e| Error::failure(format!("a trace that is no text: {e}")))
}

pub(super) fn pass_name(pass: Pass) -> &'static str {
    match pass {
        Pass::Forward => "forward",
        Pass::Backward => "backward",
        Pass::Weight => "weight gradients",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_read() {
        let check = |text: &str, expected: Option<&[usize]>| {
            assert_eq!(ranks(text, 20).ok().as_deref(), expected, "{text}");
        };
        check("0", Some(&[0]));
        check("17-19, 5,0,5", Some(&[0, 5, 17, 18, 19]));
        for bad in ["", "20", "3-", "5-3", "a", "0,,1", "-1"] {
            check(bad, None);
        }
        assert!(ranks("0-999", 1000).is_err());
    }

    #[test]
    fn what_ifs_are_read() {
        assert_eq!(AsIf::parse("fabric=2").unwrap(), AsIf::Fabric(2.0));
        assert_eq!(AsIf::parse("even-ranks").unwrap(), AsIf::EvenRanks);
        for bad in
            ["fabric", "fabric=0", "fabric=-1", "fabric=nan", "domain=1e9", "luck=2", "", "even-ranks=2"]
        {
            assert!(AsIf::parse(bad).is_err(), "{bad}");
        }
    }
}
