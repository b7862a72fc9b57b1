//! A weight on the device: the bytes of its parts as they lie in the file, and the description the kernels read.

use std::sync::Arc;

use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use qtool_formats::{FloatDtype, QuantizedWeight, Scheme};

use super::codewords::with_integers;
use super::device::Device;
use super::residency::Slot;
use crate::backend::{Form, HostWeight, Storage};

/// Most parts of a scheme.
pub(super) const PARTS: usize = 5;

/// `struct Weight` of weight.cuh, field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WeightArgs {
    pub(super) parts: [u64; PARTS],
    pub(super) form: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) bits: i32,
    pub(super) group: i32,
    zero: i32,
    pub(super) scale: i32,
    padding: i32,
}

const _: () = assert!(size_of::<WeightArgs>() == 8 * PARTS + 8 * 4);

/// `enum Form` of weight.cuh.
pub(super) fn dense(dtype: FloatDtype) -> i32 {
    match dtype {
        FloatDtype::F32 => 0,
        FloatDtype::Bf16 => 1,
        FloatDtype::F16 => 2,
    }
}

/// A weight (N, K) on the device; without bytes when the device had failed before.
#[derive(Debug)]
pub struct DeviceWeight {
    pub(super) args: WeightArgs,
    /// Where its parts lie when they are used; none when the device had failed before.
    held: Option<(Arc<Device>, Arc<Slot>)>,
}

impl Drop for DeviceWeight {
    fn drop(&mut self) {
        if let Some((device, slot)) = self.held.take() {
            device.residency.dismiss(&slot);
        }
    }
}

impl DeviceWeight {
    /// What the kernels are told of a weight without bytes.
    pub(super) fn empty(weight: &HostWeight) -> Self {
        let (form, bits, group, zero, scale) = match &weight.form {
            Form::Dense { dtype, .. } => (dense(*dtype), 0, 1, 0, 0),
            Form::Packed { scheme, .. } => match scheme {
                Scheme::Affine(affine) => (
                    3,
                    i32::from(affine.bits()),
                    affine.grouping().len(weight.k) as i32,
                    affine.fixed_zero().map_or(-1, i32::from),
                    dense(affine.scale_dtype()),
                ),
                Scheme::Ccq => (4, 0, 1, 0, 0),
                Scheme::Ccq25 => (5, 0, 1, 0, 0),
                Scheme::Nf4 => (6, 0, 1, 0, 0),
                // The device has no code for these: it gets their values.
                Scheme::K(_) | Scheme::Nf4Double => (dense(FloatDtype::F32), 0, 1, 0, 0),
            },
        };
        Self {
            args: WeightArgs {
                parts: [0; PARTS],
                form,
                n: weight.n as i32,
                k: weight.k as i32,
                bits,
                group,
                zero,
                scale,
                padding: 0,
            },
            held: None,
        }
    }

    /// Bytes of its parts.
    pub(super) fn bytes(&self) -> usize {
        self.held.as_ref().map_or(0, |(_, slot)| slot.bytes())
    }

    /// Takes a weight in, on the device or where it can be fetched from.
    pub(super) fn admit(device: &Arc<Device>, weight: &HostWeight) -> Result<Self, DriverError> {
        let slot = match &weight.form {
            Form::Packed {
                scheme: scheme @ (Scheme::K(_) | Scheme::Nf4Double),
                parts,
            } => {
                let bytes: Arc<dyn Storage> = Arc::new(decoded(*scheme, weight, parts));
                let form = Form::Dense {
                    dtype: FloatDtype::F32,
                    bytes,
                };
                device.residency.admit(&HostWeight { form, ..*weight })?
            }
            Form::Packed {
                scheme: Scheme::Ccq,
                parts,
            } => {
                let mut parts = parts.clone();
                if let [.., slopes, offsets] = parts.as_mut_slice() {
                    *slopes = with_integers(slopes.bytes(), offsets.bytes());
                }
                let form = Form::Packed {
                    scheme: Scheme::Ccq,
                    parts,
                };
                device.residency.admit(&HostWeight { form, ..*weight })?
            }
            _ => device.residency.admit(weight)?,
        };
        Ok(Self {
            held: Some((Arc::clone(device), slot)),
            args: Self::empty(weight).args,
        })
    }

    /// What kernels are told of these weights, which are on the device then, and stay until the next call.
    pub(super) fn resident(device: &Device, weights: &[&Self]) -> Result<Vec<WeightArgs>, DriverError> {
        let slots: Vec<&Arc<Slot>> = weights
            .iter()
            .filter_map(|weight| weight.held.as_ref().map(|(_, slot)| slot))
            .collect();
        let pointers = match device.residency.use_all(&slots) {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) if device.forget_sent() => {
                device.residency.use_all(&slots)
            }
            found => found,
        }?;
        let args = weights
            .iter()
            .zip(pointers)
            .map(|(weight, parts)| WeightArgs { parts, ..weight.args });
        Ok(args.collect())
    }
}

/// The values of a weight, (N, K) in F32. Its parts fit its scheme: the host has decoded them before.
fn decoded(scheme: Scheme, weight: &HostWeight, parts: &[Arc<dyn Storage>]) -> Vec<u8> {
    let slices: Vec<&[u8]> = parts.iter().map(|part| part.bytes()).collect();
    let decoded = QuantizedWeight::decode(scheme, weight.n, weight.k, &slices);
    let decoded = decoded.expect("a weight that fits its scheme");
    let mut values = vec![0f32; weight.n * weight.k];
    for (n, row) in values.chunks_exact_mut(weight.k).enumerate() {
        decoded.dequantize_row(n, row);
    }
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
