//! How far decoded weights are from the originals. Owns the error sums of a row and the figures derived from
//! them; sums of rows are merged by the caller, in an order of its own choice.
//!
//! ```text
//! w'[k] = (code[k] - zero) * scale            zero and scale of group k / group
//! e[k]  = x[k] - w'[k]
//! ```
//!
//! The difference of code and zero is exact (integers), the product rounds once in f32, e rounds once. The
//! terms x^2, e^2 and x * e are formed in f32, 16 lanes of them are added for 256 elements at a time, summed in
//! the fixed tree, and that sum is added to an f64.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// Elements between two transfers to the f64 sums.
const SEGMENT: usize = 256;

/// Error sums of any number of elements. The default is the sum of none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ErrorSums {
    /// How many elements were added.
    pub n: u64,
    /// Sum of x^2.
    pub sum_x2: f64,
    /// Sum of e^2.
    pub sum_e2: f64,
    /// Sum of x * e.
    pub sum_xe: f64,
    /// Largest |e|, compared as bit patterns; NaN if some e is NaN.
    pub max_abs_e: f32,
}

impl ErrorSums {
    /// Adds the sums of other elements. Addition in f64 depends on order: merge in a fixed one.
    pub fn merge(&mut self, other: &ErrorSums) {
        self.n += other.n;
        self.sum_x2 += other.sum_x2;
        self.sum_e2 += other.sum_e2;
        self.sum_xe += other.sum_xe;
        let largest = self.max_abs_e.to_bits().max(other.max_abs_e.to_bits());
        self.max_abs_e = f32::from_bits(largest);
    }

    /// Sum of e^2 over sum of x^2. If all x are 0: 0 without error, else infinity.
    pub fn relative_mse(&self) -> f64 {
        if self.sum_e2 == 0.0 {
            0.0
        } else {
            self.sum_e2 / self.sum_x2
        }
    }

    /// Signal to quantization noise in decibels, `-10 log10(relative_mse)`: infinity without error,
    /// -infinity for noise without signal.
    pub fn sqnr_db(&self) -> f64 {
        -10.0 * self.relative_mse().log10()
    }

    /// Cosine of the angle between x and w', from `x . w' = x^2 - xe` and `w'^2 = x^2 - 2 xe + e^2`.
    ///
    /// Both all zero: 1; one of them: 0. Kept within -1..=1. The sums carry a relative error of about 1e-6 in
    /// the worst case, and so does this figure.
    pub fn cosine(&self) -> f64 {
        let dot = self.sum_x2 - self.sum_xe;
        let decoded2 = (self.sum_x2 - 2.0 * self.sum_xe + self.sum_e2).max(0.0);
        if self.sum_x2 == 0.0 && decoded2 == 0.0 {
            return 1.0;
        }
        let lengths = (self.sum_x2 * decoded2).sqrt();
        if lengths == 0.0 {
            0.0
        } else {
            (dot / lengths).clamp(-1.0, 1.0)
        }
    }
}

/// Adds the errors of one row to `sums`. Element k is decoded with `scales[k / group]` and `zeros[k / group]`;
/// the last group may be short. An empty row adds nothing.
///
/// `zeros` hold integers. A NaN in `x` or in a used scale makes the sums NaN. Products are formed in f32:
/// magnitudes beyond 1.8e19 make the sums infinite, those below 1e-19 lose precision.
///
/// # Panics
///
/// If `group` is 0, `codes.len() != x.len()`, or `scales` and `zeros` do not have `ceil(x.len() / group)`
/// entries.
pub fn row_error(
    isa: Isa,
    x: &[f32],
    codes: &[u8],
    group: usize,
    scales: &[f32],
    zeros: &[f32],
    sums: &mut ErrorSums,
) {
    assert_eq!(codes.len(), x.len(), "one code per value");
    assert_eq!(scales.len(), x.len().div_ceil(group), "one scale per group");
    assert_eq!(zeros.len(), scales.len(), "one zero per group");
    isa.run(RowError {
        x,
        codes,
        group,
        scales,
        zeros,
        sums,
    });
}

struct RowError<'a> {
    x: &'a [f32],
    codes: &'a [u8],
    group: usize,
    scales: &'a [f32],
    zeros: &'a [f32],
    sums: &'a mut ErrorSums,
}

