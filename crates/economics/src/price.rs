//! What an hour of an accelerator costs to rent, with date, source, currency, region and commitment.

mod given;

use serde::Serialize;
use spec::catalog::{Entry, Quantity};
use spec::{Catalog, Cluster, EntryKind, Error, Result};

pub use given::{Given, names_in};

use crate::{Date, Spread};

/// Older prices are said to be old: lists change by a third or more within a year (AWS p5 in 2025-06: -44 %).
const OLD_MONTHS: u32 = 6;

/// For how long one binds oneself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Commitment {
    /// By the hour.
    OnDemand,
    /// For a year, used or not.
    #[serde(rename = "reserved-1y")]
    Reserved1y,
    /// For three years, used or not.
    #[serde(rename = "reserved-3y")]
    Reserved3y,
    /// By the hour, taken back when others pay more.
    Spot,
    /// A block of days booked ahead.
    CapacityBlock,
}

impl Commitment {
    /// All of them.
    pub const ALL: [Commitment; 5] = [
        Commitment::OnDemand,
        Commitment::Reserved1y,
        Commitment::Reserved3y,
        Commitment::Spot,
        Commitment::CapacityBlock,
    ];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Commitment::OnDemand => "on-demand",
            Commitment::Reserved1y => "reserved-1y",
            Commitment::Reserved3y => "reserved-3y",
            Commitment::Spot => "spot",
            Commitment::CapacityBlock => "capacity-block",
        }
    }

    /// The one of that name; `1y` and `3y` are the reserved ones.
    ///
    /// # Errors
    /// Another name, with those that there are.
    pub fn parse(name: &str) -> Result<Self> {
        let tidy = name.trim().to_lowercase().replace(['_', ' '], "-");
        let tidy = match tidy.as_str() {
            "1y" | "1yr" | "reserved" => "reserved-1y",
            "3y" | "3yr" => "reserved-3y",
            "ondemand" => "on-demand",
            other => other,
        };
        Commitment::ALL.into_iter().find(|c| c.name() == tidy).ok_or_else(|| {
            let known: Vec<&str> = Commitment::ALL.iter().map(|c| c.name()).collect();
            Error::user(format!("unknown commitment \"{name}\"")).hint(format!("one of {}", known.join(", ")))
        })
    }

    fn key(self) -> &'static str {
        match self {
            Commitment::OnDemand => "on_demand",
            Commitment::Reserved1y => "reserved_1y",
            Commitment::Reserved3y => "reserved_3y",
            Commitment::Spot => "spot",
            Commitment::CapacityBlock => "capacity_block",
        }
    }

    /// Months that are paid whether used or not.
    pub fn months(self) -> usize {
        match self {
            Commitment::Reserved1y => 12,
            Commitment::Reserved3y => 36,
            _ => 0,
        }
    }
}

/// A price for renting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Quote {
    /// The catalogue's price entry, or `given`.
    pub name: String,
    /// Who rents it out, if known.
    pub provider: Option<String>,
    /// What is rented.
    pub accelerator: String,
    /// For how long.
    pub commitment: Commitment,
    /// US dollars for an hour of one accelerator.
    pub usd_per_accelerator_h: Spread,
    /// Accelerators of the nodes that are billed whole; 1 where single ones are.
    pub billed_in: usize,
    /// Always `USD`: the catalogue refuses others.
    pub currency: &'static str,
    /// Where it is valid, if said.
    pub region: Option<String>,
    /// When it was valid.
    pub date: Date,
    /// Where it was read.
    pub source: String,
    /// How often a node is taken back, in events an hour; for spot.
    pub interruptions_per_node_h: Option<Spread>,
    /// What else to know of it.
    pub notes: Vec<String>,
}

impl Quote {
    /// Accelerators billed for a job of so many: whole nodes where nodes are rented.
    pub fn billed(&self, accelerators: usize) -> usize {
        accelerators.next_multiple_of(self.billed_in.max(1))
    }

    /// Dollars for `hours` of a job of so many accelerators.
    pub fn usd(&self, accelerators: usize, hours: Spread) -> Spread {
        self.usd_per_accelerator_h.times(hours).scaled(self.billed(accelerators) as f64)
    }

    /// What to say of its age today, if it is old.
    ///
    /// # Errors
    /// If it is dated after today.
    pub fn age_note(&self, today: Date) -> Result<Option<String>> {
        if self.date.is_after(today) {
            let what = format!("price {}: its date {} lies after today, {today}", self.name, self.date);
            return Err(Error::user(what).hint("the date is of reading the price, not of its end"));
        }
        let months = self.date.months_until(today);
        Ok((months > OLD_MONTHS)
            .then(|| format!("the price is of {}: {months} months old, lists have changed since", self.date)))
    }
}

/// What to pay by.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// A price of one's own, or the name of a price entry.
    pub price: Option<Given>,
    /// For how long; on demand if `None`, or what there is.
    pub commitment: Option<Commitment>,
    /// Where; anywhere if `None`.
    pub region: Option<String>,
}

