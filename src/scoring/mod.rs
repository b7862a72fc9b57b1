//! What answers the questions of `crate::scorer`.
//!
//! | Page | Idea |
//! |---|---|
//! | [`local`] | a causal model run here |
//! | [`encoder`] | an encoder run here |
//! | [`endpoint`] | a served model |
//! | [`border`] | where a prompt ends and an answer begins, in tokens; what is cut when both are too long |
//! | [`sharing`] | which prompts share a prefix, and which run in one batch |
//! | [`likelihood`] | ln p of answers and of windows |
//! | [`greedy`] | replies, many at a time, perhaps only some allowed |
//! | [`softmax`] | ln p of one token in a row of logits |

pub mod border;
pub mod encoder;
pub mod endpoint;
pub mod greedy;
pub mod likelihood;
pub mod local;
pub mod sharing;
pub mod softmax;

use std::path::Path;

use qtool_kernels::Backend;

use crate::Result;
use crate::device::Device;
use crate::model::architectures::is_encoder;
use crate::scorer::Scorer;
use crate::source::Source;

/// As [`open`], on the device that was chosen.
pub fn open_on(device: &Device, folder: &Path, options: local::Options) -> Result<Box<dyn Scorer>> {
    match device {
        Device::Cpu(backend) => open(*backend, folder, options),
        Device::Cuda(backend) => open(backend.clone(), folder, options),
    }
}

/// Opens the model of a folder, checkpoint or artifact, language model or encoder, as its config says.
pub fn open<B: Backend + 'static>(
    backend: B,
    folder: &Path,
    options: local::Options,
) -> Result<Box<dyn Scorer>> {
    if is_encoder(&Source::open(folder)?) {
        Ok(Box::new(encoder::EncoderScorer::open(backend, folder, options)?))
    } else {
        Ok(Box::new(local::LocalScorer::open(backend, folder, options)?))
    }
}
