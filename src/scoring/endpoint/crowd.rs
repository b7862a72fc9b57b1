//! Many questions under way at once: threads that take the next question, and answers handed to the caller on
//! its own thread as they come.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use crate::interrupt;
use crate::scorer::{Answer, OnAnswer};
use crate::scoring::border::miss;
use crate::{Error, Result};

/// How long an interruption may go unnoticed.
const GLANCE: Duration = Duration::from_millis(100);

/// Runs `work` on every job with at most `threads` at a time. `work` is told by a flag when the run was broken
/// off. Threads that still wait for a server then are left to their timeouts; their answers are not counted.
/// An interruption ends the run as if it were broken off.
pub fn run<J, T>(
    jobs: Vec<J>,
    threads: usize,
    work: impl Fn(usize, &J, &AtomicBool) -> Answer<T> + Send + Sync + 'static,
    on_answer: OnAnswer<'_, T>,
) -> Result<()>
where
    J: Send + Sync + 'static,
    T: Send + 'static,
{
    let count = jobs.len();
    let shared = Arc::new((jobs, work, AtomicUsize::new(0), AtomicBool::new(false)));
    let (sender, answers) = channel();
    for number in 0..threads.clamp(1, count.max(1)) {
        let (shared, sender) = (Arc::clone(&shared), sender.clone());
        let body = move || {
            let (jobs, work, next, broken_off) = &*shared;
            while !broken_off.load(Ordering::Relaxed) {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(index) else { break };
                if sender.send((index, work(index, job, broken_off))).is_err() {
                    break;
                }
            }
        };
        let started = thread::Builder::new()
            .name(format!("request {number}"))
            .spawn(body);
        // Fewer than asked for are enough.
        if let Err(e) = started
            && number == 0
        {
            return Err(Error::Threads {
                threads,
                reason: e.to_string(),
            });
        }
    }
    drop(sender);
    let broken_off = &shared.3;
    let mut missing = vec![true; count];
    loop {
        let (index, answer) = match answers.recv_timeout(GLANCE) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) if !interrupt::requested() => continue,
            Err(RecvTimeoutError::Timeout) => {
                broken_off.store(true, Ordering::Relaxed);
                return Ok(());
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        missing[index] = false;
        if on_answer(index, answer).is_break() {
            broken_off.store(true, Ordering::Relaxed);
            return Ok(());
        }
    }
    // A thread that panicked took its question with it.
    for (index, _) in missing.iter().enumerate().filter(|(_, m)| **m) {
        let lost = miss("lost", "the thread that asked this question failed".to_owned());
        if on_answer(index, Err(lost)).is_break() {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::ControlFlow;

    #[test]
    fn every_job_is_answered_once_even_if_a_thread_fails() {
        let mut seen = vec![0; 50];
        let mut lost = 0;
        let jobs: Vec<usize> = (0..50).collect();
        let work = |index: usize, job: &usize, _: &AtomicBool| {
            assert!(index != 7, "seven is a bad number");
            Ok(job * 2)
        };
        run(jobs, 8, work, &mut |index, answer| {
            seen[index] += 1;
            match answer {
                Ok(double) => assert_eq!(double, index * 2),
                Err(miss) => lost += usize::from(miss.kind == "lost"),
            }
            ControlFlow::Continue(())
        })
        .unwrap();
        assert!(seen.iter().all(|&n| n == 1) && lost == 1, "{seen:?}");
    }

    #[test]
    fn breaking_off_does_not_wait_for_the_slow() {
        let (release, held) = channel::<()>();
        let held = std::sync::Mutex::new(held);
        let work = move |index: usize, _: &(), _: &AtomicBool| {
            if index > 0 {
                let _ = held.lock().map(|h| h.recv());
            }
            Ok(())
        };
        let mut answered = 0;
        run(vec![(); 20], 4, work, &mut |_, _| {
            answered += 1;
            ControlFlow::Break(())
        })
        .unwrap();
        assert_eq!(answered, 1);
        drop(release);
    }
}
