//! What a decision rests on, as a file that can be edited and run again.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;
use spec::{Catalog, Cluster, Error, Result, suggest};
use toml::Value;

use crate::input::{self, Bounds};
use crate::own::Ownership;
use crate::{Date, Spread, price};

use super::rents;

/// A number that a decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // `KEYS` says what each is.
pub enum Key {
    OnDemandUsdPerH,
    #[serde(rename = "reserved_1y_usd_per_h")]
    Reserved1yUsdPerH,
    #[serde(rename = "reserved_3y_usd_per_h")]
    Reserved3yUsdPerH,
    SpotUsdPerH,
    SpotLost,
    RentChangePerYear,
    ServerUsd,
    ServerChangePerYear,
    NetworkShare,
    StorageShare,
    Spares,
    LifetimeYears,
    Resale,
    CapitalCostPerYear,
    MaintenancePerYear,
    StaffPerYear,
    SpaceUsdPerKwYear,
    RatedW,
    Load,
    IdleLoad,
    Pue,
    ElectricityUsdPerKwh,
    LeadMonths,
}

/// Key, its name in a file, what it is, what it may be, and whether a decision cannot do without.
type Described = (Key, &'static str, &'static str, Bounds, bool);

/// Every key.
pub(crate) const KEYS: [Described; 23] = {
    use Bounds::{Change, FromOne, FromZero, Positive, Share};
    [
        (Key::OnDemandUsdPerH, "on_demand_usd_per_h", "rent of an accelerator by the hour", Positive, true),
        (Key::Reserved1yUsdPerH, "reserved_1y_usd_per_h", "the same, bound for a year", Positive, false),
        (Key::Reserved3yUsdPerH, "reserved_3y_usd_per_h", "the same, bound for three years", Positive, false),
        (Key::SpotUsdPerH, "spot_usd_per_h", "the same, taken back at will", Positive, false),
        (Key::SpotLost, "spot_lost", "share of spot hours lost to being taken back", Share, true),
        (Key::RentChangePerYear, "rent_change_per_year", "change of rents a year", Change, true),
        (Key::ServerUsd, "server_usd", "server of one accelerator", Positive, true),
        (Key::ServerChangePerYear, "server_change_per_year", "change of that price a year", Change, true),
        (Key::NetworkShare, "network_share", "share of the purchase that is network", Share, true),
        (Key::StorageShare, "storage_share", "share of the purchase that is storage", Share, true),
        (Key::Spares, "spares", "further servers that stand by, as a share", Share, true),
        (Key::LifetimeYears, "lifetime_years", "years until all is replaced", Positive, true),
        (Key::Resale, "resale", "share of the purchase that is left then", Share, true),
        (Key::CapitalCostPerYear, "capital_cost_per_year", "cost of capital, which discounts", Share, true),
        (Key::MaintenancePerYear, "maintenance_per_year", "support and parts, of the purchase", Share, true),
        (Key::StaffPerYear, "staff_per_year", "people, of the purchase", Share, true),
        (Key::SpaceUsdPerKwYear, "space_usd_per_kw_year", "rent of the hall", FromZero, true),
        (Key::RatedW, "rated_w", "watts of the server of one accelerator", Positive, true),
        (Key::Load, "load", "share of rated power while training", Share, true),
        (Key::IdleLoad, "idle_load", "share of rated power while idle", Share, true),
        (Key::Pue, "pue", "power of the site over that of its computers", FromOne, true),
        (Key::ElectricityUsdPerKwh, "electricity_usd_per_kwh", "price of a kilowatt-hour", Positive, true),
        (Key::LeadMonths, "lead_months", "months from the order until jobs run", FromZero, true),
    ]
};

impl Key {
    /// As in a file.
    pub fn name(self) -> &'static str {
        KEYS.iter().find(|k| k.0 == self).map_or("", |k| k.1)
    }
}

