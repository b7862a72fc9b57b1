//! Codes chosen on a GPU. Owns the exchange of a plan's quantizers for those of the device, which give the same bytes
//! under the same name; methods without a form there, and whatever evidence informs, stay on the processor.

use qtool_kernels::cuda::Encoder;

use super::Device;
use crate::plan::{Action, QuantizePlan};
use crate::{Error, Result};

/// Exchanges what can be, and says how many tensors that is. Fails when the device does.
pub fn move_to(device: &Device, plans: &mut [QuantizePlan]) -> Result<usize> {
    let Device::Cuda(gpu) = device else { return Ok(0) };
    let encoder = Encoder::new(gpu.shared_device());
    let mut moved = 0;
    for tensor in plans.iter_mut().flat_map(|plan| &mut plan.tensors) {
        let Action::Quantize(q) = &mut tensor.action else {
            continue;
        };
        if let Some(quantizer) = q
            .quantizer
            .on_device(&encoder)
            .map_err(|error| Error::of_tensor(std::path::Path::new("the plan"), &tensor.name, error))?
        {
            q.quantizer = quantizer;
            moved += 1;
        }
    }
    Ok(moved)
}
