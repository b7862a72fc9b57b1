//! Statistics of the original model as those of the transformed one: no second run of the model is needed.
//!
//! The input x of a weight W becomes x T where W becomes W T^-T, so that x W^T stays. T follows from the steps along
//! W's columns: where they are multiplied with g, x is divided by g; where they are rotated by Q, so is x. Hence
//!
//! ```text
//! H' = T^T H T          exact up to rounding, for the original's text
//! ```
//!
//! A channel whose gain is 0 shows nothing of what the norm made there. The norm's output has the mean square 1, so
//! what the other channels leave of it is shared evenly among such channels.
//!
//! Largest magnitudes turn into bounds: of a sum, the sum of the magnitudes.
//!
//! Methods shrink H toward what independent inputs would give, its diagonal. Behind a rotation that is T^T diag(H) T: inputs
//! are as good as independent in the model's own basis, and in a rotated one nothing is. It goes with the statistics.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use qtool_calib::LayerStats;
use qtool_calib::stats::Moment;
use qtool_kernels::Orthogonal;

use super::Transform;
use super::folding::{Folding, Step};
use crate::calibrate::coverage::{EvidenceSource, Found};
use crate::{Error, Result};

/// Evidence of the original model, as seen by the transformed one.
pub struct TransformedEvidence<'a> {
    original: &'a dyn EvidenceSource,
    transform: &'a Transform,
    /// The statistics transformed last: layers that share an input follow each other.
    last: Mutex<Option<Last>>,
}

struct Last {
    original: Arc<LayerStats>,
    /// A tensor that was transformed the same way.
    tensor: String,
    made: Arc<LayerStats>,
}

impl<'a> TransformedEvidence<'a> {
    /// What `original` says, through `transform`.
    pub fn new(original: &'a dyn EvidenceSource, transform: &'a Transform) -> Self {
        Self {
            original,
            transform,
            last: Mutex::default(),
        }
    }
}

impl EvidenceSource for TransformedEvidence<'_> {
    fn evidence(&self, tensor: &str) -> Result<Option<Found>> {
        let Some(found) = self.original.evidence(tensor)? else {
            return Ok(None);
        };
        let folding = self.transform.folding(tensor, tensor);
        let Some(folding) = folding.filter(|f| !f.columns.is_empty()) else {
            return Ok(Some(found));
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref()
            && Arc::ptr_eq(&last.original, &found.stats)
            && self
                .transform
                .folding(&last.tensor, &last.tensor)
                .is_some_and(|other| same_input(other, folding))
        {
            let stats = Arc::clone(&last.made);
            return Ok(Some(Found { stats, ..found }));
        }
        let made = Arc::new(transformed(&found.stats, folding, tensor)?);
        *last = Some(Last {
            original: Arc::clone(&found.stats),
            tensor: tensor.to_owned(),
            made: Arc::clone(&made),
        });
        Ok(Some(Found { stats: made, ..found }))
    }
}

/// Evidence that was measured on the transformed model itself, told what its inputs were independent in.
pub struct MeasuredTransformed<'a> {
    measured: &'a dyn EvidenceSource,
    transform: Option<&'a Transform>,
}

impl<'a> MeasuredTransformed<'a> {
    /// What `measured` says of a model that went through `transform`.
    pub fn new(measured: &'a dyn EvidenceSource, transform: Option<&'a Transform>) -> Self {
        Self { measured, transform }
    }
}

impl EvidenceSource for MeasuredTransformed<'_> {
    fn evidence(&self, tensor: &str) -> Result<Option<Found>> {
        let Some(found) = self.measured.evidence(tensor)? else {
            return Ok(None);
        };
        let steps = self.transform.and_then(|t| t.folding(tensor, tensor));
        let steps = steps.map_or(&[][..], |folding| &folding.columns);
        let Some(sums) = independent_before(&found.stats, steps) else {
            return Ok(Some(found));
        };
        let stats = LayerStats::clone(&found.stats).with_independent(sums);
        let stats = stats.map_err(Error::Option)?;
        Ok(Some(Found {
            stats: Arc::new(stats),
            ..found
        }))
    }
}

/// The diagonal that `stats` had before the first rotation of `steps`, brought through the steps again. `None` without
/// a rotation or a whole moment.
fn independent_before(stats: &LayerStats, steps: &[Step]) -> Option<Vec<f64>> {
    let first = steps.iter().position(|s| matches!(s, Step::Rotate { .. }))?;
    let Moment::Full(h) = stats.moment() else {
        return None;
    };
    let (k, mut h) = (stats.columns(), h.clone());
    let scale = |h: &mut [f64], by: &dyn Fn(usize) -> f64| {
        for (r, row) in h.chunks_exact_mut(k).enumerate() {
            row.iter_mut().enumerate().for_each(|(c, h)| *h *= by(r) * by(c));
        }
    };
    for step in steps[first..].iter().rev() {
        match step {
            Step::Set(_) => {}
            Step::Scale(by) => scale(&mut h, &|c| by[c]),
            Step::Rotate { by, range } => {
                for row in h.chunks_exact_mut(k) {
                    by.rotate_back(&mut row[range.clone()], 1);
                }
                by.rotate_back(&mut h[range.start * k..range.end * k], k);
            }
        }
    }
    let mut h = alone(&Moment::Full(h), k)?;
    for step in &steps[first..] {
        match step {
            Step::Set(_) => {}
            Step::Scale(by) => scale(&mut h, &|c| if by[c] == 0.0 { 0.0 } else { 1.0 / by[c] }),
            Step::Rotate { by, range } => rotate(&mut h, by, range, k),
        }
    }
    make_symmetric(&mut h, k);
    Some(h)
}

