//! Orthogonal matrices that are cheap to multiply with: Hadamard matrices where the size allows, with seeded signs.
//!
//! ```text
//! Q[i][j] = sign_i * product over factors f of F_f[i_f][j_f]        i_f, j_f: digits of i and j, most significant first
//! ```
//!
//! A factor is a Hadamard matrix divided by the root of its order (orders 2, and 4 d by Paley's two constructions;
//! Paley, J. Math. Phys. 12, 1933), or, for an odd part of the size that no Hadamard matrix reaches, an orthogonal
//! matrix drawn from the seed. Arithmetic is f64 in a fixed order: the same seed gives the same bits on every machine.

use std::f64::consts::TAU;

/// Orders above this are not looked for as a single Hadamard factor: splitting costs less.
const LARGEST_FACTOR: usize = 128;

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Orthogonal {
    signs: Vec<f64>,
    factors: Vec<Factor>,
}

/// A small orthogonal matrix, row-major.
#[derive(Debug, Clone, PartialEq)]
struct Factor {
    len: usize,
    values: Vec<f64>,
    hadamard: bool,
}

/// SplitMix64 (Steele, Lea, Flood 2014): one stream of 64-bit numbers a seed.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller), by the portable elementary functions of `libm`.
    fn normal(&mut self) -> f64 {
        let (radius, turn) = (self.uniform(), self.uniform());
        libm::sqrt(-2.0 * libm::log(radius)) * libm::cos(TAU * turn)
    }
}

impl Orthogonal {
    /// The matrix of this size and seed.
    pub fn seeded(len: usize, seed: u64) -> Self {
        let mut draws = Draws(seed);
        let signs = (0..len)
            .map(|_| if draws.next() >> 63 == 0 { 1.0 } else { -1.0 })
            .collect();
        let mut factors: Vec<Factor> = Vec::new();
        let (twos, odd) = (
            len.max(1).trailing_zeros() as usize,
            len.max(1) >> len.max(1).trailing_zeros(),
        );
        let (orders, used, rest) = hadamard_orders(odd, twos);
        factors.extend(orders.into_iter().map(hadamard));
        if rest > 1 {
            factors.push(drawn(rest, &mut draws));
        }
        factors.extend((used..twos).map(|_| hadamard(2)));
        Self { signs, factors }
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.signs.len()
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.signs.is_empty()
    }

    /// Whether all its entries have one magnitude.
    pub fn is_hadamard(&self) -> bool {
        self.factors.iter().all(|f| f.hadamard)
    }

    /// Its factors, such as `hadamard 12 x 12 x 2 x 2`.
    pub fn describe(&self) -> String {
        let name = |f: &Factor| match f.hadamard {
            true => f.len.to_string(),
            false => format!("seeded {}", f.len),
        };
        let names: Vec<String> = self.factors.iter().map(name).collect();
        let kind = if self.is_hadamard() {
            "hadamard"
        } else {
            "orthogonal"
        };
        format!("{kind} {}", names.join(" x "))
    }

    /// `Q[i][j]` by the formula.
    pub fn entry(&self, i: usize, j: usize) -> f64 {
        let (mut row, mut column, mut value) = (i, j, self.signs[i]);
        for factor in self.factors.iter().rev() {
            value *= factor.values[row % factor.len * factor.len + column % factor.len];
            row /= factor.len;
            column /= factor.len;
        }
        value
    }

    /// Replaces every vector x along the middle axis of `data`, (outer, len, inner), by x Q.
    ///
    /// # Panics
    ///
    /// When `data` is no whole number of (len, inner) matrices.
    pub fn rotate(&self, data: &mut [f64], inner: usize) {
        let matrix = self.len() * inner;
        assert!(matrix > 0 && data.len().is_multiple_of(matrix), "shape");
        let mut image = vec![0f64; matrix];
        for data in data.chunks_exact_mut(matrix) {
            for (row, sign) in data.chunks_exact_mut(inner).zip(&self.signs) {
                row.iter_mut().for_each(|x| *x *= sign);
            }
            let mut stride = matrix;
            for factor in &self.factors {
                let block = stride;
                stride /= factor.len;
                for (from, to) in data.chunks_exact(block).zip(image.chunks_exact_mut(block)) {
                    factor.apply(from, to, stride);
                }
                data.copy_from_slice(&image);
            }
        }
    }

