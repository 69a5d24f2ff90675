//! Build or rent: compute, privacy, utilisation over months, cost of ownership, and when to move, as one decision.
//!
//! Money is of today: what is paid later is discounted by the cost of capital.

mod assumptions;
mod cash;

use serde::Serialize;
use spec::{Error, Result};

use assumptions::KEYS;
pub use assumptions::{Assumptions, Key, Number, Phase, check_demand, profile};
use cash::{End, Fixed, Parts, total};

use crate::own::break_even;
use crate::{Bill, HOURS_PER_MONTH, HOURS_PER_YEAR, Spread};

/// The utilisation below which the guide calls the cloud "almost always cheaper".
pub const GUIDE_BREAK_EVEN: f64 = 0.7;
/// By how much the demand may be misjudged: a choice, for the tornado.
const DEMAND_RANGE: [f64; 2] = [0.5, 1.5];

/// A way to get the compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Rent by the hour.
    OnDemand,
    /// Reserve for a year at a time, and rent peaks by the hour.
    #[serde(rename = "reserved-1y")]
    Reserved1y,
    /// Reserve for three years at a time, and rent peaks by the hour.
    #[serde(rename = "reserved-3y")]
    Reserved3y,
    /// Rent what others leave, and lose it at times.
    Spot,
    /// Buy now.
    Build,
    /// Rent first, and buy later.
    CloudFirst,
}

impl Way {
    /// As in answers.
    pub fn name(self) -> &'static str {
        match self {
            Way::OnDemand => "on-demand",
            Way::Reserved1y => "reserved-1y",
            Way::Reserved3y => "reserved-3y",
            Way::Spot => "spot",
            Way::Build => "build",
            Way::CloudFirst => "cloud-first",
        }
    }

    fn owns(self) -> bool {
        matches!(self, Way::Build | Way::CloudFirst)
    }
}

/// One way with its money.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Priced {
    /// Which way.
    pub way: Way,
    /// Dollars of today over the whole profile, by part; each end takes all assumptions at their cheaper or dearer end.
    pub cost: Bill,
    /// Accelerators bought, for the ways that buy.
    pub accelerators: Option<usize>,
    /// Month of the order, from 0.
    pub order_month: Option<usize>,
    /// Month from which the machines work.
    pub move_month: Option<usize>,
    /// Share of the time that the machines work from then on.
    pub utilisation: Option<f64>,
}

/// A way that was not chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Rejected {
    /// Which way.
    pub way: Way,
    /// Why.
    pub why: String,
}

/// From which utilisation owning pays against a rent.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BreakEven {
    /// The rent.
    pub against: Way,
    /// Dollars for an hour of an accelerator.
    pub usd_per_h: Spread,
    /// Share of the time; above 1 owning never pays. `null` in JSON where the rent is below the power alone.
    pub utilisation: Spread,
}

/// What one assumption moves.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// Which assumption.
    pub assumption: String,
    /// Its low end.
    pub low: f64,
    /// Its high end.
    pub high: f64,
    /// Dollars by which owning is dearer than renting at the low end; negative where it is cheaper.
    pub own_less_rent_at_low: f64,
    /// The same at the high end.
    pub own_less_rent_at_high: f64,
    /// What would be chosen at the low end.
    pub choice_at_low: Way,
    /// What would be chosen at the high end.
    pub choice_at_high: Way,
}

impl Bar {
    /// Dollars between its ends.
    pub fn swing(&self) -> f64 {
        (self.own_less_rent_at_high - self.own_less_rent_at_low).abs()
    }
}

/// A decision with its reasons.
#[derive(Clone, Debug, Serialize)]
pub struct Decision {
    /// What to do.
    pub choice: Way,
    /// Why.
    pub reasons: Vec<String>,
    /// What was not chosen, and why.
    pub rejected: Vec<Rejected>,
    /// All ways that are possible, the cheapest first.
    pub options: Vec<Priced>,
    /// The month from which one's own machines work, if they are bought at all.
    pub move_month: Option<usize>,
    /// Accelerator-hours of the profile.
    pub accelerator_hours: f64,
    /// Break-even utilisation against each rent.
    pub break_even: Vec<BreakEven>,
    /// The guide's figure, beside it.
    pub guide_break_even: f64,
    /// What would change the decision, the most important first.
    pub tornado: Vec<Bar>,
    /// What it rests on.
    pub assumptions: Assumptions,
}

