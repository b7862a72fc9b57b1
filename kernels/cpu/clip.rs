//! The squared error of one group under many candidate scales. Owns the hot loop of clip search: the caller
//! lists candidates, this page prices each, the caller picks the cheapest.
//!
//! ```text
//! w'[k]  = (clamp(rne(x[k] * inv_scale) + zero, lo, hi) - zero) * scale
//! error  = sum over k of (x[k] - w'[k])^2              times weights[k] in the weighted form
//! ```
//!
//! As `zero`, `lo` and `hi` are integers, adding the zero before the clamp and subtracting it after is the same
//! as clamping to `lo - zero..=hi - zero`, exactly; the loop does the latter.
//!
//! Element k is in lane k mod 16, each lane adds its squares in order, and the lanes of 16 candidates at a time
//! are added in the fixed tree, all in f32.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// One way to quantize a group.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The value of one step.
    pub scale: f32,
    /// What values are multiplied with before rounding; usually `1 / scale`, but any f32 is allowed.
    pub inv_scale: f32,
    /// The code of 0.0: an integer of magnitude up to 2^22.
    pub zero: f32,
    /// The smallest code: an integer of magnitude up to 2^22.
    pub lo: f32,
    /// The largest code: an integer of magnitude up to 2^22, at least `lo`.
    pub hi: f32,
}

/// `errors[c]` = the squared error of group `x` under `candidates[c]`, in f32; 0 for an empty group.
///
/// A NaN in `x` gives NaN for every candidate, an infinity gives infinity. Squares are formed in f32: errors
/// beyond 1.8e19 overflow to infinity, errors below 1e-19 lose precision and below 2.6e-23 count as 0.
/// Groups of 32, 64 and 128 have faster loops of their own, with the same bits as the general one.
///
/// # Panics
///
/// If `errors.len() != candidates.len()`.
pub fn clip_errors(isa: Isa, x: &[f32], candidates: &[Candidate], errors: &mut [f32]) {
    assert_eq!(errors.len(), candidates.len(), "one error per candidate");
    isa.run(ClipErrors::<false> {
        x,
        weights: &[],
        candidates,
        errors,
    });
}

/// [`clip_errors`] with each square multiplied by `weights[k]` before it is added:
/// `sum over k of ((x[k] - w'[k])^2) * weights[k]`.
///
/// # Panics
///
/// If `errors.len() != candidates.len()` or `weights.len() != x.len()`.
pub fn clip_errors_weighted(
    isa: Isa,
    x: &[f32],
    weights: &[f32],
    candidates: &[Candidate],
    errors: &mut [f32],
) {
    assert_eq!(errors.len(), candidates.len(), "one error per candidate");
    assert_eq!(weights.len(), x.len(), "one weight per value");
    isa.run(ClipErrors::<true> {
        x,
        weights,
        candidates,
        errors,
    });
}

struct ClipErrors<'a, const WEIGHTED: bool> {
    x: &'a [f32],
    /// As long as `x` if `WEIGHTED`, else empty.
    weights: &'a [f32],
    candidates: &'a [Candidate],
    errors: &'a mut [f32],
}

impl<const WEIGHTED: bool> Kernel for ClipErrors<'_, WEIGHTED> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        match self.x.len() {
            32 => self.fixed::<V, 2>(v),
            64 => self.fixed::<V, 4>(v),
            128 => self.fixed::<V, 8>(v),
            _ => self.general(v),
        }
    }
}

