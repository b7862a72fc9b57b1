//! Buffers that go round: what was written goes back to those who fill. Fresh memory costs a page fault for every four KiB,
//! which for an export is more than the arithmetic.

use std::sync::{Mutex, PoisonError};

/// Buffers that wait; a piece for each maker and one on the way are as many as are in use.
const MOST: usize = 4;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<Vec<Vec<u8>>>);

impl Spares {
    /// An empty buffer, the largest that waits.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let largest = (0..waiting.len()).max_by_key(|&i| waiting.get(i).map_or(0, Vec::capacity));
        let mut buffer = largest.map(|i| waiting.swap_remove(i)).unwrap_or_default();
        buffer.clear();
        buffer
    }

    /// A buffer of `length` zeros.
    pub(super) fn zeros(&self, length: usize) -> Vec<u8> {
        let mut buffer = self.take();
        buffer.resize(length, 0);
        buffer
    }

    /// Takes a buffer back; when many wait, in the place of the smallest.
    pub(super) fn give(&self, buffer: Vec<u8>) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < MOST {
            waiting.push(buffer);
        } else if let Some(least) = waiting.iter_mut().min_by_key(|b| b.capacity())
            && least.capacity() < buffer.capacity()
        {
            *least = buffer;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_goes_round() {
        let spares = Spares::default();
        for size in [10, 1000, 50, 60, 70, 2000] {
            spares.give(Vec::with_capacity(size));
        }
        assert!(spares.take().capacity() >= 2000);
        let zeros = spares.zeros(4);
        assert!(zeros == [0; 4] && zeros.capacity() >= 1000);
        assert!(spares.take().capacity() < 1000);
    }
}
