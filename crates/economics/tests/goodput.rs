//! Properties of goodput: it is a share, its parts add up, and better machines never do worse.

use economics::Spread;
use economics::failures::{Rates, poisson, spares};
use economics::goodput::{ExposedRun, Recovery, Save, SaveTimes, daly, young};
use proptest::prelude::*;
use spec::Catalog;

fn job(accelerators: usize, stall_s: f64, behind_s: f64, step_s: f64, replicas: usize) -> ExposedRun {
    ExposedRun {
        failures: Rates::named(&Catalog::builtin().unwrap(), "usual").unwrap().of_job(accelerators),
        step_s,
        replicas,
        save: SaveTimes {
            save: Save::Async,
            stall_s: Spread::new(stall_s / 2.0, stall_s, stall_s * 2.0),
            behind_s: Spread::exact(behind_s),
        },
        read_s: Spread::exact(60.0),
        interval_s: None,
        evaluation: Spread::exact(0.01),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn shares_add_up_and_stay_shares(
        n in 8usize..400_000, stall in 0.01f64..600.0, behind in 0.0f64..600.0, step in 0.1f64..60.0, dp in 1usize..64,
    ) {
        for g in job(n, stall, behind, step, dp).compare() {
            let sum: f64 = g.terms.iter().map(|t| t.share).sum();
            prop_assert!((sum - 1.0).abs() < 1e-9, "{g:?}");
            prop_assert!(g.terms.iter().all(|t| (0.0..=1.0).contains(&t.share)), "{g:?}");
            prop_assert!(0.0 <= g.goodput.low && g.goodput.low <= g.goodput.value && g.goodput.value <= g.goodput.high);
            prop_assert!(g.goodput.high < 1.0);
        }
    }

    #[test]
    fn no_interval_beats_the_best(n in 64usize..100_000, stall in 0.1f64..300.0, by in 0.05f64..20.0) {
        let job = job(n, stall, 0.0, 1.0, 8);
        let best = job.goodput(Recovery::Restart).unwrap();
        for interval in [best.interval_s * by, best.intervals.young_s, best.intervals.daly_s] {
            let other = ExposedRun { interval_s: Some(interval.clamp(1.0, 86_400.0)), ..job.clone() };
            let other = other.goodput(Recovery::Restart).unwrap();
            prop_assert!(other.goodput.value <= best.goodput.value * (1.0 + 1e-6), "{interval}");
        }
    }

    #[test]
    fn more_failures_or_slower_saves_never_help(n in 64usize..50_000, stall in 0.1f64..300.0, behind in 0.0f64..300.0) {
        let of = |job: ExposedRun| job.goodput(Recovery::Restart).unwrap().goodput.value;
        let base = of(job(n, stall, behind, 1.0, 8));
        prop_assert!(of(job(2 * n, stall, behind, 1.0, 8)) <= base);
        prop_assert!(of(job(n, stall * 1.5, behind, 1.0, 8)) <= base * (1.0 + 1e-6));
        prop_assert!(of(job(n, stall, behind + 60.0, 1.0, 8)) <= base * (1.0 + 1e-6));
    }

    #[test]
    fn spares_cover_what_is_broken(nodes in 1.0f64..20_000.0, rate in 0.0005f64..0.02, repair in 0.05f64..20.0) {
        let s = spares(nodes, Spread::exact(rate * nodes), Spread::exact(repair));
        prop_assert!(s.nodes as f64 >= s.broken.value.floor(), "{s:?}");
        prop_assert!((s.nodes as f64) < s.broken.value + 2.0 * s.broken.value.sqrt() + 3.0, "{s:?}");
    }
}

#[test]
fn the_best_interval_is_dalys_where_his_assumptions_hold() {
    let mut job = job(16_384, 30.0, 0.0, 1.0, 8);
    job.save.stall_s = Spread::exact(30.0);
    let mean_s = 86_400.0 / job.failures.per_day.value;
    let best = job.goodput(Recovery::Restart).unwrap().intervals;
    assert!((best.best_s / daly(30.0, mean_s) - 1.0).abs() < 0.02, "{best:?}");
    assert!((best.young_s - young(30.0, mean_s)).abs() < 1e-6);
}

#[test]
fn a_simulated_job_takes_as_long_as_the_closed_form_says() {
    // The model itself, drawn: exponential failures from a fixed generator, segments tried until none is hit.
    let (per_s, interval, stall, down) = (1.0 / 7200.0, 900.0, 20.0, 300.0);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut next = move || -(1.0 - uniform()).ln() / per_s;
    let (mut wall, segments) = (0.0, 200_000);
    for _ in 0..segments {
        loop {
            let failed = next();
            if failed >= interval + stall {
                wall += interval + stall;
                break;
            }
            wall += failed;
            // A recovery is tried until none hits it, either.
            loop {
                let hit = next();
                wall += hit.min(down);
                if hit >= down {
                    break;
                }
            }
        }
    }
    let mut job = job(8, stall, 0.0, 1.0, 8);
    job.failures.per_day = Spread::exact(per_s * 86_400.0);
    job.failures.planned_per_day = Spread::exact(0.0);
    job.failures.detect_s = Spread::exact(100.0);
    job.failures.restart_s = Spread::exact(140.0);
    job.read_s = Spread::exact(60.0);
    job.save.stall_s = Spread::exact(stall);
    job.evaluation = Spread::exact(0.0);
    job.interval_s = Some(interval);
    let ours = job.goodput(Recovery::Restart).unwrap().goodput.value;
    let drawn = segments as f64 * interval / wall;
    assert!((ours / drawn - 1.0).abs() < 0.003, "{ours} {drawn}");
}

#[test]
fn poisson_intervals_are_those_of_tables() {
    // Garwood's exact intervals.
    for (events, low, high) in
        [(1.0, 0.0253, 5.572), (10.0, 4.795, 18.39), (21.0, 13.0, 32.1), (100.0, 81.36, 121.6)]
    {
        let s = poisson(events);
        assert!((s.low - low).abs() < 0.15 && (s.high - high).abs() < 0.15, "{events}: {s:?}");
    }
}

#[test]
fn elastic_recovery_needs_somebody_to_go_on() {
    assert!(job(64, 1.0, 10.0, 1.0, 1).goodput(Recovery::Elastic).is_none());
    assert!(job(64, 1.0, 10.0, 1.0, 2).goodput(Recovery::Elastic).is_some());
}
