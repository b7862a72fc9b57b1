//! 32-bit words of codes, as GPTQ, AWQ and compressed-tensors keep them: each code lies within a
//! stream of bits that is cut into little-endian words. The formats differ in which way the
//! stream runs, and in the order of codes within a word.
//!
//! ```text
//! 4 bits, straight   word = | c7 | c6 | c5 | c4 | c3 | c2 | c1 | c0 |      lowest bits first
//! 4 bits, AWQ        word = | c7 | c5 | c3 | c1 | c6 | c4 | c2 | c0 |
//! 3 bits, straight   32 codes in three words; c10 and c21 straddle two of them
//! ```
//!
//! Straight, a stream of codes is the layout [`lsb-rows`](super::lsb_rows) with rows padded to whole words.
//! Running along K it gives (N, words), turned (words, N); running along N it gives, for a matrix of
//! (N, G) zero points, (G, words) or, turned, (words, G).
//!
//! Formula: bit i of `code[j]` of a straight stream is bit `(j*bits + i) % 32` of its word
//! `(j*bits + i) / 32`; AWQ keeps `code[n]` of a row of columns at bit `4 * PLACE[n % 8]` of its word
//! `n / 8`, with `PLACE = [0, 4, 1, 5, 2, 6, 3, 7]`.

mod squares;

pub use squares::awq_of_rows;

use super::{LSB_ROWS, Packing};
use crate::Result;

/// Bytes of a word.
pub const WORD: usize = 4;

/// Nibble of a word in which AWQ's GEMM layout keeps the column `n % 8`.
pub const AWQ_PLACE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Words of a stream of `count` codes.
pub fn words(bits: u8, count: usize) -> usize {
    (count * usize::from(bits)).div_ceil(32)
}

/// The streams of `codes`, rows of `count`: rows of [`words`] words each, as bytes.
///
/// Fails when the codes are no whole number of rows.
pub fn straight(bits: u8, count: usize, codes: &[u8]) -> Result<Vec<u8>> {
    let row = words(bits, count) * WORD;
    if LSB_ROWS.row_bytes(bits, count) == row {
        let mut out = Vec::with_capacity(codes.len() / count.max(1) * row);
        LSB_ROWS.pack(bits, count, codes, &mut out)?;
        return Ok(out);
    }
    let (mut out, mut bytes) = (Vec::new(), Vec::new());
    for codes in codes.chunks(count.max(1)) {
        bytes.clear();
        LSB_ROWS.pack(bits, count, codes, &mut bytes)?;
        bytes.resize(row, 0);
        out.extend_from_slice(&bytes);
    }
    Ok(out)
}

/// Puts rows of elements of `width` bytes into their columns of a matrix with `columns` columns: element
/// (r, i) of `rows`, which are `row` elements long, becomes element (i, at + r) of `out`.
pub fn turn(width: usize, row: usize, rows: &[u8], columns: usize, at: usize, out: &mut [u8]) {
    let step = (row * width).max(1);
    let count = rows.len() / step;
    if width == WORD {
        return turn_words(row, rows, columns, at, out);
    }
    for (i, line) in out
        .chunks_exact_mut((columns * width).max(1))
        .take(row)
        .enumerate()
    {
        let Some(line) = line.get_mut(at * width..(at + count) * width) else {
            continue;
        };
        for (to, from) in line.chunks_exact_mut(width).zip(rows.chunks_exact(step)) {
            if let Some(element) = from.get(i * width..(i + 1) * width) {
                to.copy_from_slice(element);
            }
        }
    }
}

