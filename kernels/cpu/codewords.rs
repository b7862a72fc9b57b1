//! The nearest of 256 codewords for vectors of four weights, by exhaustive search in integers. Owns the
//! prepared codebook ([`Codewords`]) and the search loop; does not own where codewords or scales come from.
//!
//! # What is computed
//!
//! A group is 16 vectors of 4 weights. For each vector, with x the four weights times the group's inverse
//! scale, and c a codeword, the search maximises
//!
//! ```text
//! without weights   2 x.c - c.c              that is |x|^2 - |x - c|^2
//! with weights      sum_i w_i (2 x_i c_i - c_i c_i)
//! ```
//!
//! All of it in integers, so that every machine, in any order of additions, gives the same bits:
//!
//! ```text
//! without   X_i = rne(clamp(64 x_i))                            score = 512 c.X - 16384 c.c
//! with      a   = min(511 / max w_i, 24575 / max |w_i x_i|)     per vector
//!           W_i = rne(a w_i)   Y_i = rne(a w_i x_i)             score = 512 c.Y - 256 c^2.W
//! ```
//!
//! Both scores are multiples of 256 and stay within i32; `255 - byte` sits in the lowest 8 bits, so the largest
//! score also names the byte, and of equal codewords the lowest byte wins.
//!
//! # Order of the data
//!
//! Component-major within a group: `x[64 g + 16 i + v]` is component i of vector v, so a register holds one
//! component of the 16 vectors of a group.

use super::isa::{Isa, IsaKind};
#[cfg(target_arch = "x86_64")]
use super::simd::dot16::{Avx2, Avx512};
use super::simd::dot16::{Dot16, DotKernel, LANES, Portable};

/// Weights of a group.
const GROUP: usize = 64;
/// Groups searched side by side, so that each broadcast codeword is used several times.
const ABREAST: usize = 4;
/// Steps of the scaled weight per unit, without search weights.
const STEPS: f32 = 64.0;
/// Largest magnitude of X, so that scores stay within i32: 4 * 32 * 512 * 31000 + 16384 * 4096 < 2^31.
const LARGEST_X: f32 = 31_000.0;
/// Largest W.
const LARGEST_W: f32 = 511.0;
/// Largest magnitude of Y: 4 * 32 * 512 * 24575 + 256 * 4096 * 511 < 2^31.
const LARGEST_Y: f32 = 24_575.0;
/// Keeps a division by an all-zero vector finite.
const SMALLEST: f32 = 1e-30;

/// A codebook of 256 codewords, laid out for the search.
#[derive(Debug, Clone)]
pub struct Codewords {
    entries: [Entry; 256],
    squares: [Squares; 256],
}

/// One codeword as the inner loop wants it: pairs of i16, the first in the low half.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// 512 c0, 512 c1.
    first: i32,
    /// 512 c2, 512 c3.
    second: i32,
    /// -16384 c.c + 255 - byte.
    bias: i32,
}

/// What the search with weights needs besides: pairs of i16 likewise.
#[derive(Debug, Clone, Copy, Default)]
struct Squares {
    /// -8 c0^2, -8 c1^2.
    first: i32,
    /// -8 c2^2, -8 c3^2.
    second: i32,
    /// 255 - byte.
    index: i32,
}

impl Codewords {
    /// Prepares the codewords of the 256 bytes; each component must lie in -32..=31.
    ///
    /// # Panics
    ///
    /// On a component outside that range.
    pub fn new(book: &[[i8; 4]; 256]) -> Self {
        let mut words = Self {
            entries: [Entry::default(); 256],
            squares: [Squares::default(); 256],
        };
        words.set(book);
        words
    }

    /// Replaces the codewords in place, as [`Codewords::new`] would.
    ///
    /// # Panics
    ///
    /// On a component outside -32..=31.
    pub fn set(&mut self, book: &[[i8; 4]; 256]) {
        let pair = |lo: i32, hi: i32| (lo & 0xFFFF) | (hi << 16);
        let tables = self.entries.iter_mut().zip(&mut self.squares);
        for (index, ((entry, squares), word)) in tables.zip(book).enumerate() {
            assert!(
                word.iter().all(|c| (-32..=31).contains(c)),
                "codeword {word:?} outside -32..=31"
            );
            let c = word.map(i32::from);
            let square = c.map(|c| c * c);
            let index = 255 - index as i32;
            *entry = Entry {
                first: pair(512 * c[0], 512 * c[1]),
                second: pair(512 * c[2], 512 * c[3]),
                bias: index - 16_384 * square.iter().sum::<i32>(),
            };
            *squares = Squares {
                first: pair(-8 * square[0], -8 * square[1]),
                second: pair(-8 * square[2], -8 * square[3]),
                index,
            };
        }
    }
}

