//! `phalanx doctor`: what training on this machine, or on all nodes of an allocation, needs, whether it is there, why it
//! matters and what to do.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use spec::Result;

use crate::args::Doctor;
use crate::output;
use crate::ranks::{self, Rank};

mod allocation;
mod disk;
mod host;
mod limits;
mod libraries;
mod network;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// Training works, but slower, or not in some way.
    Warn,
    /// Training will fail.
    Bad,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Bad => "BAD",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Check {
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// Why it matters; shown where something is amiss.
    why: &'static str,
    /// What to do; empty where nothing is to be done.
    #[serde(rename = "do", skip_serializing_if = "String::is_empty")]
    hint: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>, why: &'static str) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), why, hint: String::new() }
    }

    fn amiss(self, verdict: Verdict, hint: impl Into<String>) -> Check {
        Check { verdict, hint: hint.into(), ..self }
    }

    /// As `verdict` with what to do, if `amiss`.
    fn unless(self, fine: bool, verdict: Verdict, hint: impl Into<String>) -> Check {
        if fine { self } else { self.amiss(verdict, hint) }
    }
}

pub(crate) fn run(args: &Doctor) -> Result<u8> {
    let transport = crate::train::choice(&args.transport);
    if let Some(env) = Rank::env(None)? {
        ranks::check_mpi(transport)?;
        let me = env.rank;
        let looked = Rank::meet(env, transport).and_then(|rank| allocation::run(args, rank));
        return looked.map_err(|e| e.context(format!("rank {me}")));
    }
    if let Some(name) = &args.cluster {
        allocation::expected(name, args)?;
        output::say("one machine: no links between nodes to hold to --cluster");
    }
    let mut checks = machine();
    checks.extend(disk::checks(&args.dir)?);
    let worst = checks.iter().map(|c| c.verdict).max().unwrap_or(Verdict::Ok);
    output::print(&if args.json {
        serde_json::json!({ "verdict": worst, "checks": checks }).to_string()
    } else {
        text(&checks)
    });
    Ok(u8::from(worst == Verdict::Bad))
}

/// What is looked at beside disks.
fn machine() -> Vec<Check> {
    let parts = [limits::checks(), host::checks(), network::checks(), libraries::checks()];
    parts.into_iter().flatten().collect()
}

fn text(checks: &[Check]) -> String {
    let mut out = String::new();
    for c in checks {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{:<4} {:<16} {}", c.verdict.name(), c.name, c.found);
        if c.verdict > Verdict::Ok {
            let _ = writeln!(out, "     {:<16} why: {}", "", c.why);
            let _ = writeln!(out, "     {:<16} do:  {}", "", c.hint);
        }
    }
    let count = |v| checks.iter().filter(|c| c.verdict == v).count();
    let _ = writeln!(
        out,
        "{} checks: {} ok, {} to look at, {} bad",
        checks.len(),
        count(Verdict::Ok),
        count(Verdict::Warn),
        count(Verdict::Bad)
    );
    out
}

fn binary(bytes: u64) -> String {
    crate::show::binary(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// A file of /proc or /sys, trimmed; nothing where there is none.
fn line_of(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_amiss_says_why_and_what_to_do() {
        let fine = Check::ok("files", "1024", "sockets");
        let bad = Check::ok("shm", "1 MiB", "ranks talk there").amiss(Verdict::Bad, "mount it larger");
        let out = text(&[fine.clone(), bad]);
        assert_eq!(
            out,
            "ok   files            1024\nBAD  shm              1 MiB\n                      why: ranks talk there\n                      do:  mount it larger\n2 checks: 1 ok, 0 to look at, 1 bad\n"
        );
        assert_eq!(fine.clone().unless(true, Verdict::Bad, "x"), fine);
    }
}
