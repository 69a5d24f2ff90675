use std::ops::Range;

use spec::{Error, Result};

/// Shares of the sequences for training, validation and test, as Megatron's `969,30,1`.
///
/// ```
/// let split = data::Split::parse("969,30,1")?;
/// assert_eq!(split.ranges(1000), [0..969, 969..999, 999..1000]);
/// # Ok::<(), spec::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    /// Cumulative fractions: `[start, end)` of each part.
    bookends: [(f64, f64); 3],
}

impl Split {
    /// Reads up to three non-negative numbers separated by commas; what is missing is 0.
    ///
    /// # Errors
    /// Not numbers, more than three, negative, infinite, or all zero.
    pub fn parse(text: &str) -> Result<Split> {
        let refuse = |what: &str| {
            Err(Error::user(format!("data split {text:?}: {what}"))
                .hint("give shares of training, validation and test, such as \"99,1,0\""))
        };
        let mut weights = Vec::new();
        for part in text.split(',') {
            match part.trim().parse::<f64>() {
                Ok(w) if w.is_finite() && w >= 0.0 => weights.push(w),
                _ => return refuse(&format!("{:?} is not a number from 0 up", part.trim())),
            }
        }
        if weights.len() > 3 {
            return refuse(&format!("{} shares, expected at most 3", weights.len()));
        }
        weights.resize(3, 0.0);
        if weights.iter().sum::<f64>() <= 0.0 {
            return refuse("all shares are zero");
        }
        let [a, b, c] = [0, 1, 2].map(|i| normalize(&weights)[i]);
        Ok(Split { bookends: [(0.0, a), (a, a + b), (a + b, a + b + c)] })
    }

    /// The sequences of training, validation and test among `sequences`: contiguous, rounded half to even.
    pub fn ranges(&self, sequences: usize) -> [Range<usize>; 3] {
        self.bookends.map(|(start, end)| {
            if end <= start {
                return 0..0;
            }
            let at =
                |fraction: f64| ((fraction * sequences as f64).round_ties_even() as usize).min(sequences);
            at(start)..at(end)
        })
    }
}

/// Divides by the sum, which is added up in numpy's order so that the quotients have numpy's bits.
pub(crate) fn normalize(weights: &[f64]) -> Vec<f64> {
    let sum = numpy_sum(weights);
    weights.iter().map(|w| w / sum).collect()
}

/// numpy's pairwise summation of a contiguous f64 array.
fn numpy_sum(values: &[f64]) -> f64 {
    const BLOCK: usize = 128;
    if values.len() < 8 {
        return values.iter().fold(0.0, |sum, v| sum + v);
    }
    if values.len() > BLOCK {
        let half = values.len() / 2;
        let (left, right) = values.split_at(half - half % 8);
        return numpy_sum(left) + numpy_sum(right);
    }
    let (groups, rest) = values.as_chunks::<8>();
    let mut lanes = groups[0];
    for group in &groups[1..] {
        for (lane, value) in lanes.iter_mut().zip(group) {
            *lane += value;
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    rest.iter().fold(((a + b) + (c + d)) + ((e + f) + (g + h)), |sum, v| sum + v)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, sequences: usize, expected: [Range<usize>; 3]) {
        assert_eq!(Split::parse(text).unwrap().ranges(sequences), expected, "{text} of {sequences}");
    }

    #[test]
    fn ranges_follow_megatron() {
        check("99,1,0", 200, [0..198, 198..200, 0..0]);
        check("1", 7, [0..7, 0..0, 0..0]);
        check("100,0,0", 3, [0..3, 0..0, 0..0]);
        // round(0.5 * 5) is 2 in Python: half to even.
        check("1,1", 5, [0..2, 2..5, 0..0]);
        check("969, 30, 1", 10, [0..10, 10..10, 10..10]);
    }

    #[test]
    fn refusals_name_the_text() {
        for text in ["", "a,b", "-1,2", "1,2,3,4", "0,0,0", "inf", "nan"] {
            let error = Split::parse(text).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }
}
