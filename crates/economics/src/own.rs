//! Total cost of ownership: everything that owning machines takes, a year and an hour.

use serde::Serialize;
use spec::{Catalog, Cluster, EntryKind, Error, Result};

use crate::energy::Site;
use crate::{Bill, HOURS_PER_YEAR, Spread, price};

/// Machines of one's own.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ownership {
    /// Accelerators that work; spares come on top.
    pub accelerators: usize,
    /// Dollars for the server of one accelerator.
    pub server_usd: Spread,
    /// Where that price is from.
    pub server_source: String,
    /// Share of the whole purchase that is network.
    pub network_share: Spread,
    /// Share of the whole purchase that is storage.
    pub storage_share: Spread,
    /// Further servers that stand by, as a share.
    pub spares: Spread,
    /// Years until all is replaced.
    pub lifetime_years: Spread,
    /// Share of the purchase that the machines still bring then.
    pub resale: Spread,
    /// Cost of capital, a year.
    pub capital_cost: Spread,
    /// Support and parts, as a share of the purchase a year.
    pub maintenance: Spread,
    /// People, as a share of the purchase a year.
    pub staff: Spread,
    /// Rent of the hall: dollars for a rated kilowatt and year.
    pub space_usd_per_kw: Spread,
    /// Power and cooling; `None` where nobody says what the machines draw.
    pub site: Option<Site>,
    /// Months from the order until jobs run.
    pub lead_months: Spread,
}

/// The entry of the catalogue where nothing else is said.
pub const TYPICAL: &str = "typical";

impl Ownership {
    /// Machines like those of `cluster`, owned as the catalogue's ownership entry says, on a grid.
    ///
    /// # Errors
    /// An unknown entry or grid, or machines whose price nobody knows.
    pub fn of(catalog: &Catalog, cluster: &Cluster, entry: &str, grid: &str) -> Result<Self> {
        let site = Site::of(catalog, cluster, entry, grid)?;
        let entry = catalog.get(EntryKind::Ownership, entry)?;
        let need = |key: &str| {
            entry.measure(key).map(Spread::from).ok_or_else(|| {
                Error::user(format!("{}: ownership.{}.{key} is missing", entry.place, entry.name))
                    .hint("add it")
            })
        };
        let chip = &cluster.accelerator.name;
        let of_node = cluster.node_price_usd.map(|p| {
            let each = Spread::from(p).scaled(1.0 / cluster.per_node.max(1) as f64);
            (each, format!("the node's price / {}", cluster.per_node))
        });
        let factor = need("server_factor")?;
        let of_chip = || {
            let (usd, source) = price::purchase(catalog, chip)?;
            Some((usd.times(factor), format!("{source} x {}", factor.value)))
        };
        let (server_usd, server_source) = of_node.or_else(of_chip).ok_or_else(|| {
            Error::user(format!("no purchase price of {} or of {chip} in the catalogue", cluster.name)).hint(
                "put one into a file: [price.NAME] with accelerator and purchase, and give it with --catalog",
            )
        })?;
        Ok(Ownership {
            accelerators: cluster.accelerators,
            server_usd,
            server_source,
            network_share: need("network_share")?,
            storage_share: need("storage_share")?,
            spares: need("spares")?,
            lifetime_years: need("lifetime")?.map(|s| s / (HOURS_PER_YEAR * crate::HOUR_S)),
            resale: need("resale")?,
            capital_cost: need("capital_cost")?,
            maintenance: need("maintenance")?,
            staff: need("staff")?,
            space_usd_per_kw: need("space")?,
            site,
            lead_months: need("lead_time")?.scaled(1.0 / (crate::HOURS_PER_MONTH * crate::HOUR_S)),
        })
    }

    /// Dollars to buy it, by part.
    pub fn purchase(&self) -> Bill {
        Bill::of(self.purchase_parts())
    }

    fn purchase_parts(&self) -> Vec<(&'static str, Spread)> {
        let servers = self.server_usd.scaled(self.accelerators as f64);
        // Shares are of the whole: servers are what network and storage leave.
        let shares = self.network_share.plus(self.storage_share);
        let whole = servers.with(shares, |s, rest| s / (1.0 - rest));
        vec![
            ("servers", servers),
            ("network", whole.times(self.network_share)),
            ("storage", whole.times(self.storage_share)),
            ("spares", servers.times(self.spares)),
        ]
    }

