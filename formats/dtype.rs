//! Element types. The full list is the safetensors one; [`FloatDtype`] is the part of it that
//! weights come in and scales are stored in. Owns conversion of single values, nothing in bulk.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

pub use safetensors::Dtype;

/// The three float types a weight may have before quantization and a scale may be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FloatDtype {
    /// bfloat16: 8 significant bits, the range of `f32`.
    Bf16,
    /// IEEE half: 11 significant bits, largest value 65504.
    F16,
    /// IEEE single.
    F32,
}

impl FloatDtype {
    /// The float type behind a safetensors tag, or `None` for integers, booleans and small floats.
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// The safetensors tag.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
            Self::F32 => Dtype::F32,
        }
    }

    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Lower-case name as it appears in options and scheme names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// The dtype with this name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Bf16, Self::F16, Self::F32]
            .into_iter()
            .find(|d| d.name() == name)
    }

    /// `x` rounded to this type (nearest, ties to even) and widened again. Overflow gives infinity.
    #[inline]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::Bf16 => bf16::from_f32(x).to_f32(),
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::F32 => x,
        }
    }

    /// Appends `x`, rounded to nearest even, in little-endian order.
    #[inline]
    pub fn push(self, x: f32, out: &mut Vec<u8>) {
        match self {
            Self::Bf16 => out.extend_from_slice(&bf16::from_f32(x).to_le_bytes()),
            Self::F16 => out.extend_from_slice(&f16::from_f32(x).to_le_bytes()),
            Self::F32 => out.extend_from_slice(&x.to_le_bytes()),
        }
    }

    /// Widens every whole element of `bytes` (little-endian, any alignment) to `f32`.
    pub fn widen(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::Bf16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
            Self::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            Self::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
        }
    }
}

impl std::fmt::Display for FloatDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widen_undoes_push_for_values_the_type_holds() {
        for dtype in [FloatDtype::Bf16, FloatDtype::F16, FloatDtype::F32] {
            let values = [0.0f32, -1.5, 2.0f32.powi(-10), 128.0];
            let mut bytes = Vec::new();
            values.iter().for_each(|&v| dtype.push(v, &mut bytes));
            assert_eq!(bytes.len(), values.len() * dtype.bytes());
            assert_eq!(dtype.widen(&bytes), values);
            assert_eq!(FloatDtype::parse(dtype.name()), Some(dtype));
            assert_eq!(FloatDtype::from_dtype(dtype.dtype()), Some(dtype));
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        // 1 + 2^-8 lies halfway between 1 and the next bf16; even wins.
        assert_eq!(FloatDtype::Bf16.round(1.0 + 2.0f32.powi(-8)), 1.0);
        assert_eq!(FloatDtype::F16.round(1e6), f32::INFINITY);
    }
}
