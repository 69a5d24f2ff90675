//! Prices that people give.

use spec::{Catalog, Cluster, Error, Result};

use super::{Ask, Commitment, Quote, quotes, rented};
use crate::input::{self, Bounds};
use crate::{Date, Spread};

/// What `--price` says.
#[derive(Clone, Debug, PartialEq)]
pub enum Given {
    /// An amount: `2.5`, or `98.32/node`.
    Amount {
        /// US dollars an hour, as given.
        usd_per_h: f64,
        /// Of a node instead of an accelerator.
        node: bool,
    },
    /// A price entry of the catalogue or of the user's file.
    Entry(String),
}

const HOW: &str =
    "write --price 2.5 for an accelerator, --price 98.32/node for a node, or the name of a price";

/// Nobody writes a price with more digits.
const NUMBER_BYTES_MAX: usize = 32;

impl Given {
    /// Reads `2.5`, `$2.5/h`, `98.32/node`, or a name.
    ///
    /// ```
    /// use economics::price::Given;
    /// assert_eq!(Given::parse("98.32/node")?, Given::Amount { usd_per_h: 98.32, node: true });
    /// assert_eq!(Given::parse("$2.5/h")?, Given::Amount { usd_per_h: 2.5, node: false });
    /// assert_eq!(Given::parse("aws-p5")?, Given::Entry("aws-p5".to_owned()));
    /// assert!(Given::parse("2.5 EUR").is_err());
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// An amount that is none, in another currency, or for another unit than accelerator or node.
    pub fn parse(text: &str) -> Result<Self> {
        let tidy = text.trim();
        let bare = tidy.strip_prefix('$').unwrap_or(tidy);
        let special = ["nan", "inf", "infinity"].contains(&bare.to_lowercase().as_str());
        let bad = || Error::user(format!("--price {text}, expected US dollars an hour")).hint(HOW);
        if bare.starts_with(|c: char| c.is_alphabetic()) && bare == tidy && !special {
            return Ok(Given::Entry(tidy.to_owned()));
        }
        // The longest beginning that is a number; what follows is its unit.
        let mut ends = (1..=bare.len().min(NUMBER_BYTES_MAX)).rev().filter(|end| bare.is_char_boundary(*end));
        let split = |end: usize| Some((bare[..end].parse::<f64>().ok()?, &bare[end..]));
        let (usd_per_h, rest) = ends.find_map(split).ok_or_else(bad)?;
        input::number("--price", usd_per_h, Bounds::Positive).map_err(|_| bad())?;
        let words: Vec<String> = rest
            .split(['/', ' '])
            .map(|w| w.trim().to_lowercase())
            .filter(|w| !w.is_empty() && w != "per")
            .collect();
        let mut node = false;
        for word in &words {
            match word.as_str() {
                "h" | "hour" | "usd" | "accelerator" | "gpu" | "tpu" | "chip" => {}
                "node" | "server" | "machine" => node = true,
                "eur" | "gbp" | "cny" | "rmb" | "jpy" | "inr" | "chf" | "€" | "£" | "¥" => {
                    return Err(Error::user(format!("--price {text}: prices are in US dollars, not {word}"))
                        .hint("convert it, at the rate of the day of the quote"));
                }
                _ => {
                    let what = format!("--price {text}: unknown unit \"{word}\"");
                    return Err(Error::user(what).hint(HOW));
                }
            }
        }
        Ok(Given::Amount { usd_per_h, node })
    }
}

/// Names of the price entries that a file of the user's defines; the catalogue reads and checks them.
pub fn names_in(text: &str) -> Vec<String> {
    let table: toml::Table = text.parse().unwrap_or_default();
    let prices = table.get("price").and_then(|p| p.as_table());
    prices.map(|p| p.keys().cloned().collect()).unwrap_or_default()
}

/// Above the dearest and below the cheapest published rent by this much, another unit is meant.
const FAR: f64 = 4.0;

pub(super) fn amount(
    catalog: &Catalog,
    cluster: &Cluster,
    usd_per_h: f64,
    node: bool,
    ask: &Ask,
    today: Date,
) -> Result<Quote> {
    let per = if node { cluster.per_node.max(1) } else { 1 };
    let each = usd_per_h / per as f64;
    let name = &cluster.accelerator.name;
    let mut known = Vec::new();
    for entry in rented(catalog, name) {
        known.extend(quotes(entry)?.into_iter().map(|q| q.usd_per_accelerator_h));
    }
    let low = known.iter().map(|s| s.low).fold(f64::INFINITY, f64::min);
    let high = known.iter().map(|s| s.high).fold(0.0, f64::max);
    if !known.is_empty() && (each > high * FAR || each < low / FAR) {
        let what = format!(
            "--price {usd_per_h}{}: ${each:.2} an hour for a {name}, whose published rents are ${low:.2} to ${high:.2}",
            if node { "/node" } else { "" }
        );
        let other = if node { format!("--price {usd_per_h}") } else { format!("--price {usd_per_h}/node") };
        return Err(Error::user(what).hint(format!(
            "if it is the price of {}, write {other}; else put it into a file with its source",
            if node { "one accelerator" } else { "a node" }
        )));
    }
    Ok(Quote {
        name: "given".to_owned(),
        provider: None,
        accelerator: name.clone(),
        commitment: ask.commitment.unwrap_or(Commitment::OnDemand),
        usd_per_accelerator_h: Spread::exact(each),
        billed_in: per,
        currency: "USD",
        region: ask.region.clone(),
        date: today,
        source: "given".to_owned(),
        interruptions_per_node_h: None,
        notes: Vec::new(),
    })
}
