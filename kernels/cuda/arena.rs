//! Device memory under a budget. Owns what is taken, what is kept for the next taker, and the sentence that refuses more.
//!
//! Blocks that are given back are kept by their size and handed out again: a forward pass asks for the same sizes over and
//! over, and the driver's own allocation costs more than most kernels. All blocks are used in the order of one stream, so
//! one that is given back may be handed out while its last kernel still waits to run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError};

use super::launch::{adopt, uninitialised};

/// Device memory under a budget.
#[derive(Debug)]
pub(super) struct Arena {
    stream: Arc<CudaStream>,
    budget: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Kept blocks by their size: where they begin.
    kept: BTreeMap<usize, Vec<u64>>,
    /// Bytes of kept blocks.
    idle: usize,
    /// Bytes of blocks that are taken.
    used: usize,
    /// Most of them at any time.
    most: usize,
    /// Why the last taker got nothing, when it was the budget.
    refusal: Option<String>,
}

/// Bytes of a block for `bytes`: rounded up by at most a sixteenth, so that sizes meet again.
pub(super) fn rounded(bytes: usize) -> usize {
    let grain = (bytes.next_power_of_two() / 32).max(16);
    bytes.next_multiple_of(grain)
}

impl Arena {
    pub(super) fn new(stream: Arc<CudaStream>, budget: usize) -> Self {
        Self {
            stream,
            budget,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Most bytes that may be taken.
    pub(super) fn budget(&self) -> usize {
        self.budget
    }

    /// Bytes taken now, and the most so far.
    pub(super) fn used(&self) -> (usize, usize) {
        let state = self.state();
        (state.used, state.most)
    }

    /// Whether `bytes` more fit a budget of which `spare` bytes stay free.
    pub(super) fn has_room(&self, bytes: usize, spare: usize) -> bool {
        self.state().used + rounded(bytes) + spare <= self.budget
    }

    /// Room for `len` values, with whatever was there before. `None` when the budget does not hold them.
    pub(super) fn take<T: DeviceRepr>(&self, len: usize) -> Result<Option<CudaSlice<T>>, DriverError> {
        let bytes = rounded(len * size_of::<T>());
        let mut state = self.state();
        if state.used + bytes > self.budget {
            state.refusal = Some(format!(
                "out of GPU memory: {} MiB more do not fit a budget of {} MiB, of which {} are in use; pass a larger --device-memory, or --device cpu",
                mib(bytes),
                mib(self.budget),
                mib(state.used)
            ));
            return Ok(None);
        }
        let block = match state.kept.get_mut(&bytes).and_then(Vec::pop) {
            Some(block) => {
                state.idle -= bytes;
                adopt(&self.stream, block, len)
            }
            None => {
                let fits = state.used + state.idle + bytes <= self.budget;
                if !fits {
                    self.release(&mut state);
                }
                match uninitialised::<u8>(&self.stream, bytes) {
                    // Others may have taken what we keep for later.
                    Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) if state.idle > 0 => {
                        self.release(&mut state);
                        self.stream.synchronize()?;
                        adopt(
                            &self.stream,
                            uninitialised::<u8>(&self.stream, bytes)?.leak(),
                            len,
                        )
                    }
                    block => adopt(&self.stream, block?.leak(), len),
                }
            }
        };
        // A refusal that was got around is none.
        state.refusal = None;
        state.used += bytes;
        state.most = state.most.max(state.used);
        Ok(Some(block))
    }

    /// Takes a block back.
    pub(super) fn give<T: DeviceRepr>(&self, block: CudaSlice<T>) {
        let bytes = rounded(block.len() * size_of::<T>());
        let mut state = self.state();
        state.kept.entry(bytes).or_default().push(block.leak());
        state.idle += bytes;
        state.used = state.used.saturating_sub(bytes);
    }

    /// Gives all kept blocks back to the driver.
    fn release(&self, state: &mut State) {
        for (bytes, blocks) in std::mem::take(&mut state.kept) {
            for block in blocks {
                drop(adopt::<u8>(&self.stream, block, bytes));
            }
        }
        state.idle = 0;
    }

    /// Why the last taker got nothing, once.
    pub(super) fn refusal(&self) -> Option<String> {
        self.state().refusal.take()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.release(&mut state);
    }
}

fn mib(bytes: usize) -> usize {
    bytes.div_ceil(1 << 20)
}

/// Rows of `bytes` each that run together under a budget: a power of two, so that few budgets differ by it, and enough that starting
/// kernels costs little and every multiprocessor has a tile; at most a sixteenth of the budget, but never fewer than on the processor.
pub(super) fn rows_within(budget: usize, bytes: usize) -> usize {
    let fits = |rows: &usize| rows * bytes <= budget / 16;
    [8192, 4096, 2048].into_iter().find(fits).unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_meet_again_at_little_cost() {
        for bytes in (1..5000).chain([65_535, 65_536, 65_537, 1 << 30, (1 << 30) + 1]) {
            let block = rounded(bytes);
            assert!(
                block >= bytes && block - bytes < 16.max(bytes / 8),
                "{bytes} {block}"
            );
            assert_eq!(rounded(block), block, "{bytes}");
        }
    }

    #[test]
    fn a_batch_is_a_sixteenth_of_the_budget_and_no_smaller_than_on_the_processor() {
        // A row of ERNIE-4.5-0.3B, about.
        let bytes = 80_000;
        for (budget, rows) in [
            (1usize << 20, 1024),
            (2 << 30, 1024),
            (4 << 30, 2048),
            (8 << 30, 4096),
            (16 << 30, 8192),
            (140 << 30, 8192),
        ] {
            assert_eq!(rows_within(budget, bytes), rows, "{budget}");
        }
        assert_eq!(rows_within(0, 0), 8192);
    }
}
