//! Rows of GGML's K types decoded: for each group a table of its values by code, `scale * code - min`, made once and looked
//! up. Scales and minima of groups are multiplied with their super-block's numbers when the weight is taken over.

use std::sync::Arc;

use qtool_formats::FloatDtype;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::scheme::kquant::{KQuant, SUPER_BLOCK};

use super::simd::{LANES, Vector};
use super::weight::{Row, Rows, STEPS, words};
use crate::backend::Storage;

/// A weight.
pub(crate) struct K {
    pub(crate) kind: KQuant,
    codes: Arc<dyn Storage>,
    /// (N, G), of each a scale and a minimum.
    groups: Vec<[f32; 2]>,
}

impl K {
    /// Takes over the parts of a weight whose rows have `k` columns, which fit their scheme.
    pub(crate) fn new(kind: KQuant, k: usize, parts: &[Arc<dyn Storage>]) -> Self {
        let per_row = k / kind.group();
        let local = |part: &Arc<dyn Storage>| {
            let mut out = Vec::new();
            let unpacked = LSB_ROWS.unpack(kind.scale_bits(), per_row, part.bytes(), &mut out);
            unpacked.expect("parts that fit their scheme");
            out
        };
        let super_of = |part: &Arc<dyn Storage>| FloatDtype::F16.widen(part.bytes());
        let (scales, mins) = (local(&parts[1]), local(&parts[2]));
        let (super_scales, super_mins) = (super_of(&parts[3]), super_of(&parts[4]));
        let per_block = SUPER_BLOCK / kind.group();
        let group = |(i, (scale, min)): (usize, (&u8, &u8))| {
            let block = i / per_block;
            [
                super_scales[block] * f32::from(*scale),
                super_mins[block] * f32::from(*min),
            ]
        };
        Self {
            kind,
            codes: Arc::clone(&parts[0]),
            groups: scales.iter().zip(&mins).enumerate().map(group).collect(),
        }
    }

    /// Its codes as they lie.
    pub(crate) fn codes(&self) -> &[u8] {
        self.codes.bytes()
    }
}

/// Its rows, with codes of BITS bits: the weight, its bytes, K.
#[derive(Clone, Copy)]
pub(crate) struct KRows<'a, const BITS: usize>(pub(crate) &'a K, pub(crate) &'a [u8], pub(crate) usize);

/// The codes of a row, and scale and minimum of each of its groups.
pub(crate) struct KRow<'a, const BITS: usize>(&'a [u8], &'a [[f32; 2]]);

impl<'a, const BITS: usize> Rows for KRows<'a, BITS> {
    type Row = KRow<'a, BITS>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        let (bytes, groups) = (self.2 * BITS / 8, self.2 / self.0.kind.group());
        KRow(
            &self.1[n * bytes..][..bytes],
            &self.0.groups[n * groups..][..groups],
        )
    }
}

impl<const BITS: usize> Row for KRow<'_, BITS> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        // Groups of 32 at four bits, of 16 at two.
        let per_group = if BITS == 4 { 2 } else { 1 };
        let period = (1 << BITS) as f32;
        let steps: [f32; LANES] = std::array::from_fn(|i| STEPS[i] % period);
        let table = |block: usize| {
            let [scale, min] = self.1[block / per_group];
            v.sub(v.mul(v.splat(scale), v.load(&steps)), v.splat(min))
        };
        let mut values = table(4 * q);
        let mut out = [values; 4];
        for (b, out) in out.iter_mut().enumerate() {
            if b > 0 && b % per_group == 0 {
                values = table(4 * q + b);
            }
            let (words, shifts) = words::<BITS, FULL>(self.0, (4 * q + b) * 2 * BITS);
            *out = v.lookup(words, &shifts, values);
        }
        out
    }
}