/// What the search sees of the weights.
#[derive(Debug, Clone, Copy)]
pub enum SearchWeights<'a> {
    /// Every weight counts the same; `x` (G * 64), component-major.
    Even {
        /// The weights.
        x: &'a [f32],
    },
    /// Weight k counts `w[k]`: both (G * 64), component-major.
    Weighted {
        /// Importance times weight.
        wx: &'a [f32],
        /// Importance, finite and not negative; in every vector at least one is above zero.
        w: &'a [f32],
    },
}

/// For each group g (64 weights, multiplied by `inv_scales[g]` first) and each of its 16 vectors, the byte of
/// the nearest codeword into `codes` (G * 16), lowest byte on ties, and into `gains[g]` how much smaller the
/// group's (weighted) squared error is than its (weighted) energy, in units of scale squared.
///
/// So the group's error is `energy - gain * scale^2`. Weights are read to 1/64 of a codeword unit and cut off at
/// 484 units (without search weights) or to about 1/500 relative to the vector's largest importance (with),
/// so gains are accurate to a few 1e-4 of the energy, and equal on all instruction sets. All inputs must be
/// finite; otherwise the results are unspecified codes and gains.
///
/// # Panics
///
/// When the lengths disagree.
pub fn nearest_codewords(
    isa: Isa,
    book: &Codewords,
    weights: SearchWeights,
    inv_scales: &[f32],
    codes: &mut [u8],
    gains: &mut [f32],
) {
    let groups = inv_scales.len();
    let lengths = match weights {
        SearchWeights::Even { x } => [x.len(), x.len()],
        SearchWeights::Weighted { wx, w } => [wx.len(), w.len()],
    };
    assert_eq!(lengths, [groups * GROUP; 2], "weights for {groups} groups");
    assert_eq!(codes.len(), groups * LANES, "codes for {groups} groups");
    assert_eq!(gains.len(), groups, "gains");
    match weights {
        SearchWeights::Even { x } => {
            enter(
                isa,
                Search {
                    prepare: Even { x },
                    book,
                    inv_scales,
                    codes,
                    gains,
                },
            );
        }
        SearchWeights::Weighted { wx, w } => {
            enter(
                isa,
                Search {
                    prepare: Weighted { wx, w },
                    book,
                    inv_scales,
                    codes,
                    gains,
                },
            );
        }
    }
}

fn enter(isa: Isa, kernel: impl DotKernel) {
    #[cfg(target_arch = "x86_64")]
    match isa.kind() {
        IsaKind::Avx512 => {
            if let Some(token) = Avx512::<true>::detect() {
                return token.enter(kernel);
            }
            if let Some(token) = Avx512::<false>::detect() {
                return token.enter(kernel);
            }
        }
        IsaKind::Avx2 => {
            if let Some(token) = Avx2::detect() {
                return token.enter(kernel);
            }
        }
        IsaKind::Portable => {}
    }
    Portable.enter(kernel);
}

/// How a group becomes integers, and how a codeword is scored: the two objectives.
trait Objective: Copy {
    /// A group in registers.
    type Group<D: Dot16>: Copy;
    /// Reads group `g`, scaled.
    fn read<D: Dot16>(self, d: D, g: usize, inv_scale: f32) -> Self::Group<D>;
    /// A codeword, in all lanes.
    type Word<D: Dot16>: Copy;
    /// Spreads a codeword.
    fn spread<D: Dot16>(d: D, book: &Codewords, byte: usize) -> Self::Word<D>;
    /// The score of a codeword for each vector.
    fn score<D: Dot16>(d: D, group: Self::Group<D>, word: Self::Word<D>) -> D::I;
    /// The gain of each vector from its best score.
    fn gain<D: Dot16>(d: D, group: Self::Group<D>, best: D::I) -> D::F;
}

#[derive(Clone, Copy)]
struct Even<'a> {
    x: &'a [f32],
}

#[derive(Clone, Copy)]
struct Weighted<'a> {
    wx: &'a [f32],
    w: &'a [f32],
}

/// Component i of the 16 vectors of group g.
#[inline(always)]
fn component(x: &[f32], g: usize, i: usize) -> &[f32; LANES] {
    let (lanes, _) = x.as_chunks::<LANES>();
    &lanes[g * 4 + i]
}

impl Objective for Even<'_> {
    type Group<D: Dot16> = [D::I; 2];
    type Word<D: Dot16> = [D::I; 3];

    #[inline(always)]
    fn read<D: Dot16>(self, d: D, g: usize, inv_scale: f32) -> Self::Group<D> {
        let scale = d.splat(inv_scale * STEPS);
        let mut rounded = [d.splat_i(0); 4];
        for (i, rounded) in rounded.iter_mut().enumerate() {
            let scaled = d.mul(d.load(component(self.x, g, i)), scale);
            *rounded = d.round(d.min(d.max(scaled, d.splat(-LARGEST_X)), d.splat(LARGEST_X)));
        }
        [d.pair(rounded[0], rounded[1]), d.pair(rounded[2], rounded[3])]
    }
    #[inline(always)]
    fn spread<D: Dot16>(d: D, book: &Codewords, byte: usize) -> Self::Word<D> {
        let entry = &book.entries[byte];
        [
            d.splat_i(entry.first),
            d.splat_i(entry.second),
            d.splat_i(entry.bias),
        ]
    }
    #[inline(always)]
    fn score<D: Dot16>(d: D, group: Self::Group<D>, word: Self::Word<D>) -> D::I {
        d.dot(d.dot(word[2], group[0], word[0]), group[1], word[1])
    }
    #[inline(always)]
    fn gain<D: Dot16>(d: D, _: Self::Group<D>, best: D::I) -> D::F {
        d.mul(d.high_24(best), d.splat(1.0 / STEPS))
    }
}

