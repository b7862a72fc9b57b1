//! The encoder of WINT2 (CCQ): which byte each four weights get, which 4-bit scale each 64, and which three
//! numbers each output channel. Owns the decision; the layout and the meaning of the numbers are
//! [`qtool_formats::packing::wint2`], the exhaustive search is [`qtool_kernels::nearest_codewords`].
//!
//! # Objective
//!
//! For one output channel with weights x (K) and importance v (K, all one when not given):
//!
//! ```text
//! sum over k of v_k (x_k - W_k)^2,   W_k = window(code of byte, k mod 4) * local * super_scale
//! ```
//!
//! # Method
//!
//! 1. Scale the row by a power of two; for each group find the best real-valued scale under one typical
//!    codebook (`ccq/row.rs`, `ccq/scales.rs`).
//! 2. Race a list of good (code scale, code zero) pairs against each other on growing parts of the channel
//!    (`ccq/race.rs`, list in `ccq/pairs.rs`).
//! 3. For the winner (or the few best) choose the super scale and the local scales together, then alternate:
//!    codes for given scales by exhaustive search, super scale for given codes by least squares, until the
//!    error falls no further (`ccq/scales.rs`).
//!
//! All of it is deterministic and equal on every instruction set: sums run in a fixed order in f64, and the
//! search is in integers.
//!
//! # Corners
//!
//! An all-zero group gets local scale 0 and so decodes to zeros; so does a group too small to be worth a
//! scale step. An all-zero row has super scale 1. Rows whose values are so large that a decoded weight could
//! overflow are clipped at about 1.6e38; rows below bf16's smallest numbers decode to zero.

mod device;
mod feedback;
mod pairs;
pub(crate) mod quantizer;
mod race;
mod row;
mod scales;
#[cfg(test)]
mod tests;

use half::bf16;
use qtool_formats::packing::wint2::{self, Arithmetic, CODEWORDS, Channel, GROUP, VECTOR};
use qtool_kernels::{Codewords, Isa};
use thiserror::Error;

pub use quantizer::METHOD;
use row::Row;

/// How long to look for good pairs and scales. Each step costs a few times the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Effort {
    /// A few pairs, judged on a part of the channel.
    Fast,
    /// A few hundred pairs, the last of them on the whole channel.
    #[default]
    Default,
    /// The whole list, several finalists fitted completely, and a walk around the best of them.
    Best,
}

impl Effort {
    /// Every level, quickest first.
    pub const ALL: [Self; 3] = [Self::Fast, Self::Default, Self::Best];

    /// Its name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Default => "default",
            Self::Best => "best",
        }
    }
}

impl std::fmt::Display for Effort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// One encoded output channel.
#[derive(Debug, Clone, PartialEq)]
pub struct CcqRow {
    /// A byte per four weights, (K/4).
    pub code_bytes: Vec<u8>,
    /// A local scale per 64 weights, each 0..=15, not packed, (K/64).
    pub local: Vec<u8>,
    /// Scale of the channel: finite, above zero.
    pub super_scale: bf16,
    /// Slope of byte to code, an integer.
    pub code_scale: f32,
    /// Offset of byte to code, an integer.
    pub code_zp: f32,
}

impl CcqRow {
    /// The three numbers of the channel, as the codec takes them.
    pub fn channel(&self) -> Channel {
        Channel {
            super_scale: self.super_scale,
            code_scale: self.code_scale,
            code_zp: self.code_zp,
        }
    }
}

/// Why a row cannot be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CcqError {
    /// K is no positive multiple of 64.
    #[error("WINT2 needs a positive multiple of 64 input columns, got {got}")]
    Columns {
        /// K.
        got: usize,
    },
    /// Importance for another number of columns.
    #[error("importance: expected {expected} values, got {got}")]
    ImportanceLength {
        /// K.
        expected: usize,
        /// Values given.
        got: usize,
    },
    /// A weight that is infinite or not a number.
    #[error("the weight in column {column} is not finite")]
    NotFinite {
        /// The first such column.
        column: usize,
    },
    /// An importance that is negative, infinite or not a number.
    #[error("the importance of column {column} is not a finite number of at least zero")]
    Importance {
        /// The first such column.
        column: usize,
    },
}

/// Working memory of [`encode_row`], to be reused from row to row; one per thread. Its contents never
/// influence a result.
#[derive(Debug, Default)]
pub struct Scratch {
    row: Row,
    race: race::Race,
    fit: scales::Fit,
}

/// A pair with its codebook, ready for the search.
#[derive(Debug, Clone)]
struct Book {
    pair: (u16, u16),
    windows: [[i8; VECTOR]; CODEWORDS],
    words: Codewords,
}

