//! Numbers of a weight on their way into a format's tensors: read from the artifact, told apart, turned.

use std::sync::Arc;

use crate::artifact::Artifact;
use crate::artifact::manifest::QuantizedRecord;
use crate::dtype::FloatDtype;
use crate::packing::words::turn;
use crate::packing::{LSB_ROWS, Packing};
use crate::scheme::{AffineScheme, Role, Scheme};
use crate::weight::nested::{Nested, NestedScales};
use crate::weight::{AffineWeight, QuantizedWeight};
use crate::{FormatError, Result};

/// A weight as an affine one. Fails when it is another.
pub(crate) fn affine(weight: &QuantizedWeight) -> Result<&AffineWeight> {
    match weight {
        QuantizedWeight::Affine(affine) => Ok(affine),
        other => Err(FormatError::Scheme {
            got: other.scheme().to_string(),
            expected: "expected an affine one".to_owned(),
        }),
    }
}

/// Scales and zero points of a whole weight, as [`AffineWeight`] has them, without its codes.
pub(crate) fn scales_and_zeros(artifact: &Artifact, record: &QuantizedRecord) -> Result<(Vec<f32>, Vec<u8>)> {
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    for part in &record.parts {
        let bytes = artifact.stored(&part.tensor)?.bytes();
        match part.role {
            Role::Scales => {
                let dtype = FloatDtype::from_dtype(part.dtype);
                scales = dtype.map(|dtype| dtype.widen(bytes)).unwrap_or_default();
            }
            Role::ZeroPoints => {
                let groups = scales.len() / record.rows.max(1);
                LSB_ROWS.unpack(part.bits, groups, bytes, &mut zeros)?;
            }
            _ => {}
        }
    }
    Ok((scales, zeros))
}

/// Quantized scales of a whole weight; `None` when its scales are numbers.
pub(crate) fn nested_scales(artifact: &Artifact, record: &QuantizedRecord) -> Result<Option<NestedScales>> {
    if record.scheme != Scheme::Nf4Double {
        return Ok(None);
    }
    let (mut codes, mut nested, mut offset) = (Vec::new(), Vec::new(), 0.0);
    for part in &record.parts {
        let bytes = artifact.stored(&part.tensor)?.bytes();
        let floats = || FloatDtype::F32.widen(bytes);
        match part.role {
            Role::Scales => codes = bytes.to_vec(),
            Role::NestedScales => nested = floats(),
            Role::Offset => offset = floats().first().copied().unwrap_or(0.0),
            _ => {}
        }
    }
    NestedScales::new(0, codes, Arc::new(Nested::new(nested, offset)?)).map(Some)
}

/// Whether the scheme itself says that scales are half-precision values.
pub(crate) fn has_halves(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Affine(affine) if affine.scale_dtype() == FloatDtype::F16)
}

/// The first scale that is not a half-precision value, in words with what to do; `None` when all are.
pub(crate) fn not_half(scheme: Scheme, scales: &[f32]) -> Option<String> {
    let bad = scales.iter().find(|&&s| FloatDtype::F16.round(s) != s)?;
    Some(format!(
        "the scale {bad:e} is no F16 value, the type this format keeps scales in, and rounding it would change the weights (scheme {scheme}); quantize with --scale-dtype f16"
    ))
}

/// Little-endian bytes of scales (N, G) in this type, turned to (G, N) when `turned`.
pub(crate) fn scale_bytes(dtype: FloatDtype, rows: usize, scales: &[f32], turned: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(scales.len() * dtype.bytes());
    scales.iter().for_each(|&s| dtype.push(s, &mut bytes));
    if !turned {
        return bytes;
    }
    let mut out = vec![0u8; bytes.len()];
    let groups = scales.len() / rows.max(1);
    turn(dtype.bytes(), groups, &bytes, rows, 0, &mut out);
    out
}

/// Zero points (N, G), or the fixed one of a symmetric grid everywhere, turned to (G, N).
pub(crate) fn turned_zeros(scheme: AffineScheme, n: usize, groups: usize, zeros: &[u8]) -> Vec<u8> {
    match scheme.fixed_zero() {
        Some(zero) => vec![zero; n * groups],
        None => {
            let mut out = vec![0u8; n * groups];
            turn(1, groups, zeros, n, 0, &mut out);
            out
        }
    }
}
