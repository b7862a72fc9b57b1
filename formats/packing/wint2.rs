//! WINT2, the 2-bit convolutional code (CCQ) that PaddlePaddle FastDeploy serves for expert weights.
//! Owns: the meaning of a code byte, the packed 4-bit local scales, both serving arithmetics bit for
//! bit, and the two orders in which the bytes are kept. Does not own: which byte a weight gets (the
//! encoder's business) or tensor names and configuration files.
//!
//! # Bytes
//!
//! N output channels, K input columns, G = K / 64 groups.
//!
//! | tensor | type | ours | FastDeploy's | meaning |
//! |---|---|---|---|---|
//! | codes | u8 | (N, K/4) | (K/4, N) | one code byte per 4 consecutive k of one channel |
//! | locals | u8 | (N, ceil(G/2)) | (K/128, N) | two unsigned 4-bit local scales, even group in the **high** nibble |
//! | super scale | bf16 | (N) | (N) | per channel |
//! | code scale | f32 | (N) | (N) | per channel, slope of byte to code |
//! | code zero | f32 | (N) | (N) | per channel, offset of byte to code |
//!
//! With an odd G (only in our order) the low nibble of the last local byte is zero.
//!
//! # Picture and formula
//!
//! A byte stands for a 15-bit code; the four weights are 6-bit windows that overlap by 3 bits:
//!
//! ```text
//! bit 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
//!     [----- w0 -----]
//!              [----- w1 -----]
//!                       [----- w2 -----]
//!                                [----- w3 -----]
//! ```
//!
//! ```text
//! code   = floor(byte * code_scale + code_zp + 0.5)
//! w(k)   = ((code >> (9 - 3 * (k mod 4))) & 63) - 32
//! local  = (locals[k / 128] >> (4 if k / 64 is even else 0)) & 15
//! W(k)   = w(k) * local * super_scale
//! ```
//!
//! # Two arithmetics
//!
//! FastDeploy evaluates the formula in two ways that differ by at most one bf16 step, see [`Arithmetic`].
//! Sources: `custom_ops/gpu_ops/moe/winx_unzip.cu`,
//! `custom_ops/gpu_ops/cutlass_extensions/gemm/threadblock/wint2x_unzip.h` and
//! `.../warp/mma_tensorop_wint2x_dequantizer.h` in <https://github.com/PaddlePaddle/FastDeploy>.
//!
//! # Oddities
//!
//! * the zero point of every weight is the constant [`ZERO_POINT`], so a window spans -32..=31, not
//!   symmetric, and there is no zero point per group;
//! * the even group is the high nibble ([`EVEN_GROUP_SHIFT`]);
//! * a code outside 0..=[`MAX_CODE`] wraps: only its low 15 bits are looked at. Both arithmetics here do so,
//!   FastDeploy's unused third path (Triton, 16-bit codes) need not.

use half::bf16;

use crate::{FormatError, Result};

/// Weights per local scale, along K.
pub const GROUP: usize = 64;
/// Weights per code byte, along K.
pub const VECTOR: usize = 4;
/// Code bytes per local scale.
pub const VECTORS_PER_GROUP: usize = GROUP / VECTOR;
/// Number of distinct code bytes.
pub const CODEWORDS: usize = 256;
/// How far a code is shifted right to bring window `k mod 4` to the lowest bits.
pub const SHIFTS: [u32; VECTOR] = [9, 6, 3, 0];
/// Mask of one window after the shift.
pub const WINDOW_MASK: i32 = 0x3F;
/// Subtracted from every window.
pub const ZERO_POINT: i32 = 32;
/// Largest code of 15 bits.
pub const MAX_CODE: i32 = 0x7FFF;
/// Largest local scale; zero is allowed and makes the whole group zero.
pub const MAX_LOCAL: u8 = 15;
/// Where the local scale of an even group lies in its byte; an odd group lies at 0.
pub const EVEN_GROUP_SHIFT: u32 = 4;
/// FastDeploy keeps two groups in each byte of a (K/128, N) tensor, so it cannot take other widths.
pub const FASTDEPLOY_K_MULTIPLE: usize = 128;
/// FastDeploy's unzip kernel works in tiles of 256 channels and checks no bounds.
pub const FASTDEPLOY_N_MULTIPLE: usize = 256;

