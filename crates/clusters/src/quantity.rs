//! Times and amounts of memory as schedulers write them.

use std::fmt;

use spec::{Error, Result};

const MINUTE_S: u64 = 60;
const HOUR_S: u64 = 3600;
const DAY_S: u64 = 86_400;

/// A whole number of seconds, from 1 up to a thousand years.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// The seconds.
    pub seconds: u64,
}

/// More is a mistake, and keeps sums of times far from the end of their type.
const LONGEST_S: u64 = 366_000 * DAY_S;

impl Time {
    /// Reads Slurm's formats (`sbatch --time`): `MINUTES`, `MINUTES:SECONDS`, `HOURS:MINUTES:SECONDS`, `DAYS-HOURS`,
    /// `DAYS-HOURS:MINUTES`, `DAYS-HOURS:MINUTES:SECONDS`; and a number with its unit, `90s`, `30m`, `4h`, `2d`.
    ///
    /// ```
    /// use clusters::Time;
    /// let seconds = |text| Time::parse("--time", text).map(|t| t.seconds).ok();
    /// assert_eq!(seconds("30"), Some(30 * 60));
    /// assert_eq!(seconds("4:00:00"), seconds("4h"));
    /// assert_eq!(seconds("1-12"), seconds("36h"));
    /// assert_eq!(seconds("4:75:00"), None);
    /// ```
    ///
    /// # Errors
    /// Anything else, in the name of `flag`.
    pub fn parse(flag: &str, text: &str) -> Result<Time> {
        let seconds = units(text).or_else(|| clock(text)).filter(|s| (1..=LONGEST_S).contains(s));
        seconds.map(|seconds| Time { seconds }).ok_or_else(|| {
            Error::user(format!("{flag}={text}: expected a time, longer than nothing"))
                .hint("30 (minutes), 4:00:00, 2-12:00:00 (days first), or 90s, 30m, 4h, 2d")
        })
    }
}

/// As `sbatch` reads it: `HH:MM:SS`, with days in front where there are any.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, rest) = (self.seconds / DAY_S, self.seconds % DAY_S);
        if days > 0 {
            write!(f, "{days}-")?;
        }
        write!(f, "{:02}:{:02}:{:02}", rest / HOUR_S, rest % HOUR_S / MINUTE_S, rest % MINUTE_S)
    }
}

/// Digits alone: `parse` would take a sign.
fn whole(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn units(text: &str) -> Option<u64> {
    let unit_s = match text.chars().next_back()? {
        's' => 1,
        'm' => MINUTE_S,
        'h' => HOUR_S,
        'd' => DAY_S,
        _ => return None,
    };
    whole(&text[..text.len() - 1])?.checked_mul(unit_s)
}

fn clock(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(whole(days)?), rest),
        None => (None, text),
    };
    let parts = rest.split(':').map(whole).collect::<Option<Vec<u64>>>()?;
    let (hours, minutes, seconds) = match (days, &parts[..]) {
        (None, [minutes]) => (0, *minutes, 0),
        (None, [minutes, seconds]) => (0, *minutes, *seconds),
        (_, [hours, minutes, seconds]) => (*hours, *minutes, *seconds),
        (Some(_), [hours]) => (*hours, 0, 0),
        (Some(_), [hours, minutes]) => (*hours, *minutes, 0),
        _ => return None,
    };
    // The largest unit may be any number, the others are remainders.
    let hours_fit = days.is_none() || hours < 24;
    let minutes_fit = (days.is_none() && parts.len() < 3) || minutes < 60;
    if !hours_fit || !minutes_fit || (parts.len() > 1 && seconds >= 60) {
        return None;
    }
    let days_s = days.unwrap_or(0).checked_mul(DAY_S)?;
    days_s
        .checked_add(hours.checked_mul(HOUR_S)?)?
        .checked_add(minutes.checked_mul(MINUTE_S)?)?
        .checked_add(seconds)
}

/// An amount of memory or storage, at least one MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory {
    /// The bytes.
    pub bytes: u64,
}

/// What a letter alone means: schedulers differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bare {
    /// `64G` is 64 GiB, as Slurm reads it.
    Binary,
    /// `64G` is 64 GB, as Kubernetes reads it.
    Decimal,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

