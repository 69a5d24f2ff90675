//! Figures that sum many up.

/// The value that the share `q` of `values` is not above; 0 of none. Sorts them.
///
/// ```
/// use spec::stats::quantile;
/// assert_eq!(quantile(&mut [5.0, 1.0, 2.0, 3.0, 4.0], 0.3), 2.0);
/// assert_eq!(quantile(&mut [3.0, 1.0, 2.0, 4.0], 0.5), 3.0);
/// assert_eq!(quantile(&mut [], 0.5), 0.0);
/// ```
pub fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (q * values.len().saturating_sub(1) as f64).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// The upper of the middle ones; 0 of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(&mut values.into_iter().collect::<Vec<_>>(), 0.5)
}

/// The share of pairs that both values order alike less that of pairs that they order otherwise (Kendall 1938). Ties count
/// for neither. `None` of fewer than two.
///
/// ```
/// use spec::stats::kendall_tau;
/// assert_eq!(kendall_tau(&[(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0)]), Some(4.0 / 6.0));
/// assert_eq!(kendall_tau(&[(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)]), Some(2.0 / 3.0));
/// assert_eq!(kendall_tau(&[(1.0, 2.0), (2.0, 1.0)]), Some(-1.0));
/// assert_eq!(kendall_tau(&[(1.0, 1.0)]), None);
/// ```
pub fn kendall_tau(pairs: &[(f64, f64)]) -> Option<f64> {
    let (mut agree, mut all) = (0.0, 0.0);
    for (i, a) in pairs.iter().enumerate() {
        for b in &pairs[..i] {
            let both = (a.0 - b.0) * (a.1 - b.1);
            agree += if both == 0.0 { 0.0 } else { both.signum() };
            all += 1.0;
        }
    }
    (all > 0.0).then(|| agree / all)
}
