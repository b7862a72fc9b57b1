//! Small operands that many operations read: rotary angles, positions and tiles of attention are the same in every layer of a
//! batch, so they are sent once. Owns what is kept, and for how long.
//!
//! What is kept is found by its contents, never by where it lay. A copy that is let go returns to the arena as any other: kernels
//! that were started may still read it, and its next taker's come behind them on the one stream.

use std::collections::VecDeque;
use std::sync::{Arc, MutexGuard, PoisonError};

use cudarc::driver::{DeviceRepr, DriverError};

use super::device::Device;
use super::temporary::Temporary;

/// Most copies that are kept: those of a batch, and of the one before.
const MOST: usize = 8;
/// Of the budget, what they may take.
const SHARE: usize = 64;

/// A number of 32 bits.
pub(super) trait Word: DeviceRepr + Copy {
    fn bits(self) -> u32;
}

impl Word for u32 {
    fn bits(self) -> u32 {
        self
    }
}

impl Word for i32 {
    fn bits(self) -> u32 {
        self as u32
    }
}

impl Word for f32 {
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

/// Copies that are kept, the last used first: their contents here and there.
#[derive(Debug, Default)]
pub(super) struct Sent(VecDeque<(Vec<u32>, Arc<Temporary<u32>>)>);

impl Sent {
    fn bytes(&self) -> usize {
        self.0.iter().map(|(words, _)| 4 * words.len().max(1)).sum()
    }
}

/// Whether these are the same bits. Runs are compared whole, so that a processor does several at a time.
fn same<T: Word>(values: &[T], words: &[u32]) -> bool {
    const RUN: usize = 256;
    let differ = |(values, words): (&[T], &[u32])| {
        let each = values.iter().zip(words).map(|(value, word)| value.bits() ^ word);
        each.fold(0, |all, bits| all | bits) != 0
    };
    values.len() == words.len() && !values.chunks(RUN).zip(words.chunks(RUN)).any(differ)
}

impl Device {
    fn kept(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of `values`, for kernels that only read it: perhaps one that was sent before.
    pub(super) fn sent_once<T: Word>(&self, values: &[T]) -> Result<Arc<Temporary<u32>>, DriverError> {
        {
            let mut kept = self.kept();
            if let Some(at) = kept.0.iter().position(|(words, _)| same(values, words)) {
                let found = kept.0.remove(at).expect("one at this place");
                let copy = Arc::clone(&found.1);
                kept.0.push_front(found);
                return Ok(copy);
            }
        }
        let words: Vec<u32> = values.iter().map(|value| value.bits()).collect();
        let copy = Arc::new(self.sent(&words)?);
        let mut kept = self.kept();
        kept.0.push_front((words, Arc::clone(&copy)));
        let most = self.arena.budget() / SHARE;
        while kept.0.len() > MOST || kept.bytes() > most {
            kept.0.pop_back();
        }
        Ok(copy)
    }

    /// Lets all of them go; `false` when there were none.
    pub(super) fn forget_sent(&self) -> bool {
        !std::mem::take(&mut self.kept().0).is_empty()
    }

    /// Bytes of device memory that are let go when somebody needs them.
    pub(super) fn kept_for_later(&self) -> usize {
        let kept = self.kept();
        kept.0.iter().map(|(_, copy)| copy.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_bits_are_the_same_and_nothing_else_is() {
        let values: Vec<f32> = (0..1000).map(|i| i as f32 * 0.25).collect();
        let words: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        assert!(same(&values, &words) && same::<f32>(&[], &[]));
        for at in [0, 255, 256, 999] {
            let mut other = words.clone();
            other[at] ^= 1;
            assert!(!same(&values, &other), "{at}");
        }
        assert!(!same(&values[..999], &words) && !same(&values, &words[..999]));
        assert!(!same(&[0.0f32], &[(-0.0f32).to_bits()]));
    }
}
