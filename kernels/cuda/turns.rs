//! Taking turns: threads that each need device memory for a while, of which there is not enough for all at once. Owns who
//! waits.

use std::sync::{Condvar, Mutex, PoisonError};

/// Bytes that may be in use by all who have a turn.
#[derive(Debug)]
pub(super) struct Turns {
    most: usize,
    taken: Mutex<usize>,
    free: Condvar,
}

/// A turn; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    turns: &'a Turns,
    bytes: usize,
}

impl Turns {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            taken: Mutex::new(0),
            free: Condvar::new(),
        }
    }

    /// Waits until `bytes` fit beside what others have, or nobody else has anything.
    pub(super) fn wait(&self, bytes: usize) -> Turn<'_> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken > 0 && *taken + bytes > self.most {
            taken = self.free.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken += bytes;
        Turn { turns: self, bytes }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut taken = self.turns.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *taken -= self.bytes;
        self.turns.free.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn nobody_waits_forever_and_the_sum_stays_below() {
        let (turns, now, most) = (Turns::new(100), AtomicUsize::new(0), AtomicUsize::new(0));
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (turns, now, most, done) = (&turns, &now, &most, &done);
                scope.spawn(move || {
                    for i in 0..50 {
                        // The last is larger than all that there is: it goes alone.
                        let bytes = [10, 40, 60, 300][(thread + i) % 4];
                        let _turn = turns.wait(bytes);
                        let sum = now.fetch_add(bytes, Ordering::SeqCst) + bytes;
                        assert!(sum <= 100 || sum == 300, "{sum}");
                        most.fetch_max(sum, Ordering::SeqCst);
                        now.fetch_sub(bytes, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!((done.into_inner(), most.into_inner()), (400, 300));
    }
}
