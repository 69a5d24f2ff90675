//! A long message as a short one: 16 bytes for every 4 KiB, fast enough not to show beside a socket.
//!
//! CLNH (Lemire and Kaser, *Faster 64-bit universal hashing using carry-less multiplications*, 2015, section 4; the
//! carry-less form of NH, Black et al., *UMAC*, 1999): of 64-bit words `m` and secret words `k`, the sum over GF(2)\[x\] of
//! `(m[2i] + k[2i]) (m[2i+1] + k[2i+1])`. Two different chunks of one length have one sum with probability at most
//! 2^-64 over the choice of `k`, whoever chose them, as long as nothing of `k` is known. So the sums must not be seen:
//! they go into a keyed hash, and only its outcome travels.

/// Bytes that become one sum. The key is as long, and stays in the nearest cache.
pub(super) const CHUNK_BYTES: usize = 4096;
/// Bytes of one sum.
pub(super) const SUM_BYTES: usize = 16;

/// On the border of a cache line: the widest loads would else touch two each.
#[repr(align(64))]
struct Words([u8; CHUNK_BYTES]);

/// The secret words, and how this processor multiplies.
pub(super) struct Digest {
    key: Box<Words>,
    sum: fn(&[u8; CHUNK_BYTES], &[u8]) -> u128,
}

impl Digest {
    pub(super) fn new(key: Box<[u8; CHUNK_BYTES]>) -> Digest {
        Digest { key: Box::new(Words(*key)), sum: fastest() }
    }

    /// The sum of a chunk. What is shorter than [`CHUNK_BYTES`] is filled up with zeros to whole pairs of words; its
    /// length must be known from elsewhere.
    pub(super) fn sum(&self, chunk: &[u8]) -> [u8; SUM_BYTES] {
        let (whole, rest) = chunk.split_at(chunk.len() / SUM_BYTES * SUM_BYTES);
        let mut sum = (self.sum)(&self.key.0, whole);
        if !rest.is_empty() {
            let mut last = [0; SUM_BYTES];
            last[..rest.len()].copy_from_slice(rest);
            let key = u128_at(&self.key.0, whole.len());
            sum ^= multiply(u128::from_le_bytes(last) ^ key);
        }
        sum.to_le_bytes()
    }
}

fn u128_at(bytes: &[u8], at: usize) -> u128 {
    bytes.get(at..at + SUM_BYTES).and_then(|b| b.try_into().ok()).map_or(0, u128::from_le_bytes)
}

/// The product of both halves, without carries. In constant time: which bits are set must not show.
fn multiply(pair: u128) -> u128 {
    let (a, b) = (pair as u64, pair >> 64);
    (0..64).fold(0, |sum, bit| sum ^ ((b << bit) & u128::from(a >> bit & 1).wrapping_neg()))
}

fn portable(key: &[u8; CHUNK_BYTES], chunk: &[u8]) -> u128 {
    let pairs = (0..chunk.len()).step_by(SUM_BYTES);
    pairs.fold(0, |sum, at| sum ^ multiply(u128_at(chunk, at) ^ u128_at(key, at)))
}

#[cfg(target_arch = "x86_64")]
fn fastest() -> fn(&[u8; CHUNK_BYTES], &[u8]) -> u128 {
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("vpclmulqdq") {
        // SAFETY: the processor has what it is compiled for, as asked just before.
        |key, chunk| unsafe { x86::wide(key, chunk) }
    } else if is_x86_feature_detected!("pclmulqdq") {
        // SAFETY: as above.
        |key, chunk| unsafe { x86::narrow(key, chunk) }
    } else {
        portable
    }
}

