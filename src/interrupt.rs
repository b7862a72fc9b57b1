//! Ctrl-C and termination as a flag the pipelines look at between batches, so that an interrupted
//! run takes its unfinished output away. A second ctrl-C ends the program at once.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Exit status after an interruption.
pub const STATUS: i32 = 130;

/// Starts listening. Without a handler (there is one already, or the system has none) ctrl-C ends
/// the program as it always does.
pub fn listen() {
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(STATUS);
        }
    });
}

/// Whether an interruption was asked for.
pub fn requested() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Fails when an interruption was asked for.
pub fn check() -> Result<()> {
    if requested() {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}
