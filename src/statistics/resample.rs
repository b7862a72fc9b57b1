//! How far an average would move with other items of the same kind: the bootstrap, within strata, seeded.
//!
//! Means are resampled by their items' deviations and the percentiles taken, with two corrections for few items
//! (T. Hesterberg, "What Teachers Should Know About the Bootstrap", 2015): deviations enlarged by sqrt(n / (n - 1)),
//! and the ends stretched by t over z. Right-or-wrong items bring a third: a sample without a disagreement would have an
//! interval of no width, as if no disagreement were possible. Two imagined items, one won and one lost, are resampled
//! with the others (the Laplace adjustment of D. Bonett and R. Price, 2012, in bootstrap form), which makes it
//! about 3 / n wide on each side there and changes next to nothing where many disagree.
//!
//! Other statistics are computed anew from resampled items; the interval is the bias-corrected percentile one (B. Efron,
//! 1981).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::sample::{Sample, Spread};
use super::{LEVEL, normal_cdf, normal_quantile, t_quantile};
use crate::report::Interval;

/// Resamples when nothing else is asked for: their ends wander by about 2 % of the interval's width.
pub const RESAMPLES: usize = 10_000;
/// Resamples that share a stream of random numbers.
const BLOCK: usize = 64;
/// First stream of sign flips, away from those of resampling.
const SIGNS: u64 = 1 << 40;

/// Numbers drawn for one block of resamples, or of sign flips.
pub(crate) struct Draws(ChaCha8Rng);

impl Draws {
    fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// A number below `n`, by multiply and shift: off from equal chances by less than n / 2^32.
    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// 64 fair coins.
    pub fn coins(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// How often one item of many is drawn in as many draws: Poisson of mean 1.
    fn times(&mut self) -> f64 {
        let u = f64::from(self.0.next_u32()) / 2_f64.powi(32);
        let (mut k, mut p) = (0.0, (-1.0_f64).exp());
        let mut below = p;
        while u >= below && k < 16.0 {
            k += 1.0;
            p /= k;
            below += p;
        }
        k
    }
}

/// `count` results of `each`, in one order for any number of threads.
fn blocks<T: Send>(seed: u64, first: u64, count: usize, each: impl Fn(&mut Draws) -> T + Sync) -> Vec<T> {
    let block = |b: usize| {
        let mut draws = Draws::new(seed, first + b as u64);
        let here = BLOCK.min(count - b * BLOCK);
        (0..here).map(|_| each(&mut draws)).collect::<Vec<T>>()
    };
    (0..count.div_ceil(BLOCK))
        .into_par_iter()
        .flat_map_iter(block)
        .collect()
}

/// `count` results drawn from the streams of sign flips.
pub(crate) fn with_coins<T: Send>(seed: u64, count: usize, each: impl Fn(&mut Draws) -> T + Sync) -> Vec<T> {
    blocks(seed, SIGNS, count, each)
}

/// The value at a share `p` of sorted numbers, linear between neighbours.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = p.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}

/// How to resample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resampling {
    /// Seed of the draws.
    pub seed: u64,
    /// Resamples; at least 1.
    pub resamples: usize,
    /// Error rate of the interval, both sides together.
    pub level: f64,
}

impl Resampling {
    /// At 95 % confidence.
    pub fn new(seed: u64, resamples: usize) -> Self {
        Self {
            seed,
            resamples: resamples.max(1),
            level: LEVEL,
        }
    }
}

/// Interval of a mean. `binary`: items are right or wrong (or differences of such).
pub(crate) fn mean(sample: &Sample, binary: bool, how: Resampling) -> Interval {
    let (value, spread) = (sample.mean(), sample.spread());
    let mut moved = blocks(how.seed, 0, how.resamples, |draws| {
        deviation(&spread, binary, draws)
    });
    moved.sort_unstable_by(f64::total_cmp);
    let stretch = if binary {
        1.0
    } else {
        t_quantile(how.level / 2.0, spread.freedom.max(1.0)) / normal_quantile(how.level / 2.0)
    };
    Interval {
        value,
        low: value + (percentile(&moved, how.level / 2.0) * stretch).min(0.0),
        high: value + (percentile(&moved, 1.0 - how.level / 2.0) * stretch).max(0.0),
    }
}

fn deviation(spread: &Spread, binary: bool, draws: &mut Draws) -> f64 {
    let mut sum = 0.0;
    for (items, &n) in spread.strata.iter().zip(&spread.draws) {
        for _ in 0..n {
            sum += items[draws.below(items.len())];
        }
    }
    if binary {
        sum += spread.step * (draws.times() - draws.times());
    }
    sum
}

