//! Months of money: what each option pays when, discounted to today.

use std::collections::BTreeMap;

use super::assumptions::{Assumptions, Key};
use crate::HOURS_PER_MONTH;

/// All assumptions at one value each.
#[derive(Clone, Debug)]
pub(super) struct Fixed {
    values: BTreeMap<Key, f64>,
    /// Accelerators that jobs want at a time and the share of the time that they work, month by month.
    wanted: Vec<(f64, f64)>,
    /// Whether machines of others may be used.
    pub(super) data_may_leave: bool,
}

/// Dollars of today, by part.
pub(super) type Parts = Vec<(&'static str, f64)>;

/// Machines of one's own over the months.
pub(super) struct Owned {
    /// What they cost, and the rent beside them.
    pub(super) parts: Parts,
    /// Dollars of today paid for machines, replacements included.
    pub(super) bought: f64,
    /// What they are worth after the last month, in dollars of today.
    pub(super) left: f64,
}

/// Sum of parts.
pub(super) fn total(parts: &Parts) -> f64 {
    parts.iter().map(|p| p.1).sum()
}

impl Fixed {
    /// All at the values to compute with.
    pub(super) fn of(all: &Assumptions) -> Self {
        Fixed {
            values: all.numbers.iter().map(|(key, n)| (*key, n.spread.value)).collect(),
            wanted: all.wanted(),
            data_may_leave: all.data_may_leave,
        }
    }

    /// The same with one number changed.
    pub(super) fn with(&self, key: Key, value: f64) -> Self {
        let mut changed = self.clone();
        changed.values.insert(key, value);
        changed
    }

    /// The same with more or less to compute.
    pub(super) fn with_demand(&self, by: f64) -> Self {
        Fixed { wanted: self.wanted.iter().map(|(n, share)| (n * by, *share)).collect(), ..self.clone() }
    }

    /// The same with jobs that work more or less of the time.
    pub(super) fn with_use(&self, by: f64) -> Self {
        Fixed { wanted: self.wanted.iter().map(|(n, share)| (*n, share * by)).collect(), ..self.clone() }
    }

    /// Months looked ahead.
    pub(super) fn months(&self) -> usize {
        self.wanted.len()
    }

    /// Accelerators at work on average in a month, of `n` that are there.
    pub(super) fn at_work(&self, month: usize, n: f64) -> f64 {
        let (wanted, share) = self.wanted[month];
        wanted.min(n) * share
    }

    /// The same of what does not fit on `n`.
    fn beyond(&self, month: usize, n: f64) -> f64 {
        let (wanted, share) = self.wanted[month];
        (wanted - n).max(0.0) * share
    }

    pub(super) fn has(&self, key: Key) -> bool {
        self.values.contains_key(&key)
    }

    pub(super) fn get(&self, key: Key) -> f64 {
        self.values.get(&key).copied().unwrap_or(0.0)
    }

    /// Months from an order until jobs run.
    pub(super) fn lead_months(&self) -> usize {
        self.get(Key::LeadMonths).round() as usize
    }

    /// Dollars that one accelerator of one's own takes in a year, capital included, working this share of the time.
    pub(super) fn yearly_usd(&self, utilisation: f64) -> f64 {
        let get = |key| self.get(key);
        let servers = get(Key::ServerUsd);
        let bought =
            servers / (1.0 - get(Key::NetworkShare) - get(Key::StorageShare)) + servers * get(Key::Spares);
        let resale = get(Key::Resale);
        let written_off = bought * (1.0 - resale) / get(Key::LifetimeYears);
        // What is bound on average: from the purchase down to the resale.
        let capital = bought * (1.0 + resale) / 2.0 * get(Key::CapitalCostPerYear);
        let care = bought * (get(Key::MaintenancePerYear) + get(Key::StaffPerYear));
        let kw = get(Key::RatedW) / 1e3;
        let load = get(Key::Load) * utilisation + get(Key::IdleLoad) * (1.0 - utilisation);
        let power = kw * load * get(Key::Pue) * crate::HOURS_PER_YEAR * get(Key::ElectricityUsdPerKwh);
        written_off + capital + care + kw * get(Key::SpaceUsdPerKwYear) + power
    }

    /// What a dollar in so many months is worth today.
    fn worth(&self, month: f64) -> f64 {
        (1.0 + self.get(Key::CapitalCostPerYear)).powf(-month / 12.0)
    }

    /// A rent in a month, as rents change.
    fn rent(&self, key: Key, month: usize) -> f64 {
        self.get(key) * (1.0 + self.get(Key::RentChangePerYear)).powf(month as f64 / 12.0)
    }

    /// Rent of every hour by itself.
    pub(super) fn hourly(&self, key: Key, more: f64) -> Parts {
        let month = |m: usize| {
            self.beyond(m, 0.0) * HOURS_PER_MONTH * more * self.rent(key, m) * self.worth(m as f64)
        };
        vec![("rent", (0..self.months()).map(month).sum())]
    }

    /// Spot hours; those lost are rented again.
    pub(super) fn spot(&self) -> Parts {
        let lost = self.get(Key::SpotLost).min(0.99);
        self.hourly(Key::SpotUsdPerH, 1.0 / (1.0 - lost))
    }

    /// Terms of `months` each, with the number reserved that is best in each term and the rest by the hour.
    pub(super) fn reserved(&self, key: Key, months: usize) -> Parts {
        let (mut bound, mut rest) = (0.0, 0.0);
        let all = self.months();
        for start in (0..all).step_by(months) {
            // A term begun is paid to its end, also beyond the horizon.
            let paid: f64 = (start..start + months).map(|m| self.worth(m as f64)).sum();
            let each = HOURS_PER_MONTH * self.rent(key, start) * paid;
            let used = start..(start + months).min(all);
            let over = |level: f64| -> f64 {
                let month = |m: usize| {
                    self.beyond(m, level)
                        * HOURS_PER_MONTH
                        * self.rent(Key::OnDemandUsdPerH, m)
                        * self.worth(m as f64)
                };
                used.clone().map(month).sum()
            };
            let mut levels: Vec<f64> = used.clone().map(|m| self.wanted[m].0.ceil()).chain([0.0]).collect();
            levels.sort_by(f64::total_cmp);
            levels.dedup();
            let costs = levels.into_iter().map(|level| (level * each, over(level)));
            let (a, b) = costs.min_by(|x, y| (x.0 + x.1).total_cmp(&(y.0 + y.1))).unwrap_or((0.0, 0.0));
            bound += a;
            rest += b;
        }
        vec![("reserved", bound), ("rent of peaks", rest)]
    }

    /// Machines ordered in month `order`, for `n` accelerators at work; before they run and beyond them, rent by the hour
    /// where that is allowed. Where it is not, what is beyond stays undone.
    pub(super) fn own(&self, order: usize, n: f64) -> Owned {
        let get = |key| self.get(key);
        let lead = self.lead_months();
        let months = self.months();
        let shares = get(Key::NetworkShare) + get(Key::StorageShare);
        let life = ((get(Key::LifetimeYears) * 12.0).round() as usize).max(1);
        let kw = n * get(Key::RatedW) / 1e3;
        let (mut machines, mut rent, mut care, mut people, mut space, mut power) =
            (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        let (mut bought, mut paid, mut left) = (0.0, 0.0, 0.0);
        for m in 0..months {
            let worth = self.worth(m as f64);
            if m >= order && (m - order).is_multiple_of(life) {
                let changed = (1.0 + get(Key::ServerChangePerYear)).powf(m as f64 / 12.0);
                let servers = n * get(Key::ServerUsd) * changed;
                // The old ones are sold for what is left of them.
                machines -= bought * get(Key::Resale) * worth;
                bought = servers / (1.0 - shares) + servers * get(Key::Spares);
                machines += bought * worth;
                paid += bought * worth;
            }
            let owned = if m >= order + lead { n } else { 0.0 };
            let beyond = self.beyond(m, owned);
            if self.data_may_leave {
                rent += beyond * HOURS_PER_MONTH * self.rent(Key::OnDemandUsdPerH, m) * worth;
            }
            if owned > 0.0 {
                let used = self.at_work(m, owned) / owned;
                let load = get(Key::Load) * used + get(Key::IdleLoad) * (1.0 - used);
                care += bought * get(Key::MaintenancePerYear) / 12.0 * worth;
                people += bought * get(Key::StaffPerYear) / 12.0 * worth;
                space += kw * get(Key::SpaceUsdPerKwYear) / 12.0 * worth;
                power += kw * load * get(Key::Pue) * HOURS_PER_MONTH * get(Key::ElectricityUsdPerKwh) * worth;
            }
        }
        if months > order {
            // In a straight line from the purchase to the resale.
            let age = (months - order) % life;
            let age = if age == 0 { life } else { age };
            let share = 1.0 - (1.0 - get(Key::Resale)) * age as f64 / life as f64;
            left = bought * share * self.worth(months as f64);
        }
        let parts = vec![
            // One part: what a machine brings at the end follows from what it cost.
            ("machines less resale", machines - left),
            ("maintenance", care),
            ("staff", people),
            ("space", space),
            ("power and cooling", power),
            ("rent", rent),
        ];
        Owned { parts, bought: paid, left }
    }

    /// The best order month in `orders` and number of accelerators: dollars are least, of those tried. Only the levels
    /// of the demand are, since between two of them costs are straight.
    pub(super) fn best_own(&self, orders: impl Iterator<Item = usize> + Clone) -> Option<(usize, f64, f64)> {
        let most = self.wanted.iter().map(|w| w.0).fold(0.0, f64::max).ceil();
        let mut levels: Vec<f64> = self.wanted.iter().map(|w| w.0.ceil()).collect();
        levels.sort_by(f64::total_cmp);
        levels.dedup();
        if !self.data_may_leave {
            levels = vec![most];
        }
        let tried = orders.flat_map(|order| levels.iter().map(move |n| (order, *n)));
        let priced = tried.map(|(order, n)| (order, n, total(&self.own(order, n).parts)));
        priced.min_by(|a, b| a.2.total_cmp(&b.2))
    }
}
