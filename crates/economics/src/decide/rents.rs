//! The rents that a decision holds against owning, and where they are from.

use spec::{Catalog, Cluster, Error, Result};

use super::Key;
use crate::Date;
use crate::price::{self, Commitment, Quote};

/// The commitments that a decision weighs, each with its number.
const RENTS: [(Commitment, Key); 4] = [
    (Commitment::OnDemand, Key::OnDemandUsdPerH),
    (Commitment::Reserved1y, Key::Reserved1yUsdPerH),
    (Commitment::Reserved3y, Key::Reserved3yUsdPerH),
    (Commitment::Spot, Key::SpotUsdPerH),
];

/// What an hour costs under each commitment: the price given under its own; else what the platform's provider quotes, and
/// nobody else; else, of a platform that nobody rents out, what the same accelerator costs elsewhere. Only the hourly rate
/// must be known.
pub(super) fn rents(
    catalog: &Catalog,
    cluster: &Cluster,
    ask: &price::Ask,
    today: Date,
) -> Result<Vec<(Key, Quote)>> {
    if ask.commitment == Some(Commitment::CapacityBlock) {
        return Err(Error::user(
            "--commitment capacity-block: months of work are not rented in blocks of days",
        )
        .hint("on-demand, reserved-1y, reserved-3y and spot are weighed"));
    }
    let mut found = Vec::new();
    for (commitment, key) in RENTS {
        if let Some(quote) = rent(catalog, cluster, ask, commitment, today)? {
            found.push((key, quote));
        }
    }
    Ok(found)
}

fn rent(
    catalog: &Catalog,
    cluster: &Cluster,
    ask: &price::Ask,
    commitment: Commitment,
    today: Date,
) -> Result<Option<Quote>> {
    let given = ask.price.is_some() && ask.commitment.unwrap_or(Commitment::OnDemand) == commitment;
    let price = ask.price.clone().filter(|_| given);
    // By the hour is what remains where a provider only sells otherwise.
    let hourly = commitment == Commitment::OnDemand;
    let term = Some(commitment).filter(|_| !hourly || given);
    let asked = price::Ask { price, commitment: term, region: ask.region.clone() };
    let quote = price::quote(catalog, cluster, &asked, today);
    if given || hourly {
        return quote.map(Some);
    }
    let also = || price::same_provider(catalog, cluster, commitment).filter(|q| !q.date.is_after(today));
    Ok(quote.ok().or_else(also))
}

/// Where a rent is from and how old it is, in a line.
pub(super) fn source(catalog: &Catalog, quote: &Quote, today: Date) -> Result<String> {
    let who = quote.provider.as_deref().unwrap_or("you");
    let stands_in = if quote.notes.iter().any(|n| n.contains("stands in")) { ", standing in" } else { "" };
    let from = catalog.source(&quote.source).map_or(quote.source.as_str(), |s| s.what.as_str());
    let old = quote.age_note(today)?.map(|_| format!(", {} months old", quote.date.months_until(today)));
    let terms = if quote.commitment == Commitment::CapacityBlock { ", a capacity block" } else { "" };
    Ok(format!(
        "{} of {who}{stands_in}{terms}, {}{}: {from}",
        quote.name,
        quote.date,
        old.unwrap_or_default()
    ))
}
