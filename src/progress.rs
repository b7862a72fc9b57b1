//! A progress line with throughput and remaining time: on a terminal only, silent when the output
//! is piped, asked for as JSON, or `--quiet`.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A running count of bytes.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A line for `total` bytes of `what`, drawn to the terminal behind standard error. indicatif
    /// draws nothing when that is no terminal.
    pub fn visible(what: &str, total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = "{msg} {bar:28} {decimal_bytes:>9} of {decimal_total_bytes}  {decimal_bytes_per_sec:>11}  {eta} left";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar }
    }

    /// A line for `total` tokens of `what`, or nothing.
    pub fn tokens(show: bool, what: &str, total: u64) -> Self {
        if !show {
            return Self::hidden();
        }
        let this = Self::visible(what, total);
        let template = "{msg} {bar:28} {human_pos:>9} of {human_len} tokens x layers  {per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            this.bar.set_style(style);
        }
        this
    }

    /// A line for `total` items of `what`, or nothing.
    pub fn items(show: bool, what: &str, total: u64) -> Self {
        if !show {
            return Self::hidden();
        }
        let this = Self::visible(what, total);
        let template = "{msg} {bar:28} {human_pos:>9} of {human_len} items  {per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            this.bar.set_style(style);
        }
        this
    }

    /// Starts at `done`, which speed and remaining time leave out.
    pub fn begin_at(&self, done: u64) {
        self.bar.set_position(done);
        self.bar.reset_eta();
    }

    /// Draws nothing.
    pub fn hidden() -> Self {
        Self {
            bar: ProgressBar::hidden(),
        }
    }

    /// `visible` or `hidden`.
    pub fn new(show: bool, what: &str, total: u64) -> Self {
        if show {
            Self::visible(what, total)
        } else {
            Self::hidden()
        }
    }

    /// Adds bytes.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Sets the bytes done.
    pub fn set(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// Takes the line away.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
