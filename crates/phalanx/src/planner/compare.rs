//! `phalanx plan compare`.

use std::path::Path;

use clap::Parser;
use report::compare::{Comparison, Side};
use spec::{Error, Result};

use crate::args::{Args, Command, PlanOr};
use crate::{files, output};

pub(super) fn compare(a: &str, b: &str, json: bool, html: Option<&Path>) -> Result<u8> {
    let page = html.map(|path| files::Pending::create("--html", path)).transpose()?;
    let both = Comparison::of(side(a)?, side(b)?);
    if let Some(page) = page {
        page.commit(&both.page())?;
    }
    if json {
        output::print(&serde_json::to_string_pretty(&both).expect("numbers and text are JSON"));
    } else {
        output::print(&both.text());
    }
    Ok(0)
}

/// A saved answer, or the answer to a question given as the flags of a plan.
fn side(given: &str) -> Result<Side> {
    if !given.trim_start().starts_with('-') {
        return Side::parse(given, &files::read(Path::new(given))?);
    }
    let words = ["phalanx", "plan"].into_iter().chain(given.split_whitespace());
    let refused = |why: String| {
        Error::user(format!("{given}: {why}"))
            .hint("write the flags of `phalanx plan` in quotes, or name a file")
    };
    let parsed = Args::try_parse_from(words).map_err(|e| {
        refused(e.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned())
    })?;
    let Command::Plan(PlanOr::Plan(plan)) = parsed.command else {
        return Err(refused("no plan of its own".to_owned()));
    };
    if plan.cluster == "this" {
        return Err(refused("plans of this machine have other figures".to_owned()));
    }
    for (flag, there) in [
        ("--html", plan.html.is_some()),
        ("--json", plan.json),
        ("--emit", plan.emit.is_some()),
        ("--rank-map", plan.rank_map.is_some()),
        ("--explain", plan.explain),
    ] {
        if there {
            return Err(Error::user(format!("{given}: {flag} is of one plan, not of a side"))
                .hint("leave it out; --html and --json of the comparison stand outside of the quotes"));
        }
    }
    Side::parse(given, &super::answered(&plan)?.json().to_string())
}
