//! One output channel as the search wants it. Owns the power of two that brings the row to unit size, the
//! order in which its groups are visited, the component-major copy of the weights, and each group's best
//! real-valued scale. Does not own pairs or stored scales.

use half::bf16;
use qtool_formats::packing::wint2::{GROUP, VECTOR, VECTORS_PER_GROUP};
use qtool_kernels::{Isa, SearchWeights, nearest_codewords};
use std::ops::Range;

use super::Book;

/// Best scale of a Gaussian group over its root mean square: the windows then reach about two deviations.
const SCALE_OVER_RMS: f32 = 0.062;
/// A group's largest magnitude over its scale: no group starts with a scale below this.
const LARGEST_OVER_SCALE: f32 = 50.0;
/// Step of the walk along scales.
const STEP: f32 = 1.15;
/// Steps a group may walk beyond its first two neighbours.
const MAX_WALK: usize = 12;
/// Smallest importance, relative to the mean of the row.
const LEAST_IMPORTANCE: f32 = 1e-6;
/// A group whose largest magnitude is below this part of the row's counts as zero.
const NEGLIGIBLE: f32 = 1e-6;
/// Above this super scale a decoded weight (at most 480 times it) could overflow bf16.
const LARGEST_SUPER: f64 = 6.6e35;

/// What a search found, and its working memory.
#[derive(Debug, Default)]
pub(super) struct Found {
    inverse: Vec<f32>,
    pub(super) codes: Vec<u8>,
    pub(super) gains: Vec<f32>,
}

/// A row of G groups; groups are numbered in visiting order everywhere below.
#[derive(Debug, Default)]
pub(super) struct Row {
    /// Row times 2^-exponent has its largest magnitude in 1..2.
    exponent: i32,
    /// Where each visited group lies along K, (G).
    order: Vec<usize>,
    /// Component-major weights, (G, 4, 16).
    x: Vec<f32>,
    /// Importance in the same order, mean one; empty when all count the same.
    w: Vec<f32>,
    /// Importance times weight.
    wx: Vec<f32>,
    /// Weighted energy of each group, (G).
    energy: Vec<f64>,
    /// Best real-valued scale of each group, zero for a group of zeros, (G).
    scale: Vec<f32>,
    /// Working memory.
    found: Found,
}

impl Row {
    pub(super) fn groups(&self) -> usize {
        self.order.len()
    }
    pub(super) fn order(&self) -> &[usize] {
        &self.order
    }
    pub(super) fn energy(&self) -> &[f64] {
        &self.energy
    }
    pub(super) fn scale(&self) -> &[f32] {
        &self.scale
    }

    /// Takes in a row of finite weights. False when all are zero.
    pub(super) fn load(&mut self, x: &[f32], weights: Option<&[f32]>) -> bool {
        let largest = largest(x);
        if largest == 0.0 {
            return false;
        }
        self.exponent = exponent(largest);
        let shrink = power_of_two(-self.exponent);
        let shrink_f32 = (self.exponent.abs() <= 126).then_some(shrink as f32);
        let groups = x.len() / GROUP;
        self.order.clear();
        let step = stride(groups);
        self.order.extend((0..groups).map(|i| i * step % groups));
        self.x.resize(x.len(), 0.0);
        let mean = weights.map_or(0.0, mean);
        let weights = weights.filter(|_| mean > 0.0);
        let weighted = weights.map_or(0, <[f32]>::len);
        self.w.resize(weighted, 0.0);
        self.wx.resize(weighted, 0.0);
        for (slot, &g) in self.order.iter().enumerate() {
            let out = slot * GROUP..(slot + 1) * GROUP;
            let (from, to) = (&x[g * GROUP..][..GROUP], &mut self.x[out.clone()]);
            match shrink_f32 {
                Some(shrink) => spread(from, to, |x| x * shrink),
                None => spread(from, to, |x| (f64::from(x) * shrink) as f32),
            }
            if let Some(weights) = weights {
                let (from, to) = (&weights[g * GROUP..][..GROUP], &mut self.w[out.clone()]);
                spread(from, to, |w| relative(w, mean));
                for k in out {
                    self.wx[k] = self.w[k] * self.x[k];
                }
            }
        }
        self.energy.clear();
        for g in 0..groups {
            let x = &self.x[g * GROUP..][..GROUP];
            let energy = match self.w.get(g * GROUP..(g + 1) * GROUP) {
                Some(_) => lane_dot(x, &self.wx[g * GROUP..][..GROUP]),
                None => lane_dot(x, x),
            };
            self.energy.push(f64::from(energy));
        }
        true
    }

