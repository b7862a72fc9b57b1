//! `wint2.5`: the hybrid of 7-bit and 9-bit convolutional codes that FastDeploy's unzip operator knows, 2.5 bits per
//! weight and two bytes per output channel. What the words mean is told in [`crate::packing::wint25`]; this page says
//! how a weight is stored. It has one form, ours: no configuration of FastDeploy reaches it.

use super::{Family, Part, Role, whole_groups};
use crate::dtype::Dtype;
use crate::packing::{self, wint25};
use crate::{FormatError, Result};

/// The scheme's name.
pub const NAME: &str = "wint2.5";

/// The meaning of the words, as written into the manifest.
pub const FORMULA: &str = "word(i) = codes[n][10 * (k / 64) + i]; i = k % 64; \
    window = i < 63 ? (word(i / 7) >> [13, 11, 9, 6, 4, 2, 0][i % 7]) & 7 : word(9) >> 13; \
    value[n][k] = (window - 4) * ((word(9) & 8191) * super_scales[n]), in f32";

/// The stored tensors of a weight of `n` x `k`. Fails for FastDeploy's forms, and when K is no multiple of 64.
pub fn parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    if family == Family::FastDeploy {
        return Err(FormatError::SchemeShape {
            scheme: NAME.to_owned(),
            n,
            k,
            reason: "no FastDeploy configuration loads it; it loads wint2 for routed experts".to_owned(),
        });
    }
    whole_groups(NAME, (n, k), wint25::GROUP)?;
    let part = |role, dtype: Dtype, width: usize| Part {
        role,
        layout: packing::ROWS,
        bits: dtype.bitsize() as u8,
        dtype,
        shape: vec![n, width],
        rows: n,
        row_bytes: width * dtype.bitsize() / 8,
        by_columns: false,
    };
    Ok(vec![
        part(Role::Codes, Dtype::U16, k / wint25::GROUP * wint25::WORDS),
        part(Role::SuperScales, Dtype::BF16, 1),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    #[test]
    fn everything_stored_is_counted() {
        let bits = Scheme::Ccq25.bits_per_weight(256, 1024).unwrap();
        assert_eq!(bits, 2.5 + 16.0 / 1024.0);
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        for (family, k, why) in [
            (Family::Own, 96, "multiple of 64"),
            (Family::Own, 0, "empty"),
            (Family::FastDeploy, 128, "no FastDeploy configuration"),
        ] {
            let message = parts(family, 256, k).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        }
    }
}
