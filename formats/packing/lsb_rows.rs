//! `lsb-rows`: each row is one little-endian bit stream, lowest bits first, padded with zero bits
//! to a whole byte.
//!
//! ```text
//! 4 bits   | k=1 | k=0 |  k=3 | k=2 |  ...          one byte = two codes, low nibble first
//! 2 bits   | k=3 | k=2 | k=1 | k=0 |  ...           one byte = four codes
//! 3 bits   k=2(low 2) k=1 k=0 | k=5(1) k=4 k=3 k=2(high 1) | ...   codes may straddle bytes
//! 8 bits   one byte = one code
//! ```
//!
//! Formula: bit `k * bits + i` of row `n` is bit `i` of `code[n][k]`; bit `j` of a row is bit
//! `j % 8` of its byte `j / 8`. Widths 1 to 8.

use super::Packing;
use crate::{FormatError, Result};

/// The layout's only value.
pub const LSB_ROWS: LsbRows = LsbRows;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct LsbRows;

impl Packing for LsbRows {
    fn name(&self) -> &'static str {
        "lsb-rows"
    }

    fn formula(&self) -> &'static str {
        "bit i of code[n][k] is bit (k*bits + i) % 8 of byte n*row_bytes + (k*bits + i) / 8"
    }

    fn row_bytes(&self, bits: u8, k: usize) -> usize {
        (k * usize::from(bits)).div_ceil(8)
    }

    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check_rows("codes", k, codes.len())?;
        if k == 0 {
            return Ok(());
        }
        for row in codes.chunks_exact(k) {
            match bits {
                8 => out.extend_from_slice(row),
                4 => pack_row::<4, 2>(row, out),
                2 => pack_row::<2, 4>(row, out),
                _ => pack_stream(bits, row, out),
            }
        }
        Ok(())
    }

    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        let row_bytes = self.row_bytes(bits, k);
        check_rows("packed bytes", row_bytes, bytes.len())?;
        if row_bytes == 0 {
            return Ok(());
        }
        for row in bytes.chunks_exact(row_bytes) {
            match bits {
                8 => out.extend_from_slice(row),
                4 => unpack_row::<4, 2>(k, row, out),
                2 => unpack_row::<2, 4>(k, row, out),
                1 => unpack_row::<1, 8>(k, row, out),
                _ => unpack_stream(bits, k, row, out),
            }
        }
        Ok(())
    }
}

fn check_rows(what: &'static str, row: usize, len: usize) -> Result<()> {
    if (row == 0 && len == 0) || (row > 0 && len.is_multiple_of(row)) {
        return Ok(());
    }
    Err(FormatError::Weight {
        what,
        expected: format!("rows of {row}"),
        got: format!("{len} in all"),
    })
}

/// Widths that divide eight: `PER_BYTE` codes of `BITS` bits fill a byte.
fn pack_row<const BITS: u8, const PER_BYTE: usize>(row: &[u8], out: &mut Vec<u8>) {
    let mask = ((1u16 << BITS) - 1) as u8;
    let join = |codes: &[u8]| {
        codes
            .iter()
            .rev()
            .fold(0u8, |byte, code| (byte << BITS) | (code & mask))
    };
    let (whole, rest) = row.as_chunks::<PER_BYTE>();
    out.extend(whole.iter().map(|codes| join(codes)));
    if !rest.is_empty() {
        out.push(join(rest));
    }
}

fn unpack_row<const BITS: u8, const PER_BYTE: usize>(k: usize, row: &[u8], out: &mut Vec<u8>) {
    let mask = ((1u16 << BITS) - 1) as u8;
    let from = out.len();
    out.resize(from + row.len() * PER_BYTE, 0);
    let fresh = out.get_mut(from..).unwrap_or_default();
    for (codes, byte) in fresh.as_chunks_mut::<PER_BYTE>().0.iter_mut().zip(row) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (byte >> (i as u8 * BITS)) & mask;
        }
    }
    out.truncate(from + k);
}

fn pack_stream(bits: u8, row: &[u8], out: &mut Vec<u8>) {
    let (mut pending, mut filled) = (0u32, 0u32);
    for code in row {
        pending |= (u32::from(*code) & ((1 << bits) - 1)) << filled;
        filled += u32::from(bits);
        while filled >= 8 {
            out.push(pending as u8);
            pending >>= 8;
            filled -= 8;
        }
    }
    if filled > 0 {
        out.push(pending as u8);
    }
}

fn unpack_stream(bits: u8, k: usize, row: &[u8], out: &mut Vec<u8>) {
    let (mut pending, mut filled, mut bytes) = (0u32, 0u32, row.iter());
    for _ in 0..k {
        while filled < u32::from(bits) {
            pending |= u32::from(bytes.next().copied().unwrap_or(0)) << filled;
            filled += 8;
        }
        out.push((pending & ((1 << bits) - 1)) as u8);
        pending >>= bits;
        filled -= u32::from(bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_hold() {
        let pack = |bits, k, codes: &[u8]| {
            let mut out = Vec::new();
            LSB_ROWS.pack(bits, k, codes, &mut out).unwrap();
            out
        };
        assert_eq!(pack(4, 3, &[1, 2, 3]), [0x21, 0x03]);
        assert_eq!(pack(2, 4, &[1, 2, 3, 0]), [0b00_11_10_01]);
        assert_eq!(pack(3, 3, &[7, 0, 5]), [0b01_000_111, 0b1]);
        assert_eq!(pack(8, 2, &[9, 255]), [9, 255]);
    }

    /// The formula, executed bit by bit, against the loops.
    #[test]
    fn formula_gives_what_the_loops_give() {
        let mut cases = 0;
        for bits in 1..=8u8 {
            for k in [1usize, 2, 3, 5, 8, 31, 33, 64, 100] {
                let n = 3;
                let codes: Vec<u8> = (0..n * k).map(|i| ((i * 37 + 11) % (1 << bits)) as u8).collect();
                let mut packed = Vec::new();
                LSB_ROWS.pack(bits, k, &codes, &mut packed).unwrap();
                let row_bytes = LSB_ROWS.row_bytes(bits, k);
                assert_eq!(packed.len(), n * row_bytes);
                for (index, code) in codes.iter().enumerate() {
                    let (row, col) = (index / k, index % k);
                    for i in 0..usize::from(bits) {
                        let bit = col * usize::from(bits) + i;
                        let stored = (packed[row * row_bytes + bit / 8] >> (bit % 8)) & 1;
                        assert_eq!(stored, (code >> i) & 1, "bits {bits} k {k} at ({row},{col})");
                    }
                }
                let mut back = Vec::new();
                LSB_ROWS.unpack(bits, k, &packed, &mut back).unwrap();
                assert_eq!(back, codes, "bits {bits} k {k}");
                cases += 1;
            }
        }
        assert_eq!(cases, 72);
        assert!(LSB_ROWS.pack(4, 3, &[0; 4], &mut Vec::new()).is_err());
        assert!(LSB_ROWS.unpack(4, 3, &[0; 3], &mut Vec::new()).is_err());
    }
}
