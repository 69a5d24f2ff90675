//! `phalanx guide`.

use std::fmt::Write as _;

use guide::Claim;
use serde_json::json;
use spec::Result;

use crate::args::Guide;
use crate::{files, output};

pub(crate) fn run(args: &Guide) -> Result<u8> {
    let page = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let claims = guide::check(&files::catalog(&args.catalog)?, &files::calibration(None)?)?;
    if let Some(page) = page {
        page.commit(&report::guide_page::guide_page(&claims))?;
    }
    if args.json {
        let all = json!({ "claims": claims });
        output::print(&serde_json::to_string_pretty(&all).expect("numbers and text are JSON"));
    } else {
        output::print(&text(&claims));
    }
    Ok(0)
}

fn text(claims: &[Claim]) -> String {
    let mut out = String::new();
    for c in claims {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{:>2}. {:<11} {}", c.number, c.verdict.name(), c.claim);
        let _ = writeln!(out, "    ours: {}", c.ours);
        if let Some(note) = &c.note {
            let _ = writeln!(out, "    note: {note}");
        }
        let _ = writeln!(out, "    from: {}", c.source);
    }
    let mut counts: Vec<(guide::Verdict, usize)> = Vec::new();
    for c in claims {
        match counts.iter_mut().find(|n| n.0 == c.verdict) {
            Some(n) => n.1 += 1,
            None => counts.push((c.verdict, 1)),
        }
    }
    counts.sort_by_key(|n| std::cmp::Reverse(n.1));
    let counts: Vec<String> = counts.iter().map(|(v, n)| format!("{n} {}", v.name())).collect();
    let _ = writeln!(out, "\n{} claims: {}", claims.len(), counts.join(", "));
    out
}
