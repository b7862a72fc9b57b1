//! What a sample cannot show: the smallest true difference it finds in 8 of 10 runs, tested two-sided at 5 %.

use super::{LEVEL, normal_quantile};

/// Chance of finding a difference that is there.
pub const POWER: f64 = 0.8;

fn quantiles() -> (f64, f64) {
    (normal_quantile(1.0 - LEVEL / 2.0), normal_quantile(POWER))
}

/// Smallest detectable difference of two means whose difference has this standard error: (1.96 + 0.84) errors.
pub fn of_standard_error(error: f64) -> f64 {
    let (level, power) = quantiles();
    (level + power) * error
}

/// Smallest detectable difference of two shares on the same `items`, of which the models disagree on the share
/// `discordance`: the d that solves z(level) sqrt(q) + z(power) sqrt(q - d^2) = d sqrt(items) with q the discordance
/// (R. J. Connor, 1987). `None` without items.
pub fn paired(discordance: f64, items: u64) -> Option<f64> {
    if items == 0 {
        return None;
    }
    let (level, power) = quantiles();
    let (q, n) = (discordance, items as f64);
    // Squared: d^2 (n + power^2) - 2 d level sqrt(q n) + q (level^2 - power^2) = 0; the larger root.
    let a = n + power * power;
    let half_b = level * (q * n).sqrt();
    let c = q * (level * level - power * power);
    Some((half_b + (half_b * half_b - a * c).max(0.0).sqrt()) / a)
}

/// Smallest detectable difference of two shares near `share` on two independent sets of `items` each: an upper bound
/// for paired items that agree at least as often as chance. `None` without items.
pub fn unpaired(share: f64, items: u64) -> Option<f64> {
    (items > 0).then(|| of_standard_error((2.0 * share * (1.0 - share) / items as f64).sqrt()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_connors_equation() {
        let (level, power) = quantiles();
        for (q, n) in [(0.05_f64, 1000_u64), (0.2, 200), (0.5, 1772), (1.0, 50)] {
            let d = paired(q, n).unwrap();
            let left = level * q.sqrt() + power * (q - d * d).sqrt();
            assert!((left - d * (n as f64).sqrt()).abs() < 1e-9, "{q} {n} {d}");
            assert!(d < q);
        }
        assert_eq!(paired(0.1, 0), None);
        assert_eq!(paired(0.0, 10), Some(0.0));
    }

    /// Counted: 4000 runs of 400 items with that difference, exact McNemar. The exact test keeps below its level, so it
    /// finds somewhat fewer than the normal approximation promises.
    #[test]
    fn eight_of_ten_runs_find_it() {
        use rand_chacha::ChaCha8Rng;
        use rand_chacha::rand_core::{RngCore, SeedableRng};
        let (q, n) = (0.2, 400);
        let d = paired(q, n).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut found = 0;
        for _ in 0..4000 {
            let (mut gained, mut lost) = (0, 0);
            for _ in 0..n {
                let u = f64::from(rng.next_u32()) / 2_f64.powi(32);
                gained += u64::from(u < (q + d) / 2.0);
                lost += u64::from((q + d) / 2.0 <= u && u < q);
            }
            found += u32::from(super::super::proportion::mcnemar(gained, lost) < LEVEL);
        }
        let share = f64::from(found) / 4000.0;
        assert!((0.76..0.82).contains(&share), "{share}");
    }
}
