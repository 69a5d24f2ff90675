use spec::{Error, Result};

use crate::batches::{TokenStream, past_the_end};
use crate::split::normalize;

/// Several streams mixed by weight, in Megatron's greedy order: each sample comes from the stream that is
/// furthest behind its share.
///
/// Megatron keeps a 16-bit stream number and a 64-bit sample number for each sample; here the latter is counted from the
/// former, so the blend takes 2 bytes per sample.
pub struct Blend {
    streams: Vec<Box<dyn TokenStream>>,
    ids: Vec<u16>,
    /// Samples drawn from each stream before each block of `BLOCK` ids, block by block.
    before: Vec<u64>,
    sequence: usize,
}

const BLOCK: usize = 256;
/// Megatron stores the stream number in a signed 16-bit integer.
const MAX_STREAMS: usize = 32_767;
/// What each part is asked for beyond its share, because the greedy order may draw a little more
/// (`mid_level_dataset_surplus` in Megatron's configuration).
const SURPLUS: f64 = 0.005;

/// What Megatron asks each part of a blend of `samples` samples for: `ceil(ceil(samples * weight) * 1.005)`.
///
/// ```
/// assert_eq!(data::blend_parts(&[3.0, 7.0], 1000), [302, 704]);
/// ```
pub fn blend_parts(weights: &[f64], samples: u64) -> Vec<u64> {
    shares(weights, samples).map(|share| (share * (1.0 + SURPLUS)).ceil() as u64).collect()
}

/// The length of Megatron's blend for `samples` samples: the shares rounded up, then added.
pub fn blend_len(weights: &[f64], samples: u64) -> u64 {
    shares(weights, samples).map(|share| share as u64).sum()
}

fn shares(weights: &[f64], samples: u64) -> impl Iterator<Item = f64> {
    normalize(weights).into_iter().map(move |w| (samples as f64 * w).ceil())
}

impl Blend {
    /// Blends `samples` samples out of `parts` (stream, weight).
    ///
    /// # Errors
    /// No parts or more than 32,767, weights that are not positive and finite, different sequences, or a part with fewer
    /// samples than the blend draws from it.
    pub fn new(parts: Vec<(Box<dyn TokenStream>, f64)>, samples: u64) -> Result<Self> {
        let (streams, weights): (Vec<_>, Vec<f64>) = parts.into_iter().unzip();
        check_parts(&streams, &weights, samples)?;
        // Megatron normalises twice, once in its builder and once in the blend; the bits follow.
        let weights = normalize(&normalize(&weights));
        let blocks = (samples as usize).div_ceil(BLOCK);
        let mut ids = Vec::with_capacity(samples as usize);
        let mut before = Vec::with_capacity(blocks * streams.len());
        let mut drawn = vec![0u64; streams.len()];
        for i in 0..samples {
            if (i as usize).is_multiple_of(BLOCK) {
                before.extend_from_slice(&drawn);
            }
            let next = furthest_behind(&weights, &drawn, i);
            ids.push(next as u16);
            drawn[next] += 1;
        }
        for (i, (stream, drawn)) in streams.iter().zip(&drawn).enumerate() {
            if *drawn > stream.len() {
                return Err(Error::user(format!(
                    "part {i} of the blend has {} samples, but its weight draws {drawn} of {samples}",
                    stream.len()
                ))
                .hint("lower its weight, or ask for fewer samples"));
            }
        }
        let sequence = streams[0].sequence();
        Ok(Blend { streams, ids, before, sequence })
    }

    /// Which part sample `index` comes from, and which of that part's samples it is.
    pub fn entry(&self, index: u64) -> (usize, u64) {
        let at = index as usize;
        let (block, id) = (at / BLOCK, self.ids[at]);
        let within = self.ids[block * BLOCK..at].iter().filter(|&&other| other == id).count() as u64;
        (usize::from(id), self.before[block * self.streams.len() + usize::from(id)] + within)
    }
}

