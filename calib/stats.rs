//! What is known about the inputs of a linear layer: how many rows were seen, their second moment, and the
//! largest magnitude of each column. Owns the sums and how they merge; who gathers them is [`crate::observe`].
//!
//! ```text
//! H = (1 / M) sum over rows x of  x x^T          (K, K), or its diagonal alone
//! ```
//!
//! The error of a row e = w - q of a weight, as the layer's output sees it, is e H e^T.

use crate::{CalibError, Result};

/// Sums over rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Moment {
    /// Sum of x_k^2, (K).
    Diagonal(Vec<f64>),
    /// Sum of x x^T, (K, K), row-major, symmetric.
    Full(Vec<f64>),
}

/// Statistics of the rows that enter one linear layer (or several that share their input).
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStats {
    k: usize,
    rows: u64,
    moment: Moment,
    absmax: Vec<f32>,
    independent: Option<Vec<f64>>,
}

impl LayerStats {
    /// From sums that were made elsewhere. Fails when lengths disagree with K, or when a number is not finite
    /// (or, on the diagonal and in `absmax`, is negative).
    pub fn new(k: usize, rows: u64, moment: Moment, absmax: Vec<f32>) -> Result<Self> {
        let bad = |reason: String| Err(CalibError::Statistics { reason });
        let (expected, got) = match &moment {
            Moment::Diagonal(d) => (k, d.len()),
            Moment::Full(h) => (k * k, h.len()),
        };
        if expected != got || absmax.len() != k {
            return bad(format!(
                "expected {expected} sums and {k} magnitudes for {k} columns, got {got} and {}",
                absmax.len()
            ));
        }
        let sums = match &moment {
            Moment::Diagonal(sums) | Moment::Full(sums) => sums,
        };
        let stats = Self {
            k,
            rows,
            moment: Moment::Diagonal(vec![]),
            absmax,
            independent: None,
        };
        if let Some(at) = sums.iter().position(|s| !s.is_finite()) {
            return bad(format!("the sum at {at} is not finite"));
        }
        let stats = Self { moment, ..stats };
        if let Some(column) = (0..k)
            .find(|&c| stats.sum_of_squares(c) < 0.0 || stats.absmax[c].is_nan() || stats.absmax[c] < 0.0)
        {
            return bad(format!(
                "column {column} has a negative sum of squares or magnitude"
            ));
        }
        Ok(stats)
    }

    /// K.
    pub fn columns(&self) -> usize {
        self.k
    }

    /// Rows seen.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The sums.
    pub fn moment(&self) -> &Moment {
        &self.moment
    }

    /// Largest magnitude of each column, (K).
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// Sum of x_k^2.
    fn sum_of_squares(&self, column: usize) -> f64 {
        match &self.moment {
            Moment::Diagonal(d) => d[column],
            Moment::Full(h) => h[column * self.k + column],
        }
    }

    /// Mean of x_k^2 for each column, (K): how much an error in it counts when errors are independent.
    pub fn importance(&self) -> Vec<f32> {
        let rows = self.rows.max(1) as f64;
        (0..self.k)
            .map(|c| (self.sum_of_squares(c) / rows) as f32)
            .collect()
    }

    /// H of the module's text, (K, K), or `None` when only its diagonal is known.
    pub fn hessian(&self) -> Option<Vec<f64>> {
        let rows = self.rows.max(1) as f64;
        match &self.moment {
            Moment::Full(h) => Some(h.iter().map(|h| h / rows).collect()),
            Moment::Diagonal(_) => None,
        }
    }

    /// With the sums (K, K) that inputs would have which are independent in the basis they were measured in, when
    /// that is not the basis of the columns: a rotated diagonal.
    pub fn with_independent(mut self, sums: Vec<f64>) -> Result<Self> {
        if sums.len() != self.k * self.k || sums.iter().any(|s| !s.is_finite()) {
            return Err(CalibError::Statistics {
                reason: format!(
                    "expected {} finite sums of independent inputs, got {}",
                    self.k * self.k,
                    sums.len()
                ),
            });
        }
        self.independent = Some(sums);
        Ok(self)
    }

