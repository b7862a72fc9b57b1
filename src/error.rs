//! Why a command could not be done, as the sentence a person reads.

use std::path::PathBuf;

use qtool_calib::CalibError;
use qtool_formats::FormatError;
use thiserror::Error as ThisError;

/// Everything a pipeline can fail with. The program exits with status 2 on any of them, except for
/// [`Error::Interrupted`], which is 130 as for any program stopped by ctrl-C.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// A file, folder or manifest.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// An option.
    #[error(transparent)]
    Option(CalibError),
    /// A tensor whose values cannot be quantized.
    #[error("{}: tensor {tensor}: {source}", path.display())]
    Tensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        source: Box<CalibError>,
    },
    /// NaN or infinity in a source tensor.
    #[error("{}: tensor {tensor}: the element at {index:?} is {value}, expected finite weights; repair the checkpoint, or pass --non-finite keep to leave such tensors unquantized", path.display())]
    NonFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index in the tensor's own shape.
        index: Vec<usize>,
        /// The value as text.
        value: String,
    },
    /// Tensors that do not fit what was asked for, all of them.
    #[error("{}: these tensors cannot be done as asked, nothing was written; leave them out with --skip or give them options of their own with --rule:\n{}", path.display(), list(refusals))]
    Refused {
        /// The checkpoint.
        path: PathBuf,
        /// One line each.
        refusals: Vec<String>,
    },
    /// A source that is no BF16/F16/F32 checkpoint.
    #[error("{}: {reason}", path.display())]
    Source {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// As asked.
        threads: usize,
        /// The system's reason.
        reason: String,
    },
    /// Stopped by ctrl-C.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

/// Most refusals shown; the rest is counted.
const SHOWN: usize = 20;

fn list(refusals: &[String]) -> String {
    let mut lines: Vec<String> = refusals.iter().take(SHOWN).map(|r| format!("  {r}")).collect();
    if refusals.len() > SHOWN {
        lines.push(format!("  ... and {} more", refusals.len() - SHOWN));
    }
    lines.join("\n")
}
