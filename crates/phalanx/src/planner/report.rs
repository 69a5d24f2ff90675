//! A plan as a page.

use economics::Date;
use economics::own::{Ownership, TYPICAL};
use economics::run::{Ask, Run};
use economics::{energy, price};
use plan::answer::Answer;
use plan::calibration::Calibration;
use report::{Report, plan_page, scales};
use serde_json::{Value, json};
use spec::{Catalog, Result};

/// The page of an answer: with the run where one was asked for, and owning against renting where both are known.
pub(super) fn page(
    catalog: &Catalog,
    calibration: &Calibration,
    answer: &Answer,
    mut json: Value,
    (ask, run): (Option<&Ask>, Option<&Run>),
    today: Date,
) -> Result<String> {
    // A layout that was given is for its own size.
    let sizes = if answer.given { Vec::new() } else { scales(catalog, &answer.question, calibration, ask) };
    json["sizes"] = json!(sizes);
    let cluster = &answer.question.cluster;
    let asked = ask.map(|a| a.price.clone()).unwrap_or_default();
    let own = Ownership::of(catalog, cluster, TYPICAL, energy::GRID_USUAL).ok();
    let rent = price::quote(catalog, cluster, &asked, today).ok();
    if let (Some(own), Some(rent)) = (&own, &rent) {
        json["break_even"] = json!(own.break_even(rent.usd_per_accelerator_h));
    }
    let owned = own.as_ref().zip(rent.as_ref());
    plan_page(&Report { answer, json: &json, run, sizes: &sizes, owned, catalog, today })
}
