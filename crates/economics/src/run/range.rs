//! Why the range of a run is as wide as it is.

use plan::answer::Choice;
use plan::calibration::{Evidence, Grade};

use super::Run;
use super::cost::Basis;
use crate::Spread;

/// By how much one uncertain thing moves a result up, as a factor.
struct Cause {
    factor: f64,
    why: String,
}

/// What the ranges of days and dollars come from, the largest first, in sentences.
pub(super) fn reasons(run: &Run, best: &Choice, grade: &Grade) -> Vec<String> {
    let mut days = vec![step(best, grade), goodput(run)];
    days.sort_by(|a, b| b.factor.total_cmp(&a.factor));
    let mut out: Vec<String> = days.into_iter().map(|c| c.why).collect();
    if let Some(cause) = rate(run) {
        let wide = run.wall_days_range.high / run.wall_days_range.value;
        let first = if cause.factor > wide {
            "the dollars' range is mostly that of the price"
        } else {
            "the dollars' range is mostly that of the days"
        };
        out.push(format!("{first}: {}", cause.why));
    }
    out
}

fn step(best: &Choice, grade: &Grade) -> Cause {
    let evidence = match grade.evidence {
        Evidence::Validated => "published runs like it were predicted that well",
        Evidence::OtherPace => "published runs like it have another bottleneck",
        Evidence::Family => "published runs of this accelerator are of other stacks",
        Evidence::Software => "published runs of this stack are on other accelerators",
        Evidence::Extrapolated => "no published run is near",
    };
    let size = match grade.accelerators {
        0 => String::new(),
        n => format!(", up to {n} accelerators"),
    };
    let factor = best.step_high_s / best.step_s;
    Cause { factor, why: format!("a step may take {factor:.2} times as long or as short: {evidence}{size}") }
}

fn goodput(run: &Run) -> Cause {
    let g = run.goodput_range;
    let f = &run.failures;
    let between = f.between_h;
    // Time between failures against what each takes says whether anything is left.
    let down_h = |s: fn(&Spread) -> f64| (s(&f.detect_s) + s(&f.restart_s)) / 3600.0;
    Cause {
        factor: g.value / g.low.max(f64::MIN_POSITIVE),
        why: format!(
            "{:.0} to {:.0} % of the time are useful: published machines of this size fail every {:.2} to {:.2} h, and each \
             failure stops {} accelerators for {:.2} to {:.2} h",
            100.0 * g.low,
            100.0 * g.high,
            between.low,
            between.high,
            f.accelerators,
            down_h(|s| s.low),
            down_h(|s| s.high)
        ),
    }
}

fn rate(run: &Run) -> Option<Cause> {
    let (what, usd) = match run.basis.as_ref()? {
        Basis::Rent(quote) => ("rent", quote.usd_per_accelerator_h),
        Basis::Own(owned) => ("owning", owned.usd_per_accelerator_h),
    };
    let why = if usd.low == usd.high {
        format!("{what} of ${:.2} an accelerator-hour has no range", usd.value)
    } else {
        format!("{what} takes ${:.2} to ${:.2} for an accelerator-hour", usd.low, usd.high)
    };
    Some(Cause { factor: usd.high / usd.value, why })
}
