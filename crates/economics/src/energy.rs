//! Energy, and what the grid makes of it: dollars, carbon, water.

use serde::Serialize;
use spec::{Catalog, Cluster, EntryKind, Error, Result};

use crate::Spread;

/// An electricity grid.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Grid {
    /// The catalogue's entry.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// Dollars for a kilowatt-hour.
    pub usd_per_kwh: Spread,
    /// Kilograms of CO2 equivalent for a kilowatt-hour, by location.
    pub carbon_kg_per_kwh: Spread,
    /// Litres consumed where a kilowatt-hour is made, if known.
    pub water_l_per_kwh: Option<Spread>,
}

/// The grid where nothing else is said.
pub const GRID_USUAL: &str = "us";
/// Mean over rated power of TPU servers while they train (Epoch AI, training-cost-trends at 263c40a); the catalogue's
/// `load` is of GPUs.
const TPU_LOAD: Spread = Spread { low: 0.35, value: 0.43, high: 0.6 };

impl Grid {
    /// The grid of that name.
    ///
    /// # Errors
    /// An unknown name, with the known ones.
    pub fn named(catalog: &Catalog, name: &str) -> Result<Self> {
        let entry = catalog.get(EntryKind::Grid, name).map_err(|e| {
            let known: Vec<String> =
                catalog.list(Some(EntryKind::Grid)).into_iter().map(|l| l.name).collect();
            e.hint(format!("grids are {}", known.join(", ")))
        })?;
        let need = |key: &str| {
            entry.measure(key).map(Spread::from).ok_or_else(|| {
                Error::user(format!("{}: grid.{}.{key} is missing", entry.place, entry.name)).hint("add it")
            })
        };
        Ok(Grid {
            name: entry.name.clone(),
            title: entry.text("title").unwrap_or_default().to_owned(),
            usd_per_kwh: need("price")?,
            carbon_kg_per_kwh: need("carbon")?,
            water_l_per_kwh: entry.measure("water").map(Spread::from),
        })
    }
}

/// Where machines stand.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Site {
    /// The grid that feeds it.
    pub grid: Grid,
    /// Power drawn by the site over that of its computers.
    pub pue: Spread,
    /// Watts of server and its share of switches for an accelerator, rated.
    pub rated_w: Spread,
    /// Share of rated power while training.
    pub load: Spread,
    /// Share of rated power while idle.
    pub idle_load: Spread,
    /// Litres evaporated on the site for a kilowatt-hour of its computers, if known.
    pub water_l_per_kwh: Option<Spread>,
}

impl Site {
    /// A site of an ownership entry on a grid, with the machines of `cluster`. `None` if nobody says what they draw.
    ///
    /// # Errors
    /// An unknown entry or grid.
    pub fn of(catalog: &Catalog, cluster: &Cluster, ownership: &str, grid: &str) -> Result<Option<Self>> {
        let grid = Grid::named(catalog, grid)?;
        let entry = catalog.get(EntryKind::Ownership, ownership)?;
        let of = |key: &str| entry.measure(key).map(Spread::from).unwrap_or(Spread::exact(1.0));
        let of_node =
            cluster.node_power_w.map(|w| Spread::from(w).scaled(1.0 / cluster.per_node.max(1) as f64));
        let of_chip = cluster.accelerator.power_w.map(|w| Spread::from(w).times(of("power_factor")));
        let Some(rated_w) = of_node.or(of_chip) else { return Ok(None) };
        Ok(Some(Site {
            grid,
            pue: of("pue"),
            rated_w,
            load: if cluster.accelerator.vendor == "Google" { TPU_LOAD } else { of("load") },
            idle_load: of("idle_load"),
            water_l_per_kwh: entry.measure("site_water").map(Spread::from),
        }))
    }

    /// Kilowatts of the site for an accelerator that works for this share of the time.
    pub(crate) fn kw_per_accelerator(&self, utilisation: f64) -> Spread {
        let mean = self.load.scaled(utilisation).plus(self.idle_load.scaled(1.0 - utilisation));
        self.rated_w.scaled(1e-3).times(mean).times(self.pue)
    }

    /// What accelerator-hours of training take.
    pub fn energy(&self, accelerator_hours: Spread) -> Energy {
        let kwh = self.kw_per_accelerator(1.0).times(accelerator_hours);
        let computers_kwh = kwh.with(self.pue, |kwh, pue| kwh / pue);
        let made = self.grid.water_l_per_kwh.map(|w| w.times(kwh));
        let site = self.water_l_per_kwh.map(|w| w.times(computers_kwh));
        let litres = match (made, site) {
            (Some(a), Some(b)) => Some(a.plus(b)),
            (a, b) => a.or(b),
        };
        Energy {
            grid: self.grid.name.clone(),
            pue: self.pue,
            mwh: kwh.scaled(1e-3),
            usd: kwh.times(self.grid.usd_per_kwh),
            co2_t: kwh.times(self.grid.carbon_kg_per_kwh).scaled(1e-3),
            water_m3: litres.map(|l| l.scaled(1e-3)),
            water_of: match (made, site) {
                (Some(_), Some(_)) => "site and power stations",
                (Some(_), None) => "power stations",
                (None, Some(_)) => "site",
                (None, None) => "unknown",
            },
        }
    }
}

/// Energy of a run and what follows from it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Energy {
    /// The grid.
    pub grid: String,
    /// Power usage effectiveness.
    pub pue: Spread,
    /// Megawatt-hours of the site.
    pub mwh: Spread,
    /// Dollars for them; rent has them in it.
    pub usd: Spread,
    /// Tonnes of CO2 equivalent, by location.
    pub co2_t: Spread,
    /// Cubic metres of water, as far as sources say.
    pub water_m3: Option<Spread>,
    /// Where that water goes.
    pub water_of: &'static str,
}
