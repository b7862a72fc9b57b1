//! NF4 rows decoded: a table of the 16 levels times the scale, made once per group of 64 columns, and looked up by
//! code.

use std::sync::Arc;

use qtool_formats::scheme::nf4::{GROUP, LEVELS};

use super::simd::{LANES, Vector};
use super::weight::{QUAD, Row, Rows, words};
use crate::backend::Storage;

/// The parts of a weight.
pub(crate) struct Nf4 {
    /// (N, K/2), low nibble first.
    pub(crate) codes: Arc<dyn Storage>,
    /// (N, K/64)
    pub(crate) scales: Vec<f32>,
}

/// Its rows: the weight, its bytes, K.
#[derive(Clone, Copy)]
pub(crate) struct Nf4Rows<'a>(pub(crate) &'a Nf4, pub(crate) &'a [u8], pub(crate) usize);

/// The codes of a row, and its scales.
pub(crate) struct Nf4Row<'a>(&'a [u8], &'a [f32]);

impl<'a> Rows for Nf4Rows<'a> {
    type Row = Nf4Row<'a>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        let (bytes, groups) = (self.2 / 2, self.2 / GROUP);
        Nf4Row(
            &self.1[n * bytes..][..bytes],
            &self.0.scales[n * groups..][..groups],
        )
    }
}

impl Row for Nf4Row<'_> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        const { assert!(QUAD == GROUP && LEVELS.len() == LANES) };
        let values = v.mul(v.load(&LEVELS), v.splat(self.1[q]));
        let mut out = [values; 4];
        for (b, out) in out.iter_mut().enumerate() {
            let (words, shifts) = words::<4, FULL>(self.0, (4 * q + b) * 8);
            *out = v.lookup(words, &shifts, values);
        }
        out
    }
}
