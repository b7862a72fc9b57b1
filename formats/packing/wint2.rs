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
mod tests;
