//! `phalanx validate --by simulate`.

use std::fmt::Write as _;

use published::rehearsed::{Rehearsed, cross_rehearse, rehearse};
use spec::{Catalog, Result};

use super::percent;
use crate::args::Validate;
use crate::{files, output};

/// Rows shown in which the player is further from the closed form than in others.
const APART_SHOWN: usize = 8;

pub(super) fn run(args: &Validate, name: &str, table: &str, catalog: &Catalog) -> Result<u8> {
    let r = if args.held_out {
        cross_rehearse(name, table, catalog)?
    } else {
        rehearse(name, table, catalog, &files::calibration(args.calibration.as_deref())?)?
    };
    output::print(&if args.json {
        serde_json::to_string_pretty(&r).expect("numbers are JSON")
    } else {
        let mut out = String::new();
        text(&mut out, &r).expect("writing to a string");
        out
    });
    Ok(0)
}

fn text(out: &mut String, r: &Rehearsed) -> std::fmt::Result {
    let seen = if r.held_out { ", each source left out of the fit of both" } else { "" };
    writeln!(
        out,
        "{} rows estimated and played{seen}; absolute errors, median and 90th percentile",
        r.rows.len()
    )?;
    for s in &r.shares {
        writeln!(
            out,
            "  {:<27} {:>4} rows  estimated {:>7} {:>7}  played {:>7} {:>7}  apart {:>7} {:>7}",
            s.of,
            s.rows,
            percent(s.estimated.median_abs_error),
            percent(s.estimated.p90_abs_error),
            percent(s.played.median_abs_error),
            percent(s.played.p90_abs_error),
            percent(s.median_apart),
            percent(s.p90_apart)
        )?;
    }
    let mut apart: Vec<_> = r.rows.iter().collect();
    apart.sort_by(|a, b| b.differs.abs().total_cmp(&a.differs.abs()));
    writeln!(out, "furthest from the closed form of the same constants")?;
    for row in apart.iter().take(APART_SHOWN) {
        let name: String = row.id.chars().take(24).collect();
        let error = |s: f64| percent(s / row.published - 1.0);
        writeln!(
            out,
            "  {name:<24} estimated {:>8}  played {:>8}  {}, {}",
            error(row.estimated),
            error(row.played),
            row.contention.name(),
            row.layout
        )?;
    }
    writeln!(out, "{} rows not predicted; --json has their reasons", r.not_priced.len())
}