    /// Dollars to buy it, in all and not rounded.
    pub(crate) fn purchase_usd(&self) -> Spread {
        self.purchase_parts().into_iter().map(|p| p.1).fold(Spread::exact(0.0), Spread::plus)
    }

    /// Dollars a year by part, for machines that work this share of the time. The ends of the whole are those of assumptions
    /// that err independently (`Ownership::independent`); each part goes the same share of its own way to them.
    pub fn yearly_parts(&self, utilisation: f64) -> Vec<(&'static str, Spread)> {
        let parts = self.extreme_parts(utilisation);
        let extreme = sum(&parts);
        let whole = self.independent(|own| sum(&own.extreme_parts(utilisation)).value);
        let share = |way: f64, all: f64| if all > 0.0 { (way / all).min(1.0) } else { 0.0 };
        let down = share(whole.value - whole.low, extreme.value - extreme.low);
        let up = share(whole.high - whole.value, extreme.high - extreme.value);
        let lean = |s: Spread| Spread {
            low: s.value - down * (s.value - s.low),
            value: s.value,
            high: s.value + up * (s.high - s.value),
        };
        parts.into_iter().map(|(name, s)| (name, lean(s))).collect()
    }

    /// `f` with its range where each assumption goes to its ends by itself: what that changes adds up in squares, of
    /// logarithms.
    fn independent(&self, f: impl Fn(&Ownership) -> f64) -> Spread {
        let mut exact = self.clone();
        exact.assumptions().into_iter().for_each(|s| *s = Spread::exact(s.value));
        let value = f(&exact);
        let (mut down, mut up, mut least) = (0.0f64, 0.0f64, value);
        let ends: Vec<Spread> = self.clone().assumptions().into_iter().map(|s| *s).collect();
        for (i, ends) in ends.into_iter().enumerate() {
            for end in [ends.low, ends.high] {
                let mut moved = exact.clone();
                *moved.assumptions()[i] = Spread::exact(end);
                let result = f(&moved);
                let by = (result / value).ln();
                least = least.min(result);
                if by < 0.0 { down += by * by } else { up += by * by }
            }
        }
        if !value.is_finite() {
            return Spread::new(least, value, value);
        }
        Spread::new(value * (-down.sqrt()).exp(), value, value * up.sqrt().exp())
    }

    /// Everything that yearly dollars follow from.
    fn assumptions(&mut self) -> Vec<&mut Spread> {
        let mut all = vec![
            &mut self.server_usd,
            &mut self.network_share,
            &mut self.storage_share,
            &mut self.spares,
            &mut self.lifetime_years,
            &mut self.resale,
            &mut self.capital_cost,
            &mut self.maintenance,
            &mut self.staff,
            &mut self.space_usd_per_kw,
        ];
        if let Some(site) = &mut self.site {
            all.extend([
                &mut site.rated_w,
                &mut site.load,
                &mut site.idle_load,
                &mut site.pue,
                &mut site.grid.usd_per_kwh,
            ]);
        }
        all
    }

    /// [`Ownership::yearly_parts`] with all assumptions at their cheaper or dearer end at once.
    fn extreme_parts(&self, utilisation: f64) -> Vec<(&'static str, Spread)> {
        let written_off = |part: Spread| {
            // A longer life and a better resale are the cheaper end.
            let a_year = |usd: f64, resale: f64, years: f64| usd * (1.0 - resale) / years;
            Spread::new(
                a_year(part.low, self.resale.high, self.lifetime_years.high),
                a_year(part.value, self.resale.value, self.lifetime_years.value),
                a_year(part.high, self.resale.low, self.lifetime_years.low),
            )
        };
        let mut parts: Vec<(&str, Spread)> =
            self.purchase_parts().into_iter().map(|(name, usd)| (name, written_off(usd))).collect();
        let all = self.purchase_usd();
        // What is bound on average: from the purchase down to the resale.
        let bound = all.with(self.resale, |usd, resale| usd * (1.0 + resale) / 2.0);
        parts.push(("capital", bound.times(self.capital_cost)));
        parts.push(("maintenance", all.times(self.maintenance)));
        parts.push(("staff", all.times(self.staff)));
        if let Some(site) = &self.site {
            let n = self.accelerators as f64;
            let rated_kw = site.rated_w.scaled(1e-3 * n);
            parts.push(("space", rated_kw.times(self.space_usd_per_kw)));
            let kwh = site.kw_per_accelerator(utilisation).scaled(n * HOURS_PER_YEAR);
            parts.push(("power and cooling", kwh.times(site.grid.usd_per_kwh)));
        }
        parts
    }

