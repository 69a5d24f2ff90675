use std::fmt;

/// What a number of the catalogue measures; decides which units it may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// Capacity, in bytes.
    Bytes,
    /// Memory or storage throughput, in bytes per second.
    ByteRate,
    /// Throughput of a link, in bytes per second one way; the direction must be stated.
    LinkRate,
    /// Arithmetic throughput, in FLOP per second without sparsity; dense or sparse must be stated.
    FlopRate,
    /// Arithmetic done, in FLOP.
    Work,
    /// Time, in seconds.
    Time,
    /// Power, in watts.
    Power,
    /// Money, in US dollars.
    Money,
    /// Rent, in US dollars per hour of an accelerator, or of a node where the unit says so.
    Rent,
    /// Price of electricity, in US dollars per kilowatt-hour.
    EnergyPrice,
    /// Greenhouse gases, in kilograms of CO2 equivalent per kilowatt-hour.
    Carbon,
    /// Water evaporated or consumed, in litres per kilowatt-hour.
    Water,
    /// Events in an hour of one node, as a spot market's interruptions.
    Hazard,
    /// Failures, in events per node and second.
    FailureRate,
    /// A plain ratio.
    Ratio,
    /// How many of something; the unit names the something.
    Count,
}

const GIB: f64 = 1024.0 * 1024.0 * 1024.0;
const DAY_S: f64 = 86_400.0;
/// Of the Julian year.
const YEAR_DAYS: f64 = 365.25;

/// Unit, dimension and factor to the base unit.
const UNITS: &[(&str, Dimension, f64)] = &[
    ("B", Dimension::Bytes, 1.0),
    ("MB", Dimension::Bytes, 1e6),
    ("GB", Dimension::Bytes, 1e9),
    ("TB", Dimension::Bytes, 1e12),
    ("PB", Dimension::Bytes, 1e15),
    ("MiB", Dimension::Bytes, 1024.0 * 1024.0),
    ("GiB", Dimension::Bytes, GIB),
    ("TiB", Dimension::Bytes, GIB * 1024.0),
    ("MB/s", Dimension::ByteRate, 1e6),
    ("GB/s", Dimension::ByteRate, 1e9),
    ("TB/s", Dimension::ByteRate, 1e12),
    ("GiB/s", Dimension::ByteRate, GIB),
    ("Mb/s", Dimension::ByteRate, 1e6 / 8.0),
    ("Gb/s", Dimension::ByteRate, 1e9 / 8.0),
    ("Tb/s", Dimension::ByteRate, 1e12 / 8.0),
    ("GFLOP/s", Dimension::FlopRate, 1e9),
    ("TFLOP/s", Dimension::FlopRate, 1e12),
    ("PFLOP/s", Dimension::FlopRate, 1e15),
    ("FLOP", Dimension::Work, 1.0),
    ("ns", Dimension::Time, 1e-9),
    ("us", Dimension::Time, 1e-6),
    ("ms", Dimension::Time, 1e-3),
    ("s", Dimension::Time, 1.0),
    ("min", Dimension::Time, 60.0),
    ("h", Dimension::Time, 3600.0),
    ("days", Dimension::Time, DAY_S),
    ("months", Dimension::Time, YEAR_DAYS / 12.0 * DAY_S),
    ("years", Dimension::Time, YEAR_DAYS * DAY_S),
    ("W", Dimension::Power, 1.0),
    ("kW", Dimension::Power, 1e3),
    ("MW", Dimension::Power, 1e6),
    ("USD", Dimension::Money, 1.0),
    ("USD/h", Dimension::Rent, 1.0),
    ("USD/node-h", Dimension::Rent, 1.0),
    ("USD/kWh", Dimension::EnergyPrice, 1.0),
    ("kg/kWh", Dimension::Carbon, 1.0),
    ("L/kWh", Dimension::Water, 1.0),
    ("1/h", Dimension::Hazard, 1.0),
    ("1/kilonode-day", Dimension::FailureRate, 1e-3 / DAY_S),
    ("1/node-day", Dimension::FailureRate, 1.0 / DAY_S),
    ("ratio", Dimension::Ratio, 1.0),
    ("percent", Dimension::Ratio, 0.01),
    ("accelerators", Dimension::Count, 1.0),
    ("nodes", Dimension::Count, 1.0),
    ("units", Dimension::Count, 1.0),
    ("tokens", Dimension::Count, 1.0),
    ("ports", Dimension::Count, 1.0),
    ("dims", Dimension::Count, 1.0),
    ("cores", Dimension::Count, 1.0),
    ("events", Dimension::Count, 1.0),
    ("drives", Dimension::Count, 1.0),
];

impl Dimension {
    /// The factor from `unit` to the base unit, if `unit` measures this dimension.
    pub fn factor(self, unit: &str) -> Option<f64> {
        UNITS.iter().find(|(name, dimension, _)| *name == unit && self.accepts(*dimension)).map(|u| u.2)
    }

    fn accepts(self, of_unit: Dimension) -> bool {
        self == of_unit || (self == Dimension::LinkRate && of_unit == Dimension::ByteRate)
    }

