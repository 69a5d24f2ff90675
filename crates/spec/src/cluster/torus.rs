//! Extents of tori, and slices of one size.

use crate::catalog::Entry;
use crate::sum_tree::prime_factors;
use crate::{Error, Result};

/// The largest part of `n` in equal parts of at most `most`: slices that are joined are of one size.
pub(super) fn even_slice(n: usize, most: usize) -> usize {
    let most = most.max(1);
    // Parts of one each are equal, so the search ends.
    (n.div_ceil(most).max(1)..=n).find(|parts| n.is_multiple_of(*parts)).map_or(1, |parts| n / parts)
}

/// Extents as even as possible whose product is `n`: largest prime factors first, each to the smallest extent.
pub(super) fn even_extents(n: usize, dims: usize) -> Vec<usize> {
    let mut extents = vec![1; dims.clamp(1, 4)];
    for factor in prime_factors(n).into_iter().rev() {
        if let Some(smallest) = extents.iter_mut().min() {
            *smallest *= factor;
        }
    }
    extents.sort_unstable();
    extents
}

pub(super) fn parse_shape(shape: &str, platform: Option<&Entry>) -> Result<Vec<usize>> {
    let extents: Vec<usize> = shape.split('x').filter_map(|x| x.parse().ok()).filter(|x| *x > 0).collect();
    if extents.is_empty() || extents.len() != shape.split('x').count() || extents.iter().any(|x| *x > 1 << 16)
    {
        let place = platform.map(|p| p.place.clone()).unwrap_or_default();
        return Err(Error::user(format!("{place}: shape = \"{shape}\", expected extents as 16x16x16"))
            .hint("one extent for each dim of the torus, with x between them"));
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_even_and_keep_the_product() {
        let check = |n: usize, dims: usize, expected: &[usize]| assert_eq!(even_extents(n, dims), expected);
        check(256, 2, &[16, 16]);
        check(4096, 3, &[16, 16, 16]);
        check(64, 3, &[4, 4, 4]);
        check(128, 3, &[4, 4, 8]);
        check(1, 3, &[1, 1, 1]);
        check(7, 2, &[1, 7]);
        check(4, 2, &[2, 2]);
        check(9, 2, &[3, 3]);
        check(25, 3, &[1, 5, 5]);
        check(36, 2, &[6, 6]);
        check(0, 2, &[1, 1]);
        check(12, 0, &[12]);
        check(64, 5, &[2, 2, 4, 4]);
    }

    #[test]
    fn slices_are_of_one_size() {
        let check = |n: usize, most: usize, expected: usize| assert_eq!(even_slice(n, most), expected);
        check(512, 256, 256);
        check(300, 256, 150);
        check(257, 256, 1);
        check(6, 0, 1);
        check(5, 8, 5);
    }

    #[test]
    fn shapes_are_extents_with_an_x_between() {
        let check = |text: &str, expected: Option<&[usize]>| {
            assert_eq!(parse_shape(text, None).ok().as_deref(), expected, "{text}");
        };
        check("16x8x4", Some(&[16, 8, 4]));
        check("65536", Some(&[1 << 16]));
        for text in ["", "x", "16x", "16xx4", "16x0", "16xfour", "16x65537", "16,4"] {
            check(text, None);
        }
    }
}