    /// As [`rotate`](Self::rotate), by the transposed matrix: x Q^T, which undoes it up to rounding.
    ///
    /// # Panics
    ///
    /// As [`rotate`](Self::rotate).
    pub fn rotate_back(&self, data: &mut [f64], inner: usize) {
        let unsigned = Self {
            signs: vec![1.0; self.len()],
            factors: self.factors.iter().map(Factor::transposed).collect(),
        };
        unsigned.rotate(data, inner);
        for matrix in data.chunks_exact_mut(self.len() * inner) {
            for (row, sign) in matrix.chunks_exact_mut(inner).zip(&self.signs) {
                row.iter_mut().for_each(|x| *x *= sign);
            }
        }
    }
}

impl Factor {
    fn transposed(&self) -> Self {
        let at = |at: usize| self.values[at % self.len * self.len + at / self.len];
        Self {
            values: (0..self.len * self.len).map(at).collect(),
            ..self.clone()
        }
    }

    /// `to[j] = sum over i of from[i] * F[i][j]`, for runs of `stride` values.
    fn apply(&self, from: &[f64], to: &mut [f64], stride: usize) {
        to.fill(0.0);
        for (from, row) in from.chunks_exact(stride).zip(self.values.chunks_exact(self.len)) {
            for (to, f) in to.chunks_exact_mut(stride).zip(row) {
                to.iter_mut().zip(from).for_each(|(to, x)| *to += x * f);
            }
        }
    }
}

/// Hadamard orders whose product has the odd part `odd`, the twos they use up, and what of `odd` is left over.
fn hadamard_orders(odd: usize, twos: usize) -> (Vec<usize>, usize, usize) {
    let (mut orders, mut used, mut rest) = (Vec::new(), 0, odd);
    while rest > 1 && used + 2 <= twos {
        let fits = |d: &usize| rest.is_multiple_of(*d) && 4 * d <= LARGEST_FACTOR && paley(4 * d).is_some();
        let Some(largest) = (3..=rest).rev().step_by(2).find(fits) else {
            break;
        };
        orders.push(4 * largest);
        used += 2;
        rest /= largest;
    }
    (orders, used, rest)
}