/// Whether both change their inputs in the same way.
fn same_input(a: &Folding, b: &Folding) -> bool {
    let same = |(a, b): (&Step, &Step)| match (a, b) {
        (Step::Scale(a), Step::Scale(b)) => a == b,
        (
            Step::Rotate { by, range },
            Step::Rotate {
                by: other,
                range: others,
            },
        ) => Arc::ptr_eq(by, other) && range == others,
        _ => false,
    };
    a.columns.len() == b.columns.len() && a.columns.iter().zip(&b.columns).all(same)
}

/// Statistics of the input of `tensor` once its columns went through the steps of `folding`.
pub fn transformed(stats: &LayerStats, folding: &Folding, tensor: &str) -> Result<LayerStats> {
    let k = stats.columns();
    let wrong = |reason: String| {
        Error::Option(qtool_calib::CalibError::Statistics {
            reason: format!("{reason} (for tensor {tensor})"),
        })
    };
    let rows = stats.rows();
    let mut moment = stats.moment().clone();
    let mut tops: Vec<f64> = stats.absmax().iter().map(|&t| f64::from(t)).collect();
    let rotated = folding.columns.iter().any(|s| matches!(s, Step::Rotate { .. }));
    let mut independent = rotated.then(|| alone(&moment, k)).flatten().map(Moment::Full);
    for step in &folding.columns {
        match step {
            Step::Set(_) => {}
            Step::Scale(by) => {
                if let Some(independent) = &mut independent {
                    divide(independent, &mut tops.clone(), by, rows);
                }
                divide(&mut moment, &mut tops, by, rows);
            }
            Step::Rotate { by, range } => {
                let Moment::Full(h) = &mut moment else {
                    return Err(wrong(
                        "a rotation needs whole second moments, and these statistics hold diagonals only; measure without --diagonal".to_owned(),
                    ));
                };
                if range.end > k {
                    return Err(wrong(format!(
                        "expected statistics of {} columns, got {k}",
                        range.end
                    )));
                }
                rotate(h, by, range, k);
                if let Some(Moment::Full(independent)) = &mut independent {
                    rotate(independent, by, range, k);
                }
                for block in tops[range.clone()].chunks_exact_mut(by.len()) {
                    let bound = |j| (0..by.len()).map(|i| block[i] * by.entry(i, j).abs()).sum();
                    let bounds: Vec<f64> = (0..by.len()).map(bound).collect();
                    block.copy_from_slice(&bounds);
                }
            }
        }
    }
    for sums in [Some(&mut moment), independent.as_mut()].into_iter().flatten() {
        if let Moment::Full(h) = sums {
            make_symmetric(h, k);
        }
    }
    let tops = tops.into_iter().map(|t| t as f32).collect();
    let made = LayerStats::new(k, rows, moment, tops);
    let made = made.and_then(|made| match independent {
        Some(Moment::Full(sums)) => made.with_independent(sums),
        _ => Ok(made),
    });
    made.map_err(|e| wrong(e.to_string()))
}

/// The diagonal of whole second moments, as a matrix (K, K).
fn alone(moment: &Moment, k: usize) -> Option<Vec<f64>> {
    let Moment::Full(h) = moment else {
        return None;
    };
    let mut diagonal = vec![0.0; k * k];
    for c in 0..k {
        diagonal[c * k + c] = h[c * k + c];
    }
    Some(diagonal)
}

/// Q^T H Q in the columns of `range`.
fn rotate(h: &mut [f64], by: &Orthogonal, range: &Range<usize>, k: usize) {
    for row in h.chunks_exact_mut(k) {
        by.rotate(&mut row[range.clone()], 1);
    }
    by.rotate(&mut h[range.start * k..range.end * k], k);
}

/// Both sides were rounded one after the other: what must be equal is made equal, and no square negative.
fn make_symmetric(h: &mut [f64], k: usize) {
    for r in 0..k {
        for c in r + 1..k {
            let mean = (h[r * k + c] + h[c * k + r]) / 2.0;
            (h[r * k + c], h[c * k + r]) = (mean, mean);
        }
        h[r * k + r] = h[r * k + r].max(0.0);
    }
}

