//! A mean over items in strata, and what each item moves it by: the matter that resampling and sign flips work on.

/// One stratum: items that could have been others of the same kind.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Stratum {
    /// Score of each item, or difference of two.
    pub values: Vec<f64>,
    /// Weight of each item within the stratum.
    pub weights: Vec<f64>,
}

impl Stratum {
    fn weight(&self) -> f64 {
        self.weights.iter().sum()
    }

    fn mean(&self) -> f64 {
        let sum: f64 = self.values.iter().zip(&self.weights).map(|(v, w)| v * w).sum();
        sum / self.weight()
    }
}

/// The mean over strata of the weighted means within them. Every stratum counts the same: a macro average; with one
/// stratum it is the weighted mean.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    strata: Vec<Stratum>,
}

/// What resampling needs of a [`Sample`].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Spread {
    /// For each stratum, what each of its items adds to the mean's deviation when it is drawn; sums to 0.
    pub strata: Vec<Vec<f64>>,
    /// Draws of each stratum.
    pub draws: Vec<usize>,
    /// Standard error of the mean.
    pub error: f64,
    /// Degrees of freedom behind it (Welch and Satterthwaite); infinite where no variance was estimated.
    pub freedom: f64,
    /// Root mean square of what a difference of 1 in one item moves the mean by.
    pub step: f64,
}

impl Sample {
    /// A sample of these strata; `None` when one of them holds nothing, or there are none.
    pub fn new(strata: Vec<Stratum>) -> Option<Self> {
        let filled = |s: &Stratum| !s.values.is_empty() && s.weight() > 0.0;
        (!strata.is_empty() && strata.iter().all(filled)).then_some(Self { strata })
    }

    /// Items in all.
    pub fn items(&self) -> usize {
        self.strata.iter().map(|s| s.values.len()).sum()
    }

    /// The mean.
    pub fn mean(&self) -> f64 {
        self.strata.iter().map(Stratum::mean).sum::<f64>() / self.strata.len() as f64
    }

    /// What each item adds to the mean: they sum to it. (coefficient, value) for each.
    pub fn terms(&self) -> impl Iterator<Item = (f64, f64)> {
        self.strata.iter().flat_map(|s| {
            let scale = 1.0 / (self.strata.len() as f64 * s.weight());
            s.values.iter().zip(&s.weights).map(move |(v, w)| (w * scale, *v))
        })
    }

    /// Deviations to draw from. An item's deviation is its influence on the (ratio) mean, w (v - mean) / sum of w,
    /// enlarged by sqrt(n / (n - 1)), without which a bootstrap of n items has a variance too small by (n - 1) / n.
    /// A stratum of one item says nothing of its own spread: it borrows the deviations of all others from their means.
    pub fn spread(&self) -> Spread {
        let count = self.strata.len() as f64;
        let relative = |s: &Stratum| -> Vec<f64> {
            let (mean, n, weight) = (s.mean(), s.values.len() as f64, s.weight());
            let enlarged = if n > 1.0 { (n / (n - 1.0)).sqrt() } else { 0.0 };
            let each = s.values.iter().zip(&s.weights);
            each.map(|(v, w)| n * w * (v - mean) / weight * enlarged)
                .collect()
        };
        let own: Vec<Vec<f64>> = self.strata.iter().map(relative).collect();
        let pooled: Vec<f64> = own.iter().filter(|s| s.len() > 1).flatten().copied().collect();
        let (mut strata, mut draws, mut error, mut behind) = (Vec::new(), Vec::new(), 0.0, 0.0);
        for deviations in &own {
            let n = deviations.len();
            let source = if n > 1 || pooled.is_empty() {
                deviations
            } else {
                &pooled
            };
            let scale = 1.0 / (count * n as f64);
            let square: f64 = source.iter().map(|d| d * d).sum::<f64>() / source.len() as f64;
            let variance = square * n as f64 * scale * scale;
            error += variance;
            behind += variance * variance / (source.len() as f64 - 1.0).max(1.0);
            strata.push(source.iter().map(|d| d * scale).collect());
            draws.push(n);
        }
        let squares: f64 = self.terms().map(|(c, _)| c * c).sum();
        Spread {
            strata,
            draws,
            error: error.sqrt(),
            freedom: if behind > 0.0 {
                error * error / behind
            } else {
                f64::INFINITY
            },
            step: (squares / self.items() as f64).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stratum(values: &[f64]) -> Stratum {
        Stratum {
            values: values.to_vec(),
            weights: vec![1.0; values.len()],
        }
    }

    #[test]
    fn mean_error_and_freedom_by_hand() {
        // Means 2 and 10, variances 1 and 8 (of n - 1): error^2 = (1/3 + 8/2) / 4.
        let sample = Sample::new(vec![stratum(&[1.0, 2.0, 3.0]), stratum(&[8.0, 12.0])]).unwrap();
        assert_eq!(sample.mean(), 6.0);
        let spread = sample.spread();
        let variance = (1.0 / 3.0 + 4.0) / 4.0;
        assert!((spread.error * spread.error - variance).abs() < 1e-12);
        let behind: f64 = (1.0 / 12.0_f64).powi(2) / 2.0 + 1.0;
        assert!(
            (spread.freedom - variance * variance / behind).abs() < 1e-12,
            "{}",
            spread.freedom
        );
        assert!((sample.terms().map(|(c, v)| c * v).sum::<f64>() - 6.0).abs() < 1e-12);
        // Coefficients 1/6 three times, 1/4 twice.
        assert!((spread.step.powi(2) - (3.0 / 36.0 + 2.0 / 16.0) / 5.0).abs() < 1e-12);
    }

    #[test]
    fn weights_make_a_ratio() {
        let values = Stratum {
            values: vec![1.0, 4.0],
            weights: vec![3.0, 1.0],
        };
        let sample = Sample::new(vec![values]).unwrap();
        assert_eq!(sample.mean(), 1.75);
        let spread = sample.spread();
        assert!(spread.strata[0].iter().sum::<f64>().abs() < 1e-12);
    }

    #[test]
    fn a_single_item_borrows_its_spread() {
        let sample = Sample::new(vec![stratum(&[1.0, 3.0]), stratum(&[7.0])]).unwrap();
        let spread = sample.spread();
        assert_eq!((spread.strata[1].len(), spread.draws[1]), (2, 1));
        assert!(spread.strata[1].iter().any(|d| *d != 0.0));
        assert_eq!(Sample::new(vec![stratum(&[1.0]), stratum(&[])]), None);
        assert_eq!(Sample::new(vec![]), None);
    }
}