fn is_prime(n: usize) -> bool {
    n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// chi(x): 0 for 0, 1 for squares modulo the prime q, -1 for the others.
fn character(x: usize, q: usize) -> i8 {
    match x % q {
        0 => 0,
        x if (1..q).any(|y| y * y % q == x) => 1,
        _ => -1,
    }
}

/// A Hadamard matrix of this order (a multiple of four) by Paley's constructions over a prime field, as signs.
fn paley(order: usize) -> Option<Vec<i8>> {
    let first = order - 1;
    if is_prime(first) && first % 4 == 3 {
        // I + S with S skew: a border of ones around chi(i - j).
        let entry = |i: usize, j: usize| match (i, j) {
            (i, j) if i == j => 1,
            (0, _) => 1,
            (_, 0) => -1,
            (i, j) => character(first + i - j, first),
        };
        return Some(
            (0..order * order)
                .map(|at| entry(at / order, at % order))
                .collect(),
        );
    }
    let second = (order / 2).checked_sub(1)?;
    if is_prime(second) && second % 4 == 1 {
        // Each entry of the symmetric conference matrix becomes a 2 x 2 block.
        let conference = |i: usize, j: usize| match (i, j) {
            (i, j) if i == j => 0,
            (0, _) | (_, 0) => 1,
            (i, j) => character(second + i - j, second),
        };
        let entry = |i: usize, j: usize| match (conference(i / 2, j / 2), i % 2, j % 2) {
            (0, 0, 0) => 1,
            (0, _, _) => -1,
            (c, 1, 1) => -c,
            (c, _, _) => c,
        };
        return Some(
            (0..order * order)
                .map(|at| entry(at / order, at % order))
                .collect(),
        );
    }
    None
}

fn hadamard(order: usize) -> Factor {
    let signs = match order {
        2 => Some(vec![1, 1, 1, -1]),
        order => paley(order),
    };
    let scale = 1.0 / libm::sqrt(order as f64);
    Factor {
        len: order,
        values: signs
            .unwrap_or_default()
            .into_iter()
            .map(|s| f64::from(s) * scale)
            .collect(),
        hadamard: true,
    }
}

/// An orthogonal matrix drawn evenly: rows of normal numbers, made orthogonal one after the other (twice, so that
/// rounding leaves nothing).
fn drawn(len: usize, draws: &mut Draws) -> Factor {
    let mut values: Vec<f64> = (0..len * len).map(|_| draws.normal()).collect();
    for i in 0..len {
        let (before, rest) = values.split_at_mut(i * len);
        let row = &mut rest[..len];
        for _ in 0..2 {
            for other in before.chunks_exact(len) {
                let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let norm = libm::sqrt(row.iter().map(|a| a * a).sum());
        row.iter_mut().for_each(|a| *a /= norm);
    }
    Factor {
        len,
        values,
        hadamard: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [(usize, bool); 16] = [
        (1, true),
        (2, true),
        (7, false),
        (12, true),
        (18, false),
        (20, true),
        (28, true),
        (36, true),
        (48, true),
        (60, true),
        (64, true),
        (80, true),
        (96, true),
        (112, true),
        (172, false),
        (576, true),
    ];

    #[test]
    fn turned_back() {
        for (len, _) in SIZES {
            let q = Orthogonal::seeded(len, 5);
            let before: Vec<f64> = (0..2 * len * 3).map(|i| ((i * 37 + 11) % 101) as f64).collect();
            let mut data = before.clone();
            q.rotate(&mut data, 3);
            assert!(
                len < 3 || data.iter().zip(&before).any(|(a, b)| (a - b).abs() > 1.0),
                "{len}"
            );
            q.rotate_back(&mut data, 3);
            assert!(
                data.iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-10),
                "{len}"
            );
        }
    }

    #[test]
    fn orthogonal_to_the_last_digits() {
        for (len, hadamard) in SIZES {
            let q = Orthogonal::seeded(len, 3);
            assert_eq!((q.len(), q.is_hadamard()), (len, hadamard), "{}", q.describe());
            let rows: Vec<Vec<f64>> = (0..len)
                .map(|i| (0..len).map(|j| q.entry(i, j)).collect())
                .collect();
            for i in (0..len).step_by(1 + len / 40) {
                for j in 0..len {
                    let dot: f64 = rows[i].iter().zip(&rows[j]).map(|(a, b)| a * b).sum();
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((dot - expected).abs() < 1e-13, "{len}: rows {i} and {j}: {dot}");
                }
                let level = 1.0 / (len as f64).sqrt();
                let even = rows[i].iter().all(|v| (v.abs() - level).abs() < 1e-13);
                assert_eq!(even, hadamard, "{len}");
            }
        }
    }

    #[test]
    fn rotating_is_multiplying_by_the_entries() {
        for (len, _) in SIZES {
            let q = Orthogonal::seeded(len, 11);
            let (outer, inner) = (2, 3);
            let x: Vec<f64> = (0..outer * len * inner)
                .map(|i| ((i * i * 7 + 3 * i) % 23) as f64 - 11.0)
                .collect();
            let mut rotated = x.clone();
            q.rotate(&mut rotated, inner);
            for o in 0..outer {
                for j in (0..len).step_by(1 + len / 50) {
                    for r in 0..inner {
                        let at = |i: usize| (o * len + i) * inner + r;
                        let expected: f64 = (0..len).map(|i| x[at(i)] * q.entry(i, j)).sum();
                        assert!((rotated[at(j)] - expected).abs() < 1e-11, "{len} {o} {j} {r}");
                    }
                }
            }
        }
    }

    #[test]
    fn seeds_decide_and_the_bits_are_fixed() {
        assert_eq!(Orthogonal::seeded(48, 5), Orthogonal::seeded(48, 5));
        assert_ne!(Orthogonal::seeded(48, 5), Orthogonal::seeded(48, 6));
        assert_eq!(
            Orthogonal::seeded(576, 0).describe(),
            "hadamard 36 x 2 x 2 x 2 x 2"
        );
        assert_eq!(
            Orthogonal::seeded(172, 0).describe(),
            "orthogonal seeded 43 x 2 x 2"
        );
        // The first draws of SplitMix64 for seed 0, as published with it.
        let mut draws = Draws(0);
        assert_eq!(
            (draws.next(), draws.next()),
            (0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4)
        );
    }
}
