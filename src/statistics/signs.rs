//! Whether differences of any size have a side: the sign-flip permutation test.

use super::resample::with_coins;
use super::sample::Sample;

/// Two-sided p of "each difference could as well have been the other way round" (R. A. Fisher, 1935), by `flips`
/// random assignments of signs, the observed one counted among them. For right-or-wrong items of equal weight it is
/// McNemar's test, drawn instead of counted out; it holds for macro averages and for real-valued items too.
pub(crate) fn flip(differences: &Sample, seed: u64, flips: usize) -> f64 {
    let terms: Vec<f64> = differences
        .terms()
        .map(|(c, v)| c * v)
        .filter(|t| *t != 0.0)
        .collect();
    let observed = terms.iter().sum::<f64>().abs();
    // Sums of the same terms in the same order, so that only rounding of other signs is to be forgiven.
    let size: f64 = terms.iter().map(|t| t.abs()).sum();
    let reached = observed - size * 1e-12;
    let sums = with_coins(seed, flips, |draws| {
        let mut sum = 0.0;
        for some in terms.chunks(64) {
            let mut coins = draws.coins();
            for term in some {
                sum += if coins & 1 == 1 { *term } else { -*term };
                coins >>= 1;
            }
        }
        sum.abs() >= reached
    });
    let as_far = sums.into_iter().filter(|s| *s).count();
    (as_far + 1) as f64 / (flips + 1) as f64
}

#[cfg(test)]
mod tests {
    use super::super::proportion::mcnemar;
    use super::super::sample::Stratum;
    use super::*;

    fn sample(values: Vec<f64>) -> Sample {
        let weights = vec![1.0; values.len()];
        Sample::new(vec![Stratum { values, weights }]).unwrap()
    }

    #[test]
    fn equals_mcnemar_on_right_and_wrong() {
        for (gained, lost) in [(6, 1), (12, 3), (40, 30), (0, 9)] {
            let mut values = vec![1.0; gained];
            values.extend(vec![-1.0; lost]);
            values.extend(vec![0.0; 30]);
            let found = flip(&sample(values), 1, 40_000);
            let exact = mcnemar(gained as u64, lost as u64);
            assert!(
                (found - exact).abs() < 4.0 * (exact / 40_000.0).sqrt() + 1e-4,
                "{found} {exact}"
            );
        }
        assert_eq!(flip(&sample(vec![0.0; 5]), 1, 99), 1.0);
    }

    #[test]
    fn few_items_prove_nothing() {
        // All five of one sign: 2 of 32 assignments are as far out.
        let found = flip(&sample(vec![1.0, 2.0, 3.0, 4.0, 5.0]), 2, 20_000);
        assert!((found - 0.0625).abs() < 0.01, "{found}");
    }
}
