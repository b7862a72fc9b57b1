//! What validation wants of logits, computed where they lie, so that a row of a whole vocabulary need not come back: the
//! log-probabilities of a few tokens, and how far a candidate's distribution is from the base's.

use cudarc::driver::PushKernelArg;

use super::backend::{CudaBackend, DeviceTensor};
use super::launch::run;
use crate::backend::Divergence;

/// Threads of a block, which the kernels count on.
const THREADS: u32 = 256;

impl CudaBackend {
    /// ln p of tokens `wanted[m]` under softmax of row m of `logits` (M, V), in nats: within 1e-12 of f64 sums. NaN for a
    /// row with a logit that is not finite, and for all of them when the device has failed.
    ///
    /// # Panics
    ///
    /// When the rows disagree, or a token is not below V.
    pub fn log_p(&self, logits: &DeviceTensor, wanted: &[Vec<u32>]) -> Vec<Vec<f64>> {
        let (rows, columns) = logits.size();
        assert_eq!(wanted.len(), rows, "tokens of every row");
        let tokens = wanted.concat();
        assert!(tokens.iter().all(|&t| (t as usize) < columns), "tokens below V");
        let mut starts = vec![0i32];
        for row in wanted {
            starts.push(starts[starts.len() - 1] + row.len() as i32);
        }
        let found = logits.values().filter(|_| !tokens.is_empty()).and_then(|values| {
            self.attempt("find log-probabilities", || {
                let device = self.device();
                let (starts, wanted) = (device.sent(&starts)?, device.sent(&tokens)?);
                let mut out = device.zeros::<f64>(tokens.len())?;
                let v = columns as i32;
                let mut call = self.kernel("log_p");
                call.arg(&mut *out)
                    .arg(values)
                    .arg(&*starts)
                    .arg(&*wanted)
                    .arg(&v);
                run(call, (rows as u32, 1), THREADS)?;
                self.stream().clone_dtoh(&*out)
            })
        });
        let found = found.unwrap_or_else(|| vec![f64::NAN; tokens.len()]);
        let mut rest = found.as_slice();
        wanted
            .iter()
            .map(|row| {
                let (mine, others) = rest.split_at(row.len());
                rest = others;
                mine.to_vec()
            })
            .collect()
    }

    /// Each row of `candidate` (M, V) beside that of `base` (M, V): logits, or log-probabilities that were stored.
    /// `None` for a row with a logit that is not finite or a target that is not below V, and for all of them when the device
    /// has failed.
    ///
    /// # Panics
    ///
    /// When the sizes disagree.
    pub fn divergence(
        &self,
        base: &DeviceTensor,
        candidate: &DeviceTensor,
        targets: &[u32],
    ) -> Vec<Option<Divergence>> {
        let (rows, columns) = candidate.size();
        assert_eq!((base.size(), targets.len()), ((rows, columns), rows), "sizes");
        let known = |target: u32| (target as usize) < columns;
        let targets: Vec<u32> = targets
            .iter()
            .map(|&t| if known(t) { t } else { u32::MAX })
            .collect();
        let both = base.values().zip(candidate.values());
        let found = both.and_then(|(base, candidate)| {
            self.attempt("compare logits", || {
                let device = self.device();
                let targets = device.sent(&targets)?;
                let mut out = device.zeros::<f64>(3 * rows)?;
                let v = columns as i32;
                let mut call = self.kernel("divergence");
                call.arg(&mut *out)
                    .arg(base)
                    .arg(candidate)
                    .arg(&*targets)
                    .arg(&v);
                run(call, (rows as u32, 1), THREADS)?;
                self.stream().clone_dtoh(&*out)
            })
        });
        let found = found.unwrap_or_else(|| vec![f64::NAN; 3 * rows]);
        let row = |row: &[f64; 3]| {
            (!row[0].is_nan()).then_some(Divergence {
                kl: row[0],
                delta_p: row[1],
                agreed: row[2] == 1.0,
            })
        };
        found.as_chunks::<3>().0.iter().map(row).collect()
    }
}
