//! `wint2`: the 2-bit convolutional code (CCQ) of PaddlePaddle FastDeploy, 2.0625 bits per weight and
//! ten bytes per output channel. What the bytes mean is told in [`crate::packing::wint2`]; this
//! page says how a weight is stored.
//!
//! Our own form asks only that K is a multiple of 64. FastDeploy's form lies by columns and asks for
//! K % 128 and N % 256; FastDeploy takes it for routed experts only.

use super::{Family, Part, Role, whole_groups};
use crate::dtype::Dtype;
use crate::packing::{self, HIGH_NIBBLES, Packing, wint2};
use crate::{FormatError, Result};

/// The scheme's name.
pub const NAME: &str = "wint2";

/// The meaning of a code byte, as written into the manifest.
pub const FORMULA: &str = "code = floor(codes[n][k / 4] * code_scales[n] + code_zero_points[n] + 0.5); \
    value[n][k] = (((code >> (9 - 3 * (k % 4))) & 63) - 32) * (local_scales[n][k / 64] * super_scales[n]), in f32";

/// The stored tensors of a weight of `n` x `k` in the forms of `family`.
pub fn parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    let forms = rows_of_parts(family, n, k)?;
    match wint2::fastdeploy_refusal(n, k) {
        Some(reason) if family == Family::FastDeploy => Err(FormatError::SchemeShape {
            scheme: NAME.to_owned(),
            n,
            k,
            reason,
        }),
        _ => Ok(forms),
    }
}

/// The same for any block of rows of a weight, which FastDeploy's rule about N does not concern.
pub fn rows_of_parts(family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
    whole_groups(NAME, (n, k), wint2::GROUP)?;
    let by_columns = family == Family::FastDeploy;
    let matrix = |role, layout, bits, width: usize| Part {
        role,
        layout,
        bits,
        dtype: Dtype::U8,
        shape: if by_columns {
            vec![width, n]
        } else {
            vec![n, width]
        },
        rows: n,
        row_bytes: width,
        by_columns,
    };
    let vector = |role, dtype: Dtype| Part {
        role,
        layout: packing::ROWS,
        bits: dtype.bitsize() as u8,
        dtype,
        shape: if by_columns { vec![n] } else { vec![n, 1] },
        rows: n,
        row_bytes: dtype.bitsize() / 8,
        by_columns: false,
    };
    let locals = HIGH_NIBBLES.row_bytes(4, k / wint2::GROUP);
    let (codes, nibbles) = if by_columns {
        (packing::COLUMNS, packing::COLUMNS_HIGH_NIBBLES)
    } else {
        (packing::ROWS, HIGH_NIBBLES.name())
    };
    Ok(vec![
        matrix(Role::Codes, codes, 8, k / wint2::VECTOR),
        matrix(Role::LocalScales, nibbles, 4, locals),
        vector(Role::SuperScales, Dtype::BF16),
        vector(Role::CodeScales, Dtype::F32),
        vector(Role::CodeZeroPoints, Dtype::F32),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    #[test]
    fn everything_stored_is_counted() {
        // 2 bits of codes, 4/64 of local scales, 10 bytes a channel.
        let bits = Scheme::Ccq.bits_per_weight(256, 1024).unwrap();
        assert_eq!(bits, 2.0 + 4.0 / 64.0 + 80.0 / 1024.0);
        // An odd number of groups wastes a nibble a row.
        let bits = Scheme::Ccq.bits_per_weight(10, 704).unwrap();
        assert!((bits - (2.0 + 48.0 / 704.0 + 80.0 / 704.0)).abs() < 1e-12);
    }

    #[test]
    fn fastdeploy_lies_by_columns_and_asks_for_more() {
        let parts = parts(Family::FastDeploy, 512, 256).unwrap();
        let shapes: Vec<&[usize]> = parts.iter().map(|p| p.shape.as_slice()).collect();
        assert_eq!(shapes, [&[64, 512][..], &[2, 512], &[512], &[512], &[512]]);
        let dtypes: Vec<Dtype> = parts.iter().map(|p| p.dtype).collect();
        assert_eq!(
            dtypes,
            [Dtype::U8, Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::F32]
        );
        for (n, k, why) in [
            (512, 192, "multiple of 128"),
            (128, 256, "multiple of 256"),
            (512, 100, "multiple of 64"),
        ] {
            let message = super::parts(Family::FastDeploy, n, k).unwrap_err().to_string();
            assert!(message.contains(why), "{message}");
        }
        assert!(super::parts(Family::Own, 3, 192).is_ok());
    }
}
