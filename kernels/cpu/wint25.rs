//! WINT2.5 rows decoded: the ten words of a group of 64 columns taken apart one by one. It is no scheme of any server's,
//! so it has no vector path.

use std::sync::Arc;

use qtool_formats::packing::wint25::{CODE_WORDS, GROUP, MAX_LOCAL, WORDS, weights};

use super::simd::{LANES, Vector};
use super::weight::{QUAD, Row, Rows};
use crate::backend::Storage;

/// The parts of a weight.
pub(crate) struct Ccq25 {
    /// (N, K/64 * 10) little-endian words.
    pub(crate) words: Arc<dyn Storage>,
    /// (N)
    pub(crate) super_scales: Vec<f32>,
}

/// Its rows: the weight, its bytes, K.
#[derive(Clone, Copy)]
pub(crate) struct Ccq25Rows<'a>(pub(crate) &'a Ccq25, pub(crate) &'a [u8], pub(crate) usize);

/// The words of a row, and its super scale.
pub(crate) struct Ccq25Row<'a>(&'a [u8], f32);

impl<'a> Rows for Ccq25Rows<'a> {
    type Row = Ccq25Row<'a>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        let bytes = self.2 / GROUP * WORDS * 2;
        Ccq25Row(&self.1[n * bytes..][..bytes], self.0.super_scales[n])
    }
}

impl Row for Ccq25Row<'_> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        const { assert!(QUAD == GROUP) };
        let bytes = &self.0[q * WORDS * 2..][..WORDS * 2];
        let words = std::array::from_fn(|i| u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        let scale = f32::from(words[CODE_WORDS] & MAX_LOCAL) * self.1;
        let values = weights(&words).map(|w| f32::from(w) * scale);
        std::array::from_fn(|b| v.load(values[b * LANES..].first_chunk().expect("a whole group")))
    }
}
