//! Published reliability, as estimated here: rows that a constant was taken from, and rows that none was.

use economics::Spread;
use economics::failures::{JobFailures, Rates};
use economics::goodput::{ExposedRun, Recovery, Save, SaveTimes};
use spec::Catalog;

/// Whether a constant of the catalogue or of the model was taken from the row.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    Fitted,
    Checked,
}
use Use::{Checked, Fitted};

fn failures(entry: &str, accelerators: usize) -> JobFailures {
    Rates::named(&Catalog::builtin().unwrap(), entry).unwrap().of_job(accelerators)
}

/// A job that saves in the background every best interval and reads back within a minute or two.
fn job(entry: &str, accelerators: usize) -> ExposedRun {
    ExposedRun {
        failures: failures(entry, accelerators),
        step_s: 5.0,
        replicas: 16,
        save: SaveTimes {
            save: Save::Async,
            stall_s: Spread::new(0.1, 0.6, 6.3),
            behind_s: Spread::new(10.0, 50.0, 300.0),
        },
        read_s: Spread::new(10.0, 30.0, 130.0),
        interval_s: None,
        evaluation: Spread::exact(0.0),
    }
}

fn goodput(entry: &str, accelerators: usize, recovery: Recovery) -> Spread {
    job(entry, accelerators).goodput(recovery).unwrap().goodput
}

/// RSC as its paper describes it: hourly checkpoints of five minutes that block, restarts of 5 to 20 minutes.
fn rsc_large_jobs() -> Spread {
    let mut job = job("rsc-1", 2048);
    job.save =
        SaveTimes { save: Save::Blocking, stall_s: Spread::exact(300.0), behind_s: Spread::exact(0.0) };
    job.interval_s = Some(3600.0);
    job.goodput(Recovery::Restart).unwrap().goodput
}

#[test]
fn published_reliability_is_inside_the_stated_interval() {
    let rows: Vec<(&str, Use, f64, Spread)> = vec![
        ("Llama 3: 419 interruptions in 54 days", Fitted, 419.0, failures("llama3-405b", 16_384).count(54.0)),
        ("Llama 3: 3.09 h between them", Fitted, 3.093, failures("llama3-405b", 16_384).between_h),
        ("RSC: 7.9 h at 1,024", Fitted, 7.9, failures("rsc-jobs", 1024).between_h),
        ("RSC-1: 1.8 h projected at 16,384", Fitted, 1.8, failures("rsc-1", 16_384).between_h),
        ("FT-HSDP: 2.6 h at 4,000 servers", Fitted, 2.6, failures("ft-hsdp", 32_000).between_h),
        ("FT-HSDP: 18 min at 100,000", Fitted, 0.3, failures("ft-hsdp", 100_000).between_h),
        ("B200: 21 failures in 55 days", Fitted, 21.0, failures("b200-504", 504).count(55.0)),
        ("GLM-130B: 10 in 54 days", Fitted, 10.0, failures("glm-130b", 768).count(54.0)),
        // The value is the row above; this one is the low end of its range.
        ("RSC: 47.7 days at 8", Fitted, 47.7 * 24.0, failures("rsc-jobs", 8).between_h),
        ("RSC-1: 0.23 h projected at 131,072", Checked, 0.23, failures("rsc-1", 131_072).between_h),
        ("BLOOM: a GPU a week of 384", Checked, 1.0, failures("usual", 384).count(7.0)),
        (
            "Llama 3: more than 90 % effective",
            Checked,
            0.9,
            below(goodput("llama3-405b", 16_384, Recovery::Restart)),
        ),
        (
            "MegaScale: more than 90 %, 12,288",
            Checked,
            0.9,
            below(goodput("usual", 12_288, Recovery::Restart)),
        ),
        ("RSC: 90 % of large jobs", Checked, 0.9, rsc_large_jobs()),
        ("ByteRobust: 97 % of 9,600", Checked, 0.97, goodput("usual", 9_600, Recovery::InMemory)),
        ("FT-HSDP: 44 % of 100,000, restarts", Checked, 0.44, goodput("ft-hsdp", 100_000, Recovery::Restart)),
        ("FT-HSDP: 80 % of 100,000, elastic", Checked, 0.80, goodput("ft-hsdp", 100_000, Recovery::Elastic)),
    ];
    for (what, used, published, ours) in &rows {
        println!(
            "{used:?} {what}: {published} in {:.4} to {:.4}, value {:.4}",
            ours.low, ours.high, ours.value
        );
        // A point has the width of its digits.
        let (low, high) = (ours.low * 0.975, ours.high * 1.025);
        assert!((low..=high).contains(published), "{used:?} {what}: {published} is outside of {ours:?}");
    }
    let checked = rows.iter().filter(|r| r.1 == Checked).count();
    assert!(checked >= 8, "{checked} rows that no constant was taken from");
}

