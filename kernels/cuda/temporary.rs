//! Device memory that an operation needs while it runs, from the arena, so that it counts in the budget as weights and
//! activations do. Owns its way back.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use cudarc::driver::{CudaSlice, DeviceRepr, DriverError, ValidAsZeroBits};

use super::arena::{Arena, rounded};
use super::device::Device;
use super::launch::out_of_memory;

/// A block that goes back to the arena when it is dropped: kernels that were started before may still read it, as the
/// next taker's come behind them on the one stream.
#[derive(Debug)]
pub(super) struct Temporary<T: DeviceRepr> {
    arena: Arc<Arena>,
    /// There until the drop.
    block: Option<CudaSlice<T>>,
}

impl<T: DeviceRepr> Temporary<T> {
    /// Bytes it takes of the budget.
    pub(super) fn bytes(&self) -> usize {
        rounded(self.len() * size_of::<T>())
    }
}

impl<T: DeviceRepr> Deref for Temporary<T> {
    type Target = CudaSlice<T>;

    fn deref(&self) -> &CudaSlice<T> {
        self.block.as_ref().expect("there until the drop")
    }
}

impl<T: DeviceRepr> DerefMut for Temporary<T> {
    fn deref_mut(&mut self) -> &mut CudaSlice<T> {
        self.block.as_mut().expect("there until the drop")
    }
}

impl<T: DeviceRepr> Drop for Temporary<T> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.arena.give(block);
        }
    }
}

impl Device {
    /// Room for `len` values with whatever was there before, if need be in the place of weights: none may be told to a
    /// kernel before this that starts after it.
    pub(super) fn room<T: DeviceRepr>(&self, len: usize) -> Result<Temporary<T>, DriverError> {
        let mut block = self.residency.room(len.max(1))?;
        if block.is_none() && self.forget_sent() {
            block = self.residency.room(len.max(1))?;
        }
        let block = block.ok_or_else(out_of_memory)?;
        Ok(Temporary {
            arena: Arc::clone(&self.arena),
            block: Some(block),
        })
    }

    /// The same, all zeros.
    pub(super) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        len: usize,
    ) -> Result<Temporary<T>, DriverError> {
        let mut room = self.room(len)?;
        self.stream.memset_zeros(&mut *room)?;
        Ok(room)
    }

    /// A copy of `values`.
    pub(super) fn sent<T: DeviceRepr>(&self, values: &[T]) -> Result<Temporary<T>, DriverError> {
        let mut room = self.room(values.len())?;
        self.stream.memcpy_htod(values, &mut *room)?;
        Ok(room)
    }
}