/// The three numbers of an output channel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Channel {
    /// Multiplies every `w * local` of the channel.
    pub super_scale: bf16,
    /// Slope of byte to code.
    pub code_scale: f32,
    /// Offset of byte to code.
    pub code_zp: f32,
}

/// Which of FastDeploy's two ways of computing is reproduced.
///
/// They agree in every bit when `local * super_scale` is exact in bf16 for the locals in use (a
/// `super_scale` of at most 4 significant bits guarantees it) and when code scale and zero are integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Path (a), the `winx_unzip` operator: code by f32 multiply, add, add 0.5; `w * (local * super)`
    /// in f32 (exact), one rounding to bf16.
    Unzip,
    /// Path (b), the expert matrix product used in serving: code by `fma(byte, scale, zp + 0.5)`;
    /// `local * super` rounded to bf16, then `w *` that rounded to bf16 again.
    Gemm,
}

impl Arithmetic {
    /// The code of `byte` before wrapping. Not-a-number gives 0, values outside i32 saturate.
    pub fn code(self, byte: u8, code_scale: f32, code_zp: f32) -> i32 {
        let byte = f32::from(byte);
        let value = match self {
            Self::Unzip => byte * code_scale + code_zp + 0.5,
            Self::Gemm => byte.mul_add(code_scale, code_zp + 0.5),
        };
        value.floor() as i32
    }

    /// The scale that multiplies the integer weights of a group, in f32 (rounded to bf16 first on path (b)).
    pub fn group_scale(self, local: u8, super_scale: bf16) -> f32 {
        let exact = f32::from(local) * super_scale.to_f32();
        match self {
            Self::Unzip => exact,
            Self::Gemm => bf16::from_f32(exact).to_f32(),
        }
    }
}

/// Fails with `what` unless `got` items are the `expected` ones.
pub(super) fn expect_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(FormatError::Weight {
        what,
        expected: format!("{expected} items"),
        got: format!("{got}"),
    })
}

/// The four integer weights of a code, each in -32..=31; bits above the 15th are ignored.
pub fn windows(code: i32) -> [i8; VECTOR] {
    SHIFTS.map(|shift| (((code >> shift) & WINDOW_MASK) - ZERO_POINT) as i8)
}

/// The four integer weights of each of the 256 bytes of a channel.
pub fn codebook(code_scale: f32, code_zp: f32, arithmetic: Arithmetic) -> [[i8; VECTOR]; CODEWORDS] {
    let mut book = [[0; VECTOR]; CODEWORDS];
    for (byte, entry) in (0..=u8::MAX).zip(&mut book) {
        *entry = windows(arithmetic.code(byte, code_scale, code_zp));
    }
    book
}

/// Groups in a row of `k` weights. Fails unless `k` is a positive multiple of 64.
pub fn groups(k: usize) -> Result<usize> {
    if k == 0 || !k.is_multiple_of(GROUP) {
        let expected = format!("a positive multiple of {GROUP}");
        return Err(FormatError::Weight {
            what: "input columns of WINT2",
            expected,
            got: format!("{k}"),
        });
    }
    Ok(k / GROUP)
}

/// Bytes of packed local scales in a row of `groups` groups.
pub fn local_bytes(groups: usize) -> usize {
    groups.div_ceil(2)
}

/// The local scale of group `g` out of the packed bytes of its row; zero past the end.
pub fn local_of(packed: &[u8], g: usize) -> u8 {
    let shift = if g.is_multiple_of(2) { EVEN_GROUP_SHIFT } else { 0 };
    packed.get(g / 2).map_or(0, |byte| (byte >> shift) & MAX_LOCAL)
}

