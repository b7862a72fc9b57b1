//! How often a failed exchange is tried again and how long is waited before: doubling waits with jitter from a
//! seed, or what the server asks for. When a server has failed many times in a row nothing is tried twice until
//! it answers again, so that a run against a dead server ends soon.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::http::Failure;

/// How long it looks away at most before it sees that the run was broken off.
const GLANCE: Duration = Duration::from_millis(50);

/// See the module's text.
#[derive(Debug)]
pub struct Patience {
    /// Tries after the first.
    pub retries: u32,
    /// Wait before the first of them; the next are twice as long each.
    pub first: Duration,
    /// No wait is longer, whatever the server asks for.
    pub longest: Duration,
    /// Of the jitter.
    pub seed: u64,
    /// Questions in a row that failed for good before nothing is tried again.
    pub enough: usize,
    failed: AtomicUsize,
}

impl Patience {
    /// With the given numbers.
    pub fn new(retries: u32, first: Duration, longest: Duration, seed: u64, enough: usize) -> Self {
        Self {
            retries,
            first,
            longest,
            seed,
            enough,
            failed: AtomicUsize::new(0),
        }
    }

    /// Wait before try `attempt` (from 1) of question `index`: half to all of the doubled first wait.
    fn wait(&self, index: usize, attempt: u32, asked: Option<Duration>) -> Duration {
        let doubled = self.first.saturating_mul(1 << (attempt - 1).min(16));
        let jitter = mix(self.seed ^ mix(((index as u64) << 8) | u64::from(attempt)));
        let share = 0.5 + 0.5 * (jitter >> 11) as f64 / (1u64 << 53) as f64;
        let own = doubled.min(self.longest).mul_f64(share);
        asked.map_or(own, |asked| asked.max(own)).min(self.longest)
    }

    /// Tries until it works, the failure is one that stays, or patience ends.
    pub fn run<T>(
        &self,
        index: usize,
        broken_off: &AtomicBool,
        exchange: impl Fn() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut attempt = 0;
        loop {
            let failure = match exchange() {
                Ok(answer) => {
                    self.failed.store(0, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            if !failure.passing {
                // The server lives; it does not like the question.
                self.failed.store(0, Ordering::Relaxed);
                return Err(failure);
            }
            attempt += 1;
            let given_up = self.failed.load(Ordering::Relaxed) >= self.enough;
            if attempt > self.retries || given_up || broken_off.load(Ordering::Relaxed) {
                self.failed.fetch_add(1, Ordering::Relaxed);
                return Err(Failure {
                    detail: format!("{} (tried {attempt} times)", failure.detail),
                    ..failure
                });
            }
            let until = Instant::now() + self.wait(index, attempt, failure.wait);
            while !broken_off.load(Ordering::Relaxed) {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                sleep(left.min(GLANCE));
            }
        }
    }
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn failure(passing: bool) -> Failure {
        Failure {
            kind: "status 500".to_owned(),
            detail: "down".to_owned(),
            passing,
            wait: None,
        }
    }

    fn short() -> Patience {
        let milli = Duration::from_millis(1);
        Patience::new(3, milli, milli * 4, 7, 2)
    }

    #[test]
    fn waits_double_within_their_jitter_and_follow_the_server() {
        let second = Duration::from_secs(1);
        let patience = Patience::new(9, second, second * 30, 1, 9);
        for attempt in 1..9 {
            let full = (second * (1 << (attempt - 1))).min(second * 30);
            for index in 0..50 {
                let wait = patience.wait(index, attempt, None);
                assert!(wait >= full / 2 && wait <= full, "{attempt}: {wait:?}");
                assert_eq!(wait, patience.wait(index, attempt, None));
            }
        }
        let spread: Vec<Duration> = (0..20).map(|i| patience.wait(i, 1, None)).collect();
        assert!(spread.iter().any(|w| *w != spread[0]));
        assert_eq!(patience.wait(0, 1, Some(second * 5)), second * 5);
        assert_eq!(patience.wait(0, 1, Some(second * 500)), second * 30);
    }

    #[test]
    fn it_ends() {
        let (patience, on) = (short(), AtomicBool::new(false));
        let tried = Cell::new(0);
        let run = |passing, works_at| {
            tried.set(0);
            let done = patience.run(0, &on, || {
                tried.set(tried.get() + 1);
                if tried.get() == works_at {
                    Ok(())
                } else {
                    Err(failure(passing))
                }
            });
            (done.is_ok(), tried.get())
        };
        assert_eq!(run(true, 3), (true, 3));
        assert_eq!(run(false, 3), (false, 1));
        assert_eq!(run(true, 9), (false, 4));
        assert_eq!(run(true, 9), (false, 4));
        // Twice in a row is enough here; an answer restores the confidence.
        assert_eq!(run(true, 9), (false, 1));
        assert_eq!(run(true, 1), (true, 1));
        assert_eq!(run(true, 9), (false, 4));
        on.store(true, Ordering::Relaxed);
        assert_eq!(run(true, 9), (false, 1));
    }
}