    /// H of independent inputs, (K, K); `None` when it is the diagonal of H.
    pub fn independent(&self) -> Option<Vec<f64>> {
        let rows = self.rows.max(1) as f64;
        let sums = self.independent.as_ref()?;
        Some(sums.iter().map(|h| h / rows).collect())
    }

    /// The statistics of these columns alone, as a layer sees them that reads a part of the input.
    ///
    /// # Panics
    ///
    /// When the range goes beyond K.
    pub fn columns_in(&self, range: std::ops::Range<usize>) -> Self {
        let part = |h: &[f64]| -> Vec<f64> {
            let row = |r: usize| &h[r * self.k + range.start..r * self.k + range.end];
            range.clone().flat_map(row).copied().collect()
        };
        let moment = match &self.moment {
            Moment::Diagonal(d) => Moment::Diagonal(d[range.clone()].to_vec()),
            Moment::Full(h) => Moment::Full(part(h)),
        };
        Self {
            k: range.len(),
            rows: self.rows,
            moment,
            independent: self.independent.as_deref().map(part),
            absmax: self.absmax[range].to_vec(),
        }
    }

    /// Adds the sums of `other`. In f64, in this order: merging in another order may differ in the last bit.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        let (sums, more) = match (&mut self.moment, &other.moment) {
            (Moment::Full(a), Moment::Full(b)) | (Moment::Diagonal(a), Moment::Diagonal(b))
                if a.len() == b.len() && self.independent.is_none() && other.independent.is_none() =>
            {
                (a, b)
            }
            _ => {
                return Err(CalibError::Statistics {
                    reason: "statistics of different widths or kinds, or of rotated inputs, cannot be merged"
                        .to_owned(),
                });
            }
        };
        sums.iter_mut().zip(more).for_each(|(a, b)| *a += b);
        self.rows += other.rows;
        let tops = self.absmax.iter_mut().zip(&other.absmax);
        tops.for_each(|(a, b)| *a = a.max(*b));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_by_hand() {
        // Of the rows (1, -2) and (3, 0.5).
        let moment = Moment::Full(vec![10.0, -0.5, -0.5, 4.25]);
        let mut stats = LayerStats::new(2, 2, moment, vec![3.0, 2.0]).unwrap();
        assert_eq!(stats.rows(), 2);
        assert_eq!(stats.absmax(), [3.0, 2.0]);
        assert_eq!(stats.importance(), [5.0, 2.125]);
        assert_eq!(stats.hessian().unwrap(), [5.0, -0.25, -0.25, 2.125]);
        let second = stats.columns_in(1..2);
        assert_eq!((second.columns(), second.hessian().unwrap()), (1, vec![2.125]));
        let twin = stats.clone();
        stats.merge(&twin).unwrap();
        assert_eq!((stats.rows(), stats.importance()), (4, vec![5.0, 2.125]));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let new = |moment, absmax| LayerStats::new(2, 1, moment, absmax);
        assert!(new(Moment::Diagonal(vec![1.0, 2.0]), vec![1.0, 1.0]).is_ok());
        assert!(new(Moment::Diagonal(vec![1.0]), vec![1.0, 1.0]).is_err());
        assert!(new(Moment::Diagonal(vec![1.0, f64::NAN]), vec![1.0, 1.0]).is_err());
        assert!(new(Moment::Diagonal(vec![1.0, -1.0]), vec![1.0, 1.0]).is_err());
        assert!(new(Moment::Full(vec![1.0; 4]), vec![1.0, f32::NAN]).is_err());
        let mut diagonal = new(Moment::Diagonal(vec![0.0; 2]), vec![0.0; 2]).unwrap();
        let full = new(Moment::Full(vec![0.0; 4]), vec![0.0; 2]).unwrap();
        assert!(diagonal.merge(&full).is_err());
    }
}
