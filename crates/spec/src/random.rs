//! Numbers that pass as random and follow from a counter: SplitMix64 of Steele, Lea and Flood, "Fast splittable
//! pseudorandom number generators", OOPSLA 2014, figure 17.

/// The increment of the generator's state: 2^64 over the golden ratio.
pub const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser: a bijection that scatters bits, and leaves 0 where it is.
pub fn scatter(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What the generator gives at state `x`: 0 is scattered too.
///
/// ```
/// // The first outputs from state 0, as other implementations have them.
/// use spec::random::{GOLDEN, mix};
/// assert_eq!((mix(0), mix(GOLDEN)), (0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4));
/// ```
pub fn mix(x: u64) -> u64 {
    scatter(x.wrapping_add(GOLDEN))
}

/// The generator: numbers one after another from a state.
#[derive(Clone, Debug)]
pub struct SplitMix(pub u64);

impl SplitMix {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        scatter(self.0)
    }
}
