//! The logarithm of a sum of exponentials, which turns logits into log-probabilities. Owns the order of the sum:
//! 64 numbers at a time in f32, those sums in f64, in order.

use super::functions::exp;
use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// Numbers whose exponentials are summed in f32.
const RUN: usize = 4 * LANES;

/// ln(sum of exp(x)), within 1e-6: each exponential is off by at most 2 units in the last place, and six additions
/// in f32 round. All of `x` is finite; of nothing it is minus infinity. The same bits on AVX2 and AVX-512.
pub fn log_sum_exp(isa: Isa, x: &[f32]) -> f64 {
    isa.run(LogSumExp(x))
}

struct LogSumExp<'a>(&'a [f32]);

impl Kernel for LogSumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<V: Vector>(self, v: V) -> f64 {
        let (blocks, tail) = self.0.as_chunks::<LANES>();
        let mut top = v.load_partial(tail, f32::NEG_INFINITY);
        for block in blocks {
            top = v.max(top, v.load(block));
        }
        let mut lanes = [0.0; LANES];
        v.store(top, &mut lanes);
        let top = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        if top == f32::NEG_INFINITY {
            return f64::NEG_INFINITY;
        }
        let shift = v.splat(top);
        let (runs, tail) = self.0.as_chunks::<RUN>();
        let mut sum = 0.0;
        for run in runs {
            let (blocks, _) = run.as_chunks::<LANES>();
            let mut e = [shift; 4];
            for (e, block) in e.iter_mut().zip(blocks) {
                *e = exp(v, v.sub(v.load(block), shift));
            }
            sum += f64::from(v.sum(v.add(v.add(e[0], e[1]), v.add(e[2], e[3]))));
        }
        for block in tail.chunks(LANES) {
            let x = v.load_partial(block, f32::NEG_INFINITY);
            sum += f64::from(v.sum(exp(v, v.sub(x, shift))));
        }
        f64::from(top) + sum.ln()
    }
}
