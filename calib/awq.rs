//! Scales of input channels by search: a channel with large inputs gets finer steps at the cost of the others.
//!
//! ```text
//! s_k(alpha) = (m_k / geometric mean of m)^alpha,    m_k = root mean square of channel k
//! W' = W diag(s),  x' = x diag(1 / s):  the same layer, whose quantization errs by E' = W' - Q(W')
//! choose alpha in {0, 1/20 .. 19/20}:  least sum over weights of tr(E' H' E'^T),  H' = diag(1/s) H diag(1/s)
//! ```
//!
//! alpha = 0 is no scaling, so the choice is never worse than none on the rows it was priced on. Prices come from
//! second moments alone; no model is run. Source: AWQ (Lin et al. 2023), whose grid and form of s this is; there the
//! price is the output error on a few rows and m the mean magnitude.

use qtool_kernels::Isa;
use rayon::prelude::*;

use crate::proxy::Proxy;
use crate::stats::{LayerStats, Moment};
use crate::{CalibError, Quantizer, Result};

/// Steps of alpha.
pub const STEPS: usize = 20;
/// Rows priced together.
const ROWS: usize = 32;
/// Largest ratio of a scale to the geometric mean, either way: a channel that is always zero asks for nothing.
const REACH: f64 = 1e4;

/// A weight that reads the scaled input.
pub struct Reader<'a> {
    /// How it will be quantized.
    pub quantizer: &'a dyn Quantizer,
    /// Statistics of its input.
    pub stats: &'a LayerStats,
    /// Some of its rows, or all, (n, K).
    pub rows: &'a [f32],
    /// How many rows of the weight each of them stands for.
    pub weight: f64,
}

/// Scales and what they were found by.
#[derive(Debug, Clone, PartialEq)]
pub struct Scales {
    /// s, one for each channel; all 1 when no scaling was better than any.
    pub scales: Vec<f32>,
    /// The exponent.
    pub alpha: f64,
    /// Price of the errors with these scales, as a share of the price without.
    pub gain: f64,
}

/// The scales of this exponent for channels whose mean squares are `importance`.
pub fn scales_of(importance: &[f64], alpha: f64) -> Vec<f32> {
    let seen: Vec<f64> = importance.iter().copied().filter(|&v| v > 0.0).collect();
    let mean = seen.iter().map(|v| v.ln()).sum::<f64>() / seen.len().max(1) as f64;
    let scale = |&v: &f64| match v > 0.0 {
        true => (0.5 * alpha * (v.ln() - mean)).exp().clamp(1.0 / REACH, REACH) as f32,
        false => 1.0,
    };
    importance.iter().map(scale).collect()
}

