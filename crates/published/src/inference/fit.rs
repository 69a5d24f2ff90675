//! A serving stack's constants fitted on published figures.
//!
//! Each constant is moved up and down in turn, by less and less, as long as errors fall (coordinate descent on the
//! logarithm of predicted over published, outliers counting less). Constants that a stack's rows say nothing of stay.

use inference::stack::Stack;

use super::Prepared;

/// Rounds over all constants.
const ROUNDS: usize = 60;
/// The first move, as a share of the constant.
const FIRST_MOVE: f64 = 0.2;
/// A move grows by this where it helped, and shrinks by this where it did not.
const LONGER: f64 = 1.3;
const SHORTER: f64 = 0.6;
/// Errors beyond this (in log) count linearly.
const HUBER: f64 = 0.15;
/// How much an error counts that a constant has for being far from where it began, for each doubling.
const RIDGE: f64 = 0.002;
/// An error of rows that cannot be estimated at all.
const REFUSED: f64 = 10.0;

/// A constant of a stack: its name, where it is, and between which values it means what its name says.
pub struct Constant {
    /// Its key in `catalog/serving.toml`.
    pub name: &'static str,
    of: fn(&mut Stack) -> Option<&mut f64>,
    bounds: (f64, f64),
}

impl Constant {
    /// Its value in `stack`, if the stack has it.
    pub fn value(&self, stack: &Stack) -> Option<f64> {
        (self.of)(&mut stack.clone()).copied()
    }
}

/// All constants that can be fitted.
pub const CONSTANTS: [Constant; 16] = [
    Constant { name: "kernel_us", of: |s| Some(&mut s.kernel_us), bounds: (1.0, 15.0) },
    Constant { name: "quantize_kernels", of: |s| Some(&mut s.quantize_kernels), bounds: (0.1, 3.0) },
    Constant { name: "expert_kernels", of: |s| Some(&mut s.expert_kernels), bounds: (1.0, 15.0) },
    Constant { name: "all_reduce_us", of: |s| Some(&mut s.all_reduce_us), bounds: (2.0, 30.0) },
    Constant { name: "step.ampere", of: |s| s.all_reduce_step_us.get_mut("ampere"), bounds: (0.5, 20.0) },
    Constant { name: "step.other", of: |s| s.all_reduce_step_us.get_mut("other"), bounds: (0.5, 20.0) },
    Constant { name: "host_us", of: |s| Some(&mut s.host_us), bounds: (10.0, 10_000.0) },
    Constant { name: "host_request_us", of: |s| Some(&mut s.host_request_us), bounds: (0.1, 300.0) },
    Constant { name: "products", of: |s| Some(&mut s.products), bounds: (0.3, 1.0) },
    Constant { name: "memory", of: |s| Some(&mut s.memory), bounds: (0.5, 0.92) },
    Constant { name: "cache", of: |s| Some(&mut s.cache), bounds: (0.3, 0.96) },
    Constant { name: "overlap", of: |s| Some(&mut s.overlap), bounds: (0.05, 1.0) },
    Constant { name: "reread", of: |s| Some(&mut s.reread), bounds: (0.01, 1.0) },
    Constant { name: "widen8", of: |s| Some(&mut s.widen8), bounds: (0.3, 1.0) },
    Constant { name: "widen4", of: |s| Some(&mut s.widen4), bounds: (0.3, 1.0) },
    Constant { name: "family.blackwell", of: |s| s.by_family.get_mut("blackwell"), bounds: (0.3, 1.0) },
];

/// Fits the named constants of `start` on `rows`.
pub fn fit(rows: &[Prepared], start: &Stack, names: &[&str]) -> Stack {
    let wanted = |c: &&Constant| names.contains(&c.name);
    let constants: Vec<&Constant> = CONSTANTS.iter().filter(wanted).collect();
    let loss = |stack: &Stack| {
        let errors: f64 = rows.iter().map(|row| row_loss(row, stack)).sum();
        let moved = constants.iter().filter_map(|c| Some((c.value(stack)? / c.value(start)?).log2()));
        errors + RIDGE * moved.map(|m| m * m).sum::<f64>()
    };
    let mut best = start.clone();
    let mut least = loss(&best);
    let mut moves = vec![FIRST_MOVE; constants.len()];
    for _ in 0..ROUNDS {
        for (constant, by) in constants.iter().zip(&mut moves) {
            let tried = [1.0 + *by, 1.0 / (1.0 + *by)].into_iter().filter_map(|factor| {
                let mut stack = best.clone();
                let value = (constant.of)(&mut stack)?;
                *value = (*value * factor).clamp(constant.bounds.0, constant.bounds.1);
                Some((loss(&stack), stack))
            });
            match tried.filter(|t| t.0 < least).min_by(|a, b| a.0.total_cmp(&b.0)) {
                Some((found, stack)) => {
                    (least, best) = (found, stack);
                    *by *= LONGER;
                }
                None => *by *= SHORTER,
            }
        }
    }
    best
}

fn row_loss(row: &Prepared, stack: &Stack) -> f64 {
    let Ok(compared) = row.compare(stack) else { return REFUSED };
    let each = compared.figures.iter().map(|f| {
        let error = (1.0 + f.error).ln().abs();
        if error < HUBER { error * error } else { HUBER * (2.0 * error - HUBER) }
    });
    each.sum::<f64>() / compared.figures.len() as f64
}