/// The same for words, in squares of sixteen: a cache line is read and written as a whole.
fn turn_words(row: usize, rows: &[u8], columns: usize, at: usize, out: &mut [u8]) {
    const SIDE: usize = 16;
    let step = (row * WORD).max(1);
    for (band, sources) in rows.chunks(SIDE * step).enumerate() {
        let count = sources.len() / step;
        let from = (at + band * SIDE) * WORD;
        let lines = out.chunks_mut((columns * WORD * SIDE).max(1));
        for (square, lines) in lines.enumerate().take(row.div_ceil(SIDE)) {
            let mut words = [[[0u8; WORD]; SIDE]; SIDE];
            for (j, source) in sources.chunks_exact(step).enumerate() {
                let rest = source.get(square * SIDE * WORD..).unwrap_or_default();
                for (line, word) in words.iter_mut().zip(rest.as_chunks::<WORD>().0) {
                    if let Some(place) = line.get_mut(j) {
                        *place = *word;
                    }
                }
            }
            let targets = lines.chunks_exact_mut((columns * WORD).max(1));
            let here = row.saturating_sub(square * SIDE);
            for (target, line) in targets.zip(&words).take(here) {
                if let (Some(target), Some(line)) = (
                    target.get_mut(from..from + count * WORD),
                    line.as_flattened().get(..count * WORD),
                ) {
                    target.copy_from_slice(line);
                }
            }
        }
    }
}

/// AWQ's words of 4-bit codes: `codes` are (N, `k`) with N a multiple of 8, and columns `at..at + N` of
/// the (`k`, `n` / 8) words of `out` are written. Surplus rows are left out.
pub fn awq(k: usize, codes: &[u8], n: usize, at: usize, out: &mut [u8]) {
    // Sixteen words of a line at a time: what a cache line holds.
    const SIDE: usize = 16;
    let mut line = vec![0u32; k];
    let mut words = vec![[0u8; SIDE * WORD]; k];
    for (index, many) in codes.chunks((SIDE * 8 * k).max(1)).enumerate() {
        let mut count = 0;
        for (block, rows) in many.chunks_exact((8 * k).max(1)).enumerate() {
            line.fill(0);
            for (row, place) in rows.chunks_exact(k.max(1)).zip(AWQ_PLACE) {
                for (word, code) in line.iter_mut().zip(row) {
                    *word |= u32::from(*code & 15) << (4 * place);
                }
            }
            for (words, word) in words.iter_mut().zip(&line) {
                if let Some(place) = words.as_chunks_mut::<WORD>().0.get_mut(block) {
                    *place = word.to_le_bytes();
                }
            }
            count = block + 1;
        }
        let from = (at / 8 + index * SIDE) * WORD;
        let targets = out.chunks_exact_mut((n / 8 * WORD).max(1));
        for (target, words) in targets.zip(&words) {
            if let (Some(target), Some(words)) = (
                target.get_mut(from..from + count * WORD),
                words.get(..count * WORD),
            ) {
                target.copy_from_slice(words);
            }
        }
    }
}

/// The codes behind streams of words, rows of `count`: the reverse of [`straight`]. What pads a row is left out.
///
/// Fails when the bytes are no whole number of rows.
pub fn straight_codes(bits: u8, count: usize, bytes: &[u8]) -> Result<Vec<u8>> {
    let (row, stored) = (LSB_ROWS.row_bytes(bits, count), words(bits, count) * WORD);
    let rows = bytes.len().checked_div(stored).unwrap_or(0);
    let mut out = Vec::with_capacity(rows * count);
    if row == stored {
        LSB_ROWS.unpack(bits, count, bytes, &mut out)?;
        return Ok(out);
    }
    for words in bytes.chunks(stored.max(1)) {
        LSB_ROWS.unpack(bits, count, words.get(..row).unwrap_or(words), &mut out)?;
    }
    Ok(out)
}

/// The (columns, rows) transpose of a (rows, columns) matrix of elements of `width` bytes.
pub fn turned(width: usize, rows: usize, columns: usize, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; bytes.len()];
    for (row, line) in bytes.chunks_exact((columns * width).max(1)).enumerate() {
        turn(width, columns, line, rows, row, &mut out);
    }
    out
}

