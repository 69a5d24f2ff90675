//! A hash that is the same in every version and on every machine, which the standard library's do not promise.

/// FNV-1a of 64 bits (Fowler, Noll and Vo; RFC 9923). Not for data that somebody might choose against us.
///
/// ```
/// // RFC 9923, appendix C: of nothing, and of "a".
/// assert_eq!(spec::hash::fnv1a([]), 0xcbf2_9ce4_8422_2325);
/// assert_eq!(spec::hash::fnv1a(*b"a"), 0xaf63_dc4c_8601_ec8c);
/// ```
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
