//! WINT2.5, the hybrid of 7-bit and 9-bit convolutional codes that FastDeploy's unzip operator knows.
//! Owns: the meaning of the ten words of a group, and how windows, a last weight and a local scale become
//! words. Does not own: which codes a group gets. No FastDeploy configuration reaches this layout: only the
//! operator decodes it, so it is a scheme of our own artifact.
//!
//! # Bytes
//!
//! N output channels, K input columns, K a multiple of 64.
//!
//! | tensor | type | ours | FastDeploy's | meaning |
//! |---|---|---|---|---|
//! | words | u16, little-endian | (N, K/64, 10) | (K/64 * 10, N), tagged int16 | ten words per 64 weights of one channel |
//! | super scale | bf16 | (N) | (N) | per channel |
//!
//! 160 bits per 64 weights, so 2.5 bits per weight with the local scale, plus 16 bits per channel.
//!
//! # Picture and formula
//!
//! Words 0 to 8 hold seven 3-bit windows each; neighbours inside a code share one bit:
//!
//! ```text
//! bit 15 14 13 12 11 10  9 | 8  7  6  5  4  3  2  1  0
//!     [- v0 -]             |[- v3 -]
//!           [- v1 -]       |      [- v4 -]
//!                 [- v2 -] |            [- v5 -]
//!                          |                  [- v6 -]
//!     head code, 7 bits    |tail code, 9 bits
//! ```
//!
//! Word 9 holds the 64th weight and the local scale of the group:
//!
//! ```text
//! bit 15 14 13 | 12 .. 0
//!     [- v63-]   local scale, 0..=8191
//! ```
//!
//! ```text
//! v(i) = (word[i / 7] >> {13, 11, 9, 6, 4, 2, 0}[i mod 7]) & 7      i in 0..63; i = 63: word[9] >> 13
//! W(i) = (v(i) - 4) * local * super_scale                           f32, rounded once to bf16
//! ```
//!
//! Source: `Wint25UnzipKernel` in `custom_ops/gpu_ops/moe/winx_unzip.cu` of
//! <https://github.com/PaddlePaddle/FastDeploy>.
//!
//! # Oddities
//!
//! * 63 weights come from nine words, the 64th from the scale's word;
//! * the product `(v - 4) * local * super_scale` has at most 24 significant bits, so its f32 form is exact and
//!   the order of multiplication does not matter;
//! * a local scale of zero makes the whole group zero.

use half::bf16;

use super::wint2::{expect_len, transpose};
use crate::{FormatError, Result};

/// Weights per group, along K.
pub const GROUP: usize = 64;
/// Words per group.
pub const WORDS: usize = 10;
/// Words of a group that hold a head and a tail code.
pub const CODE_WORDS: usize = WORDS - 1;
/// Weights in each of those words.
pub const WEIGHTS_PER_WORD: usize = 7;
/// How far a word is shifted right to bring its j-th window to the lowest bits.
pub const SHIFTS: [u32; WEIGHTS_PER_WORD] = [13, 11, 9, 6, 4, 2, 0];
/// Bits of the tail code, so also the place of the head code in the word.
pub const TAIL_BITS: u32 = 9;
/// Number of head codes; each gives [`HEAD_WEIGHTS`] windows.
pub const HEAD_CODES: usize = 128;
/// Weights of a head code.
pub const HEAD_WEIGHTS: usize = 3;
/// Number of tail codes; each gives [`TAIL_WEIGHTS`] windows.
pub const TAIL_CODES: usize = 512;
/// Weights of a tail code.
pub const TAIL_WEIGHTS: usize = 4;
/// Subtracted from every window, so that integer weights span -4..=3.
pub const ZERO_POINT: i8 = 4;
/// Place of the 64th weight in the tenth word.
pub const LAST_SHIFT: u32 = 13;
/// Largest local scale, 13 bits.
pub const MAX_LOCAL: u16 = 0x1FFF;

/// What the ten words of a group say, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Group {
    /// Head codes of the nine words, each below [`HEAD_CODES`].
    pub heads: [u8; CODE_WORDS],
    /// Tail codes of the nine words, each below [`TAIL_CODES`].
    pub tails: [u16; CODE_WORDS],
    /// The 64th window, 0..=7.
    pub last: u8,
    /// The local scale, 0..=[`MAX_LOCAL`].
    pub local: u16,
}

