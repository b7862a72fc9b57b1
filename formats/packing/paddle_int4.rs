//! `paddle-int4`: two codes per byte, rows interleaved in fours, columns of a tile of 64 shuffled in
//! runs of 32. It is what Paddle's `weight_quantize` writes for `weight_only_int4` on every GPU from
//! architecture 75 to 100, and what FastDeploy loads without touching it.
//!
//! ```text
//! four rows n..n+4:   | n: k 0..64 | n+1: k 0..64 | n+2 .. | n+3 .. | n: k 64..128 | ...   2K bytes
//! 16 bytes of a run of 32 columns are four little-endian words; word w, w = 0..3, holds, low nibble first,
//!     k = 2w  2w+8  2w+16  2w+24  2w+1  2w+9  2w+17  2w+25     (+ 32 * run)
//! ```
//!
//! As Paddle defines it, in two steps from signed weights q:
//!
//! ```text
//! B[b]   = (q[2b] & 15) | (q[2b+1] & 15) << 4                      one byte per two columns
//! bb     = perm[b % 16] + 16 * (b / 16),  perm = [0,4,8,12,1,5,9,13,2,6,10,14,3,7,11,15]
//! byte   = bb % 32 + 128 * (bb / 32) + 32 * (n % 4) + 2 * K * (n / 4)
//! then in each 32-bit word:  nibble i = (nibble [0,2,4,6,1,3,5,7][i] + 8) & 15
//! ```
//!
//! Reference: `weight_quantize` in PaddlePaddle (`paddle/phi/kernels/impl/weight_quantize_kernel_impl.h`).
//! Oddities: the stored nibble is the integer weight plus 8, which is our code itself; the tensor is
//! tagged I8 and shaped (N/2, K) although its bytes are neither rows nor pairs of rows of the
//! weight; K must be a multiple of 64, rows come in fours.

use super::{Packing, check_tiles};
use crate::Result;

/// The layout's only value.
pub const PADDLE_INT4: PaddleInt4 = PaddleInt4;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct PaddleInt4;

/// Columns of a tile.
const TILE: usize = 64;
/// Columns that are shuffled among themselves.
const RUN: usize = 32;
/// Rows that lie interleaved.
const ROWS: usize = 4;
/// Columns of a run whose codes are the nibbles of its word 0; word w has those plus 2w.
const NIBBLES: [usize; 8] = [0, 8, 16, 24, 1, 9, 17, 25];

impl Packing for PaddleInt4 {
    fn name(&self) -> &'static str {
        "paddle-int4"
    }

    fn formula(&self) -> &'static str {
        "code[n][k] is nibble 4*(k%2) + p%4 (lowest first) of 32-bit word p/4 with p = pp%32 + 128*(pp/32) + 32*(n%4) + 2*K*(n/4), pp = 16*(k/32) + 4*((k/2)%4) + (k%32)/8"
    }

    fn row_bytes(&self, _bits: u8, k: usize) -> usize {
        k / 2
    }

    fn row_multiple(&self) -> usize {
        ROWS
    }

    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check_tiles(self, (4, bits), (TILE, k), codes.len(), k)?;
        for four in codes.chunks_exact(ROWS * k) {
            for tile in 0..k / TILE {
                for row in four.chunks_exact(k) {
                    let row = row.get(tile * TILE..(tile + 1) * TILE).unwrap_or_default();
                    row.as_chunks::<RUN>().0.iter().for_each(|run| pack_run(run, out));
                }
            }
        }
        Ok(())
    }

    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check_tiles(self, (4, bits), (TILE, k), bytes.len(), k / 2)?;
        for four in bytes.chunks_exact(ROWS * k / 2) {
            for row in 0..ROWS {
                for tile in four.chunks_exact(TILE / 2).skip(row).step_by(ROWS) {
                    tile.as_chunks().0.iter().for_each(|run| unpack_run(run, out));
                }
            }
        }
        Ok(())
    }
}

fn pack_run(run: &[u8; RUN], out: &mut Vec<u8>) {
    let code = |k: usize| run.get(k).copied().unwrap_or(0) & 15;
    for word in 0..4 {
        let pairs = NIBBLES.as_chunks::<2>().0;
        out.extend(
            pairs
                .iter()
                .map(|[low, high]| code(2 * word + low) | (code(2 * word + high) << 4)),
        );
    }
}