    /// The super scale as it will be stored, for one in units of the scaled row.
    pub(super) fn stored_scale(&self, super_scale: f32) -> bf16 {
        let real = f64::from(super_scale) * power_of_two(self.exponent);
        bf16::from_f64(real.min(LARGEST_SUPER))
    }

    /// The nearest super scale that can be stored, in units of the scaled row; may be zero.
    pub(super) fn storable(&self, super_scale: f32) -> f32 {
        (self.stored_scale(super_scale).to_f64() * power_of_two(-self.exponent)) as f32
    }

    /// Searches the groups of `range` with `scale` (one per group of the range; zero gives gain zero). The codes
    /// (16 a group) and how much smaller than its energy each group's error is come in `range`'s order.
    pub(super) fn search(
        &self,
        isa: Isa,
        book: &Book,
        range: Range<usize>,
        scale: &[f32],
        found: &mut Found,
    ) {
        let Found {
            inverse,
            codes,
            gains,
        } = found;
        inverse.clear();
        inverse.extend(scale.iter().map(|&s| if s > 0.0 { 1.0 / s } else { 0.0 }));
        codes.resize(range.len() * VECTORS_PER_GROUP, 0);
        gains.resize(range.len(), 0.0);
        let of = range.start * GROUP..range.end * GROUP;
        let weights = if self.w.is_empty() {
            SearchWeights::Even { x: &self.x[of] }
        } else {
            SearchWeights::Weighted {
                wx: &self.wx[of.clone()],
                w: &self.w[of],
            }
        };
        nearest_codewords(isa, &book.words, weights, inverse, codes, gains);
        for (gain, scale) in gains.iter_mut().zip(scale) {
            *gain *= scale * scale;
        }
    }

    /// Guesses each group's best real-valued scale from its root mean square and its largest magnitude.
    pub(super) fn guess_group_scales(&mut self) {
        self.scale.clear();
        for g in 0..self.groups() {
            let x = &self.x[g * GROUP..][..GROUP];
            let largest = largest(x);
            let mass = self.w.get(g * GROUP..(g + 1) * GROUP).map_or(GROUP as f64, sum);
            let rms = (self.energy[g] / mass).sqrt() as f32;
            let guess = (SCALE_OVER_RMS * rms).max(largest / LARGEST_OVER_SCALE);
            self.scale.push(if largest < NEGLIGIBLE { 0.0 } else { guess });
        }
    }

    /// Improves the guesses under `book`, by a walk in steps of 15 % and a parabola through the best three.
    pub(super) fn find_group_scales(&mut self, isa: Isa, book: &Book) {
        let groups = self.groups();
        let mut found = std::mem::take(&mut self.found);
        let mut at = [1.0 / STEP, 1.0, STEP].map(|factor| {
            let scale: Vec<f32> = self.scale.iter().map(|s| s * factor).collect();
            self.search(isa, book, 0..groups, &scale, &mut found);
            found.gains.clone().into_iter()
        });
        for g in 0..groups {
            let mut centre = self.scale[g];
            let mut three = at.each_mut().map(|gains| gains.next().unwrap_or(0.0));
            for _ in 0..MAX_WALK {
                let up = three[2] > three[1] && three[2] >= three[0];
                let down = three[0] > three[1] && !up;
                if !(up || down) {
                    break;
                }
                let factor = if up { STEP } else { 1.0 / STEP };
                centre *= factor;
                self.search(isa, book, g..g + 1, &[centre * factor], &mut found);
                let next = found.gains[0];
                three = if up {
                    [three[1], three[2], next]
                } else {
                    [next, three[0], three[1]]
                };
            }
            self.scale[g] = centre * step_to_the(vertex(three));
        }
        self.found = found;
    }

