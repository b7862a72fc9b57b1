//! What may be concluded from scores of several models on the same items. Owns the arithmetic; it knows neither tasks
//! nor models, and prints nothing.
//!
//! | Question | Page |
//! |---|---|
//! | how sure is a share of right answers; do two models differ on the same items | [`proportion`] |
//! | what is a model worth that does not look | [`baselines`] |
//! | which rows stay significant when many are looked at | [`holm`] |
//! | how far would an average move with other items of the same kind | [`resample`] |
//! | do differences of any size have a side | [`signs`] |
//! | which difference would this many items find | [`power`] |
//! | all of it, as rows of a report | [`compare`] |
//!
//! Everything drawn comes from ChaCha8 with the seed of the run and a stream of its own for each block of resamples,
//! so the numbers are the same for any number of threads.

pub mod baselines;
pub mod compare;
#[cfg(test)]
mod coverage;
pub mod holm;
pub mod power;
pub mod proportion;
mod recomputed;
pub mod resample;
mod sample;
pub mod signs;

use statrs::distribution::{ContinuousCDF, Normal, StudentsT};

/// Error rate of every interval and test here: 95 % confidence, 5 % level.
pub const LEVEL: f64 = 0.05;

/// Quantile of the standard normal distribution.
pub(crate) fn normal_quantile(p: f64) -> f64 {
    Normal::standard().inverse_cdf(p)
}

/// Distribution function of the standard normal distribution.
pub(crate) fn normal_cdf(x: f64) -> f64 {
    Normal::standard().cdf(x)
}

/// Quantile of Student's t; the normal one for degrees of freedom that are none.
pub(crate) fn t_quantile(p: f64, freedom: f64) -> f64 {
    // Above some thousands the two differ by less than a resample can tell.
    match StudentsT::new(0.0, 1.0, freedom) {
        Ok(t) if freedom < 1e4 => t.inverse_cdf(p),
        _ => normal_quantile(p),
    }
}