/// A number with where it is from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Number {
    /// Value and range.
    #[serde(flatten)]
    pub spread: Spread,
    /// Where it is from.
    pub source: String,
}

/// Months of the same demand.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// How many.
    pub months: usize,
    /// Accelerators that jobs want at a time.
    pub accelerators: usize,
    /// Share of the time that they work.
    pub utilisation: f64,
}

/// Everything that a decision rests on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Assumptions {
    /// Machine that is rented or bought.
    pub platform: String,
    /// Its accelerator.
    pub accelerator: String,
    /// Whether the data may be on machines of others.
    pub data_may_leave: bool,
    /// What is to be computed, from now on.
    pub demand: Vec<Phase>,
    /// Prices and rates.
    pub numbers: BTreeMap<Key, Number>,
}

/// More months than anyone plans for.
const MONTHS_MAX: usize = 240;
/// More accelerators than there are.
const ACCELERATORS_MAX: usize = 16_777_216;

impl Assumptions {
    /// What the catalogue says of a machine: its own rents or those of the same accelerator elsewhere, its price, its power.
    ///
    /// # Errors
    /// A machine that nobody rents out or whose price nobody knows, unknown names, an empty profile.
    pub fn of(
        catalog: &Catalog,
        cluster: &Cluster,
        ask: &price::Ask,
        demand: Vec<Phase>,
        today: Date,
    ) -> Result<Self> {
        let grid = crate::run::grid(catalog, ask.region.as_deref());
        let own = Ownership::of(catalog, cluster, crate::own::TYPICAL, grid)?;
        let site = own.site.as_ref().ok_or_else(|| {
            Error::user(format!("nobody says what {} draws", cluster.accelerator.name))
                .hint("give a catalogue file with the power of its node: --catalog FILE.toml")
        })?;
        let typical = "catalogue: ownership.typical";
        let mut numbers = BTreeMap::new();
        let mut put = |key: Key, spread: Spread, source: &str| {
            numbers.insert(key, Number { spread, source: source.to_owned() });
        };
        for (key, quote) in rents::rents(catalog, cluster, ask, today)? {
            put(key, quote.usd_per_accelerator_h, &rents::source(catalog, &quote, today)?);
        }
        put(
            Key::SpotLost,
            Spread::new(0.02, 0.08, 0.3),
            "assumption: checkpoints, restarts, waiting for nodes",
        );
        put(
            Key::RentChangePerYear,
            Spread::new(-0.3, -0.1, 0.0),
            "assumption: lists fall, AWS p5 by 44 % in 2025",
        );
        put(Key::ServerUsd, own.server_usd, &format!("catalogue: {}", own.server_source));
        put(
            Key::ServerChangePerYear,
            Spread::new(-0.28, -0.1, 0.0),
            "assumption; price-performance rises 0.14 decades a year",
        );
        put(Key::NetworkShare, own.network_share, typical);
        put(Key::StorageShare, own.storage_share, typical);
        put(Key::Spares, own.spares, typical);
        put(Key::LifetimeYears, own.lifetime_years, typical);
        put(Key::Resale, own.resale, typical);
        put(Key::CapitalCostPerYear, own.capital_cost, typical);
        put(Key::MaintenancePerYear, own.maintenance, typical);
        put(Key::StaffPerYear, own.staff, typical);
        put(Key::SpaceUsdPerKwYear, own.space_usd_per_kw, typical);
        put(Key::RatedW, site.rated_w, &format!("catalogue: {}", cluster.name));
        put(Key::Load, site.load, typical);
        put(Key::IdleLoad, site.idle_load, typical);
        put(Key::Pue, site.pue, typical);
        put(Key::ElectricityUsdPerKwh, site.grid.usd_per_kwh, &format!("catalogue: grid.{}", site.grid.name));
        put(Key::LeadMonths, own.lead_months, typical);
        let all = Assumptions {
            platform: cluster.name.clone(),
            accelerator: cluster.accelerator.name.clone(),
            data_may_leave: true,
            demand,
            numbers,
        };
        all.check()?;
        Ok(all)
    }

