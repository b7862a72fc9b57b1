//! The encoder of WINT2.5: head and tail codes, last weight and 13-bit local scale of each group, and one super
//! scale per output channel. Owns the decision; the layout is [`qtool_formats::packing::wint25`].
//!
//! For given scales the best codes are found exactly. Neighbouring 3-bit windows share one bit, so the best code
//! of a chain of windows follows from the best chains ending in a 0 and in a 1: the result is that of trying all
//! 128 head and 512 tail codes (the tests do), for a fraction of the work. A group's scale is the best of a
//! geometric grid, refined by least squares; with 13 bits its rounding costs nothing.

pub mod quantizer;

use half::bf16;
use qtool_formats::packing::wint25::{
    CODE_WORDS, GROUP, Group, HEAD_WEIGHTS, MAX_LOCAL, WEIGHTS_PER_WORD, WORDS, ZERO_POINT,
    decode_row as decode,
};

use crate::ccq::{CcqError, check};
pub use quantizer::METHOD;

/// Scales tried, relative to the group's root mean square: this one, and so on in steps of [`STEP`].
const LEAST_SCALE: f32 = 0.40;
/// Ratio of neighbouring scales.
const STEP: f32 = 1.08;
/// Number of scales tried.
const SCALES: usize = 14;
/// No group's grid starts below its largest magnitude over this.
const LARGEST_OVER_SCALE: f32 = 8.0;
/// Rounds of least squares at most.
const ROUNDS: usize = 4;
/// Super scales stay in this range, so that a decoded weight (at most 32764 times it) neither overflows nor
/// loses bits; rows too small for it decode to zero.
const SUPER_RANGE: (f64, f64) = (1.2e-38, 1e34);

/// One encoded output channel.
#[derive(Debug, Clone, PartialEq)]
pub struct Ccq25Row {
    /// Ten words per 64 weights, (K/64 * 10).
    pub words: Vec<u16>,
    /// Scale of the channel: finite, above zero.
    pub super_scale: bf16,
}

/// Encodes one output channel `x` (K); `weights` (K) as in [`crate::ccq::encode_row`], but a zero stays zero.
/// All-zero groups get local scale 0.
///
/// # Errors
///
/// When K is not a positive multiple of 64, lengths disagree, or a number is not finite.
pub fn encode_row(x: &[f32], weights: Option<&[f32]>) -> Result<Ccq25Row, CcqError> {
    check(x, weights)?;
    let count = weights.filter(|w| w.iter().any(|w| *w > 0.0));
    // In units of the row's largest magnitude, and importance in units of its largest: nothing overflows.
    let unit = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    let heaviest = count.map_or(1.0, |w| w.iter().fold(0.0_f32, |m, w| m.max(*w)));
    let mut row = Ccq25Row {
        words: vec![0; x.len() / GROUP * WORDS],
        super_scale: bf16::ONE,
    };
    if unit == 0.0 {
        return Ok(row);
    }
    let mut groups = Vec::new();
    for (g, x) in x.chunks_exact(GROUP).enumerate() {
        let x: [f32; GROUP] = std::array::from_fn(|k| (f64::from(x[k]) / f64::from(unit)) as f32);
        let w: [f32; GROUP] = std::array::from_fn(|k| {
            count.map_or(1.0, |w| {
                (f64::from(w[g * GROUP + k]) / f64::from(heaviest)) as f32
            })
        });
        groups.push((x, w, best_scale(&x, &w)));
    }
    let largest = groups.iter().fold(0.0_f32, |m, (_, _, scale)| m.max(*scale));
    let wanted = f64::from(largest) * f64::from(unit) / f64::from(MAX_LOCAL);
    if wanted < SUPER_RANGE.0 {
        return Ok(row);
    }
    row.super_scale = round_up(wanted.min(SUPER_RANGE.1));
    let step = row.super_scale.to_f64() / f64::from(unit);
    for ((x, w, scale), words) in groups.iter().zip(row.words.chunks_exact_mut(WORDS)) {
        let local = (f64::from(*scale) / step)
            .round_ties_even()
            .min(f64::from(MAX_LOCAL)) as u16;
        if local > 0 {
            let mut group = codes(x, w, (f64::from(local) * step) as f32).0;
            group.local = local;
            words.copy_from_slice(&group.to_words());
        }
    }
    Ok(row)
}