impl Objective for Weighted<'_> {
    type Group<D: Dot16> = ([D::I; 4], D::F);
    type Word<D: Dot16> = [D::I; 5];

    #[inline(always)]
    fn read<D: Dot16>(self, d: D, g: usize, inv_scale: f32) -> Self::Group<D> {
        let scale = d.splat(inv_scale);
        let (mut largest_w, mut largest_y) = (d.splat(SMALLEST), d.splat(SMALLEST));
        for i in 0..4 {
            let y = d.mul(d.load(component(self.wx, g, i)), scale);
            largest_w = d.max(largest_w, d.load(component(self.w, g, i)));
            largest_y = d.max(largest_y, d.max(y, d.mul(y, d.splat(-1.0))));
        }
        let a = d.min(
            d.div(d.splat(LARGEST_W), largest_w),
            d.div(d.splat(LARGEST_Y), largest_y),
        );
        let (mut y, mut w) = ([d.splat_i(0); 4], [d.splat_i(0); 4]);
        for i in 0..4 {
            y[i] = d.round(d.mul(d.mul(d.load(component(self.wx, g, i)), scale), a));
            w[i] = d.times_32(d.round(d.mul(d.load(component(self.w, g, i)), a)));
        }
        (
            [
                d.pair(y[0], y[1]),
                d.pair(y[2], y[3]),
                d.pair(w[0], w[1]),
                d.pair(w[2], w[3]),
            ],
            a,
        )
    }
    #[inline(always)]
    fn spread<D: Dot16>(d: D, book: &Codewords, byte: usize) -> Self::Word<D> {
        let (entry, squares) = (&book.entries[byte], &book.squares[byte]);
        [
            d.splat_i(entry.first),
            d.splat_i(entry.second),
            d.splat_i(squares.first),
            d.splat_i(squares.second),
            d.splat_i(squares.index),
        ]
    }
    #[inline(always)]
    fn score<D: Dot16>(d: D, (group, _): Self::Group<D>, word: Self::Word<D>) -> D::I {
        let linear = d.dot(d.dot(word[4], group[0], word[0]), group[1], word[1]);
        d.dot(d.dot(linear, group[2], word[2]), group[3], word[3])
    }
    #[inline(always)]
    fn gain<D: Dot16>(d: D, (_, a): Self::Group<D>, best: D::I) -> D::F {
        d.div(d.high_24(best), a)
    }
}

struct Search<'a, O> {
    prepare: O,
    book: &'a Codewords,
    inv_scales: &'a [f32],
    codes: &'a mut [u8],
    gains: &'a mut [f32],
}

impl<O: Objective> DotKernel for Search<'_, O> {
    #[inline(always)]
    fn run<D: Dot16>(mut self, d: D) {
        let groups = self.inv_scales.len();
        let whole = groups - groups % ABREAST;
        for g in (0..whole).step_by(ABREAST) {
            self.some::<D, ABREAST>(d, g);
        }
        for g in whole..groups {
            self.some::<D, 1>(d, g);
        }
    }
}

impl<O: Objective> Search<'_, O> {
    /// Searches `COUNT` groups from `first` on.
    #[inline(always)]
    fn some<D: Dot16, const COUNT: usize>(&mut self, d: D, first: usize) {
        let mut groups = [self.prepare.read(d, first, self.inv_scales[first]); COUNT];
        for (i, group) in groups.iter_mut().enumerate().skip(1) {
            *group = self.prepare.read(d, first + i, self.inv_scales[first + i]);
        }
        let mut best = [d.splat_i(i32::MIN); COUNT];
        for byte in 0..256 {
            let word = O::spread(d, self.book, byte);
            for i in 0..COUNT {
                best[i] = d.max_i(best[i], O::score(d, groups[i], word));
            }
        }
        for i in 0..COUNT {
            let (mut lanes, mut gains) = ([0; LANES], [0.0; LANES]);
            d.store_i(best[i], &mut lanes);
            let codes = &mut self.codes[(first + i) * LANES..][..LANES];
            for (code, lane) in codes.iter_mut().zip(lanes) {
                *code = 255 - (lane & 255) as u8;
            }
            d.store(O::gain(d, groups[i], best[i]), &mut gains);
            self.gains[first + i] = tree_sum(gains);
        }
    }
}

/// Sum of 16 lanes in a fixed tree: i + 8, then i + 4, i + 2, i + 1.
#[inline(always)]
fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests;
