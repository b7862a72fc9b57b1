//! The nearest of 256 codewords for one vector of four weights in a metric of its own, and the sum of a few
//! scaled rows that carries an error on to later columns. Owns both loops; where metrics and errors come from is
//! the caller's business.
//!
//! ```text
//! minimise over codewords c   (t - c) B (t - c)^T         B symmetric, 4 x 4
//! that is, maximise           l . c - sum over i <= j of b_ij c_i c_j,   l = 2 t B
//! ```

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// Codewords of a book.
const WORDS: usize = 256;
/// Linear and quadratic terms of a codeword.
const TERMS: usize = 14;
/// Indices of the ten products, squares first.
pub const PRODUCTS: [(usize, usize); 10] = [
    (0, 0),
    (1, 1),
    (2, 2),
    (3, 3),
    (0, 1),
    (0, 2),
    (0, 3),
    (1, 2),
    (1, 3),
    (2, 3),
];

/// A codebook with the products its search needs: terms by codewords.
#[derive(Debug, Clone)]
pub struct MetricBook {
    terms: Box<[[f32; WORDS]; TERMS]>,
}

impl MetricBook {
    /// Prepares 256 codewords.
    pub fn new(book: &[[i8; 4]; WORDS]) -> Self {
        let mut terms = Box::new([[0.0; WORDS]; TERMS]);
        for (byte, word) in book.iter().enumerate() {
            let c = word.map(f32::from);
            for i in 0..4 {
                terms[i][byte] = c[i];
            }
            for (term, (i, j)) in terms[4..].iter_mut().zip(PRODUCTS) {
                term[byte] = c[i] * c[j];
            }
        }
        Self { terms }
    }
}

/// A metric of four weights, ready for the search.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metric {
    /// B, row by row.
    pub b: [[f32; 4]; 4],
    /// -b_ii, then -(b_ij + b_ji), in the order of [`PRODUCTS`].
    quadratic: [f32; 10],
}

impl Metric {
    /// The metric with this symmetric B.
    pub fn new(b: [[f32; 4]; 4]) -> Self {
        let quadratic = PRODUCTS.map(|(i, j)| if i == j { -b[i][i] } else { -(b[i][j] + b[j][i]) });
        Self { b, quadratic }
    }
}

/// The byte whose codeword is nearest to `t` in the metric; of equally near ones the lowest. All instruction
/// sets give the same byte.
pub fn nearest_in_metric(isa: Isa, book: &MetricBook, t: [f32; 4], metric: &Metric) -> u8 {
    let mut linear = [0.0; 4];
    for (i, linear) in linear.iter_mut().enumerate() {
        let b = &metric.b;
        *linear = 2.0 * (t[0] * b[0][i] + t[1] * b[1][i] + t[2] * b[2][i] + t[3] * b[3][i]);
    }
    isa.run(Nearest {
        book,
        linear,
        quadratic: metric.quadratic,
    })
}

struct Nearest<'a> {
    book: &'a MetricBook,
    linear: [f32; 4],
    quadratic: [f32; 10],
}

impl Kernel for Nearest<'_> {
    type Output = u8;

    #[inline(always)]
    fn run<V: Vector>(self, v: V) -> u8 {
        let mut scores = [[0.0f32; LANES]; WORDS / LANES];
        let mut best = v.splat(f32::NEG_INFINITY);
        for (chunk, scores) in scores.iter_mut().enumerate() {
            let term = |i: usize| -> &[f32; LANES] { &self.book.terms[i].as_chunks::<LANES>().0[chunk] };
            let mut a = v.mul(v.splat(self.linear[0]), v.load(term(0)));
            let mut b = v.mul(v.splat(self.quadratic[0]), v.load(term(4)));
            for i in 1..4 {
                a = v.add(a, v.mul(v.splat(self.linear[i]), v.load(term(i))));
            }
            for i in 1..10 {
                b = v.add(b, v.mul(v.splat(self.quadratic[i]), v.load(term(4 + i))));
            }
            let score = v.add(a, b);
            v.store(score, scores);
            best = v.max(best, score);
        }
        let mut lanes = [0.0; LANES];
        v.store(best, &mut lanes);
        let top = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
        for (chunk, scores) in scores.iter().enumerate() {
            let mut found = LANES;
            for i in (0..LANES).rev() {
                if scores[i] == top {
                    found = i;
                }
            }
            if found < LANES {
                return (chunk * LANES + found) as u8;
            }
        }
        0
    }
}

/// `out[k] += sum over i of a[i] * rows[i][k]`, i rising, each product and sum rounded by itself: the same bits
/// on all instruction sets.
///
/// # Panics
///
/// If a row is shorter than `out`.
pub fn add_scaled(isa: Isa, a: [f32; 4], rows: [&[f32]; 4], out: &mut [f32]) {
    assert!(
        rows.iter().all(|row| row.len() >= out.len()),
        "rows as long as out"
    );
    isa.run(AddScaled { a, rows, out });
}

struct AddScaled<'a> {
    a: [f32; 4],
    rows: [&'a [f32]; 4],
    out: &'a mut [f32],
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let len = self.out.len();
        let rows = self.rows.map(|row| row[..len].as_chunks::<LANES>());
        let (outs, tail) = self.out.as_chunks_mut::<LANES>();
        let a = [
            v.splat(self.a[0]),
            v.splat(self.a[1]),
            v.splat(self.a[2]),
            v.splat(self.a[3]),
        ];
        for (chunk, out) in outs.iter_mut().enumerate() {
            let mut sum = v.load(out);
            for (a, row) in a.iter().zip(&rows) {
                sum = v.add(sum, v.mul(*a, v.load(&row.0[chunk])));
            }
            v.store(sum, out);
        }
        for (k, out) in tail.iter_mut().enumerate() {
            for (a, row) in self.a.iter().zip(&rows) {
                *out += a * row.1[k];
            }
        }
    }
}