    /// The units that a number of this dimension may carry.
    pub fn units(self) -> Vec<&'static str> {
        UNITS.iter().filter(|(_, dimension, _)| self.accepts(*dimension)).map(|u| u.0).collect()
    }
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dimension::Bytes => "a capacity",
            Dimension::ByteRate => "a throughput",
            Dimension::LinkRate => "a link rate",
            Dimension::FlopRate => "an arithmetic rate",
            Dimension::Work => "an amount of arithmetic",
            Dimension::Time => "a time",
            Dimension::Power => "a power",
            Dimension::Money => "a price",
            Dimension::Rent => "a rent",
            Dimension::EnergyPrice => "a price of energy",
            Dimension::Carbon => "a carbon intensity",
            Dimension::Water => "a water intensity",
            Dimension::Hazard => "a rate of events",
            Dimension::FailureRate => "a failure rate",
            Dimension::Ratio => "a ratio",
            Dimension::Count => "a count",
        })
    }
}

/// A value with the range that its sources span, in the base unit of its [`Dimension`].
///
/// Where sources agree the range is a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measure {
    /// The value to compute with.
    pub value: f64,
    /// The lowest that a source states.
    pub low: f64,
    /// The highest that a source states.
    pub high: f64,
}

impl Measure {
    /// A value whose sources agree.
    pub const fn exact(value: f64) -> Self {
        Measure { value, low: value, high: value }
    }

    /// The same scaled, as when a node's ports are shared out among its accelerators.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Measure { value: self.value * by, low: self.low * by, high: self.high * by }
    }
}

/// A number of the catalogue as written, with where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantity {
    /// In the base unit: link rates one way, arithmetic without sparsity.
    pub measure: Measure,
    /// What it measures.
    pub dimension: Dimension,
    /// The value as written, in `unit`.
    pub written: f64,
    /// The unit as written.
    pub unit: String,
    /// `one-way` or `both-ways` as written, for link rates.
    pub direction: Option<Direction>,
    /// Dense or sparse as written, for arithmetic rates.
    pub sparsity: Option<Sparsity>,
    /// A key of the `source` tables, or free text.
    pub source: String,
    /// `YYYY`, `YYYY-MM` or `YYYY-MM-DD`.
    pub date: String,
    /// What else to know.
    pub note: Option<String>,
}

/// Whether a link rate counts one direction or the sum of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// What can leave (or enter) in a second.
    OneWay,
    /// What can leave and enter together.
    BothWays,
}

/// Whether an arithmetic rate counts the zeros skipped by 2:4 structured sparsity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparsity {
    /// All products counted are done.
    Dense,
    /// Twice the dense rate, on matrices with half their elements zero.
    Sparse2To4,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.written, self.unit)?;
        let m = self.measure;
        if m.low < m.high {
            let per = m.value / self.written;
            write!(f, " ({} to {})", trim(m.low / per), trim(m.high / per))?;
        }
        match self.direction {
            Some(Direction::OneWay) => f.write_str(" one way")?,
            Some(Direction::BothWays) => f.write_str(" both ways")?,
            None => {}
        }
        match self.sparsity {
            Some(Sparsity::Dense) => f.write_str(" dense")?,
            Some(Sparsity::Sparse2To4) => f.write_str(" sparse")?,
            None => {}
        }
        write!(f, " [{} {}]", self.source, self.date)?;
        self.note.as_ref().map_or(Ok(()), |note| write!(f, " {note}"))
    }
}

/// Six significant digits: enough for any figure of the catalogue, without the dust of a division.
fn trim(x: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_carry_bits_bytes_and_binary_prefixes_apart() {
        let check = |dimension: Dimension, unit: &str, expected: Option<f64>| {
            assert_eq!(dimension.factor(unit), expected, "{dimension} in {unit}");
        };
        check(Dimension::LinkRate, "Gb/s", Some(1.25e8));
        check(Dimension::LinkRate, "GB/s", Some(1e9));
        check(Dimension::Bytes, "GiB", Some(1_073_741_824.0));
        check(Dimension::Bytes, "GB", Some(1e9));
        check(Dimension::Bytes, "MiB", Some(1_048_576.0));
        check(Dimension::Bytes, "TiB", Some(1_099_511_627_776.0));
        check(Dimension::ByteRate, "Mb/s", Some(125_000.0));
        check(Dimension::ByteRate, "Tb/s", Some(1.25e11));
        check(Dimension::FailureRate, "1/node-day", Some(1.0 / 86_400.0));
        check(Dimension::FailureRate, "1/kilonode-day", Some(1e-3 / 86_400.0));
        check(Dimension::Bytes, "GB/s", None);
        check(Dimension::FlopRate, "GB/s", None);
        check(Dimension::Time, "us", Some(1e-6));
    }

    #[test]
    fn a_range_is_shown_in_the_unit_it_was_written_in() {
        let quantity = |low: f64, high: f64| Quantity {
            measure: Measure { value: 4.5e10, low, high },
            dimension: Dimension::ByteRate,
            written: 45.0,
            unit: "GB/s".to_owned(),
            direction: None,
            sparsity: None,
            source: "ml".to_owned(),
            date: "2026".to_owned(),
            note: None,
        };
        let check = |low: f64, high: f64, expected: &str| {
            assert_eq!(quantity(low, high).to_string(), expected);
        };
        check(4.11e10, 4.7e10, "45 GB/s (41.1 to 47) [ml 2026]");
        check(4.5e10, 4.5e10, "45 GB/s [ml 2026]");
    }
}
