//! Shares of right answers: the interval of one, and the test of two on the same items.

use statrs::distribution::{Binomial, DiscreteCDF};

use super::{LEVEL, normal_quantile};
use crate::report::Interval;

/// Wilson's score interval of `right` in `items` (E. B. Wilson, 1927), at 95 %. It stays within 0 to 1 and keeps a
/// width where none or all are right. `None` without items.
pub fn wilson(right: u64, items: u64) -> Option<Interval> {
    if items == 0 {
        return None;
    }
    let (n, z) = (items as f64, normal_quantile(1.0 - LEVEL / 2.0));
    let p = right as f64 / n;
    let shrink = 1.0 + z * z / n;
    let centre = (p + z * z / (2.0 * n)) / shrink;
    let half = z / shrink * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
    Some(Interval {
        value: p,
        low: (centre - half).clamp(0.0, p),
        high: (centre + half).clamp(p, 1.0),
    })
}

/// Exact two-sided McNemar test (Q. McNemar, 1947; binomial, no continuity correction, no mid-p): `gained` items are
/// right by the second model alone, `lost` by the first alone. Items on which both agree say nothing and are not asked
/// for. The p-value of "both are right equally often"; 1 where nothing differs.
pub fn mcnemar(gained: u64, lost: u64) -> f64 {
    match Binomial::new(0.5, gained + lost) {
        Ok(fair) if gained + lost > 0 => (2.0 * fair.cdf(gained.min(lost))).min(1.0),
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy 1.17.1, statsmodels 0.15.0:
    /// `statsmodels.stats.proportion.proportion_confint(right, items, method="wilson")`.
    const WILSON: [(u64, u64, f64, f64); 7] = [
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371106, 1.0),
        (1, 30, 0.005908590381612455, 0.16670390991409176),
        (47, 100, 0.3751081795934127, 0.5671114302990063),
        (850, 1772, 0.45649210141911356, 0.5029637387166302),
        (5, 7, 0.3589344518326191, 0.9177810759959432),
        (19990, 20000, 0.9990797771249671, 0.9997283788549844),
    ];

    /// `statsmodels.stats.contingency_tables.mcnemar([[0, lost], [gained, 0]], exact=True).pvalue`.
    const MCNEMAR: [(u64, u64, f64); 6] = [
        (0, 1, 1.0),
        (0, 6, 0.03125),
        (12, 3, 0.03515625),
        (50, 71, 0.06859363812061445),
        (200, 100, 8.014875216538921e-09),
        (1000, 1003, 0.9643575934097763),
    ];

    #[test]
    fn wilson_equals_statsmodels() {
        for (right, items, low, high) in WILSON {
            let found = wilson(right, items).unwrap();
            assert_eq!(found.value, right as f64 / items as f64);
            assert!((found.low - low).abs() < 1e-12, "{right}/{items}: {found:?}");
            assert!((found.high - high).abs() < 1e-12, "{right}/{items}: {found:?}");
        }
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn mcnemar_equals_statsmodels() {
        for (gained, lost, p) in MCNEMAR {
            let found = mcnemar(gained, lost);
            assert!(
                (found - p).abs() < 1e-9 * p.max(1e-3),
                "{gained}, {lost}: {found}"
            );
            assert_eq!(found, mcnemar(lost, gained));
        }
        // By hand: 2 (1 + 5) / 2^5.
        assert!((mcnemar(4, 1) - 0.375).abs() < 1e-15);
        assert_eq!(mcnemar(0, 0), 1.0);
        assert_eq!(mcnemar(3, 3), 1.0);
    }
}
