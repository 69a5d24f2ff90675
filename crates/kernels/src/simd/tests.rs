use half::bf16;

use super::*;

kernel! { fn probe[T: crate::storage::Element](x: &[T], y: &mut [T], sums: &mut [f32; 2]) = |s: S| {
    let mut rows = [s.splat(0.0); LANES];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = T::get(s, &x[(i * LANES).min(x.len())..]);
    }
    sums[0] = s.sum(rows[1]);
    sums[1] = s.greatest(rows[1]);
    s.transpose(&mut rows);
    for (i, &row) in rows.iter().enumerate() {
        let at = (i * LANES).min(y.len());
        T::put(s, &mut y[at..], row);
    }
} }

#[test]
fn backends_move_the_same_lanes() {
    let before = backend();
    for len in [256, 250, 17, 3, 0] {
        let x: Vec<f32> = (0..len).map(|i| (i * i) as f32 * 0.37 - 11.0).collect();
        let half: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let at = |i: usize| x.get(i).copied().unwrap_or(0.0);
        for b in [Backend::Avx512, Backend::Avx2, Backend::Scalar] {
            if !force_backend(b) {
                continue;
            }
            let (mut y, mut sums) = (vec![0.0; len], [0.0; 2]);
            probe(&x, &mut y, &mut sums);
            assert!((0..len).all(|i| y[i] == at(i % 16 * 16 + i / 16)), "{b:?} {len}");
            let mut lanes: Vec<f32> = (16..32).map(at).collect();
            assert_eq!(sums[1], lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            while lanes.len() > 1 {
                let half = lanes.len() / 2;
                lanes = (0..half).map(|i| lanes[i] + lanes[i + half]).collect();
            }
            assert_eq!(sums[0], lanes[0]);
            let mut z = vec![bf16::ZERO; len];
            probe(&half, &mut z, &mut sums);
            assert!((0..len).all(|i| z[i] == half.get(i % 16 * 16 + i / 16).copied().unwrap_or(bf16::ZERO)));
        }
    }
    force_backend(before);
}

kernel! { fn to_bf16(x: &[f32], y: &mut [bf16]) = |s: S| {
    for i in (0..x.len()).step_by(LANES) {
        s.store_bf16(&mut y[i..], s.load(&x[i..]));
    }
} }

#[test]
fn bf16_rounds_to_nearest_even() {
    let before = backend();
    let mut x: Vec<f32> = (0..40_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
    x.extend(
        [0x3f80_8000, 0x3f81_8000, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0xffff_ffff, 1].map(f32::from_bits),
    );
    for b in [Backend::Avx512, Backend::Avx2, Backend::Scalar] {
        if !force_backend(b) {
            continue;
        }
        let mut y = vec![bf16::ZERO; x.len()];
        to_bf16(&x, &mut y);
        for (&x, y) in x.iter().zip(y) {
            assert_eq!(y.to_bits(), bf16::from_f32(x).to_bits(), "{b:?} {x}");
        }
    }
    force_backend(before);
}
