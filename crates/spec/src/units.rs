//! Units as types: bytes and bits, rates, work, time, tokens, power and money, each with only the operators that
//! physics allows, and one place that parses and prints them.
//!
//! ```
//! use spec::units::{Bytes, BytesPerSecond, Seconds};
//! let size: Bytes = "80 GB".parse()?;
//! let link: BytesPerSecond = "400 Gb/s".parse()?; // bits: 50 GB/s
//! assert_eq!(size / link, Seconds(1.6));
//! assert_eq!(size.to_string(), "74.5 GiB");
//! assert_eq!(size.decimal(), "80.0 GB");
//! # Ok::<(), spec::Error>(())
//! ```

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::str::FromStr;

/// Bytes of memory, files and messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Tokens of text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tokens(pub u64);

macro_rules! float_units {
    ($($(#[$doc:meta])* $name:ident $unit:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                $name(self.0 + other.0)
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                $name(self.0 - other.0)
            }
        }
        impl Mul<f64> for $name {
            type Output = Self;
            fn mul(self, times: f64) -> Self {
                $name(self.0 * times)
            }
        }
        impl Div<f64> for $name {
            type Output = Self;
            fn div(self, parts: f64) -> Self {
                $name(self.0 / parts)
            }
        }
        /// The ratio of two like quantities is a number.
        impl Div for $name {
            type Output = f64;
            fn div(self, other: Self) -> f64 {
                self.0 / other.0
            }
        }
        impl std::iter::Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                $name(iter.map(|x| x.0).sum())
            }
        }
    )*};
}

float_units! {
    /// Bytes per second, one direction.
    BytesPerSecond "B/s";
    /// Bits per second, one direction: how networks are sold.
    BitsPerSecond "b/s";
    /// Floating-point operations; a multiply-add is two.
    Flops "FLOP";
    /// Floating-point operations per second.
    FlopsPerSecond "FLOP/s";
    /// Time.
    Seconds "s";
    /// Tokens per second.
    TokensPerSecond "tokens/s";
    /// Power.
    Watts "W";
    /// Energy.
    Joules "J";
    /// US dollars.
    Usd "USD";
    /// US dollars per hour: how machines are rented.
    UsdPerHour "USD/h";
}

macro_rules! count_units {
    ($($name:ident),*) => {$(
        /// Saturates instead of wrapping.
        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                $name(self.0.saturating_add(other.0))
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                *self = *self + other;
            }
        }
        /// Stops at zero.
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                $name(self.0.saturating_sub(other.0))
            }
        }
        /// Saturates instead of wrapping.
        impl Mul<u64> for $name {
            type Output = Self;
            fn mul(self, times: u64) -> Self {
                $name(self.0.saturating_mul(times))
            }
        }
        /// The ratio of two like quantities is a number.
        impl Div for $name {
            type Output = f64;
            fn div(self, other: Self) -> f64 {
                self.0 as f64 / other.0 as f64
            }
        }
        impl std::iter::Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                iter.fold($name(0), Add::add)
            }
        }
    )*};
}

count_units!(Bytes, Tokens);

/// `amount / rate = time`, `amount / time = rate`, `rate * time = amount`.
macro_rules! rates {
    ($($amount:ident / $rate:ident: $get:expr, $make:expr;)*) => {$(
        impl Div<$rate> for $amount {
            type Output = Seconds;
            fn div(self, rate: $rate) -> Seconds {
                Seconds($get(self) / rate.0)
            }
        }
        impl Div<Seconds> for $amount {
            type Output = $rate;
            fn div(self, time: Seconds) -> $rate {
                $rate($get(self) / time.0)
            }
        }
        impl Mul<Seconds> for $rate {
            type Output = $amount;
            fn mul(self, time: Seconds) -> $amount {
                $make(self.0 * time.0)
            }
        }
    )*};
}

rates! {
    Bytes / BytesPerSecond: |b: Bytes| b.0 as f64, |x: f64| Bytes(x.round() as u64);
    Tokens / TokensPerSecond: |t: Tokens| t.0 as f64, |x: f64| Tokens(x.round() as u64);
    Flops / FlopsPerSecond: |f: Flops| f.0, Flops;
    Joules / Watts: |j: Joules| j.0, Joules;
}

impl Mul<Seconds> for UsdPerHour {
    type Output = Usd;
    fn mul(self, time: Seconds) -> Usd {
        Usd(self.0 * time.hours())
    }
}

impl From<BitsPerSecond> for BytesPerSecond {
    fn from(rate: BitsPerSecond) -> Self {
        BytesPerSecond(rate.0 / 8.0)
    }
}

