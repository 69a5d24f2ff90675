//! Experts balanced without a loss: biases that move with the load.

/// Moves the biases `[layers, experts]` of experts by `rate`: up where `counts`, of the same shape, are below the mean of
/// their layer, down where they are above (Wang et al. 2024, arXiv 2408.15664, algorithm 1). Counts are whole numbers, so
/// that no sum depends on its order; a layer without any stays as it is.
///
/// ```
/// let mut bias = [0.5, 0.5, 0.5, 0.5];
/// kernels::balance_experts(&[3.0, 2.0, 2.0, 1.0], &mut bias, 4, 0.25);
/// assert_eq!(bias, [0.25, 0.5, 0.5, 0.75]);
/// ```
pub fn balance_experts(counts: &[f64], bias: &mut [f32], experts: usize, rate: f32) {
    assert_eq!(counts.len(), bias.len());
    for (counts, bias) in counts.chunks_exact(experts).zip(bias.chunks_exact_mut(experts)) {
        let all: f64 = counts.iter().sum();
        for (count, bias) in counts.iter().zip(bias) {
            // The mean is compared without a division, which would round.
            match (count * experts as f64).total_cmp(&all) {
                std::cmp::Ordering::Less => *bias += rate,
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => *bias -= rate,
            }
        }
    }
}
