//! RMS and layer norms, row by row. Owns the order of their sums: lane i takes elements i, i + 16, ...; the lanes
//! are added in the fixed tree.

use rayon::prelude::*;

use super::elementwise::rows_of_task;
use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// Each row of `x` over sqrt(mean(x^2) + eps), times `gain`.
pub(super) fn rms_norm(isa: Isa, x: &[f32], gain: &[f32], eps: f32, out: &mut [f32]) {
    normalise(isa, x, gain, None, eps, out);
}

/// Each row of `x` minus its mean, over sqrt(variance + eps), times `gain`, plus `bias`.
pub(super) fn layer_norm(isa: Isa, x: &[f32], gain: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    normalise(isa, x, gain, Some(bias), eps, out);
}

fn normalise(isa: Isa, x: &[f32], gain: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    let part = rows_of_task(gain.len()) * gain.len();
    if part == 0 {
        return;
    }
    x.par_chunks(part)
        .zip(out.par_chunks_mut(part))
        .for_each(|(x, out)| {
            for (x, out) in x.chunks_exact(gain.len()).zip(out.chunks_exact_mut(gain.len())) {
                isa.run(Normalise {
                    x,
                    gain,
                    bias,
                    eps,
                    out,
                });
            }
        });
}

struct Normalise<'a> {
    x: &'a [f32],
    gain: &'a [f32],
    bias: Option<&'a [f32]>,
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let count = self.x.len() as f32;
        let mean = match self.bias {
            None => 0.0,
            Some(_) => sum::<V, false>(v, self.x, 0.0) / count,
        };
        let scale = 1.0 / (sum::<V, true>(v, self.x, mean) / count + self.eps).sqrt();
        match self.bias {
            None => {
                for ((out, x), gain) in self.out.iter_mut().zip(self.x).zip(self.gain) {
                    *out = x * scale * gain;
                }
            }
            Some(bias) => {
                let affine = self.gain.iter().zip(bias);
                for ((out, x), (gain, bias)) in self.out.iter_mut().zip(self.x).zip(affine) {
                    *out = (x - mean) * scale * gain + bias;
                }
            }
        }
    }
}

/// The sum of x - mean, or of its squares.
#[inline(always)]
fn sum<V: Vector, const SQUARES: bool>(v: V, x: &[f32], mean: f32) -> f32 {
    let mut acc = v.splat(0.0);
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        acc = term::<V, SQUARES>(v, acc, v.load(block), mean);
    }
    if !tail.is_empty() {
        acc = term::<V, SQUARES>(v, acc, v.load_partial(tail, mean), mean);
    }
    v.sum(acc)
}

#[inline(always)]
fn term<V: Vector, const SQUARES: bool>(v: V, acc: V::F, x: V::F, mean: f32) -> V::F {
    let x = v.sub(x, v.splat(mean));
    v.add(acc, if SQUARES { v.mul(x, x) } else { x })
}