impl From<BytesPerSecond> for BitsPerSecond {
    fn from(rate: BytesPerSecond) -> Self {
        BitsPerSecond(rate.0 * 8.0)
    }
}

impl Bytes {
    /// Kibibytes.
    pub const fn kib(n: u64) -> Self {
        Bytes(n.saturating_mul(1 << 10))
    }

    /// Mebibytes.
    pub const fn mib(n: u64) -> Self {
        Bytes(n.saturating_mul(1 << 20))
    }

    /// Gibibytes.
    pub const fn gib(n: u64) -> Self {
        Bytes(n.saturating_mul(1 << 30))
    }

    /// In powers of 1000, as storage and links are sold: `80.0 GB`. Display prints powers of 1024.
    pub fn decimal(self) -> String {
        scaled(self.0 as f64, "B")
    }
}

impl Seconds {
    /// In hours.
    pub fn hours(self) -> f64 {
        self.0 / 3600.0
    }

    /// In days.
    pub fn days(self) -> f64 {
        self.0 / 86_400.0
    }
}

impl Joules {
    /// In kilowatt-hours.
    pub fn kilowatt_hours(self) -> f64 {
        self.0 / 3.6e6
    }
}

/// Prefixes in powers of 1000, largest first.
const DECIMAL: [(&str, f64); 6] = [("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)];
/// Prefixes in powers of 1024, largest first.
const BINARY: [(&str, u64); 6] =
    [("Ei", 1 << 60), ("Pi", 1 << 50), ("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

/// Three significant digits: `1.25`, `12.5`, `125`.
fn three_digits(x: f64) -> String {
    match x.abs() {
        a if a >= 99.95 => format!("{x:.0}"),
        a if a >= 9.995 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

fn scaled(x: f64, unit: &str) -> String {
    let step = DECIMAL.iter().find(|(_, size)| x.abs() >= size * 0.9995);
    match step {
        Some((prefix, size)) => format!("{} {prefix}{unit}", three_digits(x / size)),
        None if x == x.trunc() && x.is_finite() => format!("{x} {unit}"),
        None => format!("{} {unit}", three_digits(x)),
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY.iter().find(|(_, size)| self.0 >= *size) {
            Some((prefix, size)) => {
                f.pad(&format!("{} {prefix}B", three_digits(self.0 as f64 / *size as f64)))
            }
            None => f.pad(&format!("{} B", self.0)),
        }
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let x = self.0 as f64;
        match [("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)].iter().find(|(_, size)| x >= size * 0.9995) {
            Some((prefix, size)) => f.pad(&format!("{}{prefix} tokens", three_digits(x / size))),
            None => f.pad(&format!("{} tokens", self.0)),
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0;
        let text = match s.abs() {
            a if !a.is_finite() => format!("{s} s"),
            0.0 => "0 s".to_owned(),
            a if a < 0.9995e-6 => format!("{} ns", three_digits(s * 1e9)),
            a if a < 0.9995e-3 => format!("{} us", three_digits(s * 1e6)),
            a if a < 0.9995 => format!("{} ms", three_digits(s * 1e3)),
            a if a < 60.0 => format!("{} s", three_digits(s)),
            a if a < 3600.0 => format!("{} min", three_digits(s / 60.0)),
            a if a < 48.0 * 3600.0 => format!("{} h", three_digits(self.hours())),
            _ => format!("{} days", three_digits(self.days())),
        };
        f.pad(&text)
    }
}

impl fmt::Display for Usd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0.abs() {
            a if a < 10_000.0 => format!("${:.2}", self.0),
            _ => format!("${}", scaled(self.0, "").replace(' ', "").replace('G', "B")),
        };
        f.pad(&text)
    }
}

macro_rules! display_scaled {
    ($($name:ident $unit:literal),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&scaled(self.0, $unit))
            }
        }
    )*};
}

display_scaled!(BytesPerSecond "B/s", BitsPerSecond "b/s", Flops "FLOP", FlopsPerSecond "FLOP/s");
display_scaled!(TokensPerSecond "tokens/s", Watts "W", Joules "J");

impl fmt::Display for UsdPerHour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("${:.2}/h", self.0))
    }
}

/// Splits `15.6T` into 15.6 and `T`; underscores in the number are allowed.
fn number_and_unit<'a>(text: &'a str, what: &str) -> Result<(f64, &'a str)> {
    let text = text.trim();
    let bad = || Error::user(format!("`{text}` is not {what}"));
    let mut end = 0;
    for (at, c) in text.char_indices() {
        let exponent = (c == 'e' || c == 'E')
            && text[at + 1..].starts_with(|d: char| d.is_ascii_digit() || d == '-' || d == '+');
        let sign = (c == '+' || c == '-') && (at == 0 || text[..at].ends_with(['e', 'E']));
        if !(c.is_ascii_digit() || c == '.' || c == '_' || exponent || sign) {
            break;
        }
        end = at + c.len_utf8();
    }
    let number: f64 = text[..end].replace('_', "").parse().map_err(|_| bad())?;
    if number.is_finite() { Ok((number, text[end..].trim())) } else { Err(bad()) }
}

