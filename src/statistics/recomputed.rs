//! Rows whose values are no means over items, such as F1: computed anew from resampled items.

use super::compare::How;
use super::{LEVEL, power, resample};
use crate::report::{Delta, Interval, Metric, Unit};

/// A row from a statistic of items: `statistic` takes item indexes (some of them more than once) and gives one value a
/// model, `None` where it is undefined; it must be quick, it is called `how.resamples` times. Items are resampled
/// within their groups (`group_of`), all models on the same ones.
///
/// Intervals are bias-corrected percentiles. Shares get no delta narrower than 3 / items on each side, the rule of
/// three: equal predictions on some items are no proof for all others. There is no test, so p is `None` and a delta is
/// noise when its interval holds 0; a model is best when the interval of its difference from every other, at 5 % over
/// the number of rivals, leaves out 0.
pub fn bootstrap_statistic(
    group: &str,
    group_of: &[usize],
    how: &How,
    statistic: impl Fn(&[usize]) -> Vec<Option<f64>> + Sync,
) -> Metric {
    let groups = group_of.iter().max().map_or(0, |m| m + 1);
    let mut strata = vec![Vec::new(); groups];
    for (item, &of) in group_of.iter().enumerate() {
        strata[of].push(item);
    }
    let all: Vec<usize> = (0..group_of.len()).collect();
    let observed = statistic(&all);
    let resampled = resample::indexes(&strata, how.resampling(), statistic);
    let them = Resampled {
        observed,
        resampled,
        how,
        items: group_of.len(),
    };
    let models = them.observed.len();
    let value = |m: usize| {
        let own: Vec<f64> = them.resampled.iter().filter_map(|r| r[m]).collect();
        Some(resample::bias_corrected(them.observed[m]?, own, LEVEL))
    };
    let delta = |m: usize| {
        let interval = them.difference(m, 0, LEVEL).filter(|_| m > 0)?;
        Some(Delta {
            interval,
            p: None,
            p_holm: None,
            noise: holds_zero(&interval),
        })
    };
    Metric {
        group: group.to_owned(),
        name: how.name.clone(),
        unit: how.unit,
        higher_is_better: how.higher_is_better,
        items: group_of.len(),
        baselines: how.baselines.headline.clone(),
        detectable: (1..models)
            .filter_map(|m| them.error(m))
            .max_by(f64::total_cmp)
            .map(power::of_standard_error),
        values: (0..models).map(value).collect(),
        deltas: (0..models).map(delta).collect(),
        best: them.best(),
        missing: vec![0; models],
    }
}

fn holds_zero(interval: &Interval) -> bool {
    interval.low <= 0.0 && interval.high >= 0.0
}

struct Resampled<'a> {
    observed: Vec<Option<f64>>,
    resampled: Vec<Vec<Option<f64>>>,
    how: &'a How,
    items: usize,
}

impl Resampled<'_> {
    fn differences(&self, of: usize, from: usize) -> Vec<f64> {
        self.resampled
            .iter()
            .filter_map(|r| Some(r[of]? - r[from]?))
            .collect()
    }

    /// Least distance of an interval's ends from a difference.
    fn least(&self) -> f64 {
        if self.how.unit == Unit::Share {
            3.0 / self.items.max(1) as f64
        } else {
            0.0
        }
    }

    fn difference(&self, of: usize, from: usize, level: f64) -> Option<Interval> {
        let value = self.observed[of]? - self.observed[from]?;
        let found = resample::bias_corrected(value, self.differences(of, from), level);
        Some(Interval {
            value,
            low: found.low.min(value - self.least()),
            high: found.high.max(value + self.least()),
        })
    }

    /// Standard error of the difference from the base; at least what the least interval stands for.
    fn error(&self, model: usize) -> Option<f64> {
        self.observed[model].zip(self.observed[0])?;
        let all = self.differences(model, 0);
        let count = all.len() as f64;
        let mean = all.iter().sum::<f64>() / count;
        let square: f64 = all.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / count;
        let least = self.least() / 1.96;
        square.is_finite().then(|| square.sqrt().max(least))
    }

    fn best(&self) -> Option<usize> {
        let sign = if self.how.higher_is_better? { 1.0 } else { -1.0 };
        let present: Vec<usize> = (0..self.observed.len())
            .filter(|&m| self.observed[m].is_some())
            .collect();
        let worth = |m: usize| self.observed[m].map_or(f64::NEG_INFINITY, |v| v * sign);
        let leader = present
            .iter()
            .copied()
            .max_by(|&a, &b| worth(a).total_cmp(&worth(b)))?;
        let rivals: Vec<usize> = present.into_iter().filter(|&m| m != leader).collect();
        let level = LEVEL / rivals.len().max(1) as f64;
        let beaten = |&m: &usize| self.difference(leader, m, level).is_some_and(|d| !holds_zero(&d));
        (!rivals.is_empty() && rivals.iter().all(beaten)).then_some(leader)
    }
}

#[cfg(test)]
mod tests {
    use super::super::baselines::Baselines;
    use super::*;

    /// Macro F1 over two classes, the scikit-learn way: 2 TP / (2 TP + FP + FN), 0 where that is undefined.
    fn macro_f1(truth: &[usize], predicted: &[usize], items: &[usize]) -> f64 {
        let f1 = |class: usize| {
            let count = |t: bool, p: bool| {
                items
                    .iter()
                    .filter(|&&i| (truth[i] == class) == t && (predicted[i] == class) == p)
                    .count() as f64
            };
            let parts = 2.0 * count(true, true) + count(false, true) + count(true, false);
            if parts > 0.0 {
                2.0 * count(true, true) / parts
            } else {
                0.0
            }
        };
        f64::midpoint(f1(0), f1(1))
    }

    fn how() -> How {
        How {
            name: "F1".into(),
            resamples: 2000,
            ..How::accuracy(Baselines::default(), 1)
        }
    }

    #[test]
    fn f1_with_its_differences() {
        let truth: Vec<usize> = (0..200).map(|i| i % 2).collect();
        let good: Vec<usize> = (0..200).map(|i| if i % 10 == 0 { 1 } else { i % 2 }).collect();
        let bad: Vec<usize> = (0..200)
            .map(|i| if i % 3 == 0 { 1 - i % 2 } else { i % 2 })
            .collect();
        let models = [&good, &good, &bad];
        let found = bootstrap_statistic("all", &[0; 200], &how(), |items| {
            models.iter().map(|m| Some(macro_f1(&truth, m, items))).collect()
        });
        // 20 of the 100 of class 0 are called 1: F1 of 160/180 and 200/220.
        let expected = (160.0 / 180.0 + 200.0 / 220.0) / 2.0;
        let value = found.values[0].unwrap();
        assert!((value.value - expected).abs() < 1e-12 && value.low < expected && value.high > expected);
        let same = found.deltas[1].unwrap();
        assert_eq!(
            (same.interval.value, same.interval.low, same.interval.high),
            (0.0, -0.015, 0.015)
        );
        assert!(same.noise);
        let worse = found.deltas[2].unwrap();
        assert!(!worse.noise && worse.interval.high < 0.0, "{worse:?}");
        assert_eq!(found.best, None, "two models share the lead");
        assert_eq!(found.deltas[0], None);
    }

    #[test]
    fn undefined_values_stay_undefined() {
        let found = bootstrap_statistic("x", &[0, 0, 1], &how(), |items| {
            vec![None, Some(items.len() as f64)]
        });
        assert_eq!((found.values[0], found.deltas[1], found.best), (None, None, None));
        assert_eq!(found.values[1].unwrap().value, 3.0);
    }
}