/// The price to pay on `cluster`: the one given, else that of the platform, else that of the same accelerator elsewhere
/// (the dearest and the cheapest as the range, and the middle one as the value).
///
/// A region that some price of the accelerator names chooses among prices; any other is one of electricity alone, which a
/// note says.
///
/// # Errors
/// A price for another accelerator, node or region, one that cannot be meant, a commitment that nobody quotes, an
/// accelerator that nobody rents out, a date after today.
pub fn quote(catalog: &Catalog, cluster: &Cluster, ask: &Ask, today: Date) -> Result<Quote> {
    let mut quote = match &ask.price {
        Some(Given::Amount { usd_per_h, node }) => {
            given::amount(catalog, cluster, *usd_per_h, *node, ask, today)?
        }
        Some(Given::Entry(name)) => {
            let entry = catalog.get(EntryKind::Price, name)?;
            if let Some(region) = &ask.region {
                same_region(catalog, entry, region)?;
            }
            entry_quote(entry, cluster, ask)?
        }
        None => match &cluster.price {
            Some(name) => {
                let entry = catalog.get(EntryKind::Price, name)?;
                let moved = ask.region.as_deref().is_some_and(|region| {
                    entry.text("region") != Some(region)
                        && rented(catalog, &cluster.accelerator.name)
                            .any(|e| e.text("region") == Some(region))
                });
                if moved { elsewhere(catalog, cluster, ask)? } else { entry_quote(entry, cluster, ask)? }
            }
            None => elsewhere(catalog, cluster, ask)?,
        },
    };
    quote.age_note(today)?;
    if let Some(region) = ask.region.as_deref().filter(|r| quote.region.as_deref() != Some(*r)) {
        let of = quote.region.as_ref().map_or("of no region".to_owned(), |r| format!("of {r}"));
        quote.notes.push(format!("region {region} is that of the electricity; price {} is {of}", quote.name));
    }
    Ok(quote)
}

/// A price that is named and a region of prices go together.
fn same_region(catalog: &Catalog, entry: &Entry, region: &str) -> Result<()> {
    let is_of_prices = || {
        let all = catalog.list(Some(EntryKind::Price)).into_iter();
        all.filter_map(|l| catalog.get(EntryKind::Price, &l.name).ok())
            .any(|e| e.text("region") == Some(region))
    };
    match entry.text("region") {
        Some(own) if own != region && is_of_prices() => {
            let what = format!("price {} is of {own}, not of {region}", entry.name);
            Err(Error::user(what).hint("leave --region out, or name a price of that region"))
        }
        _ => Ok(()),
    }
}

/// What the provider that rents `cluster` out quotes for its accelerator beside the platform's own price, the newest
/// first.
pub(crate) fn same_provider(catalog: &Catalog, cluster: &Cluster, commitment: Commitment) -> Option<Quote> {
    let own = catalog.get(EntryKind::Price, cluster.price.as_ref()?).ok()?;
    let provider = own.text("provider")?;
    let entries = rented(catalog, &cluster.accelerator.name).filter(|e| e.text("provider") == Some(provider));
    let quotes = entries.filter_map(|e| quotes(e).ok()).flatten();
    quotes.filter(|q| q.commitment == commitment).max_by_key(|q| q.date)
}

fn entry_quote(entry: &Entry, cluster: &Cluster, ask: &Ask) -> Result<Quote> {
    let of = entry.text("accelerator").unwrap_or_default();
    if of != cluster.accelerator.name {
        let what =
            format!("price {} is for {of}, {} has {}", entry.name, cluster.name, cluster.accelerator.name);
        return Err(Error::user(what).hint("name a price of that accelerator, or give one: --price 2.5"));
    }
    let all = quotes(entry)?;
    let named: Vec<&str> = all.iter().map(|q| q.commitment.name()).collect();
    let missing = |commitment: Commitment| {
        Error::user(format!("price {} has no {} rate", entry.name, commitment.name())).hint(
            match named.is_empty() {
                true => "it is a purchase price: give a rent, --price 2.5".to_owned(),
                false => format!("it has {}", named.join(", ")),
            },
        )
    };
    let wanted = ask.commitment.unwrap_or(Commitment::OnDemand);
    let found = all.iter().find(|q| q.commitment == wanted);
    let found = match (found, ask.commitment) {
        // What is only sold in blocks is bought in blocks.
        (None, None) => all.iter().find(|q| q.commitment != Commitment::Spot),
        (found, _) => found,
    };
    let mut quote = found.cloned().ok_or_else(|| missing(wanted))?;
    if quote.billed_in > 1 && cluster.per_node > 1 && quote.billed_in != cluster.per_node {
        quote.notes.push(format!(
            "billed in nodes of {}, while {} has nodes of {}",
            quote.billed_in, cluster.name, cluster.per_node
        ));
    }
    Ok(quote)
}