impl Group {
    /// The ten words. Bits beyond the stated ranges are dropped.
    pub fn to_words(&self) -> [u16; WORDS] {
        let mut words = [0; WORDS];
        let codes = self.heads.iter().zip(&self.tails);
        for (word, (&head, &tail)) in words.iter_mut().zip(codes) {
            *word = (u16::from(head) << TAIL_BITS) | (tail & (TAIL_CODES as u16 - 1));
        }
        words[CODE_WORDS] = (u16::from(self.last) << LAST_SHIFT) | (self.local & MAX_LOCAL);
        words
    }

    /// Takes ten words apart; the reverse of [`Group::to_words`].
    pub fn from_words(words: &[u16; WORDS]) -> Self {
        let mut group = Self::default();
        let codes = group.heads.iter_mut().zip(&mut group.tails);
        for (&word, (head, tail)) in words.iter().zip(codes) {
            *head = (word >> TAIL_BITS) as u8;
            *tail = word & (TAIL_CODES as u16 - 1);
        }
        group.last = (words[CODE_WORDS] >> LAST_SHIFT) as u8;
        group.local = words[CODE_WORDS] & MAX_LOCAL;
        group
    }
}

/// Integer weights, each in -4..=3, of a head code; bits above the 7th are ignored.
pub fn head_windows(head: u8) -> [i8; HEAD_WEIGHTS] {
    [4, 2, 0].map(|shift| ((head >> shift) & 7) as i8 - ZERO_POINT)
}

/// Integer weights, each in -4..=3, of a tail code; bits above the 9th are ignored.
pub fn tail_windows(tail: u16) -> [i8; TAIL_WEIGHTS] {
    [6, 4, 2, 0].map(|shift| ((tail >> shift) & 7) as i8 - ZERO_POINT)
}

/// The 64 integer weights of a group's words, each in -4..=3.
pub fn weights(words: &[u16; WORDS]) -> [i8; GROUP] {
    let mut out = [0; GROUP];
    for (&word, out) in words.iter().zip(out.chunks_mut(WEIGHTS_PER_WORD)) {
        // The last chunk is a single weight, whose window stands where the others have their first.
        for (w, shift) in out.iter_mut().zip(SHIFTS) {
            *w = ((word >> shift) & 7) as i8 - ZERO_POINT;
        }
    }
    out
}

/// Decodes one channel: `words` (K/64 * 10) into `out` (K). Fails when K is not a positive multiple of 64 or
/// the lengths disagree.
pub fn decode_row(words: &[u16], super_scale: bf16, out: &mut [bf16]) -> Result<()> {
    if out.is_empty() || !out.len().is_multiple_of(GROUP) {
        let expected = format!("a positive multiple of {GROUP}");
        return Err(FormatError::Weight {
            what: "input columns of WINT2.5",
            expected,
            got: format!("{}", out.len()),
        });
    }
    expect_len("words of a row", out.len() / GROUP * WORDS, words.len())?;
    let (words, _) = words.as_chunks::<WORDS>();
    for (words, out) in words.iter().zip(out.chunks_exact_mut(GROUP)) {
        let scale = f32::from(words[CODE_WORDS] & MAX_LOCAL) * super_scale.to_f32();
        for (w, out) in weights(words).iter().zip(out) {
            *out = bf16::from_f32(f32::from(*w) * scale);
        }
    }
    Ok(())
}

/// Words from our order (N, K/64, 10) to FastDeploy's (K/64 * 10, N); `width` is K/64 * 10.
pub fn rows_to_fastdeploy(rows: &[u16], n: usize, width: usize) -> Result<Vec<u16>> {
    transposed(rows, n, width)
}

/// The reverse of [`rows_to_fastdeploy`].
pub fn fastdeploy_to_rows(words: &[u16], n: usize, width: usize) -> Result<Vec<u16>> {
    transposed(words, width, n)
}

