//! The table of costs.

use spec::{EntryKind, Measure, Result};

use super::{Ask, H100, exact, rent, size};
use crate::facts::{Facts, Found};
use crate::verdict::{Rule, Stated};

pub(crate) const CLAIMS: &[Ask] = &[
    ("an H100 is bought for $30,000 to $40,000", bought),
    ("an H100 is rented for $2 to $4 an hour on demand", on_demand),
    ("1,000 GPUs for 30 days cost $2M to $3M", thousand),
    ("a TPU v5p chip is rented for about $4.20 an hour", v5p),
    ("an AWS p5.48xlarge is rented for about $98 an hour", p5),
    ("it costs about $43 an hour reserved for a year", p5_reserved),
    ("CoreWeave reserves an H100 for about $2.50 an hour", coreweave),
    ("128 GPUs there for 30 days cost about $230,000", small_cluster),
];

const HOURS_OF_30_DAYS: f64 = 30.0 * 24.0;
const NODE: f64 = 8.0;

fn bought(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::Within(30_000.0, 40_000.0);
    let mut price = |name| f.number(EntryKind::Price, name, "purchase");
    let (now, then) = (price("buy-h100")?, price("buy-h100-2023")?);
    Ok(Found::new().reads("in 2025", now, "$", stated).read("2023", "", then, "$", stated))
}

/// Every rental of an H100 in the catalogue.
fn on_demand(f: &mut Facts<'_>) -> Result<Found> {
    let mut offers: Vec<(String, Measure)> = Vec::new();
    for listed in f.catalog.list(Some(EntryKind::Price)) {
        let entry = f.catalog.get(EntryKind::Price, &listed.name)?;
        let is_rental = entry.text("accelerator") == Some(H100) && entry.number("on_demand").is_some();
        // What was replaced since is another claim's business.
        if is_rental && listed.name != "aws-p5-2024" {
            offers.push((listed.name.clone(), rent(f, &listed.name, "on_demand")?));
        }
    }
    offers.sort_by(|a, b| a.1.value.total_cmp(&b.1.value));
    let found = offers.into_iter().fold(Found::new(), |found, (name, price)| {
        found.reads(format!("({name})"), price, "$/h", Stated::Within(2.0, 4.0))
    });
    Ok(found.note("true of clouds for GPUs alone, not of the three large ones"))
}

fn thousand(f: &mut Facts<'_>) -> Result<Found> {
    f.arithmetic();
    let cost = |rent: f64| 1000.0 * HOURS_OF_30_DAYS * rent;
    let range = Measure { value: cost(3.0), low: cost(2.0), high: cost(4.0) };
    Ok(Found::new().reads("at $2 to $4 an hour", range, "$", Stated::Range(2e6, 3e6)))
}

fn v5p(f: &mut Facts<'_>) -> Result<Found> {
    let price = rent(f, "gcp-tpu-v5p", "on_demand")?;
    let spot = rent(f, "gcp-tpu-v5p", "spot")?;
    let chips = f.number(EntryKind::Platform, "tpu-v5p-pod", "accelerators")?.value;
    f.arithmetic();
    Ok(Found::new().reads("on demand", price, "$/h", Stated::About(4.2)).shows("spot", spot, "$/h").shows(
        "for a whole pod",
        price.scaled(chips),
        "$/h",
    ))
}

fn p5(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::About(98.0);
    let now = rent(f, "aws-p5", "on_demand")?.scaled(NODE);
    let then = rent(f, "aws-p5-2024", "on_demand")?.scaled(NODE);
    f.arithmetic();
    Ok(Found::new().reads("now", now, "$/h", stated).read("2025-06", "", then, "$/h", stated))
}

fn p5_reserved(f: &mut Facts<'_>) -> Result<Found> {
    let one = rent(f, "aws-p5-2024", "reserved_1y")?.scaled(NODE);
    let three = rent(f, "aws-p5-2024", "reserved_3y")?.scaled(NODE);
    f.arithmetic();
    Ok(Found::new()
        .reads("for one year, before the cut of 2025-06", one, "$/h", Stated::About(43.0))
        .shows("for three years", three, "$/h")
        .note("the price of three years, not of one"))
}

fn coreweave(f: &mut Facts<'_>) -> Result<Found> {
    let reserved = rent(f, "coreweave-h100", "reserved_3y")?;
    Ok(Found::by(Rule::Undisclosed)
        .shows("as reported for several years", reserved, "$/h")
        .shows("H100 assumed in its largest cluster", exact(size(f, "coreweave-h100")?), "GPUs")
        .note("plausible; contracts are not public"))
}

fn small_cluster(f: &mut Facts<'_>) -> Result<Found> {
    f.arithmetic();
    let cost = 128.0 * HOURS_OF_30_DAYS * 2.5;
    Ok(Found::new().reads("at $2.50 an hour", exact(cost), "$", Stated::About(230_000.0)))
}