/// Packs the local scales of one row, two to a byte; the high nibble is the even group. Values above 15
/// are an error, an odd count leaves the last low nibble zero.
pub fn pack_locals(locals: &[u8]) -> Result<Vec<u8>> {
    if let Some(large) = locals.iter().find(|&&local| local > MAX_LOCAL) {
        let expected = format!("0 to {MAX_LOCAL}");
        return Err(FormatError::Weight {
            what: "local scale",
            expected,
            got: format!("{large}"),
        });
    }
    let pair = |pair: &[u8]| match *pair {
        [even, odd] => (even << EVEN_GROUP_SHIFT) | odd,
        [even] => even << EVEN_GROUP_SHIFT,
        _ => 0,
    };
    Ok(locals.chunks(2).map(pair).collect())
}

/// The reverse of [`pack_locals`] for a row of `groups` groups.
pub fn unpack_locals(packed: &[u8], groups: usize) -> Result<Vec<u8>> {
    expect_len("packed local scales", local_bytes(groups), packed.len())?;
    Ok((0..groups).map(|g| local_of(packed, g)).collect())
}

/// Decodes one channel: `codes` (K/4), packed `locals` (ceil(K/64/2)) into `out` (K), every value exactly
/// as FastDeploy computes it. Fails when K is not a positive multiple of 64 or the lengths disagree.
pub fn decode_row(
    codes: &[u8],
    locals: &[u8],
    channel: Channel,
    arithmetic: Arithmetic,
    out: &mut [bf16],
) -> Result<()> {
    let groups = groups(out.len())?;
    expect_len("code bytes of a row", out.len() / VECTOR, codes.len())?;
    expect_len("packed local scales", local_bytes(groups), locals.len())?;
    let book = codebook(channel.code_scale, channel.code_zp, arithmetic);
    let grouped = codes
        .chunks_exact(VECTORS_PER_GROUP)
        .zip(out.chunks_exact_mut(GROUP));
    for (g, (codes, out)) in grouped.enumerate() {
        let scale = arithmetic.group_scale(local_of(locals, g), channel.super_scale);
        for (&code, out) in codes.iter().zip(out.chunks_exact_mut(VECTOR)) {
            let Some(word) = book.get(usize::from(code)) else {
                continue;
            };
            for (&w, out) in word.iter().zip(out) {
                *out = bf16::from_f32(f32::from(w) * scale);
            }
        }
    }
    Ok(())
}

/// Why FastDeploy cannot take a weight of `n` channels and `k` columns as WINT2, in words; `None` when it can.
pub fn fastdeploy_refusal(n: usize, k: usize) -> Option<String> {
    if k == 0 || !k.is_multiple_of(FASTDEPLOY_K_MULTIPLE) {
        let m = FASTDEPLOY_K_MULTIPLE;
        return Some(format!(
            "FastDeploy packs two groups of {GROUP} to a byte, so K must be a positive multiple of {m}, got {k}"
        ));
    }
    if n == 0 || !n.is_multiple_of(FASTDEPLOY_N_MULTIPLE) {
        let m = FASTDEPLOY_N_MULTIPLE;
        return Some(format!(
            "FastDeploy unzips tiles of {m} output channels without checking bounds, so N must be a positive multiple of {m}, got {n}"
        ));
    }
    None
}

/// Codes or locals from our order (N rows of `width` bytes) to FastDeploy's (`width` rows of N bytes).
///
/// Codes have `width` = K/4. Locals have `width` = K/128: their nibbles stay as they are, which is why
/// K % 128 must be 0. Fails when `rows` is not n * width long.
pub fn rows_to_fastdeploy(rows: &[u8], n: usize, width: usize) -> Result<Vec<u8>> {
    expect_product("bytes in row order", n, width, rows.len())?;
    Ok(transpose(rows, n, width))
}

/// The reverse of [`rows_to_fastdeploy`]: `bytes` (width, N) to (N, width).
pub fn fastdeploy_to_rows(bytes: &[u8], n: usize, width: usize) -> Result<Vec<u8>> {
    expect_product("bytes in FastDeploy's order", n, width, bytes.len())?;
    Ok(transpose(bytes, width, n))
}

fn expect_product(what: &'static str, n: usize, width: usize, got: usize) -> Result<()> {
    if n.checked_mul(width) == Some(got) {
        return Ok(());
    }
    Err(FormatError::Weight {
        what,
        expected: format!("{n} x {width}"),
        got: format!("{got}"),
    })
}

