//! Counts with a decimal suffix, as people write tokens: `15.6T`.

/// Suffixes and what they stand for; `G` is `B` in numbers of tokens.
const SUFFIXES: [(char, f64); 5] = [('K', 1e3), ('M', 1e6), ('B', 1e9), ('G', 1e9), ('T', 1e12)];

/// A finite number from 0 with or without a suffix and the word `tokens`; case and `_` between digits do not matter.
///
/// ```
/// use spec::units::tokens;
/// assert_eq!(tokens("15.6T"), Some(15.6e12));
/// assert_eq!(tokens("2_048 tokens"), Some(2048.0));
/// assert_eq!(tokens("300 GB"), None);
/// ```
pub fn tokens(text: &str) -> Option<f64> {
    let text = text.trim();
    let text = text.strip_suffix("tokens").map_or(text, str::trim_end);
    let suffix = |(c, scale): (char, f64)| Some((text.strip_suffix([c, c.to_ascii_lowercase()])?, scale));
    let (digits, scale) = SUFFIXES.into_iter().find_map(suffix).unwrap_or((text, 1.0));
    let number: f64 = digits.trim_end().replace('_', "").parse().ok()?;
    Some(number * scale).filter(|x| x.is_finite() && *x >= 0.0)
}

/// A whole number of tokens below 2^63.
pub(crate) fn whole_tokens(text: &str) -> Option<u64> {
    let x = tokens(text)?;
    // Decimal fractions of a suffix (15.6T) are whole numbers, apart from rounding in the product.
    let rounded = x.round();
    ((x - rounded).abs() <= rounded * 1e-12 && rounded <= 9.2e18).then_some(rounded as u64)
}

#[cfg(test)]
mod tests {
    use super::whole_tokens;

    #[test]
    fn whole_numbers_of_tokens() {
        let check = |text: &str, expected: Option<u64>| assert_eq!(whole_tokens(text), expected, "{text}");
        check("15.6T", Some(15_600_000_000_000));
        check(" 2_048 ", Some(2048));
        check("300B tokens", Some(300_000_000_000));
        check("2k", Some(2000));
        check("1e6", Some(1_000_000));
        for text in ["1.5", "-1", "é", "1e999", "nan", "inf", "", "tokens", "T", "80 GB", "1e19", "2 Mi"] {
            check(text, None);
        }
    }
}