/// Decodes one output channel into `out` (K).
///
/// # Errors
///
/// When the lengths disagree.
pub fn decode_row(row: &Ccq25Row, out: &mut [bf16]) -> qtool_formats::Result<()> {
    decode(&row.words, row.super_scale, out)
}

/// The least bf16 that is not below a positive normal `x`.
fn round_up(x: f64) -> bf16 {
    let near = bf16::from_f64(x);
    if near.to_f64() < x {
        bf16::from_bits(near.to_bits() + 1)
    } else {
        near
    }
}

/// The real-valued scale of least error; zero for a group of zeros.
fn best_scale(x: &[f32; GROUP], w: &[f32; GROUP]) -> f32 {
    let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
    if largest < 1e-12 {
        return 0.0;
    }
    let rms = (x.iter().map(|x| x * x).sum::<f32>() / GROUP as f32).sqrt();
    let mut scale = (LEAST_SCALE * rms).max(largest / LARGEST_OVER_SCALE);
    let mut best = (scale, f64::INFINITY, 0.0);
    for _ in 0..SCALES {
        let (group, error) = codes(x, w, scale);
        if error < best.1 {
            best = (scale, error, least_squares(x, w, &group));
        }
        scale *= STEP;
    }
    for _ in 0..ROUNDS {
        if best.2 <= 0.0 {
            break;
        }
        let (group, error) = codes(x, w, best.2);
        if error >= best.1 {
            break;
        }
        best = (best.2, error, least_squares(x, w, &group));
    }
    best.0
}

/// The scale of least error for given codes; zero when there is none above zero.
fn least_squares(x: &[f32; GROUP], w: &[f32; GROUP], group: &Group) -> f32 {
    let values = qtool_formats::packing::wint25::weights(&group.to_words());
    let (mut xv, mut vv) = (0.0_f64, 0.0_f64);
    for ((x, w), v) in x.iter().zip(w).zip(values) {
        let v = f64::from(v);
        xv += f64::from(*w) * f64::from(*x) * v;
        vv += f64::from(*w) * v * v;
    }
    if vv > 0.0 && xv > 0.0 {
        (xv / vv) as f32
    } else {
        0.0
    }
}

/// The codes of least error at a scale above zero, and that error; the local scale is left at zero.
fn codes(x: &[f32; GROUP], w: &[f32; GROUP], scale: f32) -> (Group, f64) {
    let scaled = x.map(|x| x / scale);
    let (mut group, mut error) = (Group::default(), 0.0);
    let words = scaled
        .chunks_exact(WEIGHTS_PER_WORD)
        .zip(w.chunks_exact(WEIGHTS_PER_WORD));
    for (i, (x, w)) in words.take(CODE_WORDS).enumerate() {
        let (x_head, x_tail) = x.split_at(HEAD_WEIGHTS);
        let (w_head, w_tail) = w.split_at(HEAD_WEIGHTS);
        let (head, head_error) = chain(x_head, w_head);
        let (tail, tail_error) = chain(x_tail, w_tail);
        (group.heads[i], group.tails[i]) = (head as u8, tail);
        error += f64::from(head_error + tail_error);
    }
    let (last, last_error) = chain(&scaled[GROUP - 1..], &w[GROUP - 1..]);
    group.last = last as u8;
    (
        group,
        (error + f64::from(last_error)) * f64::from(scale) * f64::from(scale),
    )
}

/// The code of a chain of windows with the least error, and that error: per last bit, the best chain so far.
fn chain(x: &[f32], w: &[f32]) -> (u16, f32) {
    let cost = |k: usize, v: u16| {
        let d = x[k] - (f32::from(v) - f32::from(ZERO_POINT));
        w[k] * d * d
    };
    let mut ends = [(0, f32::INFINITY); 2];
    for v in 0..8 {
        let end = &mut ends[usize::from(v & 1)];
        if cost(0, v) < end.1 {
            *end = (v, cost(0, v));
        }
    }
    for k in 1..x.len() {
        let mut next = [(0, f32::INFINITY); 2];
        for (bit, (code, error)) in (0..2).zip(ends) {
            for low in 0..4 {
                let total = error + cost(k, (bit << 2) | low);
                let end = &mut next[usize::from(low & 1)];
                if total < end.1 {
                    *end = ((code << 2) | low, total);
                }
            }
        }
        ends = next;
    }
    let [even, odd] = ends;
    if odd.1 < even.1 || (odd.1 == even.1 && odd.0 < even.0) {
        odd
    } else {
        even
    }
}

