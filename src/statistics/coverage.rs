//! Whether 95 % intervals hold the truth 95 times in 100: 2000 simulated evaluations each.
//!
//! 400 resamples instead of 10,000, for time: an interval's ends then wander by a tenth of its width, which costs about
//! half a percent of coverage. The count of 2000 itself wanders by 1 % (two standard errors).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

use super::proportion::wilson;
use super::resample::{self, Resampling};
use super::sample::{Sample, Stratum};
use crate::report::Interval;

const EVALUATIONS: u64 = 2000;
const RESAMPLES: usize = 400;

struct World(ChaCha8Rng);

impl World {
    /// Between 0 and 1.
    fn uniform(&mut self) -> f64 {
        (f64::from(self.0.next_u32()) + 0.5) / 2_f64.powi(32)
    }

    fn exponential(&mut self) -> f64 {
        -self.uniform().ln()
    }

    /// 1 with probability `up`, -1 with `down`.
    fn difference(&mut self, up: f64, down: f64) -> f64 {
        let u = self.uniform();
        if u < up {
            1.0
        } else if u < up + down {
            -1.0
        } else {
            0.0
        }
    }
}

/// Share of simulated evaluations whose interval holds `truth`.
fn covered(truth: f64, evaluate: impl Fn(&mut World, u64) -> Interval + Sync) -> f64 {
    let holds = |run: u64| {
        let found = evaluate(&mut World(ChaCha8Rng::seed_from_u64(1000 + run)), run);
        u64::from(found.low <= truth && truth <= found.high)
    };
    (0..EVALUATIONS).into_par_iter().map(holds).sum::<u64>() as f64 / EVALUATIONS as f64
}

fn assert_covers(what: &str, share: f64) {
    assert!((0.93..=0.97).contains(&share), "{what}: {share}");
}

fn stratum(n: usize, mut each: impl FnMut() -> f64) -> Stratum {
    Stratum {
        values: (0..n).map(|_| each()).collect(),
        weights: vec![1.0; n],
    }
}

#[test]
fn wilson_covers() {
    for (n, p) in [(30, 0.5), (100, 0.48), (200, 0.9), (1772, 0.48), (1000, 0.02)] {
        let share = covered(p, |world, _| {
            let right = (0..n).filter(|_| world.uniform() < p).count();
            wilson(right as u64, n).unwrap()
        });
        assert_covers(&format!("Wilson, {n} items at {p}"), share);
    }
}

#[test]
fn paired_differences_cover() {
    for (n, up, down) in [(200, 0.1, 0.06), (100, 0.25, 0.25), (500, 0.02, 0.03)] {
        let share = covered(up - down, |world, seed| {
            let sample = Sample::new(vec![stratum(n, || world.difference(up, down))]).unwrap();
            resample::mean(&sample, true, Resampling::new(seed, RESAMPLES))
        });
        assert_covers(&format!("paired, {n} items, {up} won, {down} lost"), share);
    }
}

#[test]
fn macro_averages_cover() {
    // Fourteen kinds of unlike size and difficulty, as in question matching.
    let kinds: Vec<(usize, f64)> = (0..14).map(|k| (8 + 4 * k, 0.3 + 0.05 * k as f64)).collect();
    let truth = kinds.iter().map(|k| k.1).sum::<f64>() / 14.0;
    let accuracy = covered(truth, |world, seed| {
        let strata = kinds
            .iter()
            .map(|&(n, p)| stratum(n, || f64::from(u8::from(world.uniform() < p))));
        let sample = Sample::new(strata.collect()).unwrap();
        resample::mean(&sample, true, Resampling::new(seed, RESAMPLES))
    });
    assert_covers("macro average of accuracies", accuracy);
    let difference = covered(0.04 - 0.06, |world, seed| {
        let strata = kinds
            .iter()
            .map(|&(n, _)| stratum(n, || world.difference(0.04, 0.06)));
        let sample = Sample::new(strata.collect()).unwrap();
        resample::mean(&sample, true, Resampling::new(seed, RESAMPLES))
    });
    assert_covers("macro average of differences", difference);
}

#[test]
fn means_of_few_windows_cover() {
    // Nats a window differ by a little noise, windows by their length.
    for n in [8, 40] {
        let share = covered(0.1, |world, seed| {
            let weights: Vec<f64> = (0..n).map(|_| 200.0 + 56.0 * world.uniform()).collect();
            let values = weights
                .iter()
                .map(|_| 0.1 + world.uniform() + world.uniform() - 1.0)
                .collect();
            let sample = Sample::new(vec![Stratum { values, weights }]).unwrap();
            resample::mean(&sample, false, Resampling::new(seed, RESAMPLES))
        });
        assert_covers(&format!("mean of {n} windows"), share);
    }
    // KL is skewed: an exponential needs more of them.
    let skewed = covered(1.0, |world, seed| {
        let sample = Sample::new(vec![stratum(150, || world.exponential())]).unwrap();
        resample::mean(&sample, false, Resampling::new(seed, RESAMPLES))
    });
    assert_covers("skewed mean of 150", skewed);
}

#[test]
fn rare_disagreement_is_not_undercovered() {
    // One in 200 items gained, none lost, 100 items: most evaluations see no disagreement at all.
    let share = covered(0.005, |world, seed| {
        let sample = Sample::new(vec![stratum(100, || world.difference(0.005, 0.0))]).unwrap();
        resample::mean(&sample, true, Resampling::new(seed, RESAMPLES))
    });
    assert!(share >= 0.93, "{share}");
}

/// Bias-corrected percentiles of a statistic that is no mean: the standard deviation.
#[test]
fn recomputed_statistics_cover() {
    let truth = (1.0_f64 / 12.0).sqrt();
    let share = covered(truth, |world, seed| {
        let values: Vec<f64> = (0..80).map(|_| world.uniform()).collect();
        let deviation = |items: &[usize]| {
            let mean = items.iter().map(|&i| values[i]).sum::<f64>() / items.len() as f64;
            let square: f64 = items.iter().map(|&i| (values[i] - mean).powi(2)).sum();
            (square / (items.len() as f64 - 1.0)).sqrt()
        };
        let all: Vec<usize> = (0..80).collect();
        let drawn = resample::indexes(
            std::slice::from_ref(&all),
            Resampling::new(seed, RESAMPLES),
            deviation,
        );
        resample::bias_corrected(deviation(&all), drawn, super::LEVEL)
    });
    assert_covers("standard deviation", share);
}