    /// The same as a bill.
    pub fn yearly(&self, utilisation: f64) -> Bill {
        Bill::of(self.yearly_parts(utilisation))
    }

    /// Dollars a year, not rounded.
    pub(crate) fn yearly_usd(&self, utilisation: f64) -> Spread {
        sum(&self.yearly_parts(utilisation))
    }

    /// Dollars for an hour of an accelerator in use.
    pub fn usd_per_accelerator_h(&self, utilisation: f64) -> Spread {
        self.yearly_usd(utilisation).scaled(1.0 / (self.accelerators as f64 * HOURS_PER_YEAR * utilisation))
    }

    /// The utilisation from which owning is cheaper than renting at `rent_usd_per_h`; see [`break_even`].
    ///
    /// Its range is of assumptions that err independently, the rent among them.
    pub fn break_even(&self, rent_usd_per_h: Spread) -> Spread {
        let at = |own: &Ownership, rent: f64| {
            let yearly = |utilisation| sum(&own.extreme_parts(utilisation)).value;
            let (idle, busy) = (yearly(0.0), yearly(1.0));
            let hours = own.accelerators as f64 * HOURS_PER_YEAR;
            break_even(idle, (busy - idle) / hours, own.accelerators, rent)
        };
        let owned = self.independent(|own| at(own, rent_usd_per_h.value));
        if !owned.value.is_finite() {
            return owned;
        }
        let [dear, cheap] =
            [rent_usd_per_h.high, rent_usd_per_h.low].map(|rent| at(self, rent) / owned.value);
        let far = |a: f64, b: f64| (a.ln().powi(2) + b.ln().powi(2)).sqrt().exp();
        Spread::new(
            owned.value / far(owned.low / owned.value, dear),
            owned.value,
            owned.value * far(owned.high / owned.value, cheap),
        )
    }
}

fn sum(parts: &[(&'static str, Spread)]) -> Spread {
    parts.iter().map(|p| p.1).fold(Spread::exact(0.0), Spread::plus)
}

/// The utilisation at which owning costs what renting does: `fixed / (n * hours * (rent - variable))`. Above 1 owning
/// never pays; infinite where the rent is below what an hour of one's own machine takes in power.
///
/// The guide's machine ($30M for 1,000 GPUs, four years, $4M a year) pays from 66, 52 or 33 % against $2, $2.50 or $4,
/// not from 70 %; one with its network ($46M, $5M a year) from 94, 75, 47 %, and from 27 % against a hyperscaler's $6.88:
///
/// ```
/// use economics::own::break_even;
/// let percent = |capex: f64, opex: f64, rent: f64| (100.0 * break_even(capex / 4.0 + opex, 0.0, 1000, rent)).round();
/// assert_eq!([2.0, 2.5, 4.0].map(|rent| percent(30e6, 4e6, rent)), [66.0, 52.0, 33.0]);
/// assert_eq!([2.0, 2.5, 4.0, 6.88].map(|rent| percent(46e6, 5e6, rent)), [94.0, 75.0, 47.0, 27.0]);
/// ```
pub fn break_even(
    fixed_usd_per_year: f64,
    variable_usd_per_h: f64,
    accelerators: usize,
    rent_usd_per_h: f64,
) -> f64 {
    let saved = rent_usd_per_h - variable_usd_per_h;
    if saved <= 0.0 {
        return f64::INFINITY;
    }
    fixed_usd_per_year / (accelerators as f64 * HOURS_PER_YEAR * saved)
}