    /// Holds the machine that a file names to the catalogue, which it is only labelled with otherwise.
    ///
    /// # Errors
    /// A platform that is unknown, or an accelerator that it does not have.
    pub fn check_machine(&self, catalog: &Catalog) -> Result<()> {
        let cluster = catalog.cluster(&self.platform, None).map_err(|e| e.context("platform"))?;
        let known = catalog.get(spec::EntryKind::Accelerator, &self.accelerator);
        let known = known.map_err(|e| e.context("accelerator"))?;
        if known.name != cluster.accelerator.name {
            let what = format!(
                "accelerator = \"{}\", while {} has {}",
                self.accelerator, cluster.name, cluster.accelerator.name
            );
            return Err(Error::user(what).hint("name one that the platform has, or another platform"));
        }
        Ok(())
    }

    /// Reads what [`Assumptions::to_toml`] wrote, edited or not. `path` names it in errors.
    ///
    /// # Errors
    /// Text that is no TOML, keys that are unknown or missing, numbers that make no sense, another currency.
    pub fn parse(path: &str, text: &str) -> Result<Self> {
        read(text).map_err(|e| e.context(path))
    }

    fn check(&self) -> Result<()> {
        check_demand(&self.demand)?;
        for (key, name, what, bounds, required) in KEYS {
            match self.numbers.get(&key) {
                Some(number) => {
                    input::spread(name, number.spread, bounds)?;
                }
                None if required => {
                    return Err(Error::user(format!("{name} is missing: {what}"))
                        .hint(format!("add {name} = NUMBER")));
                }
                None => {}
            }
        }
        let shares = self.number(Key::NetworkShare).high + self.number(Key::StorageShare).high;
        if shares >= 1.0 {
            return Err(Error::user(format!(
                "network_share and storage_share reach {shares:.2} of the purchase"
            ))
            .hint("what is left of 1 are the servers"));
        }
        Ok(())
    }

    /// A number; an exact 0 where it is optional and absent.
    pub fn number(&self, key: Key) -> Spread {
        self.numbers.get(&key).map_or(Spread::exact(0.0), |n| n.spread)
    }

    /// Months looked ahead: those of the demand.
    pub fn months(&self) -> usize {
        self.demand.iter().map(|p| p.months).sum()
    }

    /// Accelerators wanted at a time and the share of the time that they work, month by month.
    pub fn wanted(&self) -> Vec<(f64, f64)> {
        let of = |p: &Phase| std::iter::repeat_n((p.accelerators as f64, p.utilisation), p.months);
        self.demand.iter().flat_map(of).collect()
    }

    /// As a file.
    pub fn to_toml(&self) -> String {
        let mut out = String::from(
            "# What a decision to build or to rent rests on. Edit it and decide again: phalanx decide THIS.toml\n\
             # A number is a value, or { value = 1, low = 0.5, high = 2, source = \"...\" }.\n\n",
        );
        // Writing to a string cannot fail.
        let _ = writeln!(out, "currency = \"USD\"");
        let text = |s: &str| Value::String(s.to_owned()).to_string();
        let _ =
            writeln!(out, "platform = {}\naccelerator = {}", text(&self.platform), text(&self.accelerator));
        let _ = writeln!(
            out,
            "data_may_leave = {}  # privacy: false excludes machines of others",
            self.data_may_leave
        );
        for p in &self.demand {
            let _ = writeln!(
                out,
                "\n[[demand]]\nmonths = {}\naccelerators = {}\nutilisation = {}",
                p.months, p.accelerators, p.utilisation
            );
        }
        let _ = writeln!(out, "\n[numbers]");
        for (key, name, what, ..) in KEYS {
            if let Some(n) = self.numbers.get(&key) {
                let s = n.spread;
                let _ = writeln!(
                    out,
                    "# {what}\n{name} = {{ value = {}, low = {}, high = {}, source = {} }}",
                    s.value,
                    s.low,
                    s.high,
                    text(&n.source)
                );
            }
        }
        out
    }
}

