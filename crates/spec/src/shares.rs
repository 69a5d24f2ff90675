//! How the elements of a buffer are dealt to the members of a group: the same arithmetic for those who move them and
//! for those who count what is moved.

use std::ops::Range;

/// Boundaries of [`aligned`] shares lie on multiples of so many elements.
pub const ALIGN: usize = 64;

/// Share `index` of `count` elements dealt to `parts` members as evenly as possible, the longer shares first.
///
/// ```
/// use spec::shares::even;
/// assert_eq!([even(7, 3, 0), even(7, 3, 1), even(7, 3, 2)], [0..3, 3..5, 5..7]);
/// ```
pub fn even(count: usize, parts: usize, index: usize) -> Range<usize> {
    let (base, longer) = (count / parts, count % parts);
    let start = index * base + index.min(longer);
    start..start + base + usize::from(index < longer)
}

/// Like [`even`] with boundaries on multiples of [`ALIGN`] elements, so that no two members write one cache line:
/// what each member of an all-reduce adds up and hands to the others.
///
/// ```
/// use spec::shares::aligned;
/// assert_eq!([aligned(130, 2, 0), aligned(130, 2, 1)], [0..128, 128..130]);
/// ```
pub fn aligned(count: usize, parts: usize, index: usize) -> Range<usize> {
    let blocks = even(count.div_ceil(ALIGN), parts, index);
    (blocks.start * ALIGN).min(count)..(blocks.end * ALIGN).min(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(count: usize, parts: usize, share: impl Fn(usize) -> Range<usize>, step: usize) {
        let mut end = 0;
        for index in 0..parts {
            let range = share(index);
            assert_eq!(range.start, end, "share {index} of {count} among {parts}");
            assert!(range.end == count || range.end.is_multiple_of(step));
            end = range.end;
        }
        assert_eq!(end, count);
        assert!(share(0).len() - share(parts - 1).len() < 2 * step);
    }

    #[test]
    fn shares_are_adjacent_whole_and_even() {
        for count in [0, 1, 63, 64, 65, 1000, 4096, 70_001] {
            for parts in 1..10 {
                check(count, parts, |i| even(count, parts, i), 1);
                check(count, parts, |i| aligned(count, parts, i), ALIGN);
            }
        }
    }
}