/// "More than" what was published: the published figure is no more than the high end.
fn below(ours: Spread) -> Spread {
    assert!(ours.value > 0.9, "{ours:?}");
    Spread { low: 0.0, ..ours }
}

#[test]
fn values_are_near_and_intervals_are_no_excuse() {
    let check = |what: &str, published: f64, ours: Spread, within: f64| {
        assert!((ours.value / published - 1.0).abs() < within, "{what}: {published}, {ours:?}");
    };
    check("Llama 3, count", 419.0, failures("llama3-405b", 16_384).count(54.0), 0.01);
    // Taken from 1,024 GPUs alone.
    check("RSC at 8", 47.7 * 24.0, failures("rsc-jobs", 8).between_h, 0.15);
    check("ByteRobust", 0.97, goodput("usual", 9_600, Recovery::InMemory), 0.02);
    check("FT-HSDP, elastic", 0.80, goodput("ft-hsdp", 100_000, Recovery::Elastic), 0.15);
}

#[test]
fn restarts_grow_with_the_job_as_published() {
    for (accelerators, published_s) in [(16_000, 200.0), (22_000, 300.0), (64_000, 600.0), (98_000, 900.0)] {
        let ours = failures("ft-hsdp", accelerators).restart_s.value;
        assert!((ours - published_s).abs() <= 35.0, "{accelerators}: {ours} s, {published_s} s published");
    }
}

#[test]
fn counted_entries_hold_the_interval_of_their_count() {
    let catalog = Catalog::builtin().unwrap();
    for name in ["llama3-405b", "b200-504", "glm-130b"] {
        let entry = catalog.get(spec::EntryKind::Failure, name).unwrap();
        let (rate, events) = (entry.measure("rate").unwrap(), entry.measure("events").unwrap().value);
        let poisson = economics::failures::poisson(events);
        for (ours, counted) in [(rate.low, poisson.low), (rate.high, poisson.high)] {
            let ratio = ours / rate.value / (counted / events);
            assert!((ratio - 1.0).abs() < 0.02, "{name}: {ratio}");
        }
        let causes = Rates::named(&catalog, name).unwrap().causes;
        let sum: f64 = causes.iter().map(|c| c.rate.value).sum();
        assert!(
            causes.is_empty() || (sum / (rate.value * 86_400.0) - 1.0).abs() < 0.01,
            "{name}: causes {sum}"
        );
    }
}

#[test]
fn the_trace_of_400_servers_is_in_the_catalogue_with_its_bursts() {
    // Starts of faults in five times thirty days, as counted in the first 174 days.
    let months = [11, 37, 118, 34, 55];
    let dispersion = economics::failures::dispersion(&months);
    assert!((dispersion - 32.3).abs() < 0.1, "{dispersion}");
    let rate = economics::failures::overdispersed(313.0, dispersion).scaled(1.0 / (400.0 * 174.1863));
    let held = Rates::named(&Catalog::builtin().unwrap(), "trace-400").unwrap().per_node_day;
    for (a, b) in [(rate.low, held.low), (rate.value, held.value), (rate.high, held.high)] {
        assert!((a / b - 1.0).abs() < 0.01, "{rate:?} {held:?}");
    }
}