/// Holds a profile to sense.
///
/// # Errors
/// An empty profile, months or accelerators of nothing, a utilisation above 1.
pub fn check_demand(demand: &[Phase]) -> Result<()> {
    const HINT: &str = "a profile is months x accelerators @ utilisation: 6x64@0.3,42x512@0.8";
    if demand.is_empty() {
        return Err(Error::user("the profile of demand is empty").hint(HINT));
    }
    let mut months = 0;
    for (i, p) in demand.iter().enumerate() {
        let place = format!("demand {}", i + 1);
        if p.months == 0 {
            return Err(Error::user(format!("{place} lasts 0 months")).hint(HINT));
        }
        months += p.months.min(MONTHS_MAX + 1);
        if !(1..=ACCELERATORS_MAX).contains(&p.accelerators) {
            let what = format!("{place}: {} accelerators, expected 1 to {ACCELERATORS_MAX}", p.accelerators);
            return Err(Error::user(what).hint(HINT));
        }
        input::number(&format!("{place}: utilisation"), p.utilisation, Bounds::Share)?;
    }
    if months > MONTHS_MAX {
        return Err(
            Error::user(format!("a profile of {months} months, expected at most {MONTHS_MAX}")).hint(HINT)
        );
    }
    if demand.iter().all(|p| p.utilisation == 0.0) {
        return Err(Error::user("the profile of demand asks for nothing: every utilisation is 0").hint(HINT));
    }
    Ok(())
}

/// A profile as one writes it: `6x64@0.3,42x512@0.8` are six months of 64 accelerators at 30 %, then 42 of 512 at 80 %.
///
/// ```
/// use economics::decide::profile;
/// let phases = profile("6x64@0.3,42x512@80%")?;
/// assert_eq!((phases[1].months, phases[1].accelerators, phases[1].utilisation), (42, 512, 0.8));
/// assert!(profile("6x64@1.3").is_err() && profile("").is_err());
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// Another text, or a profile that makes no sense.
pub fn profile(text: &str) -> Result<Vec<Phase>> {
    let phase = |part: &str| -> Option<Phase> {
        let (months, rest) = part.trim().split_once('x')?;
        let (accelerators, share) = rest.split_once('@')?;
        let share = share.trim();
        let utilisation = match share.strip_suffix('%') {
            Some(percent) => percent.trim().parse::<f64>().ok()? / 100.0,
            None => share.parse().ok()?,
        };
        Some(Phase {
            months: months.trim().parse().ok()?,
            accelerators: accelerators.trim().parse().ok()?,
            utilisation,
        })
    };
    let parts = text.split(',').filter(|p| !p.trim().is_empty());
    let phases = parts.map(|part| {
        phase(part).ok_or_else(|| {
            Error::user(format!("profile \"{part}\", expected MONTHSxACCELERATORS@UTILISATION"))
                .hint("write it like 6x64@0.3,42x512@0.8")
        })
    });
    let phases: Vec<Phase> = phases.collect::<Result<_>>()?;
    check_demand(&phases)?;
    Ok(phases)
}

