//! Two models' logits of one window beside each other: KL divergence, change of p, agreement. Owns the arithmetic, in
//! f64, and what BF16 would make of a logit.

use rayon::prelude::*;

use super::answers::WindowDivergence;

/// One window of both: logits (scored tokens, V) each.
///
/// `targets` are the tokens that stand in the text. Panics when the lengths do not fit, which callers check.
pub fn compare_logits(base: &[f32], candidate: &[f32], targets: &[u32]) -> WindowDivergence {
    let width = base.len() / targets.len().max(1);
    assert_eq!(base.len(), candidate.len(), "equal vocabularies");
    let rows: Vec<Option<Row>> = targets
        .par_iter()
        .enumerate()
        .map(|(i, &target)| {
            let of = |logits: &[f32]| i * width..(i * width + width).min(logits.len());
            Row::of(&base[of(base)], &candidate[of(candidate)], target as usize)
        })
        .collect();
    let mut all = WindowDivergence::default();
    for row in rows {
        match row {
            Some(row) => {
                all.kl.push(row.kl as f32);
                all.delta_p.push(row.delta_p as f32);
                all.agreed += u64::from(row.agreed);
            }
            None => all.non_finite += 1,
        }
    }
    all
}

struct Row {
    kl: f64,
    delta_p: f64,
    agreed: bool,
}

impl Row {
    /// `None` when a logit is not finite.
    fn of(base: &[f32], candidate: &[f32], target: usize) -> Option<Self> {
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
        let p = |logits: &[f32], z: f64| (f64::from(*logits.get(target)?) - z).exp().into();
        let (before, after): (Option<f64>, Option<f64>) = (p(base, z_base), p(candidate, z_candidate));
        Some(Self {
            // Rounding may leave equal distributions a hair below 0.
            kl: kl.max(0.0),
            delta_p: after? - before?,
            agreed: top(base) == top(candidate),
        })
    }
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

/// The nearest BF16, ties to even.
pub fn bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    if !value.is_finite() {
        return value;
    }
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_divergence_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 / 2 + ln(2/3) / 2.
        let base = [0.0, 0.0];
        let candidate = [0.0, 3.0_f32.ln()];
        let found = compare_logits(&base, &candidate, &[1]);
        let kl = 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln();
        assert!((f64::from(found.kl[0]) - kl).abs() < 1e-7, "{}", found.kl[0]);
        assert!((found.delta_p[0] - 0.25).abs() < 1e-7);
        assert_eq!(
            (found.agreed, found.non_finite),
            (0, 0),
            "of equal ones the lowest is the likeliest"
        );
        // Two positions, one of them not finite; the other equal.
        let found = compare_logits(&[1.0, 2.0, f32::NAN, 0.0], &[1.0, 2.0, 0.0, 0.0], &[0, 0]);
        assert_eq!(found.kl, [0.0]);
        assert_eq!((found.agreed, found.non_finite), (1, 1));
    }

    #[test]
    fn bf16_as_the_half_crate_rounds() {
        for value in [
            0.0,
            -1.0,
            1.003_906_2,
            1.011_718_8,
            2.345_6,
            -1e-30,
            3.3e38,
            f32::INFINITY,
        ] {
            let expected = half::bf16::from_f32(value).to_f32();
            assert_eq!(bf16(value), expected, "{value}");
        }
    }
}
