use std::fmt::Write as _;

use published::inference::{Validation, validate};
use spec::{Catalog, Error, Result};

use crate::args::{By, Validate};
use crate::output;

/// Rows printed, those furthest off first; `--json` has all.
const ROWS_SHOWN: usize = 10;

/// A table of serving figures.
pub(super) fn run(
    args: &Validate,
    name: &str,
    table: &str,
    catalog: &Catalog,
    unread: &[String],
) -> Result<u8> {
    for (flag, given) in [
        ("--fit", args.fit.is_some()),
        ("--calibration", args.calibration.is_some()),
        ("--held-out", args.held_out),
        ("--half", args.half),
        ("--by", args.by != By::Estimate),
    ] {
        if given {
            return Err(Error::user(format!("{flag}: {name} is a table of serving figures"))
                .hint(format!("leave {flag} out; serving constants come from catalog/serving.toml")));
        }
    }
    let v = validate(name, table, catalog)?;
    if v.rows + v.not_priced.len() == 0 {
        return Err(Error::user(format!("{name}: a header without rows"))
            .hint("each line after the header is one published figure"));
    }
    output::print(&if args.json {
        let json = serde_json::json!({ "inference": v, "columns_not_read": unread });
        serde_json::to_string_pretty(&json).expect("numbers are JSON")
    } else {
        let mut out = String::new();
        text(&mut out, &v).expect("writing to a string");
        out
    });
    Ok(0)
}

fn text(out: &mut String, v: &Validation) -> std::fmt::Result {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    writeln!(
        out,
        "{} serving figures: mean error {}, median {}, 90th percentile {}, largest {}",
        v.rows,
        percent(v.mean_abs_error),
        percent(v.median_abs_error),
        percent(v.p90_abs_error),
        percent(v.max_abs_error)
    )?;
    for f in &v.figures {
        writeln!(
            out,
            "  {:<14} {:>4} rows  signed {:>8}  median {:>7}",
            f.figure.column(),
            f.rows,
            percent(f.mean_error),
            percent(f.median_abs_error)
        )?;
    }
    let mut worst: Vec<_> = v.details.iter().collect();
    worst.sort_by(|a, b| b.error.total_cmp(&a.error));
    for d in worst.iter().take(ROWS_SHOWN) {
        let id: String = d.id.chars().take(50).collect();
        writeln!(out, "  {id:<50} {:>8}  {}", percent(d.error), d.stack)?;
    }
    for n in &v.not_priced {
        writeln!(out, "  not priced: line {}, {}: {}", n.line, n.id, n.reason)?;
    }
    Ok(())
}
