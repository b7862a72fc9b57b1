//! `high-nibbles`: two 4-bit values to a byte, the first in the high nibble; an odd last one leaves
//! the low nibble zero. WINT2's local scales lie like this (see [`super::wint2`]).
//!
//! ```text
//! | k=0 | k=1 |  k=2 | k=3 |  ...      high nibble first
//! ```
//!
//! Formula: `value[n][k] = (byte[n*row_bytes + k/2] >> (4 if k is even else 0)) & 15`.

use super::Packing;
use super::wint2;
use crate::{FormatError, Result};

/// The layout's only value.
pub const HIGH_NIBBLES: HighNibbles = HighNibbles;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct HighNibbles;

impl Packing for HighNibbles {
    fn name(&self) -> &'static str {
        "high-nibbles"
    }

    fn formula(&self) -> &'static str {
        "value[n][k] is (byte n*row_bytes + k/2 >> (4 if k % 2 == 0 else 0)) & 15"
    }

    fn row_bytes(&self, _bits: u8, k: usize) -> usize {
        wint2::local_bytes(k)
    }

    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check(bits, k, codes.len())?;
        for row in codes.chunks_exact(k.max(1)) {
            out.extend(wint2::pack_locals(row)?);
        }
        Ok(())
    }

    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let row = self.row_bytes(bits, k);
        check(bits, row, bytes.len())?;
        for row in bytes.chunks_exact(row.max(1)) {
            out.extend(wint2::unpack_locals(row, k)?);
        }
        Ok(())
    }
}

fn check(bits: u8, row: usize, len: usize) -> Result<()> {
    let fault = |what, expected: String, got: String| Err(FormatError::Weight { what, expected, got });
    if bits != 4 {
        return fault(
            "bits of a code",
            "4 for high-nibbles".to_owned(),
            bits.to_string(),
        );
    }
    if (row == 0 && len > 0) || (row > 0 && !len.is_multiple_of(row)) {
        return fault("codes", format!("rows of {row}"), format!("{len} in all"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_picture_holds() {
        let (mut packed, mut back) = (Vec::new(), Vec::new());
        HIGH_NIBBLES.pack(4, 3, &[1, 2, 3, 4, 5, 6], &mut packed).unwrap();
        assert_eq!(packed, [0x12, 0x30, 0x45, 0x60]);
        for (at, code) in [1u8, 2, 3].into_iter().enumerate() {
            assert_eq!(
                (packed[at / 2] >> if at % 2 == 0 { 4 } else { 0 }) & 15,
                code,
                "the formula"
            );
        }
        HIGH_NIBBLES.unpack(4, 3, &packed, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4, 5, 6]);
        assert!(HIGH_NIBBLES.pack(8, 3, &[1, 2, 3], &mut packed).is_err());
    }
}
