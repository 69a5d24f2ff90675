//! The optimiser update and the norm of gradients.

use half::bf16;

use crate::pool::{Parts, Pool};
use crate::simd::{LANES, STREAM, Simd, ask_ahead, kernel};

/// One AdamW step with decoupled weight decay (Loshchilov and Hutter 2019), in PyTorch's formula and order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 for norms and biases.
    pub weight_decay: f64,
    /// The number of this step, counted from 1.
    pub step: u64,
    /// What gradients are multiplied by first: the clipping factor.
    pub grad_scale: f32,
}

/// The scalars of a step, computed in double precision and rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWScalars {
    /// `1 - lr weight_decay`.
    pub keep: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// `sqrt(1 - beta2^step)`.
    pub root_correction2: f32,
    /// Added to the root.
    pub eps: f32,
    /// `-lr / (1 - beta1^step)`.
    pub minus_step_size: f32,
    /// What gradients are multiplied by first.
    pub grad_scale: f32,
}

impl AdamW {
    /// What the update of an element is computed with.
    pub fn scalars(&self) -> AdamWScalars {
        let correction1 = 1.0 - power(self.beta1, self.step);
        let correction2 = 1.0 - power(self.beta2, self.step);
        AdamWScalars {
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            one_minus_beta1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            one_minus_beta2: (1.0 - self.beta2) as f32,
            root_correction2: correction2.sqrt() as f32,
            eps: self.eps as f32,
            minus_step_size: (-(self.lr / correction1)) as f32,
            grad_scale: self.grad_scale,
        }
    }
}

/// A power by repeated multiplication: the standard library's may differ between systems.
pub(crate) fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut result = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    result
}

/// Updates the weights `w` and the moments `m` and `v`.
pub fn adamw(pool: &Pool, step: &AdamW, w: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32]) {
    let len = grad.len();
    assert_eq!((w.len(), m.len(), v.len()), (len, len, len));
    let scalars = step.scalars();
    let (w, m, v) = (Parts::new(w), Parts::new(m), Parts::new(v));
    pool.rows(len, 2, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        let (w, m, v) = unsafe { (w.part(range.clone()), m.part(range.clone()), v.part(range.clone())) };
        update(scalars, w, m, v, &grad[range], None);
    });
}

/// [`adamw`] on master weights `w`, which also writes them rounded to `out`.
pub fn adamw_bf16(
    pool: &Pool,
    step: &AdamW,
    w: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    grad: &[f32],
    out: &mut [bf16],
) {
    let len = grad.len();
    assert_eq!((w.len(), m.len(), v.len(), out.len()), (len, len, len, len));
    let scalars = step.scalars();
    let (w, m, v, out) = (Parts::new(w), Parts::new(m), Parts::new(v), Parts::new(out));
    pool.rows(len, 2, &|range, _| {
        // SAFETY: tasks have disjoint ranges.
        let (w, m, v, out) = unsafe {
            (w.part(range.clone()), m.part(range.clone()), v.part(range.clone()), out.part(range.clone()))
        };
        update(scalars, w, m, v, &grad[range], Some(out));
    });
}

kernel! { fn update(
    c: AdamWScalars, w: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], mut_out: Option<&mut [bf16]>
) = |s: S| {
    let mut out = mut_out;
    for j in (0..grad.len()).step_by(LANES) {
        let (w, m, v) = (&mut w[j..], &mut m[j..], &mut v[j..]);
        ask_ahead(s, [w.as_ptr(), m.as_ptr(), v.as_ptr(), grad[j..].as_ptr()], STREAM);
        let new = update_lanes(s, c, s.load(w), m, v, s.load(&grad[j..]));
        s.store(w, new);
        if let Some(out) = &mut out {
            s.store_bf16(&mut out[j..], new);
        }
    }
} }

#[inline(always)]
fn update_lanes<S: Simd>(s: S, c: AdamWScalars, w: S::V, m: &mut [f32], v: &mut [f32], grad: S::V) -> S::V {
    let g = s.mul(grad, s.splat(c.grad_scale));
    let w = s.mul(w, s.splat(c.keep));
    let m_old = s.load(m);
    let m_new = s.add(m_old, s.mul(s.splat(c.one_minus_beta1), s.sub(g, m_old)));
    let square = s.mul(s.mul(s.splat(c.one_minus_beta2), g), g);
    let v_new = s.add(s.mul(s.load(v), s.splat(c.beta2)), square);
    s.store(m, m_new);
    s.store(v, v_new);
    let root = s.add(s.div(s.sqrt(v_new), s.splat(c.root_correction2)), s.splat(c.eps));
    s.add(w, s.div(s.mul(s.splat(c.minus_step_size), m_new), root))
}

/// The sum of squares of each run of `chunk` elements, in double precision and fixed order. The norm of a gradient is
/// the root of the sum of `partials`, whichever rank computed them.
pub fn sum_squares(pool: &Pool, x: &[f32], partials: &mut [f64], chunk: usize) {
    assert!(chunk > 0 && partials.len() == x.len().div_ceil(chunk), "one partial per chunk");
    let partials = Parts::new(partials);
    pool.rows(x.len().div_ceil(chunk), chunk, &|range, _| {
        for i in range {
            let part = &x[i * chunk..x.len().min((i + 1) * chunk)];
            // SAFETY: tasks have disjoint chunks.
            let partial = unsafe { partials.part(i..i + 1) };
            partial[0] = squares(part);
        }
    });
}

kernel! { fn squares(x: &[f32]) -> f64 = |s: S| {
    let mut sums = [0.0f64; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        ask_ahead(s, [x.as_ptr()], STREAM);
        for (sum, &x) in sums.iter_mut().zip(x) {
            // The square of an f32 is exact in an f64.
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
} }
