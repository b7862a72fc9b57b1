//! Weights of other ecosystems' models as a device takes them: codes whose meaning is one of our schemes' stay packed,
//! laid out as our own are; what has no such meaning becomes floats, four bytes a weight where the format's own
//! precision asks for them.

use std::sync::Arc;

use qtool_formats::import::{Decoded, Foreign, Tensor};
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_kernels::backend::{Form, HostWeight, Storage};

use crate::{Error, Result};

fn wrong(foreign: &Foreign, name: &str, expected: String, tensor: &Tensor) -> Error {
    Error::ModelTensor {
        path: foreign.files().root().to_owned(),
        tensor: name.to_owned(),
        expected,
        got: format!("{:?}", tensor.shape),
    }
}

/// A matrix (N, K) that is coded; `None` where it lies as plain elements. Fails when it is missing, of other dimensions,
/// or cannot be decoded.
pub fn matrix(foreign: &Foreign, name: &str, n: usize, k: usize) -> Result<Option<HostWeight>> {
    let tensor = foreign.tensor(name)?;
    if tensor.coded.is_some() && tensor.shape != [n, k] {
        return Err(wrong(foreign, name, format!("[{n}, {k}]"), tensor));
    }
    let Some(decoded) = foreign.decode(tensor)? else {
        return Ok(None);
    };
    let form = match decoded {
        Decoded::Weight(weight) => {
            let parts = weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o))?;
            let parts = parts.into_iter().map(|p| -> Arc<dyn Storage> { Arc::new(p) });
            Form::Packed {
                scheme: weight.scheme(),
                parts: parts.collect(),
            }
        }
        Decoded::Floats { dtype, bytes } => Form::Dense {
            dtype,
            bytes: Arc::new(bytes),
        },
    };
    Ok(Some(HostWeight { n, k, form }))
}

/// A vector of `len` floats that is coded; `None` where it lies as plain elements. Fails likewise.
pub fn vector(foreign: &Foreign, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
    let tensor = foreign.tensor(name)?;
    if tensor.coded.is_none() {
        return Ok(None);
    }
    let values = foreign.values(tensor)?;
    if values.len() != len {
        return Err(wrong(foreign, name, format!("{len} floats"), tensor));
    }
    Ok(Some(values))
}