/// The codes (N, K) behind AWQ's (`k`, `n` / 8) words: the reverse of [`awq`].
pub fn awq_codes(k: usize, n: usize, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0u8; n * k];
    for (column, line) in bytes.chunks_exact((n / 8 * WORD).max(1)).enumerate() {
        let words = line.as_chunks::<WORD>().0.iter();
        let nibbles = words.flat_map(|word| {
            let word = u32::from_le_bytes(*word);
            AWQ_PLACE
                .iter()
                .map(move |place| ((word >> (4 * place)) & 15) as u8)
        });
        for (target, code) in out.iter_mut().skip(column).step_by(k.max(1)).zip(nibbles) {
            *target = code;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], index: usize) -> u32 {
        u32::from_le_bytes(bytes[index * WORD..][..WORD].try_into().unwrap())
    }

    #[test]
    fn pictures_hold() {
        let packed = straight(4, 8, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        assert_eq!(packed, 0x7654_3210u32.to_le_bytes());
        let mut out = [0u8; 4];
        awq(1, &[0, 1, 2, 3, 4, 5, 6, 7], 8, 0, &mut out);
        assert_eq!(u32::from_le_bytes(out), 0x7531_6420);
        assert_eq!((words(3, 32), words(3, 33), words(2, 5)), (3, 4, 1));
    }

    /// The formula, executed bit by bit, for every width the formats have.
    #[test]
    fn straight_streams_follow_the_formula() {
        let mut bits_checked = 0;
        for bits in [2u8, 3, 4, 8] {
            for count in [1usize, 11, 32, 33, 96] {
                let codes: Vec<u8> = (0..3 * count)
                    .map(|i| ((i * 37 + 5) % (1 << bits)) as u8)
                    .collect();
                let packed = straight(bits, count, &codes).unwrap();
                let row = words(bits, count);
                assert_eq!(packed.len(), 3 * row * WORD);
                assert_eq!(straight_codes(bits, count, &packed).unwrap(), codes);
                for (index, code) in codes.iter().enumerate() {
                    let (r, j) = (index / count, index % count);
                    for i in 0..usize::from(bits) {
                        let at = j * usize::from(bits) + i;
                        let bit = (word(&packed, r * row + at / 32) >> (at % 32)) & 1;
                        assert_eq!(bit, u32::from(code >> i) & 1, "{bits} bits, {count} codes");
                        bits_checked += 1;
                    }
                }
            }
        }
        assert_eq!(bits_checked, 3 * (1 + 11 + 32 + 33 + 96) * (2 + 3 + 4 + 8));
    }

    #[test]
    fn awq_words_follow_the_formula() {
        let (n, k) = (24, 5);
        let codes: Vec<u8> = (0..n * k).map(|i| (i * 7 % 16) as u8).collect();
        let mut out = vec![0u8; k * n / 8 * WORD];
        awq(k, &codes[..8 * k], n, 0, &mut out);
        awq(k, &codes[8 * k..], n, 8, &mut out);
        assert_eq!(awq_codes(k, n, &out), codes);
        for (row, codes) in codes.chunks_exact(k).enumerate() {
            for (column, code) in codes.iter().enumerate() {
                let nibble = word(&out, column * n / 8 + row / 8) >> (4 * AWQ_PLACE[row % 8]);
                assert_eq!(nibble & 15, u32::from(*code), "row {row} column {column}");
            }
        }
    }

    #[test]
    fn turning_puts_rows_into_columns() {
        let mut out = [0u8; 12];
        turn(2, 2, &[1, 0, 2, 0, 3, 0, 4, 0], 3, 1, &mut out);
        assert_eq!(out, [0, 0, 1, 0, 3, 0, 0, 0, 2, 0, 4, 0]);
        assert_eq!(turned(1, 2, 3, &[1, 2, 3, 4, 5, 6]), [1, 4, 2, 5, 3, 6]);
        assert_eq!(turned(2, 2, 1, &[1, 0, 2, 0]), [1, 0, 2, 0]);
        let mut words = [0u8; 8];
        turn(WORD, 1, &[1, 2, 3, 4, 5, 6, 7, 8], 2, 0, &mut words);
        assert_eq!(words, [1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