/// Decides.
///
/// # Errors
/// If nothing is possible: data may not leave, and the machines would come after the last month of the profile.
pub fn decide(assumptions: Assumptions) -> Result<Decision> {
    let value = Fixed::at(&assumptions, End::Value);
    let mut options: Vec<Priced> = ways(&value).into_iter().map(|plan| priced(&assumptions, &plan)).collect();
    options.sort_by_key(|p| p.cost.total.value);
    let Some(best) = options.first().cloned() else {
        let lead = assumptions.number(Key::LeadMonths).value;
        let what = format!(
            "nothing is possible: data may not leave, and machines come after {lead} months, the profile has {}",
            assumptions.months()
        );
        return Err(
            Error::user(what).hint("look further ahead, or allow machines of others: data_may_leave = true")
        );
    };
    let break_even = break_evens(&assumptions);
    let reasons = reasons(&assumptions, &options, &break_even);
    let rejected = rejected(&assumptions, &value, &options);
    let hours: f64 = assumptions.wanted().iter().map(|(n, share)| n * share * HOURS_PER_MONTH).sum();
    Ok(Decision {
        choice: best.way,
        reasons,
        rejected,
        move_month: best.move_month,
        options,
        accelerator_hours: hours,
        break_even,
        guide_break_even: GUIDE_BREAK_EVEN,
        tornado: tornado(&assumptions, &value),
        assumptions,
    })
}

/// A way as it would be gone: when to order, and for how many.
#[derive(Clone, Copy, Debug)]
struct Plan {
    way: Way,
    order: usize,
    accelerators: f64,
}

/// The ways that are possible, each at its best.
fn ways(at: &Fixed) -> Vec<Plan> {
    let rented = |way| Plan { way, order: 0, accelerators: 0.0 };
    let mut all = Vec::new();
    let mut orders = 0..1;
    if at.data_may_leave {
        all.push(rented(Way::OnDemand));
        for (key, way) in [
            (Key::Reserved1yUsdPerH, Way::Reserved1y),
            (Key::Reserved3yUsdPerH, Way::Reserved3y),
            (Key::SpotUsdPerH, Way::Spot),
        ] {
            if at.has(key) {
                all.push(rented(way));
            }
        }
        orders = 1..at.months();
    }
    let own = |way, found: Option<(usize, f64, f64)>| {
        found.map(|(order, n, _)| Plan { way, order, accelerators: n })
    };
    if at.lead_months() < at.months() {
        all.extend(own(Way::Build, at.best_own(0..1)));
        if at.data_may_leave {
            let last = at.months() - at.lead_months();
            all.extend(own(Way::CloudFirst, at.best_own(orders.start..orders.end.min(last))));
        }
    }
    all
}

/// Dollars of today of a way.
fn cash(at: &Fixed, plan: &Plan) -> Parts {
    match plan.way {
        Way::OnDemand => at.hourly(Key::OnDemandUsdPerH, 1.0),
        Way::Reserved1y => at.reserved(Key::Reserved1yUsdPerH, 12),
        Way::Reserved3y => at.reserved(Key::Reserved3yUsdPerH, 36),
        Way::Spot => at.spot(),
        Way::Build | Way::CloudFirst => at.own(plan.order, plan.accelerators),
    }
}

fn priced(assumptions: &Assumptions, plan: &Plan) -> Priced {
    let at = |end| cash(&Fixed::at(assumptions, end), plan);
    let (value, cheap, dear) = (at(End::Value), at(End::Cheap), at(End::Dear));
    let parts = (0..value.len()).filter(|i| value[*i].1 != 0.0 || dear[*i].1 != 0.0);
    let cost = Bill::of(parts.map(|i| {
        let (low, value, high) = (cheap[i].1, value[i], dear[i].1);
        (value.0, Spread { low: low.min(value.1), value: value.1, high: high.max(value.1) })
    }));
    let fixed = Fixed::at(assumptions, End::Value);
    let owns = plan.way.owns();
    let from = plan.order + fixed.lead_months();
    let used = || {
        let months = from.min(fixed.months())..fixed.months();
        let mean = plan.accelerators * months.len().max(1) as f64;
        months.map(|m| fixed.at_work(m, plan.accelerators)).sum::<f64>() / mean
    };
    Priced {
        way: plan.way,
        cost,
        accelerators: owns.then_some(plan.accelerators as usize),
        order_month: owns.then_some(plan.order),
        move_month: owns.then_some(from),
        utilisation: owns.then(used),
    }
}

fn break_evens(all: &Assumptions) -> Vec<BreakEven> {
    let at = |end: End, rent: f64| {
        let fixed = Fixed::at(all, end);
        let (idle, busy) = (fixed.yearly_usd(0.0), fixed.yearly_usd(1.0));
        break_even(idle, (busy - idle) / HOURS_PER_YEAR, 1, rent)
    };
    let rents = [
        (Way::OnDemand, Key::OnDemandUsdPerH),
        (Way::Reserved1y, Key::Reserved1yUsdPerH),
        (Way::Reserved3y, Key::Reserved3yUsdPerH),
        (Way::Spot, Key::SpotUsdPerH),
    ];
    let known = rents.into_iter().filter(|(_, key)| all.numbers.contains_key(key));
    known
        .map(|(against, key)| {
            let usd_per_h = all.number(key);
            let utilisation = Spread::new(
                at(End::Cheap, usd_per_h.high),
                at(End::Value, usd_per_h.value),
                at(End::Dear, usd_per_h.low),
            );
            BreakEven { against, usd_per_h, utilisation }
        })
        .collect()
}

