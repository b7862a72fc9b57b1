//! Many looks at once: Holm's correction of p-values.

/// p-values after Holm's step-down correction (S. Holm, 1979), in the order given: the smallest times their number,
/// the next times one less, never falling, never above 1. Where a corrected value is below 5 %, the chance that any
/// true "no difference" of the family is called one is below 5 %.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut corrected = vec![1.0; p.len()];
    let mut so_far = 0.0_f64;
    for (rank, &index) in order.iter().enumerate() {
        so_far = so_far.max((p[index] * (p.len() - rank) as f64).min(1.0));
        corrected[index] = so_far;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;

    /// statsmodels 0.15.0: `multipletests(p, method="holm")[1]`.
    #[test]
    fn equals_statsmodels() {
        let p = [0.01, 0.04, 0.03, 0.005, 0.9, 0.04];
        let expected = [0.05, 0.12, 0.12, 0.03, 0.9, 0.12];
        for (found, expected) in holm(&p).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
        assert!(holm(&[]).is_empty());
        assert_eq!(holm(&[0.02]), [0.02]);
    }
}