fn unpack_run(bytes: &[u8; RUN / 2], out: &mut Vec<u8>) {
    let mut run = [0u8; RUN];
    for (word, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
        let nibbles = bytes.iter().flat_map(|b| [b & 15, b >> 4]);
        for (column, nibble) in NIBBLES.iter().zip(nibbles) {
            if let Some(code) = run.get_mut(2 * word + column) {
                *code = nibble;
            }
        }
    }
    out.extend_from_slice(&run);
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn pack(codes: &[u8], k: usize) -> Vec<u8> {
        let mut out = Vec::new();
        PADDLE_INT4.pack(4, k, codes, &mut out).unwrap();
        out
    }

    /// Codes of q(k, n), (N, K).
    fn codes(n: usize, k: usize, q: impl Fn(usize, usize) -> i32) -> Vec<u8> {
        (0..n * k).map(|i| (q(i % k, i / k) + 8) as u8).collect()
    }

    /// The two steps of the module's text, byte by byte.
    fn by_definition(codes: &[u8], n: usize, k: usize) -> Vec<u8> {
        const PERM: [usize; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
        const SOURCE: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let q = |n: usize, k_: usize| (codes[n * k + k_] as i32 - 8) & 15;
        let mut flat = vec![0u8; n * k / 2];
        for n in 0..n {
            for b in 0..k / 2 {
                let bb = PERM[b % 16] + 16 * (b / 16);
                let at = bb % 32 + 128 * (bb / 32) + 32 * (n % 4) + 2 * k * (n / 4);
                flat[at] = (q(n, 2 * b) | (q(n, 2 * b + 1) << 4)) as u8;
            }
        }
        let words = flat.as_chunks::<4>().0;
        words
            .iter()
            .flat_map(|word| {
                let word = u32::from_le_bytes(*word);
                let nibble = |i: usize| ((word >> (4 * SOURCE[i])) + 8) & 15;
                (0..8).map(|i| nibble(i) << (4 * i)).sum::<u32>().to_le_bytes()
            })
            .collect()
    }

    /// The bytes that Paddle 3.3.1 wrote.
    #[test]
    fn known_answer() {
        let bytes = pack(&codes(32, 256, |k, n| ((4 * k + 3 * n) % 15) as i32 - 7), 256);
        let first = [
            49, 117, 117, 185, 185, 253, 253, 66, 66, 134, 134, 202, 202, 30, 30, 83, 185, 253, 253, 66, 66,
            134, 134, 202, 202, 30, 30, 83, 83, 151, 151, 219,
        ];
        assert_eq!(bytes[..32], first);
        let digest: String = Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(
            digest,
            "a8954c0b390dd06d148877d866f385d2d5bb6ba50e2119bbfb67b3accbda3148"
        );
    }

    #[test]
    fn formulas_give_what_the_loops_give_and_blocks_of_rows_join() {
        let mut cases = 0;
        for (n, k) in [(4, 64), (8, 128), (16, 192), (12, 320)] {
            let all = codes(n, k, |k, n| ((5 * k + 3 * n + k * n / 7) % 15) as i32 - 7);
            let bytes = pack(&all, k);
            assert_eq!(bytes, by_definition(&all, n, k));
            for (i, code) in all.iter().enumerate() {
                let (n, c) = (i / k, i % k);
                let pp = 16 * (c / 32) + 4 * ((c / 2) % 4) + (c % 32) / 8;
                let p = pp % 32 + 128 * (pp / 32) + 32 * (n % 4) + 2 * k * (n / 4);
                let nibble = 4 * (c % 2) + p % 4;
                let byte = bytes[4 * (p / 4) + nibble / 2];
                assert_eq!((byte >> (4 * (nibble % 2))) & 15, *code, "{n} {c} of {k}");
            }
            let mut back = Vec::new();
            PADDLE_INT4.unpack(4, k, &bytes, &mut back).unwrap();
            assert_eq!(back, all);
            let (top, bottom) = all.split_at(4 * k);
            assert_eq!([pack(top, k), pack(bottom, k)].concat(), bytes);
            cases += 1;
        }
        assert_eq!(cases, 4);
    }

    #[test]
    fn what_does_not_tile_is_refused() {
        for (bits, k, len) in [(4, 64, 128), (4, 32, 128), (8, 64, 256), (4, 0, 0), (4, 64, 260)] {
            let mut out = Vec::new();
            assert!(
                PADDLE_INT4.pack(bits, k, &vec![0; len], &mut out).is_err(),
                "{bits} {k} {len}"
            );
            let half = len / 2;
            assert!(
                PADDLE_INT4.unpack(bits, k, &vec![0; half], &mut out).is_err(),
                "{bits} {k} {half}"
            );
        }
    }
}