/// (rows, columns) to (columns, rows), in bands of rows so that both sides stay in cache.
pub(super) fn transpose<T: Copy + Default>(from: &[T], rows: usize, columns: usize) -> Vec<T> {
    const BAND: usize = 64;
    let mut to = vec![T::default(); from.len()];
    if rows == 0 || columns == 0 {
        return to;
    }
    for (band, lines) in from.chunks(BAND * columns).enumerate() {
        for (column, out) in to.chunks_exact_mut(rows).enumerate() {
            let out = out.iter_mut().skip(band * BAND);
            for (to, from) in out.zip(lines.iter().skip(column).step_by(columns)) {
                *to = *from;
            }
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    /// The picture of the file's head, one character per bit, bit 14 first.
    const PICTURE: [&str; VECTOR] = [
        "000000.........",
        "...111111......",
        "......222222...",
        ".........333333",
    ];

    #[test]
    fn windows_of_a_code_by_hand() {
        // 0b000_000_000_000_000: every window 0, minus 32.
        assert_eq!(windows(0), [-32; 4]);
        // 0b100_000_000_000_000: only the highest bit of w0.
        assert_eq!(windows(0x4000), [0, -32, -32, -32]);
        // 0b000_001_000_000_000: lowest of w0 (1) and bit 3 of w1 (8).
        assert_eq!(windows(0x0200), [-31, -24, -32, -32]);
        assert_eq!(windows(MAX_CODE), [31; 4]);
    }

    #[test]
    fn the_picture_is_the_shift_formula() {
        for code in 0..=MAX_CODE {
            let drawn = PICTURE.map(|line| {
                let bits = line.chars().zip((0..15).rev()).filter(|(c, _)| *c != '.');
                bits.fold(0, |window, (_, bit)| (window << 1) | ((code >> bit) & 1)) - ZERO_POINT
            });
            assert_eq!(drawn, windows(code).map(i32::from));
        }
    }

    #[test]
    fn codes_past_fifteen_bits_wrap() {
        for code in [0x8000, 0x1_2345, -1, -32768, i32::MAX, i32::MIN] {
            assert_eq!(windows(code), windows(code & MAX_CODE));
        }
    }

    #[test]
    fn code_of_a_byte_by_hand() {
        for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
            assert_eq!(path.code(11, 128.0, 0.0), 1408);
            assert_eq!(path.code(11, 120.0, 604.0), 1924);
            assert_eq!(path.code(11, 128.5, 0.0), 1414); // 1413.5 + 0.5, floor
            assert_eq!(path.code(1, -0.75, 0.0), -1); // -0.25, floor
            assert_eq!(path.code(1, f32::NAN, 0.0), 0);
        }
    }

    #[test]
    fn locals_pack_the_even_group_high() {
        assert_eq!(pack_locals(&[9, 3]).unwrap(), [0x93]);
        assert_eq!(pack_locals(&[9, 3, 15]).unwrap(), [0x93, 0xF0]);
        assert!(pack_locals(&[]).unwrap().is_empty());
        assert_eq!(unpack_locals(&[0x93, 0xF0], 3).unwrap(), [9, 3, 15]);
        assert!(pack_locals(&[16]).is_err());
        assert!(unpack_locals(&[0x93], 3).is_err());
    }

    #[test]
    fn decode_of_one_group_by_hand() {
        // code 0x4000 for every byte: weights 0, -32, -32, -32, local 2, super 0.5.
        let channel = Channel {
            super_scale: bf16::from_f32(0.5),
            code_scale: 0.0,
            code_zp: 16384.0,
        };
        for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
            let mut out = [bf16::NAN; 64];
            decode_row(&[7; 16], &[0x20], channel, path, &mut out).unwrap();
            for four in out.chunks_exact(4) {
                assert_eq!([0.0, -32.0, -32.0, -32.0], [0, 1, 2, 3].map(|i| four[i].to_f32()));
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let channel = Channel {
            super_scale: bf16::ONE,
            code_scale: 1.0,
            code_zp: 0.0,
        };
        let decode = |codes: usize, locals: usize, k: usize| {
            let (codes, locals) = (vec![0; codes], vec![0; locals]);
            decode_row(
                &codes,
                &locals,
                channel,
                Arithmetic::Unzip,
                &mut vec![bf16::ZERO; k],
            )
        };
        assert!(decode(48, 2, 192).is_ok());
        for (codes, locals, k) in [(0, 0, 0), (24, 1, 96), (47, 2, 192), (48, 1, 192), (48, 3, 192)] {
            assert!(decode(codes, locals, k).is_err(), "{codes} {locals} {k}");
        }
    }

    #[test]
    fn relayout_is_a_transpose_and_its_own_way_back() {
        let rows = [1, 2, 3, 4, 5, 6]; // (2, 3)
        assert_eq!(rows_to_fastdeploy(&rows, 2, 3).unwrap(), [1, 4, 2, 5, 3, 6]);
        let long: Vec<u8> = (0..130 * 67).map(|i| (i % 251) as u8).collect();
        let there = rows_to_fastdeploy(&long, 130, 67).unwrap();
        assert_eq!(there[66 * 130 + 129], long[129 * 67 + 66]);
        assert_eq!(fastdeploy_to_rows(&there, 130, 67).unwrap(), long);
        assert!(rows_to_fastdeploy(&rows, 2, 4).is_err());
        assert!(fastdeploy_to_rows(&rows, usize::MAX, 3).is_err());
    }

    #[test]
    fn fastdeploy_refuses_with_a_reason() {
        assert_eq!(fastdeploy_refusal(256, 1536), None);
        assert!(fastdeploy_refusal(256, 192).unwrap().contains("128"));
        assert!(fastdeploy_refusal(8, 128).unwrap().contains("256"));
        assert!(fastdeploy_refusal(0, 128).is_some() && fastdeploy_refusal(256, 0).is_some());
    }

    /// A known-answer vector: K = 128, N = 8, bytes by formula, in FastDeploy's order.
    struct Vector {
        channel: fn(u16) -> Channel,
        unzip: &'static str,
        gemm: &'static str,
    }

    const V1: Vector = Vector {
        channel: |n| Channel {
            super_scale: bf16::from_bits(0x3B00 + 16 * n),
            code_scale: 128.0 - f32::from(n),
            code_zp: 3.0 * f32::from(n),
        },
        unzip: "cd92eebca2eab935e9b22505d15b2d0f44ebdbb869d60dd9e3dd2d650447cde8",
        gemm: "cd92eebca2eab935e9b22505d15b2d0f44ebdbb869d60dd9e3dd2d650447cde8",
    };
    const V2: Vector = Vector {
        channel: |n| Channel {
            super_scale: bf16::from_bits(0x3B00 + 16 * n),
            code_scale: 128.5 - 0.25 * f32::from(n),
            code_zp: 0.25 * f32::from(n),
        },
        unzip: "95654c7fca7846d3482712f321c40d63666f0efe612ae28cb595911a307b7742",
        gemm: "95654c7fca7846d3482712f321c40d63666f0efe612ae28cb595911a307b7742",
    };
    const V3: Vector = Vector {
        channel: |n| Channel {
            super_scale: bf16::from_bits(0x3B01 + 15 * n),
            code_scale: 120.0,
            code_zp: 604.0 + f32::from(n),
        },
        unzip: "96e7e6135cf7eac562c8f78fcad912eb3079ae31062a1342cf6149dfd03b7f08",
        gemm: "32e8c262dd0e37d7ffb633cb6ef2fdcaa34139dba2ef7b48b6f58dabb85bbbb9",
    };

    fn sha256(bytes: impl AsRef<[u8]>) -> String {
        Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// The decoded vector as (128, 8) bf16 bits, FastDeploy's orientation.
    fn decoded(vector: &Vector, arithmetic: Arithmetic) -> Vec<u16> {
        let (k, n) = (128, 8);
        let on_disk: Vec<u8> = (0..k / 4)
            .flat_map(|r| (0..n).map(move |n| ((37 * r + 101 * n + 11) % 256) as u8))
            .collect();
        assert_eq!(
            sha256(&on_disk),
            "af458cdaee5b3441dc1a93a7aa38ac6b75c4079d871db81a7acbf577b51d96e1"
        );
        let codes = fastdeploy_to_rows(&on_disk, n, k / 4).unwrap();
        let mut bits = vec![0; k * n];
        for column in 0..n {
            let locals = [((29 * column + 147) % 256) as u8];
            let mut out = vec![bf16::ZERO; k];
            let codes = &codes[column * k / 4..(column + 1) * k / 4];
            decode_row(
                codes,
                &locals,
                (vector.channel)(column as u16),
                arithmetic,
                &mut out,
            )
            .unwrap();
            for (row, value) in out.iter().enumerate() {
                bits[row * n + column] = value.to_bits();
            }
        }
        bits
    }

    #[test]
    fn known_answers_on_both_paths() {
        for vector in [V1, V2, V3] {
            for (arithmetic, answer) in [(Arithmetic::Unzip, vector.unzip), (Arithmetic::Gemm, vector.gemm)] {
                let bytes: Vec<u8> = decoded(&vector, arithmetic)
                    .iter()
                    .flat_map(|b| b.to_le_bytes())
                    .collect();
                assert_eq!(sha256(&bytes), answer);
            }
        }
    }

    #[test]
    fn known_answers_readable() {
        let bytes = [11, 112, 213, 58, 159, 4, 105, 206];
        let codes = |vector: Vector, arithmetic: Arithmetic| {
            [0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| {
                let channel = (vector.channel)(n as u16);
                arithmetic.code(bytes[n], channel.code_scale, channel.code_zp)
            })
        };
        for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
            assert_eq!(
                codes(V1, path),
                [1408, 14227, 26844, 7259, 19728, 507, 12828, 24947]
            );
            assert_eq!(
                codes(V2, path),
                [1414, 14364, 27265, 7410, 20274, 510, 13337, 26112]
            );
            assert_eq!(
                codes(V3, path),
                [1924, 14045, 26166, 7567, 19688, 1089, 13210, 25331]
            );
            let v1 = decoded(&V1, path);
            let value = |k: usize| bf16::from_bits(v1[k * 8]).to_f32();
            assert_eq!(
                [0, 1, 2, 3].map(value),
                [-0.527_343_75, -0.175_781_25, 0.281_25, -0.562_5]
            );
            assert_eq!(
                [64, 65, 66, 67].map(value),
                [-0.058_593_75, 0.128_906_25, 0.093_75, -0.187_5]
            );
        }
        assert_eq!(windows(1408), [-30, -10, 16, -32]);
        let (a, b) = (decoded(&V3, Arithmetic::Unzip), decoded(&V3, Arithmetic::Gemm));
        assert_eq!((a[0], b[0]), (0xBF04, 0xBF03));
        assert_eq!(a.iter().zip(&b).filter(|(a, b)| a != b).count(), 157);
        assert!(a.iter().zip(&b).all(|(a, b)| a.abs_diff(*b) <= 1));
    }

    #[test]
    fn the_closed_formula_is_the_loop() {
        let (k, channel) = (
            192,
            Channel {
                super_scale: bf16::from_f32(0.0075),
                code_scale: 113.0,
                code_zp: 421.0,
            },
        );
        let codes: Vec<u8> = (0..k / 4).map(|i| (i * 91 + 5) as u8).collect();
        let locals = pack_locals(&[3, 14, 7]).unwrap();
        let mut out = vec![bf16::ZERO; k];
        decode_row(&codes, &locals, channel, Arithmetic::Unzip, &mut out).unwrap();
        for (i, value) in out.iter().enumerate() {
            let code = i32::from(codes[i / 4]) * 113 + 421;
            let w = ((code >> (9 - 3 * (i % 4))) & 63) - 32;
            let local = (locals[i / 128] >> (if (i / 64) % 2 == 0 { 4 } else { 0 })) & 15;
            let exact = w as f32 * f32::from(local) * channel.super_scale.to_f32();
            assert_eq!(*value, bf16::from_f32(exact));
        }
    }
}