#[cfg(test)]
mod tests {
    use qtool_formats::packing::wint25::{HEAD_CODES, TAIL_CODES, head_windows, tail_windows};

    use super::*;

    fn noise(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 16_777_216.0
        };
        (0..count)
            .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
            .collect()
    }

    fn relative(x: &[f32], row: &Ccq25Row) -> f64 {
        let mut out = vec![bf16::NAN; x.len()];
        decode_row(row, &mut out).unwrap();
        let error: f64 = x
            .iter()
            .zip(&out)
            .map(|(x, y)| (f64::from(*x) - y.to_f64()).powi(2))
            .sum();
        error / x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>()
    }

    #[test]
    fn chains_are_as_good_as_trying_every_code() {
        let w = noise(1, 700).iter().map(|w| w * w).collect::<Vec<_>>();
        let x = noise(2, 700).iter().map(|x| 2.0 * x).collect::<Vec<_>>();
        let term = |x: f32, w: f32, v: i8| {
            let d = x - f32::from(v);
            w * d * d
        };
        let cost = |x: &[f32], w: &[f32], v: &[i8]| -> f32 {
            x.iter().zip(w).zip(v).map(|((x, w), v)| term(*x, *w, *v)).sum()
        };
        for (x, w) in x.chunks_exact(7).zip(w.chunks_exact(7)) {
            let heads = (0..HEAD_CODES as u8).map(|c| cost(&x[..3], &w[..3], &head_windows(c)));
            let tails = (0..TAIL_CODES as u16).map(|c| cost(&x[3..], &w[3..], &tail_windows(c)));
            assert_eq!(chain(&x[..3], &w[..3]).1, heads.fold(f32::INFINITY, f32::min));
            assert_eq!(chain(&x[3..], &w[3..]).1, tails.fold(f32::INFINITY, f32::min));
            let (head, tail) = (chain(&x[..3], &w[..3]), chain(&x[3..], &w[3..]));
            assert_eq!(cost(&x[..3], &w[..3], &head_windows(head.0 as u8)), head.1);
            assert_eq!(cost(&x[3..], &w[3..], &tail_windows(tail.0)), tail.1);
        }
    }

    #[test]
    fn gaussian_error_is_below_the_ceiling() {
        let x = noise(3, 4096);
        let error = relative(&x, &encode_row(&x, None).unwrap());
        assert!(error < 0.096, "{error}");
    }

    #[test]
    fn corners_stay_finite_and_zeros_stay_zero() {
        let zero = encode_row(&[0.0; 64], None).unwrap();
        assert_eq!(zero.words, [0; 10]);
        let mut x = noise(4, 192);
        x[64..128].fill(0.0);
        let row = encode_row(&x, Some(&[0.0; 192])).unwrap();
        assert_eq!(row.words[10..20], [0; 10]);
        let usual = relative(&x, &row);
        for size in [1e-30, 1e-8, 1e8, 1e30] {
            let scaled: Vec<f32> = x.iter().map(|x| x * size).collect();
            assert!((relative(&scaled, &encode_row(&scaled, None).unwrap()) - usual).abs() < 1e-2);
        }
        let mut outlier = x.clone();
        outlier[3] = 1e4;
        for x in [
            vec![f32::MAX; 64],
            vec![f32::from_bits(1); 64],
            vec![-0.3; 64],
            outlier,
        ] {
            let row = encode_row(&x, None).unwrap();
            let mut out = vec![bf16::NAN; x.len()];
            decode_row(&row, &mut out).unwrap();
            assert!(out.iter().all(|y| y.is_finite()));
            assert!(relative(&x, &row) <= 1.0);
        }
        assert_eq!(encode_row(&[1.0; 65], None), Err(CcqError::Columns { got: 65 }));
    }
}
