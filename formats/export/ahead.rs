//! Pieces of an export made ahead of the writing, on threads of their own, and written in order by the caller's: while one
//! is written, the next two are being made.

use std::sync::mpsc::{Receiver, sync_channel};

use crate::Result;

/// Threads that make pieces. Memory holds two pieces for each, and the one that is written.
const MAKERS: usize = 2;

/// Makes pieces 0 to `count` and hands each to `take`, in order. Stops at the first error of either.
pub(super) fn in_order<T: Send>(
    count: usize,
    make: impl Fn(usize) -> Result<T> + Sync,
    mut take: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    let make = &make;
    std::thread::scope(|scope| {
        let makers: Vec<_> = (0..MAKERS)
            .map(|first| {
                // One waits while the next is being made.
                let (send, receive) = sync_channel(1);
                scope.spawn(move || {
                    for index in (first..count).step_by(MAKERS) {
                        // The receiver is gone when there was an error.
                        if send.send(make(index)).is_err() {
                            break;
                        }
                    }
                });
                receive
            })
            .collect();
        for index in 0..count {
            match makers.get(index % MAKERS).map(Receiver::recv) {
                Some(Ok(piece)) => take(index, piece?)?,
                // The maker panicked, which the scope passes on.
                _ => break,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FormatError;

    #[test]
    fn pieces_come_in_order_and_errors_end_it() {
        let fault = || FormatError::Scheme {
            got: "x".to_owned(),
            expected: "y".to_owned(),
        };
        for count in [0usize, 1, 2, 7, 100] {
            let mut taken = Vec::new();
            in_order(
                count,
                |i| Ok(i * i),
                |i, square| {
                    taken.push((i, square));
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(taken, (0..count).map(|i| (i, i * i)).collect::<Vec<_>>());
        }
        let mut taken = 0;
        let made = in_order(
            50,
            |i| if i == 9 { Err(fault()) } else { Ok(i) },
            |_, _| {
                taken += 1;
                Ok(())
            },
        );
        assert!(made.is_err() && taken == 9);
        let refused = in_order(50, Ok, |i, _| if i == 5 { Err(fault()) } else { Ok(()) });
        assert!(refused.is_err());
    }
}
