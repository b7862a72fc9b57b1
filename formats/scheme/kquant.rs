//! `q4-k` and `q2-k`: the K types of GGML, in which groups have scales and minima of few bits, and 256 weights, a super-block,
//! have two F16 numbers for these.
//!
//! ```text
//!        codes    groups of   scales and minima of a group   bits per weight
//! q4-k   4 bits   32          6 bits each                    4.5
//! q2-k   2 bits   16          4 bits each                    2.625
//! ```
//!
//! Codes and numbers are GGML's; the layout is our own, and [`crate::packing::ggml`] writes the blocks of GGUF files.
//!
//! Source: the structures and the decoders of `ggml-quants.c` of llama.cpp, and the pull request that introduced them
//! (ggml-org/llama.cpp #1684).

use super::{Family, Part, Role, whole_groups};
use crate::dtype::Dtype;
use crate::packing::{self, LSB_ROWS, Packing};
use crate::{FormatError, Result};

/// Columns of a super-block.
pub const SUPER_BLOCK: usize = 256;

/// One of the two types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KQuant {
    /// 2-bit codes.
    Q2,
    /// 4-bit codes.
    Q4,
}

impl KQuant {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Q2, Self::Q4];

    /// The scheme's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q2 => "q2-k",
            Self::Q4 => "q4-k",
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Q2 => 2,
            Self::Q4 => 4,
        }
    }

    /// Columns that share a scale and a minimum.
    pub fn group(self) -> usize {
        match self {
            Self::Q2 => 16,
            Self::Q4 => 32,
        }
    }

    /// Bits of a group's scale, and of its minimum.
    pub fn scale_bits(self) -> u8 {
        match self {
            Self::Q2 => 4,
            Self::Q4 => 6,
        }
    }

    /// The meaning of a code, as written into the manifest.
    pub fn formula(self) -> &'static str {
        match self {
            Self::Q2 => {
                "value[n][k] = (super_scales[n][k / 256] * local_scales[n][k / 16]) * code[n][k] - super_mins[n][k / 256] * local_mins[n][k / 16], each step in f32"
            }
            Self::Q4 => {
                "value[n][k] = (super_scales[n][k / 256] * local_scales[n][k / 32]) * code[n][k] - super_mins[n][k / 256] * local_mins[n][k / 32], each step in f32"
            }
        }
    }

    /// The stored tensors of a weight of `n` x `k`. Fails for FastDeploy's forms, and when K is no multiple of 256.
    pub fn parts(self, family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
        if family == Family::FastDeploy {
            return Err(FormatError::SchemeShape {
                scheme: self.name().to_owned(),
                n,
                k,
                reason: "FastDeploy does not load it; it loads INT8 and INT4 per channel".to_owned(),
            });
        }
        whole_groups(self.name(), (n, k), SUPER_BLOCK)?;
        let packed = |role, bits: u8, count: usize| {
            let width = LSB_ROWS.row_bytes(bits, count);
            Part::of_rows(role, LSB_ROWS.name(), bits, Dtype::U8, (n, width))
        };
        let halves = |role| Part::of_rows(role, packing::ROWS, 16, Dtype::F16, (n, k / SUPER_BLOCK));
        Ok(vec![
            packed(Role::Codes, self.bits(), k),
            packed(Role::LocalScales, self.scale_bits(), k / self.group()),
            packed(Role::LocalMins, self.scale_bits(), k / self.group()),
            halves(Role::SuperScales),
            halves(Role::SuperMins),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    #[test]
    fn everything_stored_is_counted() {
        for (kind, bits) in [(KQuant::Q2, 2.625), (KQuant::Q4, 4.5)] {
            let scheme = Scheme::K(kind);
            assert_eq!(scheme.bits_per_weight(7, 512).unwrap(), bits);
            assert_eq!(Scheme::parse(kind.name()).unwrap(), scheme);
            assert!(kind.formula().contains(&format!("/ {}]", kind.group())));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        for (family, k, why) in [
            (Family::Own, 320, "multiple of 256"),
            (Family::Own, 0, "empty"),
            (Family::FastDeploy, 256, "FastDeploy"),
        ] {
            let message = KQuant::Q4.parts(family, 3, k).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        }
    }
}