impl Book {
    fn new(pair: (u16, u16)) -> Self {
        let windows = wint2::codebook(f32::from(pair.0), f32::from(pair.1), Arithmetic::Gemm);
        Self {
            pair,
            windows,
            words: Codewords::new(&windows),
        }
    }
}

/// Encodes one output channel `x` (K). `weights` (K) says how much an error in each column counts; without it
/// all count the same, as they do when all are zero. A column with importance zero counts a millionth of the
/// mean.
///
/// The result depends only on `x`, `weights` and `effort`, not on `isa` or what `scratch` held.
///
/// # Errors
///
/// When K is not a positive multiple of 64, lengths disagree, or a number is not finite.
pub fn encode_row(
    x: &[f32],
    weights: Option<&[f32]>,
    effort: Effort,
    isa: Isa,
    scratch: &mut Scratch,
) -> Result<CcqRow, CcqError> {
    let best = fitted_row(x, weights, effort, isa, scratch)?;
    Ok(best.map_or_else(|| zero_row(x.len()), |best| finish(&scratch.row, &best)))
}

/// The best encoding of a row, in its units; `None` for a row of zeros, and for one that nothing stored comes near.
fn fitted_row(
    x: &[f32],
    weights: Option<&[f32]>,
    effort: Effort,
    isa: Isa,
    scratch: &mut Scratch,
) -> Result<Option<scales::Fitted>, CcqError> {
    check(x, weights)?;
    let Scratch { row, race, fit } = scratch;
    fit.asked = 0.0;
    if !row.load(x, weights) {
        return Ok(None);
    }
    let plan = race::Plan::of(effort);
    row.guess_group_scales();
    if effort != Effort::Fast {
        row.find_group_scales(isa, race::typical());
    }
    let finalists = race.run(row, isa, plan);
    let mut best: Option<scales::Fitted> = None;
    for book in finalists {
        let fitted = fit.run(row, isa, book, plan);
        if best.as_ref().is_none_or(|best| fitted.error < best.error) {
            best = Some(fitted);
        }
    }
    Ok(best.filter(|best| best.super_scale > 0.0))
}

pub(crate) fn check(x: &[f32], weights: Option<&[f32]>) -> Result<(), CcqError> {
    if x.is_empty() || !x.len().is_multiple_of(GROUP) {
        return Err(CcqError::Columns { got: x.len() });
    }
    if let Some(column) = x.iter().position(|x| !x.is_finite()) {
        return Err(CcqError::NotFinite { column });
    }
    let Some(weights) = weights else { return Ok(()) };
    if weights.len() != x.len() {
        return Err(CcqError::ImportanceLength {
            expected: x.len(),
            got: weights.len(),
        });
    }
    match weights.iter().position(|w| !(w.is_finite() && *w >= 0.0)) {
        Some(column) => Err(CcqError::Importance { column }),
        None => Ok(()),
    }
}

/// The encoding of a channel of zeros.
fn zero_row(k: usize) -> CcqRow {
    let (code_scale, code_zp) = pairs::PAIRS[0];
    CcqRow {
        code_bytes: vec![0; k / VECTOR],
        local: vec![0; k / GROUP],
        super_scale: bf16::ONE,
        code_scale: f32::from(code_scale),
        code_zp: f32::from(code_zp),
    }
}

/// Brings the groups back into their order along K and the super scale back to the row's size.
fn finish(row: &Row, fitted: &scales::Fitted) -> CcqRow {
    let mut out = zero_row(row.groups() * GROUP);
    out.super_scale = row.stored_scale(fitted.super_scale);
    (out.code_scale, out.code_zp) = (f32::from(fitted.pair.0), f32::from(fitted.pair.1));
    let groups = fitted
        .codes
        .chunks_exact(wint2::VECTORS_PER_GROUP)
        .zip(&fitted.local);
    for ((codes, &local), &g) in groups.zip(row.order()) {
        out.local[g] = local;
        if local > 0 {
            out.code_bytes[g * codes.len()..][..codes.len()].copy_from_slice(codes);
        }
    }
    out
}

/// Decodes one output channel into `out` (K) with the arithmetic used in serving.
///
/// # Errors
///
/// When the lengths disagree.
pub fn decode_row(row: &CcqRow, arithmetic: Arithmetic, out: &mut [bf16]) -> qtool_formats::Result<()> {
    wint2::decode_row(
        &row.code_bytes,
        &wint2::pack_locals(&row.local)?,
        row.channel(),
        arithmetic,
        out,
    )
}