/// Prices of the same accelerator at any provider.
fn elsewhere(catalog: &Catalog, cluster: &Cluster, ask: &Ask) -> Result<Quote> {
    let name = &cluster.accelerator.name;
    let mut all = Vec::new();
    for entry in rented(catalog, name) {
        all.extend(quotes(entry)?);
    }
    if all.is_empty() {
        return Err(Error::user(format!("no rent for {name} in the catalogue"))
            .hint("give one: --price 2.5, or --price 98.32/node"));
    }
    let wanted = ask.commitment.unwrap_or(Commitment::OnDemand);
    let has = |q: &Quote| {
        q.commitment == wanted || (ask.commitment.is_none() && q.commitment == Commitment::CapacityBlock)
    };
    let (mut fitting, others): (Vec<Quote>, Vec<Quote>) = all.into_iter().partition(has);
    if let Some(region) = &ask.region
        && fitting.iter().chain(&others).any(|q| q.region.as_ref() == Some(region))
    {
        fitting.retain(|q| q.region.as_ref() == Some(region));
    }
    if fitting.is_empty() {
        let mut known: Vec<&str> = others.iter().map(|q| q.commitment.name()).collect();
        known.sort_unstable();
        known.dedup();
        return Err(Error::user(format!("nobody quotes {name} {}", wanted.name()))
            .hint(format!("quoted are {}; or give a price: --price 2.5", known.join(", "))));
    }
    // What was true until another list replaced it says little of today.
    let newest = fitting.iter().map(|q| q.date).max().unwrap_or(fitting[0].date);
    let recent: Vec<Quote> =
        fitting.iter().filter(|q| q.date.months_until(newest) <= 3 * OLD_MONTHS).cloned().collect();
    let mut by_price = recent;
    by_price.sort_by(|a, b| a.usd_per_accelerator_h.value.total_cmp(&b.usd_per_accelerator_h.value));
    let (low, high) =
        (by_price[0].usd_per_accelerator_h.low, by_price[by_price.len() - 1].usd_per_accelerator_h.high);
    let mut middle = by_price[(by_price.len() - 1) / 2].clone();
    middle.usd_per_accelerator_h = Spread::new(low, middle.usd_per_accelerator_h.value, high);
    let lacks = match (&cluster.price, &ask.region) {
        (Some(own), Some(region)) => format!("{own} is not of {region}"),
        _ => format!("nobody quotes {} itself", cluster.name),
    };
    middle.notes.push(format!(
        "{lacks}: {} stands in, the middle of {} quotes for {name}",
        middle.name,
        by_price.len()
    ));
    Ok(middle)
}

/// Entries that rent out an accelerator.
fn rented<'a>(catalog: &'a Catalog, accelerator: &'a str) -> impl Iterator<Item = &'a Entry> {
    let names = catalog.list(Some(EntryKind::Price)).into_iter();
    names
        .filter_map(|l| catalog.get(EntryKind::Price, &l.name).ok())
        .filter(move |e| e.text("accelerator") == Some(accelerator))
}

/// Every quote of a price entry.
///
/// # Errors
/// A price by the node that does not say of how many accelerators, or a rate of nothing.
pub fn quotes(entry: &Entry) -> Result<Vec<Quote>> {
    let found = Commitment::ALL.into_iter().filter_map(|c| Some((c, entry.number(c.key())?)));
    found.map(|(commitment, rate)| one(entry, commitment, rate)).collect()
}

fn one(entry: &Entry, commitment: Commitment, rate: &Quantity) -> Result<Quote> {
    let path = format!("{}: price.{}.{}", entry.place, entry.name, commitment.key());
    let node = entry.measure("node_accelerators").map(|m| m.value as usize);
    let per = match (rate.unit.as_str(), node) {
        ("USD/node-h", Some(n)) if n > 0 => n,
        ("USD/node-h", _) => {
            return Err(Error::user(format!(
                "{path} is of a node, and price.{} does not say how large",
                entry.name
            ))
            .hint("add node_accelerators, or give the price of an accelerator in USD/h"));
        }
        _ => 1,
    };
    if rate.measure.low <= 0.0 {
        return Err(Error::user(format!("{path} = {}, expected more than 0", rate.written))
            .hint("a price that is not known is left out"));
    }
    Ok(Quote {
        name: entry.name.clone(),
        provider: entry.text("provider").map(str::to_owned),
        accelerator: entry.text("accelerator").unwrap_or_default().to_owned(),
        commitment,
        usd_per_accelerator_h: Spread::from(rate.measure).scaled(1.0 / per as f64),
        billed_in: node.unwrap_or(1).max(1),
        currency: "USD",
        region: entry.text("region").map(str::to_owned),
        date: Date::parse(&rate.date)?,
        source: rate.source.clone(),
        interruptions_per_node_h: (commitment == Commitment::Spot)
            .then(|| entry.measure("spot_interruption").map(Spread::from))
            .flatten(),
        notes: rate.note.iter().cloned().collect(),
    })
}

/// What an accelerator costs to buy, in dollars, if the catalogue knows.
pub fn purchase(catalog: &Catalog, accelerator: &str) -> Option<(Spread, String)> {
    let mut found: Vec<(&Entry, &Quantity)> =
        rented(catalog, accelerator).filter_map(|e| Some((e, e.number("purchase")?))).collect();
    found.sort_by(|a, b| a.1.date.cmp(&b.1.date));
    found
        .last()
        .map(|(e, q)| (Spread::from(q.measure), format!("price.{} ({} {})", e.name, q.source, q.date)))
}