fn reasons(all: &Assumptions, options: &[Priced], break_even: &[BreakEven]) -> Vec<String> {
    let best = &options[0];
    let mut out = vec![format!(
        "{} costs {} over {} months, in money of today",
        best.way.name(),
        best.cost.total,
        all.months()
    )];
    if let Some(next) = options.get(1) {
        let less = next.cost.total.value - best.cost.total.value;
        out.push(format!("{less} less than {}, the next", next.way.name()));
    }
    if !all.data_may_leave {
        out.push("data may not leave: machines of others are excluded, whatever they cost".to_owned());
        if let Some(month) = best.move_month.filter(|m| *m > 0) {
            out.push(format!("nothing can be computed before month {month}, when the machines work"));
        }
    }
    if let (Some(u), Some(against)) = (best.utilisation, break_even.first()) {
        out.push(format!(
            "the machines work {:.0} % of the time; against {} owning pays from {}",
            100.0 * u,
            against.against.name(),
            percent(against.utilisation.value)
        ));
    }
    if best.way == Way::CloudFirst
        && let (Some(order), Some(month)) = (best.order_month, best.move_month)
    {
        out.push(format!("rent first, order in month {order}, move in month {month}"));
    }
    if !best.way.owns()
        && let Some(b) = break_even.first()
    {
        let most = options.iter().find_map(|o| o.utilisation).unwrap_or(0.0);
        out.push(format!(
            "machines of one's own would work {:.0} % of the time; against {} they pay from {}",
            100.0 * most,
            b.against.name(),
            percent(b.utilisation.value)
        ));
    }
    out
}

fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.0} %", 100.0 * share) } else { "no utilisation".to_owned() }
}

fn rejected(all: &Assumptions, at: &Fixed, options: &[Priced]) -> Vec<Rejected> {
    let best = options[0].cost.total.value;
    let mut out: Vec<Rejected> = options[1..]
        .iter()
        .map(|o| Rejected {
            way: o.way,
            why: format!("{} more: {}", o.cost.total.value - best, o.cost.total.value),
        })
        .collect();
    let rents = [Way::OnDemand, Way::Reserved1y, Way::Reserved3y, Way::Spot, Way::CloudFirst, Way::Build];
    for way in rents.into_iter().filter(|w| options.iter().all(|o| o.way != *w)) {
        let why = if !all.data_may_leave && way != Way::Build {
            "data may not leave one's own machines".to_owned()
        } else if way.owns() {
            format!(
                "machines ordered now work from month {}, after the last of the profile",
                at.lead_months()
            )
        } else {
            format!("no {} price is known", way.name())
        };
        out.push(Rejected { way, why });
    }
    out
}

/// The cheapest way, and by how much the best that owns is dearer than the best that rents.
fn outcome(at: &Fixed) -> Option<(Way, f64)> {
    let all: Vec<(Way, f64)> = ways(at).iter().map(|p| (p.way, total(&cash(at, p)))).collect();
    let least =
        |owns: bool| all.iter().filter(|a| a.0.owns() == owns).map(|a| a.1).fold(f64::INFINITY, f64::min);
    let best = all.iter().min_by(|a, b| a.1.total_cmp(&b.1))?;
    Some((best.0, least(true) - least(false)))
}

fn tornado(all: &Assumptions, value: &Fixed) -> Vec<Bar> {
    let bar = |assumption: &str, low: f64, high: f64, at_low: Fixed, at_high: Fixed| {
        let ((choice_at_low, a), (choice_at_high, b)) = (outcome(&at_low)?, outcome(&at_high)?);
        let sane = |x: f64| if x.is_finite() { x.round() } else { 0.0 };
        Some(Bar {
            assumption: assumption.to_owned(),
            low,
            high,
            own_less_rent_at_low: sane(a),
            own_less_rent_at_high: sane(b),
            choice_at_low,
            choice_at_high,
        })
    };
    let ranged = KEYS.iter().filter(|k| all.number(k.0).low < all.number(k.0).high);
    let mut bars: Vec<Bar> = ranged
        .filter_map(|(key, name, ..)| {
            let s = all.number(*key);
            bar(name, s.low, s.high, value.with(*key, s.low), value.with(*key, s.high))
        })
        .collect();
    let [low, high] = DEMAND_RANGE;
    bars.extend(bar("demand", low, high, value.with_demand(low), value.with_demand(high)));
    bars.sort_by(|a, b| b.swing().total_cmp(&a.swing()));
    bars
}