#[cfg(target_arch = "aarch64")]
fn fastest() -> fn(&[u8; CHUNK_BYTES], &[u8]) -> u128 {
    if std::arch::is_aarch64_feature_detected!("aes") {
        // SAFETY: the processor has the instruction, as asked just before.
        |key, chunk| unsafe { arm::narrow(key, chunk) }
    } else {
        portable
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fastest() -> fn(&[u8; CHUNK_BYTES], &[u8]) -> u128 {
    portable
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{CHUNK_BYTES, SUM_BYTES};
    use std::arch::x86_64::*;

    /// Bytes of the widest registers.
    const WIDE: usize = 64;
    const SUMS: usize = 4;

    #[target_feature(enable = "avx512f,vpclmulqdq,pclmulqdq")]
    pub(super) fn wide(key: &[u8; CHUNK_BYTES], chunk: &[u8]) -> u128 {
        // Several sums, so that an addition need not wait for the last one.
        let mut sums = [_mm512_setzero_si512(); SUMS];
        let step = |sum: __m512i, m: &[u8], k: &[u8]| {
            // SAFETY: both slices have so many bytes, and loads of these kinds need no alignment.
            let (m, k) =
                unsafe { (_mm512_loadu_si512(m.as_ptr().cast()), _mm512_loadu_si512(k.as_ptr().cast())) };
            let x = _mm512_xor_si512(m, k);
            _mm512_xor_si512(sum, _mm512_clmulepi64_epi128::<0x10>(x, x))
        };
        let (wholes, tail) = chunk.split_at(chunk.len() / (SUMS * WIDE) * (SUMS * WIDE));
        for (m, k) in wholes.chunks_exact(SUMS * WIDE).zip(key.chunks_exact(SUMS * WIDE)) {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = step(*sum, &m[i * WIDE..][..WIDE], &k[i * WIDE..][..WIDE]);
            }
        }
        for (m, k) in tail.chunks_exact(WIDE).zip(key[wholes.len()..].chunks_exact(WIDE)) {
            sums[0] = step(sums[0], m, k);
        }
        let [a, b, c, d] = sums;
        let sum = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
        let lanes = [
            _mm512_extracti32x4_epi32::<0>(sum),
            _mm512_extracti32x4_epi32::<1>(sum),
            _mm512_extracti32x4_epi32::<2>(sum),
            _mm512_extracti32x4_epi32::<3>(sum),
        ];
        let at = chunk.len() / WIDE * WIDE;
        lanes.into_iter().fold(rest(&key[at..], &chunk[at..]), |sum, lane| sum ^ bits(lane))
    }

    #[target_feature(enable = "pclmulqdq")]
    pub(super) fn narrow(key: &[u8; CHUNK_BYTES], chunk: &[u8]) -> u128 {
        rest(&key[..], chunk)
    }

    #[inline]
    #[target_feature(enable = "pclmulqdq")]
    fn rest(key: &[u8], chunk: &[u8]) -> u128 {
        let mut sum = _mm_setzero_si128();
        for (m, k) in chunk.chunks_exact(SUM_BYTES).zip(key.chunks_exact(SUM_BYTES)) {
            // SAFETY: both slices have so many bytes, and loads of these kinds need no alignment.
            let (m, k) = unsafe { (_mm_loadu_si128(m.as_ptr().cast()), _mm_loadu_si128(k.as_ptr().cast())) };
            let x = _mm_xor_si128(m, k);
            sum = _mm_xor_si128(sum, _mm_clmulepi64_si128::<0x10>(x, x));
        }
        bits(sum)
    }

    fn bits(x: __m128i) -> u128 {
        // SAFETY: both are 128 bits without a meaning of their own.
        unsafe { std::mem::transmute(x) }
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::{CHUNK_BYTES, SUM_BYTES, u128_at};
    use std::arch::aarch64::vmull_p64;

    #[target_feature(enable = "neon,aes")]
    pub(super) fn narrow(key: &[u8; CHUNK_BYTES], chunk: &[u8]) -> u128 {
        (0..chunk.len()).step_by(SUM_BYTES).fold(0, |sum, at| {
            let x = u128_at(chunk, at) ^ u128_at(key, at);
            sum ^ vmull_p64(x as u64, (x >> 64) as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(n: usize, seed: u64) -> Vec<u8> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (x >> 56) as u8
        };
        (0..n).map(|_| next()).collect()
    }

    /// By the definition: bit by bit, over words.
    fn reference(key: &[u8], chunk: &[u8]) -> u128 {
        let mut padded = chunk.to_vec();
        padded.resize(chunk.len().next_multiple_of(16), 0);
        let word = |b: &[u8], i: usize| u64::from_le_bytes(b[8 * i..8 * i + 8].try_into().unwrap());
        (0..padded.len() / 16).fold(0, |sum, i| {
            let a = word(&padded, 2 * i) ^ word(key, 2 * i);
            let b = word(&padded, 2 * i + 1) ^ word(key, 2 * i + 1);
            (0..64).filter(|bit| a >> bit & 1 == 1).fold(sum, |sum, bit| sum ^ (u128::from(b) << bit))
        })
    }

    #[test]
    fn every_way_to_multiply_gives_the_definition() {
        let key: Box<[u8; CHUNK_BYTES]> = bytes(CHUNK_BYTES, 1).try_into().unwrap();
        let digest = Digest::new(key.clone());
        for n in [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 200, 1000, 4080, 4095, 4096] {
            let chunk = bytes(n, n as u64 + 7);
            assert_eq!(digest.sum(&chunk), reference(&key[..], &chunk).to_le_bytes(), "{n} bytes");
            let whole = &chunk[..n / 16 * 16];
            assert_eq!(portable(&key, whole), reference(&key[..], whole));
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("pclmulqdq") {
                // SAFETY: the processor has it.
                assert_eq!(unsafe { x86::narrow(&key, whole) }, reference(&key[..], whole));
            }
        }
    }

    #[test]
    fn a_flipped_bit_changes_the_sum() {
        let digest = Digest::new(bytes(CHUNK_BYTES, 1).try_into().unwrap());
        let chunk = bytes(CHUNK_BYTES, 2);
        for bit in (0..8 * CHUNK_BYTES).step_by(97) {
            let mut other = chunk.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(digest.sum(&chunk), digest.sum(&other), "bit {bit}");
        }
    }
}
