//! What the tests share: inputs, comparison, and derivatives by central differences in double precision.

use kernels::Pool;

/// Reproducible numbers, roughly normal.
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Numbers(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// `len` numbers of about unit size.
    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| {
                let sum: f64 = (0..4).map(|_| (self.bits() & 0xffff) as f64 / 65536.0 - 0.5).sum();
                (sum * 1.7) as f32
            })
            .collect()
    }

    pub(crate) fn tokens(&mut self, len: usize, vocab: usize) -> Vec<u32> {
        (0..len).map(|_| self.below(vocab) as u32).collect()
    }
}

pub(crate) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Asserts that `got` is within `tolerance` of `want`, relative to the largest magnitude in `want` or, as inputs
/// are of unit size and results may cancel, to 1.
#[track_caller]
pub(crate) fn close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * size, "element {i}: {got}, expected {want}, size {size}");
    }
}

/// Asserts that `got` is the gradient of `f` at `x`.
#[track_caller]
pub(crate) fn gradient(got: &[f32], x: &[f32], tolerance: f64, f: &dyn Fn(&[f64]) -> f64) {
    const STEP: f64 = 1e-5;
    let mut x = wide(x);
    let want: Vec<f64> = (0..x.len())
        .map(|i| {
            let here = x[i];
            x[i] = here + STEP;
            let above = f(&x);
            x[i] = here - STEP;
            let below = f(&x);
            x[i] = here;
            (above - below) / (2.0 * STEP)
        })
        .collect();
    close(got, &want, tolerance);
}

/// The sum of products.
pub(crate) fn dot(a: &[f64], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, &b)| a * f64::from(b)).sum()
}

/// Adds leaves in the order that a tree states, one addition at a time.
pub(crate) fn add_tree(leaves: &[Vec<f32>], tree: &[u32]) -> Vec<f32> {
    let mut nodes = leaves.to_vec();
    for &radix in tree {
        nodes = nodes
            .chunks(radix as usize)
            .map(|children| {
                children[1..].iter().fold(children[0].clone(), |sum, child| {
                    sum.iter().zip(child).map(|(a, b)| a + b).collect()
                })
            })
            .collect();
    }
    assert_eq!(nodes.len(), 1);
    nodes.remove(0)
}

pub(crate) fn pool() -> Pool {
    Pool::new(2)
}

/// Room for any kernel of the shapes in these tests.
pub(crate) fn scratch(len: usize) -> Vec<f32> {
    vec![f32::NAN; len]
}