impl TokenStream for Blend {
    fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
        if index >= self.len() {
            return Err(past_the_end(index, self.len(), "the blend"));
        }
        let (part, sample) = self.entry(index);
        self.streams[part].sample(sample, out)
    }

    fn len(&self) -> u64 {
        self.ids.len() as u64
    }

    fn sequence(&self) -> usize {
        self.sequence
    }
}

/// The stream with the largest `weight * max(i, 1) - drawn`, the first among equals.
fn furthest_behind(weights: &[f64], drawn: &[u64], i: u64) -> usize {
    let total = (i as f64).max(1.0);
    let (mut best, mut most) = (0, f64::NEG_INFINITY);
    for (k, (weight, &drawn)) in weights.iter().zip(drawn).enumerate() {
        let behind = weight * total - drawn as f64;
        if behind > most {
            (best, most) = (k, behind);
        }
    }
    best
}

fn check_parts(streams: &[Box<dyn TokenStream>], weights: &[f64], samples: u64) -> Result<()> {
    let refuse = |what: String| {
        Err(Error::user(what).hint("check data.blend: each part has a prefix and a weight above 0"))
    };
    if streams.is_empty() || streams.len() > MAX_STREAMS {
        return refuse(format!("a blend of {} parts, expected 1 to {MAX_STREAMS}", streams.len()));
    }
    if let Some((i, w)) = weights.iter().enumerate().find(|(_, w)| !w.is_finite() || **w <= 0.0) {
        return refuse(format!("part {i} of the blend has weight {w}"));
    }
    if samples == 0 {
        return Err(Error::user("a blend of 0 samples"));
    }
    let sequence = streams[0].sequence();
    match streams.iter().position(|s| s.sequence() != sequence) {
        Some(i) => Err(Error::failure(format!(
            "part {i} of the blend has sequence {}, part 0 has {sequence}",
            streams[i].sequence()
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sample `i` of part `part` is the tokens `part, i`.
    struct Counting(u32, u64);

    impl TokenStream for Counting {
        fn sample(&self, index: u64, out: &mut [u32]) -> Result<()> {
            out.copy_from_slice(&[self.0, index as u32]);
            Ok(())
        }

        fn len(&self) -> u64 {
            self.1
        }

        fn sequence(&self) -> usize {
            1
        }
    }

    fn blend(weights: &[f64], len: u64, samples: u64) -> Result<Blend> {
        let part = |(i, &w): (usize, &f64)| (Box::new(Counting(i as u32, len)) as Box<dyn TokenStream>, w);
        Blend::new(weights.iter().enumerate().map(part).collect(), samples)
    }

    fn ids(weights: &[f64], samples: u64) -> Vec<usize> {
        let blend = blend(weights, samples, samples).unwrap();
        (0..samples).map(|i| blend.entry(i).0).collect()
    }

    #[test]
    fn golden_order() {
        assert_eq!(ids(&[0.3, 0.7], 10), [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]);
        // Equal weights: the first index wins ties.
        assert_eq!(ids(&[1.0, 1.0], 4), [0, 1, 0, 1]);
    }

    #[test]
    fn each_part_is_read_in_order() {
        let blend = blend(&[0.2, 0.5, 0.3], 2000, 2000).unwrap();
        let mut next = [0; 3];
        for i in 0..2000 {
            let mut out = [0; 2];
            blend.sample(i, &mut out).unwrap();
            assert_eq!(out[1], next[out[0] as usize]);
            next[out[0] as usize] += 1;
        }
        assert_eq!(next, [400, 1000, 600]);
        assert!(blend.sample(2000, &mut [0; 2]).is_err());
    }

    #[test]
    fn refusals() {
        let check = |weights: &[f64], len, samples, expected: &str| {
            let error = blend(weights, len, samples).err().unwrap();
            assert!(error.to_string().contains(expected), "{error}");
        };
        check(&[], 1, 1, "0 parts");
        check(&[1.0, 0.0], 1, 1, "part 1 of the blend has weight 0");
        check(&[f64::NAN], 1, 1, "weight NaN");
        check(&[1.0, 1.0], 3, 10, "part 0 of the blend has 3 samples, but its weight draws 5 of 10");
        check(&[1.0], 1, 0, "0 samples");
    }
}
