//! Published training runs, one folder for each paper, report or table: estimated with the layouts that were published.
//!
//! Each folder's `tolerance.toml` says how many rows are estimated and how far off the median and the 90th percentile may
//! be. They are ratchets: a change that makes a source worse fails here; one that makes it better should lower them.

#![allow(clippy::disallowed_methods, reason = "the published rows lie in files")]

use std::path::Path;

use plan::calibration::Calibration;
use published::validate::{
    Unseen, Validation, calibrate, cross_validate, cross_validate_by, halves, validate,
};
use spec::Catalog;

#[derive(serde::Deserialize)]
struct Tolerance {
    priced: usize,
    median_abs_error: f64,
    p90_abs_error: f64,
}

fn folders() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/published");
    let mut folders: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    let read = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        (name, std::fs::read_to_string(path.join("runs.csv")).unwrap())
    };
    folders.iter().map(|p| read(p)).collect()
}

/// All folders as one table.
fn all() -> String {
    let mut out = String::new();
    for (i, (_, text)) in folders().into_iter().enumerate() {
        let body = if i == 0 { text.as_str() } else { text.split_once('\n').unwrap().1 };
        out.push_str(body);
    }
    out
}

#[test]
fn every_source_stays_within_its_tolerance() {
    let catalog = Catalog::builtin().unwrap();
    let calibration = Calibration::builtin().unwrap();
    let mut failures = Vec::new();
    for (name, text) in folders() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/published").join(&name).join("tolerance.toml");
        let tolerance: Tolerance = toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let v = validate(&name, &text, &catalog, &calibration).unwrap();
        let found = (v.priced, v.median_abs_error, v.p90_abs_error);
        if v.priced < tolerance.priced
            || v.median_abs_error > tolerance.median_abs_error
            || v.p90_abs_error > tolerance.p90_abs_error
        {
            failures.push(format!(
                "{name}: {found:?}, allowed ({}, {}, {})",
                tolerance.priced, tolerance.median_abs_error, tolerance.p90_abs_error
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Tables of runs on few accelerators or by eager stacks, whose pace the host sets.
const SMALL: [&str; 2] = ["VIA-Research/vTrain data/ground_truth_single.csv", "huggingface/nanotron"];

/// Rows, and the median and 90th percentile of absolute errors, of the sources that `of` takes.
fn errors(v: &Validation, of: impl Fn(&str) -> bool) -> (usize, f64, f64, f64) {
    let rows: Vec<_> = v.rows.iter().filter(|r| of(&r.source)).collect();
    let mut abs: Vec<f64> = rows.iter().map(|r| r.error.abs()).collect();
    abs.sort_by(f64::total_cmp);
    let at = |q: f64| abs[((abs.len() as f64 * q).ceil() as usize).clamp(1, abs.len()) - 1];
    let inside = rows.iter().filter(|r| (r.low..=r.high).contains(&r.published)).count();
    (rows.len(), at(0.5), at(0.9), inside as f64 / rows.len() as f64)
}

fn is_large(source: &str) -> bool {
    !SMALL.iter().any(|small| source.starts_with(small))
}

/// The honest figure: every source predicted with constants that have not seen it.
#[test]
fn unseen_sources_are_predicted() {
    let catalog = Catalog::builtin().unwrap();
    let text = all();
    let check = |v: &Validation, median: f64, p90: f64| {
        let (rows, found_median, found_p90, _) = errors(v, is_large);
        assert!(v.unseen == Unseen::Groups && rows > 580, "{rows}");
        assert!(found_median < median, "median {found_median}");
        assert!(found_p90 < p90, "90th percentile {found_p90}");
    };
    let by_source = cross_validate("published", &text, &catalog).unwrap();
    check(&by_source, 0.045, 0.15);
    // Whole publishers left out: all releases of one vendor's tables at once.
    check(&cross_validate_by("published", &text, &catalog, |run| run.family.clone()).unwrap(), 0.075, 0.29);
    // A fifth of the rows at a time, whatever their source.
    let fifth = |id: &str| id.bytes().fold(7u32, |a, b| a.wrapping_mul(31).wrapping_add(b.into())) >> 7;
    let rows = cross_validate_by("published", &text, &catalog, |run| (fifth(&run.id) % 5).to_string());
    check(&rows.unwrap(), 0.05, 0.15);

    let sweeps: Vec<_> =
        by_source.sweeps.iter().filter(|s| !SMALL.iter().any(|x| s.name.contains(x))).collect();
    assert!(sweeps.len() > 12);
    let mean = sweeps.iter().map(|s| s.kendall_tau).sum::<f64>() / sweeps.len() as f64;
    assert!(mean > 0.6, "layouts are ordered at a mean tau of {mean}");
    let regret = sweeps.iter().map(|s| s.regret).sum::<f64>() / sweeps.len() as f64;
    assert!(regret < 0.06, "layouts predicted best are {regret} slower than the best");
}

/// Constants fitted on half of each source, judged on the half kept back: ratchets, and intervals that mean what they say.
#[test]
fn the_half_of_each_source_that_is_kept_back_is_predicted() {
    let v = halves("published", &all(), &Catalog::builtin().unwrap()).unwrap();
    let check = |of: &dyn Fn(&str) -> bool, rows: usize, median: f64, p90: f64| {
        let found = errors(&v, of);
        assert!(found.0 >= rows && found.1 < median && found.2 < p90, "{found:?}");
        assert!((0.85..=0.95).contains(&found.3), "{found:?}");
    };
    assert_eq!(v.unseen, Unseen::Half);
    check(&is_large, 298, 0.04, 0.13);
    check(&|source| source.starts_with(SMALL[0]), 363, 0.055, 0.18);
    check(&|source| source.starts_with(SMALL[1]), 311, 0.1, 0.4);
}

/// `phalanx validate --fit catalog/calibration.toml` on all rows makes the file anew.
#[test]
fn the_built_in_constants_are_the_fit_of_these_rows() {
    let fitted = calibrate("published", &all(), &Catalog::builtin().unwrap()).unwrap();
    let builtin = Calibration::builtin().unwrap();
    for (a, b) in [
        (&fitted.family, &builtin.family),
        (&fitted.chip, &builtin.chip),
        (&fitted.recipe, &builtin.recipe),
        (&fitted.lineage, &builtin.lineage),
        (&fitted.software, &builtin.software),
    ] {
        assert!(a.keys().eq(b.keys()));
        for (name, factors) in a {
            let off = factors.iter().zip(b[name]).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
            assert!(off < 2e-3, "{name} is {off} from the built-in one");
        }
    }
}

#[test]
fn intervals_hold_nine_in_ten_and_reasons_are_given() {
    let catalog = Catalog::builtin().unwrap();
    let v = validate("published", &all(), &catalog, &Calibration::builtin().unwrap()).unwrap();
    assert!((0.88..0.97).contains(&v.inside_interval), "{}", v.inside_interval);
    assert_eq!(v.priced + v.not_priced.len(), 2056);
    assert!(v.not_priced.iter().all(|n| !n.reason.is_empty() && n.line > 1));
    assert!(v.rows.iter().all(|r| r.low < r.predicted && r.predicted < r.high));
}
