//! Quality figures of one quantized weight, with their formulas. Plain data: what fills them in
//! lives where the arithmetic is.

use serde::{Deserialize, Serialize};

/// How close the decoded values w' are to the source values w, and how well the codes are used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// sum (w - w')^2 / sum w^2. `None` when all w are zero and some w' is not, or
    /// when the sums overflow.
    pub relative_mse: Option<f64>,
    /// Signal to quantization noise: -10 log10(relative_mse), in dB. `None` when the error is zero
    /// (the ratio is infinite) or the source is all zero.
    pub sqnr_db: Option<f64>,
    /// sum w w' / sqrt(sum w^2 * sum w'^2). `None` when either is all zero.
    pub cosine: Option<f64>,
    /// max |w - w'|.
    pub max_abs_error: f64,
    /// Entropy of the code histogram, in bits; at most the code width.
    pub code_entropy_bits: f64,
    /// Share of codes at either end of the scheme's code range.
    pub saturated: f64,
    /// Codes of the scheme's range that no weight uses.
    pub unused_codes: u32,
    /// Bits per weight with everything stored counted: codes, scales, zero points.
    pub bits_per_weight: f64,
}

/// Sums from which the error figures follow, accumulated in any number type wide enough.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorMoments {
    /// sum w^2
    pub sum_w2: f64,
    /// sum (w - w')^2
    pub sum_e2: f64,
    /// sum w (w - w')
    pub sum_we: f64,
    /// max |w - w'|
    pub max_abs_e: f64,
}

impl Figures {
    /// Figures from error moments, the histogram of all codes, the scheme's inclusive code range
    /// and the bits per weight.
    pub fn new(m: &ErrorMoments, histogram: &[u64; 256], code_range: (u8, u8), bits_per_weight: f64) -> Self {
        let relative_mse = if m.sum_w2 > 0.0 {
            Some(m.sum_e2 / m.sum_w2).filter(|r| r.is_finite())
        } else {
            (m.sum_e2 == 0.0).then_some(0.0)
        };
        let sqnr_db = relative_mse.filter(|&r| r > 0.0).map(|r| -10.0 * r.log10());
        let dot = m.sum_w2 - m.sum_we;
        let sum_q2 = m.sum_w2 - 2.0 * m.sum_we + m.sum_e2;
        let cosine =
            (m.sum_w2 > 0.0 && sum_q2 > 0.0).then(|| (dot / (m.sum_w2 * sum_q2).sqrt()).clamp(-1.0, 1.0));
        let (low, high) = (usize::from(code_range.0), usize::from(code_range.1));
        let total: u64 = histogram.iter().sum();
        let share = |count: u64| count as f64 / total.max(1) as f64;
        let entropy: f64 = histogram
            .iter()
            .filter(|&&c| c > 0)
            .map(|&c| share(c))
            .map(|p| -p * p.log2())
            .sum();
        let count = |code: usize| histogram.get(code).copied().unwrap_or(0);
        Self {
            relative_mse,
            sqnr_db,
            cosine,
            max_abs_error: m.max_abs_e,
            code_entropy_bits: entropy.max(0.0),
            saturated: share(count(low) + if high == low { 0 } else { count(high) }),
            unused_codes: (low..=high).filter(|&code| count(code) == 0).count() as u32,
            bits_per_weight,
        }
    }

    /// What is suspicious about a weight with these figures, in words; empty when nothing is. A
    /// weight with any such fault decodes, but hardly does what its source did.
    pub fn faults(&self, code_bits: u8) -> Vec<String> {
        let mut faults = Vec::new();
        if self.code_entropy_bits == 0.0 {
            faults.push("constant codes: every weight has the same code".to_owned());
        } else if self.code_entropy_bits < 0.25 * f64::from(code_bits) {
            faults.push(format!(
                "codes carry only {:.2} of {code_bits} bits: most weights share one code",
                self.code_entropy_bits
            ));
        }
        if self.saturated > 0.5 {
            faults.push(format!(
                "{:.0} % of codes lie at the ends of the grid: the scale is too small",
                self.saturated * 100.0
            ));
        }
        match self.relative_mse {
            None => faults.push(
                "no error figure: the source is all zero but the decoded weight is not, or the sums overflow"
                    .to_owned(),
            ),
            Some(r) if r > 0.5 => faults.push(format!(
                "relative MSE {r:.3}: more than half of the weight's energy is lost"
            )),
            Some(_) => {}
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// w = (3, -4), w' = (2, -4): e = (1, 0).
    #[test]
    fn figures_by_hand() {
        let moments = ErrorMoments {
            sum_w2: 25.0,
            sum_e2: 1.0,
            sum_we: 3.0,
            max_abs_e: 1.0,
        };
        let mut histogram = [0u64; 256];
        histogram[0] = 1;
        histogram[2] = 1;
        let f = Figures::new(&moments, &histogram, (0, 3), 4.25);
        assert_eq!(f.relative_mse, Some(0.04));
        assert!((f.sqnr_db.unwrap() - 13.9794).abs() < 1e-4);
        assert!((f.cosine.unwrap() - 22.0 / (25.0f64 * 20.0).sqrt()).abs() < 1e-15);
        assert_eq!((f.code_entropy_bits, f.saturated, f.unused_codes), (1.0, 0.5, 2));
        assert!(f.faults(2).is_empty());
    }

    #[test]
    fn degenerate_weights_are_named() {
        let mut histogram = [0u64; 256];
        histogram[8] = 100;
        let zero = Figures::new(&ErrorMoments::default(), &histogram, (0, 15), 4.0);
        assert_eq!(
            (zero.relative_mse, zero.sqnr_db, zero.cosine),
            (Some(0.0), None, None)
        );
        assert!(zero.faults(4)[0].contains("constant"));
        let lost = ErrorMoments {
            sum_w2: 1.0,
            sum_e2: 0.9,
            sum_we: 0.9,
            max_abs_e: 1.0,
        };
        assert_eq!(Figures::new(&lost, &histogram, (0, 15), 4.0).faults(4).len(), 2);
    }
}
