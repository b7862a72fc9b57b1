//! A thread that checks what an export reads, beside the one that writes. A fault is told at the end at the latest, before
//! anything appears under its name, so that no piece has to wait for the digest of a tensor.

use std::sync::atomic::{AtomicBool, Ordering};

use super::OnBytes;
use crate::Result;

/// Does `work` while another thread checks `items` one after the other. Fails with what a check fails with, or else with what
/// `work` fails with. `work` is told to stop by its `OnBytes` when a check has failed, or when `on_bytes` says so; checks end
/// early when `work` has failed.
pub(super) fn beside<I: Send, T>(
    items: impl Iterator<Item = I> + Send,
    check: impl Fn(I) -> Result<()> + Send,
    on_bytes: OnBytes<'_>,
    work: impl FnOnce(OnBytes<'_>) -> Result<T>,
) -> Result<T> {
    let (bad, stopped) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let checking = scope.spawn(|| {
            let mut items = items.take_while(|_| !stopped.load(Ordering::Relaxed));
            let checked = items.try_for_each(check);
            bad.store(checked.is_err(), Ordering::Relaxed);
            checked
        });
        let done = work(&|bytes| !bad.load(Ordering::Relaxed) && on_bytes(bytes));
        stopped.store(done.is_err(), Ordering::Relaxed);
        checking
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FormatError;

    fn fault(got: usize) -> FormatError {
        FormatError::Scheme {
            got: got.to_string(),
            expected: "y".to_owned(),
        }
    }

    #[test]
    fn the_check_has_the_first_word() {
        let check = |i| if i == 7 { Err(fault(i)) } else { Ok(()) };
        assert_eq!(beside(0..7, check, &|_| true, |_| Ok(3)).unwrap(), 3);
        let late = beside(0..9, check, &|_| true, |_| Ok(3));
        assert!(late.unwrap_err().to_string().contains('7'));
        // The work waits until it is told to stop.
        let told = beside(7..9, check, &|_| true, |going| {
            while going(1) {
                std::thread::yield_now();
            }
            Err::<(), _>(fault(100))
        });
        assert!(told.unwrap_err().to_string().contains('7'));
        let own = beside(0..7, check, &|_| true, |_| Err::<(), _>(fault(100)));
        assert!(own.unwrap_err().to_string().contains("100"));
        let asked = beside(0..7, check, &|bytes| bytes < 5, |going| Ok(going(4) && !going(5)));
        assert!(asked.unwrap());
    }

    #[test]
    fn checks_end_when_the_work_has_failed() {
        let endless = std::iter::repeat(1);
        assert!(beside(endless, |_| Ok(()), &|_| true, |_| Err::<(), _>(fault(1))).is_err());
    }
}