/// Searches scales for `channels` channels; column c of every reader belongs to channel `channel_of[c]` (several
/// columns share one where query heads share a value head).
///
/// Fails when a reader's statistics or rows are of another width than `channel_of`, or its rows cannot be quantized.
pub fn search(isa: Isa, readers: &[Reader<'_>], channel_of: &[usize], channels: usize) -> Result<Scales> {
    let k = channel_of.len();
    let bad = |reason: String| Err(CalibError::Statistics { reason });
    let mut sums = vec![0f64; channels];
    for reader in readers {
        if reader.stats.columns() != k || !reader.rows.len().is_multiple_of(k.max(1)) {
            return bad(format!(
                "expected statistics and rows of {k} columns, got {}",
                reader.stats.columns()
            ));
        }
        let rows = reader.stats.rows() as f64;
        let each = reader.stats.importance().into_iter().zip(channel_of);
        each.for_each(|(v, &channel)| sums[channel] += f64::from(v) * rows);
    }
    let mut best = Scales {
        scales: vec![1.0; channels],
        alpha: 0.0,
        gain: 1.0,
    };
    let plain = price(isa, readers, &vec![1.0; k])?;
    let mut least = plain;
    for step in 1..STEPS {
        let alpha = step as f64 / STEPS as f64;
        let scales = scales_of(&sums, alpha);
        let columns: Vec<f32> = channel_of.iter().map(|&channel| scales[channel]).collect();
        let cost = price(isa, readers, &columns)?;
        if cost < least {
            least = cost;
            best = Scales {
                scales,
                alpha,
                gain: cost / plain,
            };
        }
    }
    Ok(best)
}

/// sum over readers of tr(E' H' E'^T). Rows are priced in parts that do not depend on threads.
fn price(isa: Isa, readers: &[Reader<'_>], scales: &[f32]) -> Result<f64> {
    let k = scales.len();
    let mut total = 0.0;
    let mut shared: Option<(&LayerStats, Proxy)> = None;
    for reader in readers {
        if !shared
            .as_ref()
            .is_some_and(|(stats, _)| std::ptr::eq(*stats, reader.stats))
        {
            shared = Some((reader.stats, Proxy::new(&divided(reader.stats, scales)?)));
        }
        let Some((_, proxy)) = &shared else { continue };
        let parts: Vec<&[f32]> = reader.rows.chunks(ROWS * k).collect();
        let costs = parts
            .par_iter()
            .map(|part| {
                let scaled: Vec<f32> = part
                    .chunks_exact(k)
                    .flat_map(|row| row.iter().zip(scales).map(|(w, s)| w * s))
                    .collect();
                let codes = reader.quantizer.quantize(isa, &scaled, scaled.len() / k, k)?;
                Ok(proxy.sums(&scaled, &codes).0)
            })
            .collect::<Result<Vec<f64>>>()?;
        total += costs.iter().sum::<f64>() * reader.weight;
    }
    Ok(total)
}

/// The statistics of x diag(1 / s).
fn divided(stats: &LayerStats, scales: &[f32]) -> Result<LayerStats> {
    let inverse: Vec<f64> = scales.iter().map(|&s| 1.0 / f64::from(s)).collect();
    let k = inverse.len();
    let moment = match stats.moment() {
        Moment::Diagonal(d) => Moment::Diagonal(d.iter().zip(&inverse).map(|(d, i)| d * i * i).collect()),
        Moment::Full(h) => Moment::Full(
            h.chunks_exact(k)
                .zip(&inverse)
                .flat_map(|(row, i)| row.iter().zip(&inverse).map(move |(h, j)| h * i * j))
                .collect(),
        ),
    };
    let tops = stats.absmax().iter().zip(&inverse).map(|(t, i)| t * *i as f32);
    LayerStats::new(k, stats.rows(), moment, tops.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::of_rows;
    use crate::options::PartialOptions;

    #[test]
    fn scales_by_hand() {
        // Root mean squares 1, 4, 0 and 2: the geometric mean of those seen is 2.
        let near = |found: Vec<f32>, expected: [f32; 4]| {
            assert!(
                found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6),
                "{found:?}"
            );
        };
        near(scales_of(&[1.0, 16.0, 0.0, 4.0], 1.0), [0.5, 2.0, 1.0, 1.0]);
        near(
            scales_of(&[1.0, 16.0, 0.0, 4.0], 0.5),
            [0.5f32.sqrt(), 2f32.sqrt(), 1.0, 1.0],
        );
        near(scales_of(&[1.0, 16.0, 0.0, 4.0], 0.0), [1.0; 4]);
    }

    /// One channel in sixteen carries large inputs and small weights: scaling must find it, and pay.
    #[test]
    fn a_loud_channel_gets_finer_steps() {
        let k = 64;
        let value = |i: usize| ((i * 2_654_435_761) % 1009) as f32 / 504.5 - 1.0;
        let loud = |c: usize| if c % 16 == 3 { 30.0 } else { 1.0 };
        let x: Vec<f32> = (0..200 * k).map(|i| value(i + 7) * loud(i % k)).collect();
        let stats = of_rows(&x, k);
        let rows: Vec<f32> = (0..48 * k)
            .map(|i| value(i * 3 + 1) * if loud(i % k) > 1.0 { 0.1 } else { 1.0 })
            .collect();
        for options in ["bits:4,group:64,clip:none", "bits:4,group:32,clip:mse", "bits:8"] {
            let options = PartialOptions::parse(options).unwrap().complete(4).unwrap();
            let quantizer = (crate::find(options.method).unwrap().build)(&options).unwrap();
            let reader = Reader {
                quantizer: quantizer.as_ref(),
                stats: &stats,
                rows: &rows,
                weight: 1.0,
            };
            let all: Vec<usize> = (0..k).collect();
            let found = search(Isa::best(), &[reader], &all, k).unwrap();
            assert!(found.alpha > 0.0 && found.gain < 0.7, "{options}: {found:?}");
            assert!(found.scales[3] > 2.0 * found.scales[4]);
            // The gain, again, from the definition: outputs of the decoded layer on the rows themselves.
            let error = |scales: &[f32]| {
                let scaled: Vec<f32> = rows
                    .chunks_exact(k)
                    .flat_map(|r| r.iter().zip(scales).map(|(w, s)| w * s))
                    .collect();
                let codes = quantizer.quantize(Isa::best(), &scaled, 48, k).unwrap();
                let mut decoded = vec![0f32; k];
                let mut total = 0f64;
                for n in 0..48 {
                    codes.dequantize_row(n, &mut decoded);
                    for x in x.chunks_exact(k) {
                        let off: f64 = (0..k)
                            .map(|c| {
                                f64::from(x[c])
                                    * (f64::from(rows[n * k + c])
                                        - f64::from(decoded[c]) / f64::from(scales[c]))
                            })
                            .sum();
                        total += off * off;
                    }
                }
                total
            };
            let gain = error(&found.scales) / error(&vec![1.0; k]);
            assert!(
                (gain - found.gain).abs() < 1e-3 * gain,
                "{options}: {gain} {}",
                found.gain
            );
            // Channels that share a scale: pairs of neighbours.
            let reader = Reader {
                quantizer: quantizer.as_ref(),
                stats: &stats,
                rows: &rows,
                weight: 1.0,
            };
            let pairs: Vec<usize> = (0..k).map(|c| c / 2).collect();
            assert_eq!(
                search(Isa::best(), &[reader], &pairs, k / 2)
                    .unwrap()
                    .scales
                    .len(),
                k / 2
            );
        }
    }
}