/// Parses `text` as a number with one of `units`, with or without a metric prefix.
fn parse_unit(text: &str, what: &str, units: &[(&str, f64)], example: &str) -> Result<f64> {
    let (number, suffix) =
        number_and_unit(text, what).map_err(|e| e.hint(format!("write it like `{example}`")))?;
    for (unit, size) in units {
        let Some(prefix) = suffix.strip_suffix(unit) else { continue };
        let prefix = prefix.trim_end();
        if prefix.is_empty() {
            return Ok(number * size);
        }
        let decimal = DECIMAL.iter().find(|(p, _)| *p == prefix || (*p == "k" && prefix == "K"));
        if let Some((_, scale)) = decimal {
            return Ok(number * scale * size);
        }
        // Only amounts of bytes are counted in powers of 1024.
        if let Some((_, scale)) = BINARY.iter().find(|(p, _)| *p == prefix && unit.starts_with('B')) {
            return Ok(number * *scale as f64 * size);
        }
    }
    let unit = if suffix.is_empty() { "no unit".to_owned() } else { format!("unit `{suffix}`") };
    Err(Error::user(format!("`{}` is not {what}: {unit}", text.trim()))
        .hint(format!("write it like `{example}`")))
}

/// A whole number of at most 2^63, as a count has to be.
fn whole(x: f64, text: &str, what: &str) -> Result<u64> {
    // Decimal fractions of a prefix (15.6T) are whole numbers, apart from rounding in the product.
    let rounded = x.round();
    let near = (x - rounded).abs() <= rounded.abs() * 1e-12;
    if near && (0.0..=9.2e18).contains(&rounded) {
        return Ok(rounded as u64);
    }
    Err(Error::user(format!("`{}` is not {what}: expected a whole number, zero or more", text.trim())))
}

impl FromStr for Bytes {
    type Err = Error;
    /// `80 GB` (powers of 1000), `64 KiB` (powers of 1024), `512 B`. Bits are refused.
    fn from_str(text: &str) -> Result<Self> {
        let x = parse_unit(text, "a number of bytes", &[("B", 1.0)], "80 GB` or `64 KiB")?;
        // A part of a byte rounds away: 1.3 GiB has no exact size in bytes.
        whole(x.round(), text, "a number of bytes").map(Bytes)
    }
}

impl FromStr for Tokens {
    type Err = Error;
    /// `15.6T`, `300B`, `2M`, `2048`, each with or without `tokens` after it.
    fn from_str(text: &str) -> Result<Self> {
        let what = "a number of tokens";
        let (number, suffix) =
            number_and_unit(text, what).map_err(|e| e.hint("write it like `15.6T` or `2048`"))?;
        let prefix = suffix.strip_suffix("tokens").unwrap_or(suffix).trim_end();
        let scale = match prefix {
            "" => 1.0,
            "k" | "K" => 1e3,
            "M" => 1e6,
            "B" | "G" => 1e9,
            "T" => 1e12,
            _ => {
                return Err(Error::user(format!("`{}` is not {what}: unit `{suffix}`", text.trim()))
                    .hint("write it like `15.6T` or `2048`"));
            }
        };
        whole(number * scale, text, what).map(Tokens)
    }
}

macro_rules! parse_float {
    ($($name:ident $what:literal [$($unit:literal $size:expr),*] $example:literal;)*) => {$(
        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self> {
                parse_unit(text, $what, &[$(($unit, $size)),*], $example).map($name)
            }
        }
    )*};
}

parse_float! {
    BytesPerSecond "a bandwidth" ["B/s" 1.0, "b/s" 0.125, "bit/s" 0.125, "bps" 0.125] "50 GB/s` or `400 Gb/s";
    BitsPerSecond "a bandwidth" ["b/s" 1.0, "bit/s" 1.0, "bps" 1.0, "B/s" 8.0] "400 Gb/s` or `50 GB/s";
    FlopsPerSecond "a compute rate" ["FLOP/s" 1.0, "FLOPS" 1.0, "FLOPs/s" 1.0] "989 TFLOP/s";
    Flops "an amount of compute" ["FLOP" 1.0, "FLOPs" 1.0] "3.8e25 FLOP";
    TokensPerSecond "a token rate" ["tokens/s" 1.0] "400 ktokens/s";
    Watts "a power" ["W" 1.0] "700 W";
    Joules "an energy" ["J" 1.0, "Wh" 3600.0] "30 GJ` or `5 MWh";
}

