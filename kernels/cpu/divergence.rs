//! Two models' logits of the same tokens beside each other: KL divergence, change of p, agreement. Owns the arithmetic,
//! in f64.

use rayon::prelude::*;

use crate::backend::Divergence;

/// Each row of `candidate` (M, V) beside that of `base` (M, V), logits of both or stored log-probabilities, row m with the
/// token `targets[m]`; see [`Divergence`]. `None` for a row with a number that is not finite, and where the token is not below V.
///
/// # Panics
///
/// When the sizes disagree.
pub fn divergences(base: &[f32], candidate: &[f32], targets: &[u32]) -> Vec<Option<Divergence>> {
    let width = base.len() / targets.len().max(1);
    assert_eq!(base.len(), candidate.len(), "equal vocabularies");
    assert_eq!(base.len(), width * targets.len(), "a row a token");
    targets
        .par_iter()
        .enumerate()
        .map(|(i, &target)| {
            let row = i * width..(i + 1) * width;
            one(&base[row.clone()], &candidate[row], target as usize)
        })
        .collect()
}

fn one(base: &[f32], candidate: &[f32], target: usize) -> Option<Divergence> {
    if !base.iter().chain(candidate).all(|l| l.is_finite()) {
        return None;
    }
    let (z_base, z_candidate) = (log_sum(base), log_sum(candidate));
    let kl: f64 = base
        .iter()
        .zip(candidate)
        .map(|(&b, &c)| {
            let ln_p = f64::from(b) - z_base;
            ln_p.exp() * (ln_p - (f64::from(c) - z_candidate))
        })
        .sum();
    let p = |logits: &[f32], z: f64| Some((f64::from(*logits.get(target)?) - z).exp());
    Some(Divergence {
        // Rounding may leave equal distributions a hair below 0.
        kl: kl.max(0.0),
        delta_p: p(candidate, z_candidate)? - p(base, z_base)?,
        agreed: top(base) == top(candidate),
    })
}

/// ln of the sum of exp, in f64.
fn log_sum(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = f64::from(most);
    most + logits
        .iter()
        .map(|l| (f64::from(*l) - most).exp())
        .sum::<f64>()
        .ln()
}

fn top(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 / 2 + ln(2/3) / 2.
        let found = divergences(&[0.0, 0.0], &[0.0, 3.0_f32.ln()], &[1])[0].unwrap();
        let kl = 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln();
        assert!((found.kl - kl).abs() < 1e-7, "{found:?}");
        assert!((found.delta_p - 0.25).abs() < 1e-7, "{found:?}");
        assert!(!found.agreed, "of equal ones the lowest is the likeliest");
        // Not finite, equal, and a token beyond the vocabulary.
        let base = [1.0, 2.0, f32::NAN, 0.0, 1.0, 1.0];
        let candidate = [1.0, 2.0, 0.0, 0.0, 1.0, 1.0];
        let found = divergences(&base, &candidate, &[0, 0, 2]);
        assert_eq!(
            found[0].map(|d| (d.kl, d.delta_p, d.agreed)),
            Some((0.0, 0.0, true))
        );
        assert_eq!(found[1..], [None, None]);
        assert_eq!(divergences(&[], &[], &[]), []);
    }
}
