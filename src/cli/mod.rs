//! What was typed, and what is printed. Nothing below this page knows about terminals.

pub mod cache;
pub mod calibrate;
pub mod completions;
pub mod corpus;
pub mod device;
pub mod devices;
pub mod export;
pub mod forecast;
pub mod inspect;
pub mod outcome;
pub mod planned;
pub mod predict;
pub mod quantize;
pub mod server;
pub mod size;
pub mod target;
pub mod tasks;
pub mod transform;
pub mod validate;
pub mod verify;

use std::io::{IsTerminal, Write};

use clap::{Parser, Subcommand};
use console::style;

use crate::{Error, interrupt};

/// Exit status of a check that found something.
pub const FOUND: i32 = 1;
/// Exit status of an error.
pub const ERROR: i32 = 2;

const ABOUT: &str = "\
Quantizes large language models offline: a BF16 checkpoint (safetensors) in, a packed and
self-describing artifact out, on the CPU, in bounded memory, with the same bytes on every machine.";

const AFTER: &str = "\
Examples:
  qtool quantize MODEL -o OUT --bits 4        group-wise INT4 with clip search
  qtool quantize MODEL -o OUT --bits 8        INT8 per output channel
  qtool quantize ERNIE -o OUT --bits 4 --format fastdeploy   the folder FastDeploy loads
  qtool verify OUT --base MODEL               every byte and every figure, checked again
  qtool inspect OUT                           what is in there, worst tensors first
  qtool export OUT --to bf16 -o DIR           decoded weights for any library
  qtool validate MODEL OUT --task divergence=text.txt --max-kl 0.05   may OUT be deployed?

Exit status: 0 done or passed, 1 a check found something or a limit is broken, 2 error,
3 a limit can neither be said to hold nor to be broken, 130 interrupted.
The progress line appears on a terminal only; NO_COLOR=1 turns colours off.";

/// The command line.
#[derive(Debug, Parser)]
#[command(name = "qtool", version, about = ABOUT, after_help = AFTER, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make an artifact from a checkpoint
    Quantize(Box<quantize::Args>),
    /// Measure what a model's layers see of a text, for quantization with --calib
    Calibrate(calibrate::Args),
    /// Put together what several machines measured
    MergeStats(calibrate::MergeArgs),
    /// Show what is in a checkpoint or an artifact
    Inspect(inspect::Args),
    /// Check every byte of an artifact, and with --base every quality figure
    Verify(verify::Args),
    /// Compare artifacts with their base on data: what changed, how sure that is, may it be deployed
    Validate(Box<validate::Args>),
    /// Write a label for each item of a file, by one model
    Predict(Box<predict::Args>),
    /// Say which device models run on, and check it
    Device(devices::Args),
    /// Write an artifact in another format
    Export(export::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
}

impl Cli {
    /// Runs the command; the number is the exit status.
    pub fn run(&self) -> anyhow::Result<i32> {
        match &self.command {
            Command::Quantize(args) => args.run(),
            Command::Calibrate(args) => args.run(),
            Command::MergeStats(args) => args.run(),
            Command::Inspect(args) => args.run(),
            Command::Verify(args) => args.run(),
            Command::Validate(args) => args.run(),
            Command::Predict(args) => args.run(),
            Command::Device(args) => args.run(),
            Command::Export(args) => args.run(),
            Command::Completions(args) => Ok(args.run()),
        }
    }
}

/// Prints the sentence behind a failure and gives its exit status.
pub fn fail(error: &anyhow::Error) -> i32 {
    // A reader that went away (`qtool inspect | head`) is no fault of ours.
    let closed = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if error.downcast_ref::<std::io::Error>().is_some_and(closed) {
        return 0;
    }
    let _ = writeln!(
        std::io::stderr(),
        "{} {error:#}",
        style("error:").red().bold().for_stderr()
    );
    match error.downcast_ref::<Error>() {
        Some(Error::Interrupted | Error::Paused { .. } | Error::Stopped { .. }) => interrupt::STATUS,
        _ => ERROR,
    }
}

/// Prints text to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints a value as indented JSON.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Whether a progress line should be drawn: on a terminal, unless the output is for a machine.
pub fn wants_progress(json: bool, quiet: bool) -> bool {
    !json && !quiet && std::io::stderr().is_terminal()
}
