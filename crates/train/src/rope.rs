use spec::{Rope, RopeScaling};

/// Fills cosine and sine tables `[places, half]` of some places among the `positions` tokens that a model is trained or run
/// at.
///
/// Frequencies are `theta^(-2i/h)`, stretched as Hugging Face's `rope_type` of the same name does; angles are computed
/// in f64 and rounded once.
pub(crate) fn tables(
    rope: &Rope,
    head_dim: usize,
    positions: usize,
    places: impl Iterator<Item = usize>,
    cos: &mut [f32],
    sin: &mut [f32],
) {
    let half = head_dim / 2;
    let (frequencies, amplitude) = frequencies(rope, head_dim, positions);
    for (row, place) in places.enumerate() {
        for (i, f) in frequencies.iter().enumerate() {
            let angle = place as f64 * f;
            cos[row * half + i] = (angle.cos() * amplitude) as f32;
            sin[row * half + i] = (angle.sin() * amplitude) as f32;
        }
    }
}

fn frequencies(rope: &Rope, head_dim: usize, positions: usize) -> (Vec<f64>, f64) {
    let d = head_dim as f64;
    let at = |theta: f64| (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / d));
    let plain = || at(rope.theta);
    match rope.scaling {
        RopeScaling::Default => (plain().collect(), 1.0),
        RopeScaling::Linear { factor } => (plain().map(|f| f / factor).collect(), 1.0),
        RopeScaling::Dynamic { factor } => {
            let original = rope.max_positions as f64;
            let stretch =
                (factor * (positions as f64).max(original) / original - (factor - 1.0)).powf(d / (d - 2.0));
            (at(rope.theta * stretch).collect(), 1.0)
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let original = original_max_positions as f64;
            let scaled = plain().map(|f| {
                let wavelength = std::f64::consts::TAU / f;
                if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    f
                } else {
                    let smooth =
                        (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            });
            (scaled.collect(), 1.0)
        }
        RopeScaling::Yarn(yarn) => {
            // The dim at which a full context makes `rotations` turns (Peng et al. 2023, section 3.2).
            let dim = |rotations: f64| {
                d * (yarn.original_max_positions as f64 / (rotations * std::f64::consts::TAU)).ln()
                    / (2.0 * rope.theta.ln())
            };
            let (low, high) = (dim(yarn.beta_fast), dim(yarn.beta_slow));
            let (low, high) = if yarn.truncate { (low.floor(), high.ceil()) } else { (low, high) };
            let (low, high) = (low.max(0.0), high.min(d - 1.0));
            let blended = plain().enumerate().map(|(i, f)| {
                let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                f / yarn.factor * ramp + f * (1.0 - ramp)
            });
            (blended.collect(), yarn.amplitude())
        }
    }
}
