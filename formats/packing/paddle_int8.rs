//! `paddle-int8`: one byte per code, rows interleaved in pairs, columns of a tile of 64 shuffled in
//! runs of 16. It is what Paddle's `weight_quantize` writes for `weight_only_int8` on every GPU from
//! architecture 75 to 100, and what FastDeploy loads without touching it.
//!
//! ```text
//! two rows n, n+1:  | n: k 0..64 | n+1: k 0..64 | n: k 64..128 | n+1: k 64..128 | ...   2K bytes
//! 16 bytes of a run:  k =  0  8  1  9  2 10  3 11  4 12  5 13  6 14  7 15     (+ 16 * run)
//! ```
//!
//! ```text
//! perm = [0,2,4,6,8,10,12,14,1,3,5,7,9,11,13,15]
//! kk   = perm[k % 16] + 16 * (k / 16)
//! byte = kk % 64 + 128 * (kk / 64) + 64 * (n % 2) + 2 * K * (n / 2)
//! ```
//!
//! Reference: `weight_quantize` in PaddlePaddle (`paddle/phi/kernels/impl/weight_quantize_kernel_impl.h`).
//! Oddities: the stored byte is the integer weight plus 128, which is our code itself; the tensor is
//! tagged I8 and shaped (N, K) although no row of it is a row of the weight; K must be a multiple
//! of 64, rows come in pairs.

use super::{Packing, check_tiles};
use crate::Result;

/// The layout's only value.
pub const PADDLE_INT8: PaddleInt8 = PaddleInt8;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct PaddleInt8;

/// Columns of a tile.
const TILE: usize = 64;
/// Columns that are shuffled among themselves.
const RUN: usize = 16;
/// Rows that lie interleaved.
const ROWS: usize = 2;

impl Packing for PaddleInt8 {
    fn name(&self) -> &'static str {
        "paddle-int8"
    }

    fn formula(&self) -> &'static str {
        "code[n][k] is byte kk%64 + 128*(kk/64) + 64*(n%2) + 2*K*(n/2) with kk = 16*(k/16) + (k%8)*2 + (k%16)/8"
    }

    fn row_bytes(&self, _bits: u8, k: usize) -> usize {
        k
    }

    fn row_multiple(&self) -> usize {
        ROWS
    }

    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check_tiles(self, (8, bits), (TILE, k), codes.len(), k)?;
        for pair in codes.chunks_exact(ROWS * k) {
            let (even, odd) = pair.split_at(k);
            for (even, odd) in even.chunks_exact(TILE).zip(odd.chunks_exact(TILE)) {
                for run in even.chunks_exact(RUN).chain(odd.chunks_exact(RUN)) {
                    let (low, high) = run.split_at(RUN / 2);
                    out.extend(low.iter().zip(high).flat_map(|(&l, &h)| [l, h]));
                }
            }
        }
        Ok(())
    }

    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        check_tiles(self, (8, bits), (TILE, k), bytes.len(), k)?;
        for pair in bytes.chunks_exact(ROWS * k) {
            for row in 0..ROWS {
                for tile in pair.chunks_exact(TILE).skip(row).step_by(ROWS) {
                    for run in tile.chunks_exact(RUN) {
                        out.extend(run.iter().step_by(2));
                        out.extend(run.iter().skip(1).step_by(2));
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    const PERM: [usize; 16] = [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15];

    fn pack(codes: &[u8], k: usize) -> Vec<u8> {
        let mut out = Vec::new();
        PADDLE_INT8.pack(8, k, codes, &mut out).unwrap();
        out
    }

    /// Codes of q(k, n), (N, K).
    fn codes(n: usize, k: usize, q: impl Fn(usize, usize) -> i32) -> Vec<u8> {
        (0..n * k).map(|i| (q(i % k, i / k) + 128) as u8).collect()
    }

    /// The bytes that Paddle 3.3.1 wrote.
    #[test]
    fn known_answer() {
        let bytes = pack(&codes(32, 256, |k, n| ((7 * k + 13 * n) % 255) as i32 - 127), 256);
        let first = [
            1, 57, 8, 64, 15, 71, 22, 78, 29, 85, 36, 92, 43, 99, 50, 106, 113, 169, 120, 176, 127, 183, 134,
            190, 141, 197, 148, 204, 155, 211, 162, 218,
        ];
        assert_eq!(bytes[..32], first);
        let digest: String = Sha256::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        assert_eq!(
            digest,
            "da8e4aff6231121a170ef0f3aefc57c4933f56b4a9d4fd1fab9ec0ce59569c13"
        );
    }

    #[test]
    fn formula_gives_what_the_loops_give_and_blocks_of_rows_join() {
        let mut cases = 0;
        for (n, k) in [(2, 64), (4, 128), (16, 192), (6, 320)] {
            let all = codes(n, k, |k, n| ((37 * k + 101 * n + k * n) % 255) as i32 - 127);
            let bytes = pack(&all, k);
            for (i, code) in all.iter().enumerate() {
                let (n, c) = (i / k, i % k);
                let kk = PERM[c % 16] + 16 * (c / 16);
                assert_eq!(kk, 16 * (c / 16) + (c % 8) * 2 + (c % 16) / 8);
                let at = kk % 64 + 128 * (kk / 64) + 64 * (n % 2) + 2 * k * (n / 2);
                assert_eq!(bytes[at], *code, "{n} {c} of {k}");
            }
            let mut back = Vec::new();
            PADDLE_INT8.unpack(8, k, &bytes, &mut back).unwrap();
            assert_eq!(back, all);
            let (top, bottom) = all.split_at(2 * k);
            assert_eq!([pack(top, k), pack(bottom, k)].concat(), bytes);
            cases += 1;
        }
        assert_eq!(cases, 4);
    }

    #[test]
    fn what_does_not_tile_is_refused() {
        for (bits, k, len) in [(8, 64, 64), (8, 32, 64), (4, 64, 128), (8, 0, 0), (8, 64, 130)] {
            let mut out = Vec::new();
            assert!(
                PADDLE_INT8.pack(bits, k, &vec![0; len], &mut out).is_err(),
                "{bits} {k} {len}"
            );
            assert!(
                PADDLE_INT8.unpack(bits, k, &vec![0; len], &mut out).is_err(),
                "{bits} {k} {len}"
            );
        }
    }
}
