//! AWQ's words from rows that are packed already. Owns the turning of squares of nibbles, so that no code need stand alone in
//! a byte on its way.

use super::{AWQ_PLACE, WORD};

/// Words of a line that are made together: what a cache line holds.
const SIDE: usize = 16;
/// Words of a row that are turned together: two cache lines, since one by one they come slowly.
const WIDE: usize = 32;
/// Codes of a word.
const CODES: usize = 8;

/// AWQ's (`k`, `n` / 8) words of the (`n`, `k`) codes of 4 bits whose rows lie in `bytes` as
/// [`lsb-rows`](crate::packing::lsb_rows). Both are multiples of eight; of anything else the rest is left out.
pub fn awq_of_rows(k: usize, n: usize, bytes: &[u8], out: &mut [u8]) {
    let row = (k / 2).max(1);
    let mut lines = vec![[[0u8; WORD]; SIDE]; WIDE * CODES];
    for (band, rows) in bytes.chunks(SIDE * CODES * row).enumerate() {
        let from = band * SIDE * WORD;
        let mut targets = out.chunks_exact_mut((n / CODES * WORD).max(1));
        for square in (0..row).step_by(WIDE * WORD) {
            let mut count = 0;
            for (b, eight) in rows.chunks_exact(CODES * row).enumerate() {
                let mut words = [[0u32; WIDE]; CODES];
                for (source, place) in eight.chunks_exact(row).zip(AWQ_PLACE) {
                    let here = source.get(square..).unwrap_or_default().as_chunks::<WORD>().0;
                    if let Some(words) = words.get_mut(place as usize) {
                        words
                            .iter_mut()
                            .zip(here)
                            .for_each(|(word, bytes)| *word = u32::from_le_bytes(*bytes));
                    }
                }
                turn_nibbles(&mut words);
                for (j, words) in words.iter().enumerate() {
                    for (line, word) in lines.iter_mut().skip(j).step_by(CODES).zip(words) {
                        if let Some(place) = line.get_mut(b) {
                            *place = word.to_le_bytes();
                        }
                    }
                }
                count = (b + 1) * WORD;
            }
            let columns = (row - square).min(WIDE * WORD) / WORD * CODES;
            for (target, line) in targets.by_ref().take(columns).zip(&lines) {
                if let (Some(target), Some(line)) = (
                    target.get_mut(from..from + count),
                    line.as_flattened().get(..count),
                ) {
                    target.copy_from_slice(line);
                }
            }
        }
    }
}

/// Nibble i of word j becomes nibble j of word i, many times side by side: halves of eight words are exchanged, then of
/// four, then of two.
fn turn_nibbles(words: &mut [[u32; WIDE]; CODES]) {
    exchange::<4>(words, 0x0000_ffff);
    exchange::<2>(words, 0x00ff_00ff);
    exchange::<1>(words, 0x0f0f_0f0f);
}

/// Exchanges the high nibbles of a word with the low ones of the word `APART` further on.
fn exchange<const APART: usize>(words: &mut [[u32; WIDE]; CODES], low: u32) {
    for pair in words.chunks_exact_mut(2 * APART) {
        let (first, second) = pair.split_at_mut(APART);
        for (a, b) in first.as_flattened_mut().iter_mut().zip(second.as_flattened_mut()) {
            let moved = (*a >> (4 * APART) ^ *b) & low;
            *b ^= moved;
            *a ^= moved << (4 * APART);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::awq;
    use super::*;
    use crate::packing::{LSB_ROWS, Packing};

    #[test]
    fn packed_rows_give_the_words_of_their_codes() {
        let mut checked = 0;
        for (n, k) in [(8, 8), (16, 24), (128, 128), (136, 200), (264, 256), (1024, 8)] {
            let codes: Vec<u8> = (0..n * k).map(|i| (i * 7 + i / k * 3) as u8 % 16).collect();
            let mut bytes = Vec::new();
            LSB_ROWS.pack(4, k, &codes, &mut bytes).unwrap();
            let mut expected = vec![0u8; k * n / 8 * WORD];
            awq(k, &codes, n, 0, &mut expected);
            let mut out = vec![0u8; expected.len()];
            awq_of_rows(k, n, &bytes, &mut out);
            assert!(out == expected, "{n} x {k}");
            checked += out.len();
        }
        assert!(checked > 30_000);
    }
}