/// Columns of x divided by `by`; where that is 0, see the module's text.
fn divide(moment: &mut Moment, tops: &mut [f64], by: &[f64], rows: u64) {
    let k = tops.len();
    let inverse: Vec<f64> = by.iter().map(|&g| if g == 0.0 { 0.0 } else { 1.0 / g }).collect();
    let diagonal = |moment: &Moment, c: usize| match moment {
        Moment::Diagonal(d) => d[c],
        Moment::Full(h) => h[c * k + c],
    };
    match moment {
        Moment::Diagonal(d) => d.iter_mut().zip(&inverse).for_each(|(d, i)| *d *= i * i),
        Moment::Full(h) => {
            for (row, i) in h.chunks_exact_mut(k).zip(&inverse) {
                row.iter_mut().zip(&inverse).for_each(|(h, j)| *h *= i * j);
            }
        }
    }
    tops.iter_mut().zip(&inverse).for_each(|(t, i)| *t *= i.abs());
    let hidden: Vec<usize> = (0..k).filter(|&c| by[c] == 0.0).collect();
    if hidden.is_empty() {
        return;
    }
    let seen: f64 = (0..k).map(|c| diagonal(moment, c)).sum();
    let share = (rows as f64 * k as f64 - seen).max(0.0) / hidden.len() as f64;
    for c in hidden {
        match moment {
            Moment::Diagonal(d) => d[c] = share,
            Moment::Full(h) => h[c * k + c] = share,
        }
        tops[c] = (share / rows.max(1) as f64).sqrt();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_rows(x: &[Vec<f64>]) -> LayerStats {
        let k = x[0].len();
        let mut h = vec![0f64; k * k];
        for row in x {
            for r in 0..k {
                for c in 0..k {
                    h[r * k + c] += row[r] * row[c];
                }
            }
        }
        let tops = (0..k).map(|c| x.iter().fold(0f32, |t, row| t.max(row[c].abs() as f32)));
        LayerStats::new(k, x.len() as u64, Moment::Full(h), tops.collect()).unwrap()
    }

    #[test]
    fn statistics_follow_their_inputs() {
        let k = 12;
        let gain: Vec<f64> = (0..k)
            .map(|c| if c == 5 { 0.0 } else { 0.3 + c as f64 })
            .collect();
        let q = Orthogonal::seeded(k, 9);
        // Rows of mean square 1, as a norm makes them.
        let normed: Vec<Vec<f64>> = (0..40)
            .map(|m| {
                let row: Vec<f64> = (0..k)
                    .map(|c| ((m * 13 + c * 7 + m * c) % 11) as f64 - 5.0)
                    .collect();
                let norm = (row.iter().map(|v| v * v).sum::<f64>() / k as f64).sqrt();
                row.iter().map(|v| v / norm).collect()
            })
            .collect();
        let with = |change: &dyn Fn(&[f64]) -> Vec<f64>| {
            of_rows(&normed.iter().map(|r| change(r)).collect::<Vec<_>>())
        };
        let original = with(&|row| row.iter().zip(&gain).map(|(x, g)| x * g).collect());
        let folding = Folding {
            columns: vec![Step::Scale(gain.clone().into())],
            rows: vec![],
        };
        let unscaled = transformed(&original, &folding, "t").unwrap();
        let truth = with(&|row| row.to_vec());
        let (a, b) = (unscaled.hessian().unwrap(), truth.hessian().unwrap());
        for at in 0..k * k {
            let blind = at / k == 5 || at % k == 5;
            assert!(
                (a[at] - b[at]).abs() < 1e-12 || (blind && at != 5 * k + 5),
                "{at}"
            );
        }
        let rotation = Folding {
            columns: vec![Step::Rotate {
                by: Arc::new(q.clone()),
                range: 0..k,
            }],
            rows: vec![],
        };
        let turned = transformed(&truth, &rotation, "t").unwrap();
        let direct = with(&|row| {
            let mut row = row.to_vec();
            q.rotate(&mut row, 1);
            row
        });
        for (a, b) in turned.hessian().unwrap().iter().zip(direct.hessian().unwrap()) {
            assert!((a - b).abs() < 1e-12);
        }
        // What is independent: the diagonal before, turned; and the same from the rotated moment alone.
        let independent = turned.independent().unwrap();
        let before = truth.hessian().unwrap();
        let rows = truth.rows() as f64;
        let found = independent_before(&direct, &rotation.columns).unwrap();
        for i in 0..k {
            for j in 0..k {
                let slow: f64 = (0..k)
                    .map(|c| q.entry(c, i) * before[c * k + c] * q.entry(c, j))
                    .sum();
                assert!((independent[i * k + j] - slow).abs() < 1e-12, "{i} {j}");
                assert!((found[i * k + j] / rows - slow).abs() < 1e-12, "{i} {j}");
            }
        }
        assert_eq!(unscaled.independent(), None, "a scaled diagonal is one");
        assert!(
            turned
                .absmax()
                .iter()
                .zip(direct.absmax())
                .all(|(bound, top)| *bound >= top * 0.999_999)
        );
        let diagonal = LayerStats::new(k, 1, Moment::Diagonal(vec![1.0; k]), vec![1.0; k]).unwrap();
        let refused = transformed(&diagonal, &rotation, "t").unwrap_err().to_string();
        assert!(refused.contains("--diagonal"), "{refused}");
    }
}
