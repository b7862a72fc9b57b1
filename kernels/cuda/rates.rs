//! How fast the kernels run: each timed over many launches in a row, memory allocated before. For `calib/benches/gpu_rates.rs`.

use std::time::Instant;

use cudarc::driver::{DriverError, PushKernelArg};

use super::backend::{CudaBackend, DeviceTensor, FEW_ROWS};
use super::launch::run;
use super::weight::DeviceWeight;
use crate::backend::{Heads, Segment};

impl CudaBackend {
    /// Seconds of one of `times` runs of `work`, all of them started before the device is waited for, after one that
    /// does not count. `None` when the device has failed; [`fault`](crate::Backend::fault) says how.
    fn timed(&self, times: usize, mut work: impl FnMut(usize) -> Result<(), DriverError>) -> Option<f64> {
        self.attempt("be timed", || {
            work(0)?;
            self.stream().synchronize()?;
            let start = Instant::now();
            (0..times).try_for_each(&mut work)?;
            self.stream().synchronize()?;
            Ok(start.elapsed().as_secs_f64() / times.max(1) as f64)
        })
    }

    /// Bytes read plus bytes written in a second, when the device copies `bytes` from one place to another.
    pub fn copy_rate(&self, bytes: usize, times: usize) -> Option<f64> {
        let buffers = self.attempt("allocate what is copied", || {
            let stream = self.stream();
            Ok((stream.alloc_zeros::<u8>(bytes)?, stream.alloc_zeros::<u8>(bytes)?))
        });
        let (from, mut to) = buffers?;
        let seconds = self.timed(times, |_| self.stream().memcpy_dtod(&from, &mut to))?;
        Some(2.0 * bytes as f64 / seconds)
    }

    /// Seconds from one launch to the next where kernels have hardly anything to do: what small products cannot go below.
    pub fn launch_seconds(&self, times: usize) -> Option<f64> {
        let mut one = self.attempt("allocate a number", || self.stream().alloc_zeros::<f32>(1))?;
        self.timed(times, |_| {
            let mut call = self.kernel("activate");
            call.arg(&mut one).arg(&1i64).arg(&3i32);
            run(call, (1, 1), 32)
        })
    }

    /// Seconds of a product of x (M, K) by one of `weights`, taken in turn so that none stays in a cache.
    ///
    /// # Panics
    ///
    /// When there is no weight, or their sizes and that of x disagree.
    pub fn product_seconds(&self, x: &DeviceTensor, weights: &[DeviceWeight], times: usize) -> Option<f64> {
        let ((m, k), n) = (x.size(), weights[0].args.n as usize);
        assert!(
            weights
                .iter()
                .all(|w| (w.args.n as usize, w.args.k as usize) == (n, k)),
            "sizes"
        );
        let values = x.values()?;
        let mut out = self.attempt("allocate a product", || self.stream().alloc_zeros::<f32>(m * n))?;
        if m <= FEW_ROWS {
            // They take a few microseconds, so the questions where weights lie are asked before.
            let dealt = self.attempt("reserve memory", || self.deal_few_rows(&weights[0].args, m))?;
            let all: Vec<&DeviceWeight> = weights.iter().collect();
            let there = self.attempt("bring weights there", || {
                DeviceWeight::resident(self.device(), &all)
            })?;
            return self.timed(times, |i| {
                self.few_rows(&mut out, values, &there[i % there.len()], m, &dealt)
            });
        }
        self.timed(times, |i| {
            self.product(&mut out, values, &weights[i % weights.len()], m)
        })
    }

    /// Seconds of the sums of one [`gram`](crate::Backend::gram) of x, without bringing them back.
    pub fn gram_seconds(&self, x: &DeviceTensor, times: usize) -> Option<f64> {
        let (values, (m, k)) = (x.values()?, x.size());
        let mut out = self.attempt("allocate moments", || self.stream().alloc_zeros::<f64>(k * k))?;
        self.timed(times, |_| self.sum_products(&mut out, values, m, k))
    }

    /// Seconds of one [`attention`](crate::Backend::attention).
    pub fn attention_seconds(
        &self,
        [q, keys, values]: [&DeviceTensor; 3],
        segments: &[Segment],
        heads: Heads,
        times: usize,
    ) -> Option<f64> {
        let (rows, columns) = q.size();
        let from = [q.values()?, keys.values()?, values.values()?];
        let mut out = self.attempt("allocate a result", || {
            self.stream().alloc_zeros::<f32>(rows * columns)
        })?;
        self.timed(times, |_| self.attend(&mut out, from, segments, rows, heads))
    }
}
