//! How long work takes on the device, by its own clock: events before and after, on the compute stream.

use cudarc::driver::sys::CUevent_flags;

use super::backend::CudaBackend;
use super::launch::out_of_memory;
use crate::backend::{Backend, Fault};

impl CudaBackend {
    /// Seconds between the start of the first kernel or copy that `work` starts and the end of the last.
    pub fn timed(&self, work: impl FnOnce()) -> Result<f64, Fault> {
        let stream = &self.device().stream;
        let mark = || {
            self.attempt("time work", || {
                stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
            })
        };
        let begun = mark();
        work();
        let ended = mark();
        self.fault()?;
        let milliseconds = begun
            .zip(ended)
            .and_then(|(begun, ended)| self.attempt("time work", || begun.elapsed_ms(&ended)));
        self.fault()?;
        Ok(f64::from(milliseconds.unwrap_or_default()) / 1e3)
    }

    /// Bytes a second, read and written counted, of the driver's own copy of `bytes` bytes from one place on the device to
    /// another: the best of `times`. The yardstick of kernels that are bound by memory.
    pub fn copy_rate(&self, bytes: usize, times: usize) -> Result<f64, Fault> {
        let (stream, arena) = (&self.device().stream, &self.device().arena);
        let blocks = self.attempt("allocate a tensor", || {
            let block = || arena.take::<u8>(bytes)?.ok_or_else(out_of_memory);
            Ok((block()?, block()?))
        });
        let Some((from, mut to)) = blocks else {
            self.fault()?;
            return Ok(0.0);
        };
        let mut best = f64::INFINITY;
        for _ in 0..times {
            let copy = || {
                self.attempt("copy within the device", || stream.memcpy_dtod(&from, &mut to));
            };
            best = best.min(self.timed(copy)?);
        }
        arena.give(from);
        arena.give(to);
        Ok(2.0 * bytes as f64 / best)
    }
}