impl FromStr for Seconds {
    type Err = Error;
    /// `5 us`, `1.5 s`, `10 min`, `12 h`, `54 days`.
    fn from_str(text: &str) -> Result<Self> {
        const UNITS: [(&str, f64); 10] = [
            ("ns", 1e-9),
            ("us", 1e-6),
            ("ms", 1e-3),
            ("s", 1.0),
            ("min", 60.0),
            ("h", 3600.0),
            ("d", 86_400.0),
            ("day", 86_400.0),
            ("days", 86_400.0),
            ("years", 365.25 * 86_400.0),
        ];
        let (number, unit) =
            number_and_unit(text, "a time").map_err(|e| e.hint("write it like `1.5 s` or `12 h`"))?;
        match UNITS.iter().find(|(name, _)| *name == unit) {
            Some((_, size)) => Ok(Seconds(number * size)),
            None => Err(Error::user(format!("`{}` is not a time: unit `{unit}`", text.trim()))
                .hint("write it like `1.5 s` or `12 h`")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: FromStr<Err = Error> + fmt::Display>(input: &str, expected: &str) {
        let shown = input.parse::<T>().map_or_else(|e| e.to_string(), |x| x.to_string());
        assert_eq!(shown, expected, "{input}");
    }

    #[test]
    fn parse_and_print() {
        check::<Bytes>("80 GB", "74.5 GiB");
        check::<Bytes>("80GiB", "80.0 GiB");
        check::<Bytes>("1.5 KiB", "1.50 KiB");
        check::<Bytes>("512 B", "512 B");
        check::<BytesPerSecond>("400 Gb/s", "50.0 GB/s");
        check::<BytesPerSecond>("3.35 TB/s", "3.35 TB/s");
        check::<BitsPerSecond>("50 GB/s", "400 Gb/s");
        check::<FlopsPerSecond>("989.4 TFLOP/s", "989 TFLOP/s");
        check::<Flops>("3.8e25 FLOP", "38000000 EFLOP");
        check::<Tokens>("15.6T", "15.6T tokens");
        check::<Tokens>("2_048", "2.05k tokens");
        check::<Tokens>("300B tokens", "300B tokens");
        check::<Seconds>("5 us", "5.00 us");
        check::<Seconds>("90 s", "1.50 min");
        check::<Seconds>("54 days", "54.0 days");
        check::<Watts>("700 W", "700 W");
        check::<Joules>("5 MWh", "18.0 GJ");
    }

    #[test]
    fn refuse() {
        check::<Bytes>("80 Gb", "`80 Gb` is not a number of bytes: unit `Gb`");
        check::<Bytes>("80", "`80` is not a number of bytes: no unit");
        check::<Bytes>("-1 B", "`-1 B` is not a number of bytes: expected a whole number, zero or more");
        check::<Bytes>("GB", "`GB` is not a number of bytes");
        check::<BytesPerSecond>("400 Gib/s", "`400 Gib/s` is not a bandwidth: unit `Gib/s`");
        check::<Tokens>("1.5", "`1.5` is not a number of tokens: expected a whole number, zero or more");
        check::<Tokens>("é", "`é` is not a number of tokens");
        check::<Tokens>("1e999", "`1e999` is not a number of tokens");
        check::<Seconds>("3 fortnights", "`3 fortnights` is not a time: unit `fortnights`");
    }

    #[test]
    fn physics() {
        assert_eq!(Flops(6e3) / FlopsPerSecond(2e3), Seconds(3.0));
        assert_eq!(Bytes(100) / Seconds(4.0), BytesPerSecond(25.0));
        assert_eq!(Watts(500.0) * Seconds(7200.0), Joules(3.6e6));
        assert_eq!((Watts(500.0) * Seconds(7200.0)).kilowatt_hours(), 1.0);
        assert_eq!(UsdPerHour(2.0) * Seconds(1800.0), Usd(1.0));
        assert_eq!(Bytes(1) - Bytes(2), Bytes(0));
        assert_eq!(Bytes(u64::MAX) + Bytes(2), Bytes(u64::MAX));
        assert_eq!(Usd(1.5).to_string(), "$1.50");
        assert_eq!(Usd(2.5e9).to_string(), "$2.50B");
        assert_eq!([Bytes(1), Bytes(2)].into_iter().sum::<Bytes>(), Bytes(3));
        assert_eq!(format!("{:>8}", Bytes(512)), "   512 B");
    }
}
