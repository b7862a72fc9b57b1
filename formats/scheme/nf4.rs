//! `nf4`: bitsandbytes' 4-bit NormalFloat. A code names one of 16 fixed levels in -1..1, which are quantiles of a
//! normal distribution with an exact zero among them; a group of 64 columns has one scale, its largest magnitude.
//! 4.5 bits per weight, the scale in F32.
//!
//! bitsandbytes may quantize the scales a second time, in blocks of 256 that do not end where rows do, around their mean
//! over the whole tensor. That is no property of a row, and is left out: the form written here is its plain one.
//!
//! Source: QLoRA (arXiv 2305.14314), appendix E; the levels are the constants of bitsandbytes'
//! `functional.py`.

use super::{Family, Part, Role, whole_groups};
use crate::dtype::Dtype;
use crate::packing::{self, LSB_ROWS, Packing};
use crate::{FormatError, Result};

/// The scheme's name.
pub const NAME: &str = "nf4";

/// Columns that share a scale.
pub const GROUP: usize = 64;

/// What the codes mean, before the scale.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The code of zero.
pub const ZERO: u8 = 7;

/// The meaning of a code, as written into the manifest.
pub const FORMULA: &str = "value[n][k] = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, \
    -0.091050036, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0][code[n][k]] \
    * scale[n][k / 64], in f32";

/// The stored tensors of a weight of `n` x `k`. Fails for FastDeploy's forms, and when K is no multiple of 64.
pub fn parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    if family == Family::FastDeploy {
        return Err(FormatError::SchemeShape {
            scheme: NAME.to_owned(),
            n,
            k,
            reason: "FastDeploy does not load it; it loads INT8 and INT4 per channel".to_owned(),
        });
    }
    whole_groups(NAME, (n, k), GROUP)?;
    let part = |role, layout, bits, dtype: Dtype, width: usize| Part {
        role,
        layout,
        bits,
        dtype,
        shape: vec![n, width],
        rows: n,
        row_bytes: width * dtype.bitsize() / 8,
        by_columns: false,
    };
    Ok(vec![
        part(Role::Codes, LSB_ROWS.name(), 4, Dtype::U8, k / 2),
        part(Role::Scales, packing::ROWS, 32, Dtype::F32, k / GROUP),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    #[test]
    fn everything_stored_is_counted_and_levels_are_spelled_out() {
        assert_eq!(Scheme::Nf4.bits_per_weight(256, 1024).unwrap(), 4.5);
        let spelled = LEVELS.map(|level| format!("{level:?}")).join(", ");
        assert!(FORMULA.contains(&format!("[{spelled}]")), "{spelled}");
        assert!(LEVELS.is_sorted() && LEVELS[usize::from(ZERO)] == 0.0);
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        for (family, k, why) in [
            (Family::Own, 96, "multiple of 64"),
            (Family::Own, 0, "empty"),
            (Family::FastDeploy, 128, "FastDeploy"),
        ] {
            let message = parts(family, 256, k).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        }
    }
}
