//! Why a way was chosen, and why the others were not.

use super::{Assumptions, BreakEven, Priced, Rejected, Way};

pub(super) fn reasons(all: &Assumptions, options: &[Priced], break_even: &[BreakEven]) -> Vec<String> {
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
        let (a, b) = (best.cost.total, next.cost.total);
        if a.high > b.low {
            out.push("their ranges overlap: what would change it is below".to_owned());
        }
    }
    if !all.data_may_leave {
        out.push("data may not leave: machines of others are excluded, whatever they cost".to_owned());
        if let Some(month) = best.move_month.filter(|m| *m > 0) {
            out.push(format!("nothing can be computed before month {month}, when the machines work"));
        }
    }
    if best.way == Way::CloudFirst
        && let (Some(order), Some(month)) = (best.order_month, best.move_month)
    {
        out.push(format!("rent first, order in month {order}, move in month {month}"));
    }
    out.extend(use_of_own(options, break_even));
    out
}

/// What machines of one's own would work, and from where on they pay against the cheapest rent.
fn use_of_own(options: &[Priced], break_even: &[BreakEven]) -> Option<String> {
    let build = options.iter().find(|o| o.way == Way::Build)?;
    let rent = options.iter().find(|o| !o.way.owns())?;
    let against = break_even.iter().find(|b| b.against == rent.way)?;
    let (works, pays) = (build.utilisation?, against.over_profile?.value);
    Some(format!(
        "machines bought now would work {} of the time once they are there; over these months they pay against {} {}, \
         and {} if they ran for good",
        percent(works),
        rent.way.name(),
        from(pays),
        from(against.utilisation.value)
    ))
}

fn from(share: f64) -> String {
    if share > 1.0 { "at no utilisation".to_owned() } else { format!("from {}", percent(share)) }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

pub(super) fn rejected(options: &[Priced], not_possible: Vec<Rejected>) -> Vec<Rejected> {
    let best = options[0].cost.total.value;
    let dearer = options[1..].iter().map(|o| Rejected {
        way: o.way,
        why: format!("{} more: {}", o.cost.total.value - best, o.cost.total.value),
    });
    dearer.chain(not_possible).collect()
}
