//! A weight on the device: the bytes of its parts as they lie in the file, and the description the kernels read.

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};
use qtool_formats::{FloatDtype, Scheme};

use crate::backend::{Form, HostWeight};

/// Most parts of a scheme.
const PARTS: usize = 5;

/// `struct Weight` of weight.cuh, field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct WeightArgs {
    parts: [u64; PARTS],
    pub(super) form: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) bits: i32,
    group: i32,
    zero: i32,
    scale: i32,
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
    /// Owns what `args.parts` points to.
    _parts: Vec<CudaSlice<u8>>,
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
            _parts: Vec::new(),
        }
    }

    /// Copies a weight's bytes to the device.
    pub(super) fn upload(
        stream: &std::sync::Arc<CudaStream>,
        weight: &HostWeight,
    ) -> Result<Self, DriverError> {
        let mut on_device = Self::empty(weight);
        let parts = match &weight.form {
            Form::Dense { bytes, .. } => std::slice::from_ref(bytes),
            Form::Packed { parts, .. } => parts.as_slice(),
        };
        for (pointer, part) in on_device.args.parts.iter_mut().zip(parts) {
            let bytes = stream.clone_htod(part.bytes())?;
            *pointer = bytes.device_ptr(stream).0;
            on_device._parts.push(bytes);
        }
        Ok(on_device)
    }
}
