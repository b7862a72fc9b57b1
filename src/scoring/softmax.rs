//! ln p of tokens from rows of logits.

use qtool_kernels::{Isa, absmax, log_sum_exp};

/// ln p of each of `tokens` under softmax of `logits` (V), in nats; the sum over the vocabulary is within 1e-6.
/// NaN for all of them when a logit is not finite.
pub fn log_p(logits: &[f32], tokens: &[u32]) -> Vec<f64> {
    let isa = Isa::best();
    if !absmax(isa, logits).is_finite() {
        return vec![f64::NAN; tokens.len()];
    }
    let norm = log_sum_exp(isa, logits);
    let one = |&t: &u32| logits.get(t as usize).map_or(f64::NAN, |&l| f64::from(l) - norm);
    tokens.iter().map(one).collect()
}

/// The token with the highest logit among those that `allowed` lets pass, the lowest id of equals; none when no
/// finite logit is left.
pub fn greatest(logits: &[f32], allowed: impl Fn(u32) -> bool) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (id, &l) in logits.iter().enumerate() {
        let id = id as u32;
        if l.is_finite() && best.is_none_or(|(_, top)| l > top) && allowed(id) {
            best = Some((id, l));
        }
    }
    best.map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let logits = [0.0, 3f32.ln(), 0.0, 5f32.ln()];
        let p: Vec<f64> = log_p(&logits, &[0, 1, 3]).iter().map(|l| l.exp()).collect();
        for (p, expected) in p.iter().zip([0.1, 0.3, 0.5]) {
            assert!((p - expected).abs() < 1e-7, "{p}");
        }
        // Far from zero, where a sum without the shift would overflow.
        let far = log_p(&[1000.0, 1000.0], &[1]);
        assert!((far[0] + 2f64.ln()).abs() < 1e-12, "{far:?}");
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(log_p(&[0.0, broken], &[0])[0].is_nan());
        }
        assert_eq!(greatest(&logits, |_| true), Some(3));
        assert_eq!(greatest(&logits, |id| id == 0 || id == 2), Some(0));
        assert_eq!(greatest(&[f32::NAN, f32::NEG_INFINITY], |_| true), None);
    }
}
