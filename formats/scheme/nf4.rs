//! `nf4`: bitsandbytes' 4-bit NormalFloat. A code names one of 16 fixed levels in -1..1, which are quantiles of a
//! normal distribution with an exact zero among them; a group of 64 columns has one scale, its largest magnitude.
//! 4.5 bits per weight, the scale in F32.
//!
//! `nf4-dq`: the same, with scales that are quantized a second time ("double quantization"). Scale `i = n*G + k/64` of the
//! weight as a whole, rows one after the other, is `MAP[code] * nested[i / 256] + offset`: the offset is the mean of all
//! scales, a nested scale the largest distance from it among 256 of them, a code one of 256 in
//! [`dynamic_map`](super::dynamic_map). Blocks do not end where rows do. 4.127 bits per weight. Such a scale may come out
//! a little below zero, where a tiny one stands beside large ones.
//!
//! Source: QLoRA (arXiv 2305.14314), section 3 and appendix E; the levels are the constants of bitsandbytes'
//! `functional.py`.

use std::sync::LazyLock;

use super::dynamic_map::MAP;
use super::{Family, Part, Role, whole_groups};
use crate::dtype::Dtype;
use crate::packing::{self, LSB_ROWS, Packing};
use crate::{FormatError, Result};

/// The scheme's name.
pub const NAME: &str = "nf4";

/// The name of the scheme with quantized scales.
pub const DOUBLE_NAME: &str = "nf4-dq";

/// Scales that share a nested scale.
pub const NESTED_GROUP: usize = 256;

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

/// The meaning of a code under double quantization, as written into the manifest.
pub static DOUBLE_FORMULA: LazyLock<String> = LazyLock::new(|| {
    let spelled = |values: &[f32]| {
        let each: Vec<String> = values.iter().map(|v| format!("{v:?}")).collect();
        format!("[{}]", each.join(", "))
    };
    format!(
        "value[n][k] = {}[code[n][k]] * scale(n, k / 64); scale(n, g) = {}[scales[n][g]] * nested_scales[(n * K / 64 + g) / 256] + offset, each step in f32",
        spelled(&LEVELS),
        spelled(&MAP)
    )
});

/// The stored tensors of a weight of `n` x `k`. Fails for FastDeploy's forms, and when K is no multiple of 64.
pub fn parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    check(NAME, family, n, k)?;
    Ok(vec![
        Part::of_rows(Role::Codes, LSB_ROWS.name(), 4, Dtype::U8, (n, k / 2)),
        Part::of_rows(Role::Scales, packing::ROWS, 32, Dtype::F32, (n, k / GROUP)),
    ])
}

/// The same for quantized scales.
pub fn double_parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    check(DOUBLE_NAME, family, n, k)?;
    let whole = |role, count: usize| Part {
        shape: vec![count],
        ..Part::of_rows(role, packing::WHOLE, 32, Dtype::F32, (count, 1))
    };
    Ok(vec![
        Part::of_rows(Role::Codes, LSB_ROWS.name(), 4, Dtype::U8, (n, k / 2)),
        Part::of_rows(Role::Scales, packing::ROWS, 8, Dtype::U8, (n, k / GROUP)),
        whole(Role::NestedScales, (n * (k / GROUP)).div_ceil(NESTED_GROUP)),
        whole(Role::Offset, 1),
    ])
}

fn check(name: &str, family: Family, n: usize, k: usize) -> Result<()> {
    if family == Family::FastDeploy {
        return Err(FormatError::SchemeShape {
            scheme: name.to_owned(),
            n,
            k,
            reason: "FastDeploy does not load it; it loads INT8 and INT4 per channel".to_owned(),
        });
    }
    whole_groups(name, (n, k), GROUP)
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
        let double = Scheme::Nf4Double.bits_per_weight(256, 1024).unwrap();
        assert!((double - 4.127).abs() < 0.0005, "{double}");
        assert_eq!(DOUBLE_FORMULA.matches(", ").count(), 15 + 255 + 3);
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        for (family, k, why) in [
            (Family::Own, 96, "multiple of 64"),
            (Family::Own, 0, "empty"),
            (Family::FastDeploy, 128, "FastDeploy"),
        ] {
            for fault in [parts(family, 256, k), double_parts(family, 256, k)] {
                let message = fault.unwrap_err().to_string();
                assert!(message.contains(why), "{message}");
            }
        }
    }
}