impl Memory {
    /// Reads a whole number with a unit: `64GiB` and `64Gi` are binary, `64GB` is decimal, and `64G` is what `bare` says.
    ///
    /// ```
    /// use clusters::{Memory, quantity::Bare};
    /// let bytes = |text, bare| Memory::parse("--mem", text, bare).map(|m| m.bytes).ok();
    /// assert_eq!(bytes("64G", Bare::Binary), bytes("64GiB", Bare::Decimal));
    /// assert_eq!(bytes("64G", Bare::Decimal), Some(64_000_000_000));
    /// assert_eq!(bytes("64", Bare::Binary), None);
    /// ```
    ///
    /// # Errors
    /// No unit, an unknown one, less than a MiB or more than 2^63 bytes, in the name of `flag`.
    pub fn parse(flag: &str, text: &str, bare: Bare) -> Result<Memory> {
        let wrong = |what: &str| {
            Error::user(format!("{flag}={text}: expected {what}"))
                .hint("64GiB or 64Gi (2^30 bytes), 64GB (10^9)")
        };
        let end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| wrong("an amount with its unit"))?;
        let count =
            whole(&text[..end]).filter(|_| end > 0).ok_or_else(|| wrong("a whole number and its unit"))?;
        let unit = unit_bytes(&text[end..], bare).ok_or_else(|| wrong("one of the units K, M, G, T"))?;
        let bytes = count.checked_mul(unit).filter(|b| *b <= i64::MAX as u64);
        let bytes = bytes.ok_or_else(|| wrong("an amount that a machine has"))?;
        if bytes < MIB {
            return Err(wrong("at least 1 MiB"));
        }
        Ok(Memory { bytes })
    }

    /// In Slurm's unit of a MiB, rounded up.
    pub fn slurm(self) -> String {
        if self.bytes.is_multiple_of(GIB) {
            format!("{}G", self.bytes / GIB)
        } else {
            format!("{}M", self.bytes.div_ceil(MIB))
        }
    }

    /// As a Kubernetes quantity, exactly.
    pub fn quantity(self) -> String {
        let of = |(unit, suffix): (u64, &str)| {
            self.bytes.is_multiple_of(unit).then(|| format!("{}{suffix}", self.bytes / unit))
        };
        let units = [(GIB, "Gi"), (1_000_000_000, "G"), (MIB, "Mi"), (1_000_000, "M"), (KIB, "Ki")];
        units.into_iter().find_map(of).unwrap_or_else(|| self.bytes.to_string())
    }
}

fn unit_bytes(text: &str, bare: Bare) -> Option<u64> {
    let mut rest = text.chars();
    let power = match rest.next()?.to_ascii_uppercase() {
        'K' => 1,
        'M' => 2,
        'G' => 3,
        'T' => 4,
        _ => return None,
    };
    let base = match (rest.as_str(), bare) {
        ("iB" | "i", _) | ("", Bare::Binary) => KIB,
        ("B", _) | ("", Bare::Decimal) => 1000,
        _ => return None,
    };
    Some(base.pow(power))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times() {
        let check = |text: &str, expected: Option<&str>| {
            let found = Time::parse("--time", text).map(|t| t.to_string());
            assert_eq!(found.ok().as_deref(), expected, "{text}");
        };
        check("30", Some("00:30:00"));
        check("90", Some("01:30:00"));
        check("90:30", Some("01:30:30"));
        check("30:00:00", Some("1-06:00:00"));
        check("1-0", Some("1-00:00:00"));
        check("1-2:03", Some("1-02:03:00"));
        check("1-2:03:04", Some("1-02:03:04"));
        check("120s", Some("00:02:00"));
        check("2d", Some("2-00:00:00"));
        for wrong in [
            "",
            "0",
            "0s",
            "-1",
            "+1",
            "1:60",
            "1:60:00",
            "1-24",
            "1-1:60",
            "1.5h",
            "4 h",
            "h",
            "1:2:3:4",
            "1-",
            "-",
            "99999999999999999999",
            "9999999999d",
        ] {
            check(wrong, None);
        }
        let error = Time::parse("--grace", "4hours").unwrap_err();
        assert!(error.to_string().contains("--grace=4hours") && error.exit_code() == 2, "{error}");
    }

    #[test]
    fn amounts_of_memory() {
        let check = |text: &str, slurm: Option<&str>, quantity: Option<&str>| {
            let of = |bare| Memory::parse("--mem", text, bare).ok();
            assert_eq!(of(Bare::Binary).map(Memory::slurm).as_deref(), slurm, "{text}");
            assert_eq!(of(Bare::Decimal).map(Memory::quantity).as_deref(), quantity, "{text}");
        };
        check("64G", Some("64G"), Some("64G"));
        check("64GiB", Some("64G"), Some("64Gi"));
        check("64Gi", Some("64G"), Some("64Gi"));
        check("500M", Some("500M"), Some("500M"));
        check("1GB", Some("954M"), Some("1G"));
        check("1025kib", None, None);
        check("1025KiB", Some("2M"), Some("1025Ki"));
        for wrong in ["", "64", "G", "64X", "64GIB", "-64G", "6.4G", "64 G", "1K", "99999999999T", "0G"] {
            check(wrong, None, None);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(seconds in 1..LONGEST_S, mib in 1..1_u64 << 30) {
            let time = Time { seconds };
            prop_assert_eq!(Time::parse("", &time.to_string()).unwrap(), time);
            let memory = Memory { bytes: mib * MIB };
            prop_assert_eq!(Memory::parse("", &memory.slurm(), Bare::Binary).unwrap(), memory);
            prop_assert_eq!(Memory::parse("", &memory.quantity(), Bare::Decimal).unwrap(), memory);
        }

        #[test]
        fn no_text_breaks_the_readers(text in "\\PC{0,12}|[0-9dhms:KMGTi-]{0,12}") {
            let _ = (Time::parse("", &text), Memory::parse("", &text, Bare::Binary));
        }
    }
}