fn read(text: &str) -> Result<Assumptions> {
    const HINT: &str = "`phalanx decide --write FILE.toml` writes a whole one to edit";
    spec::guard_toml(text).map_err(|e| Error::user(format!("not TOML: {}", e.why)).hint(HINT))?;
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| Error::user(format!("not TOML: {}", e.message())).hint(HINT))?;
    const TOP: [&str; 6] = ["currency", "platform", "accelerator", "data_may_leave", "demand", "numbers"];
    known(table.keys(), &TOP, "key")?;
    let word = |key: &str| match table.get(key) {
        Some(Value::String(s)) => Ok(s.clone()),
        Some(_) => Err(Error::user(format!("{key} is no text")).hint(HINT)),
        None => Err(Error::user(format!("{key} is missing")).hint(HINT)),
    };
    if let Some(other) = table.get("currency").filter(|v| v.as_str() != Some("USD")) {
        return Err(Error::user(format!("currency = {other}: only USD is computed with"))
            .hint("convert every price, at the rate of its day"));
    }
    let data_may_leave = match table.get("data_may_leave") {
        None => true,
        Some(Value::Boolean(b)) => *b,
        Some(other) => {
            return Err(Error::user(format!("data_may_leave = {other}, expected true or false")).hint(HINT));
        }
    };
    let demand = match table.get("demand") {
        None => Vec::new(),
        Some(Value::Array(all)) => all.iter().map(phase).collect::<Result<_>>()?,
        Some(_) => {
            return Err(Error::user("demand is no list of tables").hint("write [[demand]] for each phase"));
        }
    };
    let empty = toml::Table::new();
    let given = table.get("numbers").map_or(Some(&empty), Value::as_table);
    let given = given.ok_or_else(|| Error::user("numbers is no table").hint("write [numbers]"))?;
    known(given.keys(), &KEYS.map(|k| k.1), "key numbers.")?;
    let mut numbers = BTreeMap::new();
    for (key, name, ..) in KEYS {
        if let Some(value) = given.get(name) {
            numbers.insert(key, number(name, value)?);
        }
    }
    let all = Assumptions {
        platform: word("platform")?,
        accelerator: word("accelerator")?,
        data_may_leave,
        demand,
        numbers,
    };
    all.check()?;
    Ok(all)
}

fn known<'a>(keys: impl Iterator<Item = &'a String>, known: &[&str], what: &str) -> Result<()> {
    for key in keys {
        if !known.contains(&key.as_str()) {
            let sep = if what.ends_with('.') { "" } else { " " };
            return Err(
                Error::user(format!("unknown {what}{sep}{key}")).hint(suggest::hint(key, known.to_vec()))
            );
        }
    }
    Ok(())
}

fn phase(value: &Value) -> Result<Phase> {
    let table = value
        .as_table()
        .ok_or_else(|| Error::user("demand is no list of tables").hint("write [[demand]]"))?;
    known(table.keys(), &["months", "accelerators", "utilisation"], "key demand.")?;
    let count = |key: &str| {
        let found = table.get(key).and_then(Value::as_integer).and_then(|n| usize::try_from(n).ok());
        found.ok_or_else(|| {
            Error::user(format!("demand.{key} is no count"))
                .hint(format!("add {key} = NUMBER to every [[demand]]"))
        })
    };
    let utilisation = table.get("utilisation").and_then(float).ok_or_else(|| {
        Error::user("demand.utilisation is no number").hint("70 % is written utilisation = 0.7")
    })?;
    Ok(Phase { months: count("months")?, accelerators: count("accelerators")?, utilisation })
}

fn float(value: &Value) -> Option<f64> {
    value.as_float().or(value.as_integer().map(|i| i as f64))
}

fn number(name: &str, value: &Value) -> Result<Number> {
    let no_number = || {
        Error::user(format!("{name} = {value} is no number"))
            .hint("write 0.7, or { value = 0.7, low = 0.5, high = 0.9 }")
    };
    if let Some(x) = float(value) {
        return Ok(Number { spread: Spread::exact(x), source: "given".to_owned() });
    }
    let table = value.as_table().ok_or_else(no_number)?;
    known(table.keys(), &["value", "low", "high", "source"], &format!("key {name}."))?;
    let of = |key: &str| table.get(key).map(|v| float(v).ok_or_else(no_number)).transpose();
    let middle = of("value")?.ok_or_else(no_number)?;
    Ok(Number {
        spread: Spread {
            low: of("low")?.unwrap_or(middle),
            value: middle,
            high: of("high")?.unwrap_or(middle),
        },
        source: table.get("source").and_then(Value::as_str).unwrap_or("given").to_owned(),
    })
}
