//! Days of the calendar: when a price was read, and how old it is.

use std::fmt;

use serde::{Serialize, Serializer};
use spec::{Error, Result};

/// A day, month or year. Serialises as `YYYY`, `YYYY-MM` or `YYYY-MM-DD`.
///
/// What is not said counts as its first: `2025` is compared as 2025-01-01.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Date {
    year: u16,
    month: Option<u8>,
    day: Option<u8>,
}

impl Date {
    /// A day of the calendar.
    pub const fn day(year: u16, month: u8, day: u8) -> Self {
        Date { year, month: Some(month), day: Some(day) }
    }

    /// The day so many days after 1970-01-01 (Howard Hinnant's `civil_from_days`).
    pub fn from_unix_days(days: i64) -> Self {
        let z = days.clamp(0, 1_000_000) + 719_468;
        let (era, of_era) = (z / 146_097, z % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let m = (5 * of_year + 2) / 153;
        let month = if m < 10 { m + 3 } else { m - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Date::day(year as u16, month as u8, (of_year - (153 * m + 2) / 5 + 1) as u8)
    }

    /// Reads `YYYY`, `YYYY-MM` or `YYYY-MM-DD`.
    ///
    /// # Errors
    /// Any other text.
    pub fn parse(text: &str) -> Result<Self> {
        let bad = || {
            Error::user(format!("date \"{text}\", expected YYYY, YYYY-MM or YYYY-MM-DD"))
                .hint("write it like 2026-11 or 2026-11-28")
        };
        let parts: Vec<&str> = text.split('-').collect();
        let digits = |part: &str, width: usize| {
            let fine = part.len() == width && part.bytes().all(|b| b.is_ascii_digit());
            fine.then(|| part.parse::<u16>().ok()).flatten()
        };
        let part = |at: usize, most: u16| match parts.get(at) {
            None => Some(None),
            Some(part) => digits(part, 2).filter(|n| (1..=most).contains(n)).map(|n| Some(n as u8)),
        };
        let year = digits(parts[0], 4).filter(|y| (1950..=2100).contains(y)).ok_or_else(bad)?;
        if parts.len() > 3 {
            return Err(bad());
        }
        let month = part(1, 12).ok_or_else(bad)?;
        let days = match month {
            Some(2) if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => {
                29
            }
            Some(2) => 28,
            Some(4 | 6 | 9 | 11) => 30,
            _ => 31,
        };
        Ok(Date { year, month, day: part(2, days).ok_or_else(bad)? })
    }

    /// Whole months from `self` until `today`; 0 if it is not before.
    ///
    /// ```
    /// use economics::Date;
    /// let of = |text| Date::parse(text).unwrap();
    /// assert_eq!(of("2025-06").months_until(of("2026-11-28")), 17);
    /// assert_eq!(of("2026-11-29").months_until(of("2026-11-28")), 0);
    /// ```
    pub fn months_until(self, today: Date) -> u32 {
        let months = |d: Date| i64::from(d.year) * 12 + i64::from(d.month.unwrap_or(1));
        let short = i64::from(self.day.unwrap_or(1) > today.day.unwrap_or(1));
        (months(today) - months(self) - short).max(0) as u32
    }

    /// Whether it lies wholly after `today`.
    pub(crate) fn is_after(self, today: Date) -> bool {
        let key = |d: Date, of: Date| {
            (d.year, of.month.and(d.month).unwrap_or(0), of.month.and(of.day).and(d.day).unwrap_or(0))
        };
        key(self, self) > key(today, self)
    }
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}", self.year)?;
        self.month.map_or(Ok(()), |m| write!(f, "-{m:02}"))?;
        self.day.map_or(Ok(()), |d| write!(f, "-{d:02}"))
    }
}

impl Serialize for Date {
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_since_1970_are_days_of_the_calendar() {
        let check = |days: i64, expected: &str| assert_eq!(Date::from_unix_days(days).to_string(), expected);
        check(0, "1970-01-01");
        check(59, "1970-03-01");
        check(11_016, "2000-02-29");
        check(20_785, "2026-11-28");
    }

    #[test]
    fn what_is_no_date_is_refused() {
        let no_days = ["2025-01-32", "2025-02-29", "2100-02-29", "2026-02-30", "2026-04-31"];
        for text in
            ["", "20", "2025-13", "2025-00", "2025-1", "2025-01-01-01", "-2025", "nan"].iter().chain(&no_days)
        {
            assert!(Date::parse(text).is_err(), "{text}");
        }
        for text in ["2025", "2025-06", "2025-06-30", "2024-02-29", "2000-02-29"] {
            assert_eq!(Date::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_month_of_today_is_no_future() {
        let today = Date::day(2026, 11, 28);
        let check = |text: &str, after: bool| {
            assert_eq!(Date::parse(text).unwrap().is_after(today), after, "{text}");
        };
        check("2026", false);
        check("2026-11", false);
        check("2026-11-28", false);
        check("2026-11-29", true);
        check("2026-12", true);
        check("2027", true);
    }
}