/// Resampled item indexes, `strata` holding those of each stratum, handed to `statistic`.
pub(crate) fn indexes<T: Send>(
    strata: &[Vec<usize>],
    how: Resampling,
    statistic: impl Fn(&[usize]) -> T + Sync,
) -> Vec<T> {
    blocks(how.seed, 0, how.resamples, |draws| {
        let all = strata.iter().flat_map(|s| (0..s.len()).map(move |_| s));
        let drawn: Vec<usize> = all.map(|s| s[draws.below(s.len())]).collect();
        statistic(&drawn)
    })
}

/// The bias-corrected percentile interval of a statistic with this value and these resampled values: the percentiles
/// are moved by twice the z of the share of resamples below the value, ties counted half.
pub(crate) fn bias_corrected(value: f64, mut resampled: Vec<f64>, level: f64) -> Interval {
    resampled.sort_unstable_by(f64::total_cmp);
    let (mut low, mut high) = (value, value);
    if !resampled.is_empty() {
        let below = resampled.partition_point(|r| *r < value) as f64;
        let ties = resampled.partition_point(|r| *r <= value) as f64 - below;
        let count = resampled.len() as f64;
        // A value outside its own resamples would move the percentiles to nowhere.
        let share = ((below + ties / 2.0) / count).clamp(0.5 / count, 1.0 - 0.5 / count);
        let bias = 2.0 * normal_quantile(share);
        low = percentile(&resampled, normal_cdf(bias + normal_quantile(level / 2.0)));
        high = percentile(&resampled, normal_cdf(bias + normal_quantile(1.0 - level / 2.0)));
    }
    Interval {
        value,
        low: low.min(value),
        high: high.max(value),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Stratum;
    use super::*;

    fn sample(values: Vec<f64>) -> Sample {
        let weights = vec![1.0; values.len()];
        Sample::new(vec![Stratum { values, weights }]).unwrap()
    }

    #[test]
    fn percentiles_by_hand() {
        let sorted = [0.0, 1.0, 2.0, 4.0];
        assert_eq!(percentile(&sorted, 0.0), 0.0);
        assert_eq!(percentile(&sorted, 1.0), 4.0);
        assert_eq!(percentile(&sorted, 0.5), 1.5);
        assert_eq!(percentile(&[7.0], 0.3), 7.0);
    }

    #[test]
    fn an_interval_near_the_textbook_one() {
        // 400 numbers 0..399: standard error 115.6 / 20 = 5.78.
        let found = mean(
            &sample((0..400).map(f64::from).collect()),
            false,
            Resampling::new(1, 4000),
        );
        assert_eq!(found.value, 199.5);
        let half = 1.966 * 5.781;
        assert!((found.high - found.value - half).abs() < 0.5, "{found:?}");
        assert!((found.value - found.low - half).abs() < 0.5, "{found:?}");
    }

    #[test]
    fn no_disagreement_is_not_certainty() {
        let found = mean(&sample(vec![0.0; 100]), true, Resampling::new(1, 10_000));
        assert!(found.value == 0.0 && (found.low + 0.03).abs() < 1e-12 && (found.high - 0.03).abs() < 1e-12);
        let real = mean(&sample(vec![2.0; 100]), false, Resampling::new(1, 100));
        assert_eq!((real.low, real.high), (2.0, 2.0));
    }

    #[test]
    fn the_same_for_any_number_of_threads() {
        let values: Vec<f64> = (0..50).map(|i| f64::from(i * i % 17)).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| mean(&sample(values.clone()), false, Resampling::new(3, 1000)))
        };
        assert_eq!(run(1), run(5));
        assert_ne!(
            run(1),
            mean(&sample(values.clone()), false, Resampling::new(4, 1000))
        );
    }

    #[test]
    fn strata_keep_their_sizes() {
        let strata = [vec![0, 1, 2], vec![7, 8]];
        let seen = indexes(&strata, Resampling::new(5, 200), <[usize]>::to_vec);
        assert_eq!(seen.len(), 200);
        for drawn in &seen {
            assert!(
                drawn.len() == 5 && drawn[..3].iter().all(|i| *i < 3) && drawn[3..].iter().all(|i| *i > 6)
            );
        }
        assert!((0..3).all(|i| seen.iter().any(|d| d[0] == i)));
    }

    #[test]
    fn bias_is_corrected_and_ties_are_none() {
        let all_equal = bias_corrected(1.0, vec![1.0; 50], LEVEL);
        assert_eq!((all_equal.low, all_equal.high), (1.0, 1.0));
        // Without bias: the plain percentiles.
        let plain = bias_corrected(50.0, (0..=100).map(f64::from).collect(), LEVEL);
        assert!(
            (plain.low - 2.5).abs() < 0.1 && (plain.high - 97.5).abs() < 0.1,
            "{plain:?}"
        );
        // Most resamples lie below the value: both ends move up.
        let biased = bias_corrected(60.0, (0..=100).map(f64::from).collect(), LEVEL);
        assert!(biased.low > 4.0 && biased.high > 98.0, "{biased:?}");
    }
}