impl<const WEIGHTED: bool> ClipErrors<'_, WEIGHTED> {
    /// A group of exactly `BLOCKS` times 16 values, held in registers.
    #[inline(always)]
    fn fixed<V: Vector, const BLOCKS: usize>(self, v: V) {
        let zero = v.splat(0.0);
        let (mut x, mut weights) = ([zero; BLOCKS], [zero; BLOCKS]);
        for (lanes, block) in x.iter_mut().zip(self.x.as_chunks::<LANES>().0) {
            *lanes = v.load(block);
        }
        for (lanes, block) in weights.iter_mut().zip(self.weights.as_chunks::<LANES>().0) {
            *lanes = v.load(block);
        }
        for (candidates, errors) in self.candidates.chunks(LANES).zip(self.errors.chunks_mut(LANES)) {
            let mut sums = [zero; LANES];
            for (sum, candidate) in sums.iter_mut().zip(candidates) {
                let candidate = Lanes::new(v, candidate);
                let mut acc = candidate.square::<V, WEIGHTED>(v, x[0], weights[0]);
                for block in 1..BLOCKS {
                    acc = v.add(acc, candidate.square::<V, WEIGHTED>(v, x[block], weights[block]));
                }
                *sum = acc;
            }
            store_sums(v, &sums, errors);
        }
    }

    /// A group of any length.
    #[inline(always)]
    fn general<V: Vector>(self, v: V) {
        let zero = v.splat(0.0);
        let (blocks, tail) = self.x.as_chunks::<LANES>();
        let (weight_blocks, weight_tail) = self.weights.as_chunks::<LANES>();
        let last = v.load_partial(tail, 0.0);
        let last_weights = v.load_partial(weight_tail, 0.0);
        for (candidates, errors) in self.candidates.chunks(LANES).zip(self.errors.chunks_mut(LANES)) {
            let mut sums = [zero; LANES];
            for (sum, candidate) in sums.iter_mut().zip(candidates) {
                let candidate = Lanes::new(v, candidate);
                let mut acc = zero;
                for (i, block) in blocks.iter().enumerate() {
                    let weights = if WEIGHTED { v.load(&weight_blocks[i]) } else { zero };
                    acc = v.add(acc, candidate.square::<V, WEIGHTED>(v, v.load(block), weights));
                }
                if !tail.is_empty() {
                    let square = candidate.square::<V, WEIGHTED>(v, last, last_weights);
                    acc = v.add(acc, v.keep_first(square, tail.len()));
                }
                *sum = acc;
            }
            store_sums(v, &sums, errors);
        }
    }
}

/// A candidate in all lanes, with the limits moved by the zero.
struct Lanes<F> {
    scale: F,
    inv_scale: F,
    lo: F,
    hi: F,
}

impl<F: Copy> Lanes<F> {
    #[inline(always)]
    fn new<V: Vector<F = F>>(v: V, c: &Candidate) -> Lanes<F> {
        Lanes {
            scale: v.splat(c.scale),
            inv_scale: v.splat(c.inv_scale),
            lo: v.splat(c.lo - c.zero),
            hi: v.splat(c.hi - c.zero),
        }
    }

    /// `(x - w')^2`, times the weight if `WEIGHTED`.
    #[inline(always)]
    fn square<V: Vector<F = F>, const WEIGHTED: bool>(&self, v: V, x: F, weights: F) -> F {
        let nearest = v.round(v.mul(x, self.inv_scale));
        let steps = v.min(v.max(nearest, self.lo), self.hi);
        let error = v.sub(x, v.mul(steps, self.scale));
        let square = v.mul(error, error);
        if WEIGHTED { v.mul(square, weights) } else { square }
    }
}

/// The tree sums of up to 16 candidates.
#[inline(always)]
fn store_sums<V: Vector>(v: V, sums: &[V::F; LANES], errors: &mut [f32]) {
    let sums = v.sum_each(sums);
    if let Ok(errors) = <&mut [f32; LANES]>::try_from(&mut *errors) {
        v.store(sums, errors);
    } else {
        let mut lanes = [0.0; LANES];
        v.store(sums, &mut lanes);
        errors.copy_from_slice(&lanes[..errors.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_values_by_hand() {
        let candidate = Candidate {
            scale: 0.5,
            inv_scale: 2.0,
            zero: 8.0,
            lo: 0.0,
            hi: 15.0,
        };
        let x = [0.5, 0.75, 10.0];
        for isa in Isa::available() {
            let mut errors = [0.0; 1];
            clip_errors(isa, &x, &[candidate], &mut errors);
            // 0.5 is exact; 0.75 is the tie 1.5 steps, rounds to 2 steps = 1.0; 10.0 is clipped to 7 steps = 3.5.
            assert_eq!(errors, [0.0 + 0.0625 + 42.25]);
            clip_errors_weighted(isa, &x, &[1.0, 2.0, 0.0], &[candidate], &mut errors);
            assert_eq!(errors, [0.125]);
        }
    }
}
