//! Initial weights from a counter-based generator: element `i` of parameter `name` under `seed` is a pure function of
//! the three, whoever holds it and whatever the layout.

use program::{ParamKey, ParamPart};
use spec::random::mix;
use spec::{Error, ModelSpec, Result};

/// Elements from which several threads fill a box: below, starting them takes longer.
const SPREAD: usize = 1 << 22;

/// Fills the rank's box of a parameter, row by row; `out` has `ld` elements a row.
///
/// # Errors
/// If the system starts no more threads.
pub(crate) fn fill(model: &ModelSpec, seed: u64, part: &ParamPart, out: &mut [f32], ld: usize) -> Result<()> {
    let (scheme, key) = (Scheme::of(model, part.key), key(seed, &part.name));
    let row = |r: usize, row: &mut [f32]| {
        let first = (part.row0 + r) * part.global.1 + part.col0;
        for (c, x) in row[..part.cols].iter_mut().enumerate() {
            *x = match scheme {
                Scheme::Constant(v) => v,
                Scheme::Normal(std) => normal(key, (first + c) as u64) * std,
            };
        }
    };
    let many = part.rows * part.cols >= SPREAD;
    let threads = if many { std::thread::available_parallelism().map_or(1, usize::from) } else { 1 };
    let rows = part.rows.div_ceil(threads).max(1);
    let fill = |(i, chunk): (usize, &mut [f32])| {
        chunk.chunks_mut(ld).enumerate().for_each(|(r, out)| row(i * rows + r, out));
    };
    let chunks = out[..part.rows * ld].chunks_mut(rows * ld).enumerate();
    if threads == 1 {
        chunks.for_each(fill);
        return Ok(());
    }
    std::thread::scope(|scope| {
        for chunk in chunks {
            let fill = &fill;
            let thread = std::thread::Builder::new().spawn_scoped(scope, move || fill(chunk));
            thread.map_err(|e| {
                Error::failure(format!("start {threads} threads: {e}"))
                    .hint("raise the limit on threads: ulimit -u")
            })?;
        }
        Ok(())
    })
}

#[derive(Clone, Copy)]
enum Scheme {
    Constant(f32),
    Normal(f32),
}

impl Scheme {
    /// Norm weights 1, biases 0, matrices normal; projections back into the residual stream are scaled by
    /// `1 / sqrt(2 L)` so that its variance does not grow with depth (Radford et al. 2019, section 2.3).
    fn of(model: &ModelSpec, of: ParamKey) -> Scheme {
        if of.bias {
            Scheme::Constant(0.0)
        } else if of.role.is_norm() {
            Scheme::Constant(1.0)
        } else if of.role.is_residual_out() {
            Scheme::Normal(model.init_std / (2.0 * model.layers as f32).sqrt())
        } else {
            Scheme::Normal(model.init_std)
        }
    }
}

fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |h, b| mix(h ^ u64::from(b)))
}

/// The sum of twelve uniform 16-bit numbers, centred: mean 0, variance 1, at most 6 (Irwin-Hall). Integers only, so
/// that no mathematical library can change a bit.
fn normal(key: u64, counter: u64) -> f32 {
    let sum: u64 = (0..3)
        .map(|i| mix(key ^ mix(3 * counter + i)))
        .map(|w| (w & 0xffff) + (w >> 16 & 0xffff) + (w >> 32 & 0xffff) + (w >> 48))
        .sum();
    ((sum as f64 - 12.0 * 32767.5) / 65536.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let n = 100_000;
        let xs: Vec<f64> = (0..n).map(|i| f64::from(normal(key(7, "w"), i))).collect();
        let mean = xs.iter().sum::<f64>() / n as f64;
        let var = xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.02 && (var - 1.0).abs() < 0.02, "{mean} {var}");
    }

    #[test]
    fn a_box_holds_the_same_numbers_as_the_whole() {
        let model = ModelSpec::preset("tiny").expect("a preset");
        let whole = ParamPart {
            name: "layers.0.mlp.down.weight".into(),
            key: ParamKey { place: program::Place::Layer(0), role: program::Role::Down, bias: false },
            global: (6, 10),
            dims: [6, 10],
            row0: 0,
            rows: 6,
            col0: 0,
            cols: 10,
            local_row0: 0,
        };
        let part = ParamPart { row0: 2, rows: 3, col0: 4, cols: 5, ..whole.clone() };
        let (mut a, mut b) = (vec![0.0; 60], vec![0.0; 15]);
        fill(&model, 3, &whole, &mut a, 10).expect("threads");
        fill(&model, 3, &part, &mut b, 5).expect("threads");
        for r in 0..3 {
            assert_eq!(a[(2 + r) * 10 + 4..][..5], b[r * 5..][..5]);
        }
    }
}