fn transposed(from: &[u16], rows: usize, columns: usize) -> Result<Vec<u16>> {
    if rows.checked_mul(columns) != Some(from.len()) {
        let expected = format!("{rows} x {columns}");
        return Err(FormatError::Weight {
            what: "words of WINT2.5",
            expected,
            got: format!("{}", from.len()),
        });
    }
    Ok(transpose(from, rows, columns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_by_hand() {
        // v0 = 0b111, v1 = 0b100, v2 = 0b001: head 1110001? v0 and v1 share bit 13, v1 and v2 bit 11:
        // bits 15..9 = 1 1 1 0 0 0 1 -> v0 = 111, v1 = 100, v2 = 001.
        assert_eq!(head_windows(0b111_0001), [3, 0, -3]);
        // bits 8..0 = 0 1 0 1 1 0 0 1 1 -> v3 = 010, v4 = 011, v5 = 100, v6 = 011.
        assert_eq!(tail_windows(0b0_1011_0011), [-2, -1, 0, -1]);
        let group = Group {
            heads: [0b111_0001; 9],
            tails: [0b0_1011_0011; 9],
            last: 6,
            local: 4097,
        };
        let words = group.to_words();
        assert_eq!(words[..9], [0b1110_0010_1011_0011; 9]);
        assert_eq!(words[9], 0b1101_0000_0000_0001);
        let expected = [3, 0, -3, -2, -1, 0, -1];
        let weights = weights(&words);
        assert!(weights[..63].chunks_exact(7).all(|seven| seven == expected));
        assert_eq!(weights[63], 2);
    }

    #[test]
    fn words_and_parts_are_the_same_thing() {
        for word in 0..=u16::MAX {
            let words = [word; WORDS];
            let group = Group::from_words(&words);
            assert_eq!(group.to_words(), words);
            let [a, b, c] = head_windows(group.heads[0]);
            let [d, e, f, g] = tail_windows(group.tails[0]);
            assert_eq!(weights(&words)[..7], [a, b, c, d, e, f, g]);
        }
    }

    #[test]
    fn the_picture_is_the_shift_formula() {
        const PICTURE: [&str; WEIGHTS_PER_WORD] = [
            "000.............",
            "..111...........",
            "....222.........",
            ".......333......",
            ".........444....",
            "...........555..",
            ".............666",
        ];
        for word in 0..=u16::MAX {
            for (j, line) in PICTURE.iter().enumerate() {
                let bits = line.chars().zip((0..16).rev()).filter(|(c, _)| *c != '.');
                let drawn = bits.fold(0, |window, (_, bit)| (window << 1) | ((word >> bit) & 1));
                assert_eq!(drawn, (word >> SHIFTS[j]) & 7);
            }
        }
    }

    #[test]
    fn decode_of_two_groups_by_hand() {
        let one = Group {
            last: 7,
            local: 2,
            ..Group::default()
        };
        let two = Group {
            heads: [0x7F; 9],
            tails: [0x1FF; 9],
            last: 0,
            local: 0,
        };
        let words = [one.to_words(), two.to_words()].concat();
        let mut out = [bf16::NAN; 128];
        decode_row(&words, bf16::from_f32(0.25), &mut out).unwrap();
        assert!(out[..63].iter().all(|w| w.to_f32() == -2.0));
        assert_eq!(out[63].to_f32(), 1.5);
        assert!(out[64..].iter().all(|w| w.to_f32() == 0.0));
    }

    #[test]
    fn every_product_is_exact_in_f32() {
        let super_scale = bf16::from_bits(0x3BFF);
        for local in [1, 4095, 8191] {
            for w in -4..=3_i8 {
                let scale = f32::from(local as u16) * super_scale.to_f32();
                let product = f64::from(w) * f64::from(local) * f64::from(super_scale.to_f32());
                assert_eq!(f64::from(f32::from(w) * scale), product);
            }
        }
    }

    #[test]
    fn lengths_and_order() {
        let decode =
            |words: usize, k: usize| decode_row(&vec![0; words], bf16::ONE, &mut vec![bf16::ZERO; k]);
        assert!(decode(30, 192).is_ok());
        assert!(decode(0, 0).is_err() && decode(10, 32).is_err() && decode(29, 192).is_err());
        let rows: Vec<u16> = (0..60).collect(); // (3, 20)
        let there = rows_to_fastdeploy(&rows, 3, 20).unwrap();
        assert_eq!(there[..4], [0, 20, 40, 1]);
        assert_eq!(fastdeploy_to_rows(&there, 3, 20).unwrap(), rows);
        assert!(rows_to_fastdeploy(&there, 3, 21).is_err());
    }
}
