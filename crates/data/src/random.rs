//! The two random orders that other trainers fixed: numpy's legacy shuffle and torch's permutation.
//!
//! Both draw from MT19937 seeded by one 32-bit word. They differ in how a draw becomes an index:
//! numpy masks and rejects, torch takes the remainder.

/// The Mersenne Twister with 32-bit output (Matsumoto and Nishimura, 1998), seeded by one word.
///
/// ```
/// let mut twister = data::Mt19937::new(5489);
/// assert_eq!(twister.next_u32(), 3_499_211_612); // the reference implementation's first output
/// ```
#[derive(Clone)]
pub struct Mt19937 {
    state: [u32; WORDS],
    next: usize,
}

const WORDS: usize = 624;
const MIDDLE: usize = 397;

impl Mt19937 {
    /// Seeds as `init_genrand`, numpy's `RandomState(seed)` and torch's CPU generator do.
    pub fn new(seed: u32) -> Self {
        let mut state = [0u32; WORDS];
        state[0] = seed;
        for i in 1..WORDS {
            let previous = state[i - 1];
            state[i] = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
        }
        Mt19937 { state, next: WORDS }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == WORDS {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// The next 64 random bits: the first draw is the high half, in numpy and in torch.
    pub fn next_u64(&mut self) -> u64 {
        let high = u64::from(self.next_u32());
        (high << 32) | u64::from(self.next_u32())
    }

    fn twist(&mut self) {
        for i in 0..WORDS {
            let mixed = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % WORDS] & 0x7fff_ffff);
            let odd = if mixed & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[i] = self.state[(i + MIDDLE) % WORDS] ^ (mixed >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// A uniform draw from `0..=max` by masked rejection (numpy's `random_interval`).
    fn interval(&mut self, max: u64) -> u64 {
        let mask = u64::MAX.checked_shr(max.leading_zeros()).unwrap_or(0);
        loop {
            let draw = match u32::try_from(mask) {
                Ok(0) => return 0,
                Ok(mask) => u64::from(self.next_u32() & mask),
                Err(_) => self.next_u64() & mask,
            };
            if draw <= max {
                return draw;
            }
        }
    }
}

/// Shuffles in place exactly as `numpy.random.RandomState.shuffle` does on a one-dimensional array.
///
/// ```
/// let mut state = data::Mt19937::new(1234);
/// let mut items: Vec<u32> = (0..10).collect();
/// data::numpy_shuffle(&mut state, &mut items);
/// assert_eq!(items, [7, 2, 9, 1, 0, 8, 4, 5, 6, 3]);
/// ```
pub fn numpy_shuffle<T>(state: &mut Mt19937, items: &mut [T]) {
    for i in (1..items.len()).rev() {
        let j = state.interval(i as u64) as usize;
        items.swap(i, j);
    }
}

/// From this many items on torch draws 64 bits an item and shuffles inside out (`randperm_cpu` in ATen's tensor factories).
const TORCH_WIDE_FROM: u64 = (u32::MAX / 20) as u64;

/// `torch.randperm(n, generator)` on the CPU for a generator seeded with `seed`, of which MT19937 takes the low 32 bits.
///
/// ```
/// assert_eq!(data::torch_randperm(10, 0), [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
/// ```
pub fn torch_randperm(n: u64, seed: u64) -> Vec<u64> {
    let mut state = Mt19937::new(seed as u32);
    if n < TORCH_WIDE_FROM { forward(n, &mut state) } else { inside_out(n, &mut state) }
}

/// Each position takes one of the items from it on.
fn forward(n: u64, state: &mut Mt19937) -> Vec<u64> {
    let mut order: Vec<u64> = (0..n).collect();
    for i in 0..n.saturating_sub(1) {
        let draw = u64::from(state.next_u32()) % (n - i);
        order.swap(i as usize, (i + draw) as usize);
    }
    order
}

/// Each item takes one of the positions up to its own.
fn inside_out(n: u64, state: &mut Mt19937) -> Vec<u64> {
    let mut order = Vec::with_capacity(n as usize);
    for i in 0..n {
        let draw = state.next_u64() % (i + 1);
        order.push(i);
        order.swap(i as usize, draw as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_shuffle_continues_the_state() {
        // numpy: s = RandomState(1234); a = arange(10); s.shuffle(a); b = arange(10); s.shuffle(b)
        let mut state = Mt19937::new(1234);
        let mut first: Vec<u32> = (0..10).collect();
        let mut second = first.clone();
        numpy_shuffle(&mut state, &mut first);
        numpy_shuffle(&mut state, &mut second);
        assert_eq!(second, [7, 3, 5, 1, 4, 8, 0, 2, 6, 9]);
    }

    #[test]
    fn inside_out_is_a_permutation() {
        // Equality with torch needs 214,748,364 items, whose permutation under seed 7 starts 93268064, 63068233.
        let mut order = inside_out(1000, &mut Mt19937::new(7));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..1000));
    }

    #[test]
    fn interval_stays_within_its_bounds() {
        let mut state = Mt19937::new(7);
        for max in [0u64, 1, 2, 3, 4, 1000, u64::from(u32::MAX), u64::from(u32::MAX) + 1, u64::MAX] {
            for _ in 0..50 {
                assert!(state.interval(max) <= max);
            }
        }
        assert_eq!(state.interval(0), 0);
    }
}
