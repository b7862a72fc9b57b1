//! Functions of one number on 16 lanes. Owns the polynomials (minimax fits by the Remez exchange in 40 digits; the
//! largest error of each is stated and tested) and what is made of them.
//!
//! ```text
//! exp(x)   = 2^n (1 + p(r)),   n = round(x / ln 2),  r = x - n ln 2,  p(r) = r + r^2 q(r)
//! tanh(x)  = t / (t + 2),      t = exp(2x) - 1 = 2^n p + (2^n - 1), without loss near 0
//! gelu(x)  = max(x, 0) - a exp(-R(a)),   a = |x|,  R(a) = -ln(erfc(a / sqrt 2) / 2)
//! ```

use super::simd::Vector;
use crate::backend::Activation;

/// q of degree 4 on |r| <= ln 2 / 2: exp is off by at most 3.1e-9 of its value, before rounding.
const Q: [f32; 5] = [
    0.499_999_94,
    0.166_665_2,
    0.041_668_4,
    0.008_368_851,
    0.001_381_431_6,
];

/// R of degree 9 on 0..5.6: a exp(-R) is off by at most 9.6e-8.
const R: [f32; 10] = [
    std::f32::consts::LN_2,
    0.797_889_7,
    0.318_249_02,
    0.036_547_3,
    -0.005_116_368,
    0.000_246_321_8,
    7.646_361e-5,
    -1.943_795_2e-5,
    1.938_034_3e-6,
    -7.550_037_4e-8,
];
/// Where R goes on as a straight line.
const R_END: f32 = 5.6;

/// ln 2 in two parts: the first has 9 bits, so that n times it is exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// n and p(r) of the page's formula; x is clamped so that 2^n is 0 or infinite beyond.
#[inline(always)]
fn split<V: Vector>(v: V, x: V::F) -> (V::F, V::F) {
    // NaN passes through: `min` and `max` give their second argument then.
    let x = v.min(v.splat(89.0), v.max(v.splat(-105.0), x));
    let n = v.round(v.mul(x, v.splat(std::f32::consts::LOG2_E)));
    let r = v.mul_add(n, v.splat(-LN_2[0]), x);
    let r = v.mul_add(n, v.splat(-LN_2[1]), r);
    let q = polynomial(v, r, &Q);
    (n, v.mul_add(v.mul(r, r), q, r))
}

#[inline(always)]
fn polynomial<V: Vector>(v: V, x: V::F, coefficients: &[f32]) -> V::F {
    let mut sum = v.splat(0.0);
    for &c in coefficients.iter().rev() {
        sum = v.mul_add(sum, x, v.splat(c));
    }
    sum
}

/// e^x within 2 units in the last place; 0 below -104, infinite above 88.8, NaN for NaN.
#[inline(always)]
pub(super) fn exp<V: Vector>(v: V, x: V::F) -> V::F {
    let (n, p) = split(v, x);
    v.times_power_of_two(v.add(v.splat(1.0), p), n)
}

/// e^x - 1 for |x| up to 40 or so.
#[inline(always)]
fn exp_minus_one<V: Vector>(v: V, x: V::F) -> V::F {
    let (n, p) = split(v, x);
    let power = v.times_power_of_two(v.splat(1.0), n);
    v.mul_add(power, p, v.sub(power, v.splat(1.0)))
}

/// |x|.
#[inline(always)]
fn magnitude<V: Vector>(v: V, x: V::F) -> V::F {
    v.max_magnitude(v.splat(0.0), x)
}

/// tanh(x): beyond 10 it is 1 in f32.
#[inline(always)]
fn tanh<V: Vector>(v: V, x: V::F) -> V::F {
    let x = v.min(v.splat(10.0), v.max(v.splat(-10.0), x));
    let t = exp_minus_one(v, v.add(x, x));
    v.div(t, v.add(t, v.splat(2.0)))
}

/// x / (1 + exp(-y)).
#[inline(always)]
fn times_sigmoid<V: Vector>(v: V, x: V::F, y: V::F) -> V::F {
    let e = exp(v, v.sub(v.splat(0.0), y));
    v.div(x, v.add(v.splat(1.0), e))
}

#[inline(always)]
fn gelu<V: Vector>(v: V, x: V::F) -> V::F {
    let a = v.min(v.splat(30.0), magnitude(v, x));
    let inside = v.min(v.splat(R_END), a);
    let r = polynomial(v, inside, &R);
    let r = v.mul_add(v.sub(a, inside), v.splat(R_END), r);
    let tail = v.mul(a, exp(v, v.sub(v.splat(0.0), r)));
    v.sub(v.max(v.splat(0.0), x), tail)
}

/// f(x).
#[inline(always)]
pub(super) fn apply<V: Vector>(v: V, f: Activation, x: V::F) -> V::F {
    match f {
        Activation::Silu => times_sigmoid(v, x, x),
        Activation::Gelu => gelu(v, x),
        Activation::GeluTanh => {
            // x (1 + tanh u) / 2 = x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
            let twice = 2.0 * (2.0 / std::f32::consts::PI).sqrt();
            let square = v.mul(x, x);
            let inner = v.mul_add(v.mul(square, x), v.splat(0.044_715), x);
            times_sigmoid(v, x, v.mul(inner, v.splat(twice)))
        }
        Activation::Relu => v.max(v.splat(0.0), x),
        Activation::Tanh => tanh(v, x),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use crate::cpu::simd::{Kernel, LANES};

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector>(self, v: V) {
            for block in self.0.as_chunks_mut::<LANES>().0 {
                let y = exp(v, v.load(block));
                v.store(y, block);
            }
        }
    }

    /// Steps of f32 numbers from `y` to the true value, which may lie between two of them.
    fn ulps(y: f32, truth: f64) -> f64 {
        let step = f64::from(f32::from_bits((truth as f32).to_bits() + 1)) - f64::from(truth as f32);
        (f64::from(y) - truth).abs() / step
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let x: Vec<f32> = (0..=u32::MAX).step_by(1021).map(f32::from_bits).collect();
        let (mut worst, mut checked) = (0f64, 0);
        for isa in Isa::available() {
            let mut y = x.clone();
            let whole = y.len() / LANES * LANES;
            isa.run(Exp(&mut y));
            for (&x, &y) in x[..whole].iter().zip(&y) {
                let truth = f64::from(x).exp();
                if x.is_nan() {
                    assert!(y.is_nan());
                } else if truth > f64::from(f32::MAX) {
                    assert!(y == f32::INFINITY || x < 88.73, "exp({x}) = {y}");
                } else {
                    worst = worst.max(ulps(y, truth));
                }
                checked += 1;
            }
        }
        assert!(worst <= 2.0, "{worst}");
        assert!(checked > 4_000_000);
    }
}