    /// The super scale of least (weighted) error for given codes and local scales, in units of the scaled row;
    /// `None` when nothing in the row has a scale above zero.
    pub(super) fn least_squares(&self, book: &Book, local: &[u8], codes: &[u8]) -> Option<f32> {
        let (mut xy, mut yy) = (0.0, 0.0);
        for (g, (&local, codes)) in local
            .iter()
            .zip(codes.chunks_exact(VECTORS_PER_GROUP))
            .enumerate()
        {
            let range = g * GROUP..(g + 1) * GROUP;
            let mut c = [0.0; GROUP];
            for (v, &code) in codes.iter().enumerate() {
                for (i, &w) in book.windows[usize::from(code)].iter().enumerate() {
                    c[i * VECTORS_PER_GROUP + v] = f32::from(w);
                }
            }
            let (xc, cc) = if self.w.is_empty() {
                (lane_dot(&self.x[range], &c), lane_dot(&c, &c))
            } else {
                let mut wc = c;
                wc.iter_mut()
                    .zip(&self.w[range.clone()])
                    .for_each(|(c, w)| *c *= w);
                (lane_dot(&self.wx[range], &c), lane_dot(&wc, &c))
            };
            let l = f64::from(local);
            xy += f64::from(xc) * l;
            yy += f64::from(cc) * l * l;
        }
        (yy > 0.0 && xy > 0.0).then(|| (xy / yy) as f32)
    }
}

fn mean(weights: &[f32]) -> f64 {
    sum(weights) / weights.len() as f64
}

/// An importance beside the mean of all.
fn relative(weight: f32, mean: f64) -> f32 {
    ((f64::from(weight) / mean) as f32).max(LEAST_IMPORTANCE)
}

/// What [`Row::load`] makes of importances (K): relative to their mean, and their sums over each group along K. `None` when
/// all are zero, and so all columns count the same.
pub(super) fn counts(weights: &[f32]) -> Option<(Vec<f32>, Vec<f64>)> {
    let mean = mean(weights);
    let columns: Vec<f32> = weights.iter().map(|&w| relative(w, mean)).collect();
    let masses = columns.chunks_exact(GROUP).map(|group| {
        let mut ordered = [0.0; GROUP];
        spread(group, &mut ordered, |w| w);
        sum(&ordered)
    });
    let masses = masses.collect();
    (mean > 0.0).then_some((columns, masses))
}

/// Sum of products of 64 values: 16 lanes in order, then the lanes in order.
fn lane_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

/// Where between -1 and 1 a parabola through three gains, one step apart, is highest.
fn vertex([low, middle, high]: [f32; 3]) -> f32 {
    let bend = 2.0 * middle - low - high;
    if bend > 0.0 {
        (0.5 * (high - low) / bend).clamp(-1.0, 1.0)
    } else {
        0.0
    }
}

/// [`STEP`] to a power between -1 and 1, by the series of e^(v ln STEP) in f64: the same on every machine, as a
/// library's `powf` is not.
fn step_to_the(v: f32) -> f32 {
    const LN_STEP: f64 = 0.13976192164310813;
    let t = f64::from(v) * LN_STEP;
    (1..=10).rev().fold(1.0, |sum, i| 1.0 + sum * t / f64::from(i)) as f32
}

/// The group's weights from their order along K to component-major.
fn spread(from: &[f32], to: &mut [f32], map: impl Fn(f32) -> f32) {
    for (v, four) in from.chunks_exact(VECTOR).enumerate() {
        for (i, &x) in four.iter().enumerate() {
            to[i * VECTORS_PER_GROUP + v] = map(x);
        }
    }
}

/// Largest magnitude of a whole number of groups.
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 16];
    for x in x.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            let x = x.abs();
            *lane = if x > *lane { x } else { *lane };
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

fn sum(a: &[f32]) -> f64 {
    a.iter().map(|a| f64::from(*a)).sum()
}

/// e such that 2^e <= x < 2^(e+1), also for subnormal x.
fn exponent(x: f32) -> i32 {
    let bits = f64::from(x).to_bits() >> 52;
    (bits & 0x7FF) as i32 - 1023
}

/// 2^e for -1022 <= e <= 1023.
fn power_of_two(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// A step that visits all groups and spreads every prefix over the row: coprime to `groups`, near the golden
/// section of it.
pub(super) fn stride(groups: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let start = (groups * 618 / 1000).max(1);
    (start..).find(|&s| gcd(s, groups) == 1).unwrap_or(1)
}