impl Kernel for RowError<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let mut row = RowSums::new(v);
        let (blocks, tail) = self.x.as_chunks::<LANES>();
        let (code_blocks, code_tail) = self.codes.as_chunks::<LANES>();
        let (mut group, mut group_end) = (0, self.group);
        for (i, (block, codes)) in blocks.iter().zip(code_blocks).enumerate() {
            let first = i * LANES;
            while group_end <= first {
                group += 1;
                group_end = group_end.saturating_add(self.group);
            }
            let (scale, zero) = if first + LANES <= group_end {
                (v.splat(self.scales[group]), v.splat(self.zeros[group]))
            } else {
                let (scales, zeros) = self.lanes_from(first, LANES);
                (v.load(&scales), v.load(&zeros))
            };
            row.add(v, v.load(block), v.load_codes(codes), scale, zero);
        }
        if !tail.is_empty() {
            let (scales, zeros) = self.lanes_from(blocks.len() * LANES, tail.len());
            let mut codes = [0; LANES];
            codes[..code_tail.len()].copy_from_slice(code_tail);
            let x = v.load_partial(tail, 0.0);
            row.add(v, x, v.load_codes(&codes), v.load(&scales), v.load(&zeros));
        }
        row.flush(v);
        self.sums.merge(&ErrorSums {
            n: self.x.len() as u64,
            max_abs_e: v.largest_magnitude(row.max_abs_e),
            ..row.sums
        });
    }
}

impl RowError<'_> {
    /// Scales and zeros of `n` elements from `first` on, where a group may end inside; unused lanes are 0, so
    /// that with x = 0 and code = 0 they add nothing.
    #[inline(always)]
    fn lanes_from(&self, first: usize, n: usize) -> ([f32; LANES], [f32; LANES]) {
        let (mut scales, mut zeros) = ([0.0; LANES], [0.0; LANES]);
        for i in 0..n {
            let group = (first + i) / self.group;
            scales[i] = self.scales[group];
            zeros[i] = self.zeros[group];
        }
        (scales, zeros)
    }
}

/// The running sums of one row.
struct RowSums<F> {
    x2: F,
    e2: F,
    xe: F,
    max_abs_e: F,
    /// Blocks added since the last transfer to `sums`.
    blocks: usize,
    sums: ErrorSums,
}

impl<F: Copy> RowSums<F> {
    #[inline(always)]
    fn new<V: Vector<F = F>>(v: V) -> RowSums<F> {
        let zero = v.splat(0.0);
        RowSums {
            x2: zero,
            e2: zero,
            xe: zero,
            max_abs_e: zero,
            blocks: 0,
            sums: ErrorSums::default(),
        }
    }

    #[inline(always)]
    fn add<V: Vector<F = F>>(&mut self, v: V, x: F, codes: F, scale: F, zero: F) {
        let decoded = v.mul(v.sub(codes, zero), scale);
        let error = v.sub(x, decoded);
        self.x2 = v.add(self.x2, v.mul(x, x));
        self.e2 = v.add(self.e2, v.mul(error, error));
        self.xe = v.add(self.xe, v.mul(x, error));
        self.max_abs_e = v.max_magnitude(self.max_abs_e, error);
        self.blocks += 1;
        if self.blocks == SEGMENT / LANES {
            self.flush(v);
        }
    }

    #[inline(always)]
    fn flush<V: Vector<F = F>>(&mut self, v: V) {
        let zero = v.splat(0.0);
        self.sums.sum_x2 += f64::from(v.sum(self.x2));
        self.sums.sum_e2 += f64::from(v.sum(self.e2));
        self.sums.sum_xe += f64::from(v.sum(self.xe));
        (self.x2, self.e2, self.xe, self.blocks) = (zero, zero, zero, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_elements_by_hand() {
        for isa in Isa::available() {
            let mut sums = ErrorSums::default();
            row_error(
                isa,
                &[3.0, 4.0, -1.0],
                &[9, 10, 8],
                2,
                &[4.0, 2.0],
                &[8.0, 8.0],
                &mut sums,
            );
            // w' = 4, 8, 0; e = -1, -4, -1.
            let expected = ErrorSums {
                n: 3,
                sum_x2: 26.0,
                sum_e2: 18.0,
                sum_xe: -18.0,
                max_abs_e: 4.0,
            };
            assert_eq!(sums, expected);
            assert_eq!(sums.relative_mse(), 18.0 / 26.0);
            assert!((sums.cosine() - 44.0 / (26.0f64 * 80.0).sqrt()).abs() < 1e-12);
            assert!((sums.sqnr_db() - 1.597).abs() < 1e-3);
        }
    }

    #[test]
    fn figures_of_zero_rows() {
        let nothing = ErrorSums::default();
        assert_eq!(
            (nothing.relative_mse(), nothing.sqnr_db(), nothing.cosine()),
            (0.0, f64::INFINITY, 1.0)
        );
        let noise = ErrorSums {
            n: 1,
            sum_e2: 1.0,
            max_abs_e: 1.0,
            ..nothing
        };
        assert_eq!((noise.relative_mse(), noise.cosine()), (f64::INFINITY, 0.0));
        assert_eq!(noise.sqnr_db(), f64::NEG_INFINITY);
    }
}
