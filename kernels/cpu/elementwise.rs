//! Operations that look at one element, or one row, at a time: sums, gates, activations, rotary embedding. Owns
//! how they are shared out among threads; the functions are in `functions.rs`.

use rayon::prelude::*;

use super::functions::apply;
use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};
use crate::backend::{Activation, RopeStyle, RopeTable};

/// Numbers that one task works on; fewer are not worth a second thread.
const PART: usize = 16 << 10;

/// Rows of a task, for rows of this length.
pub(super) fn rows_of_task(columns: usize) -> usize {
    (PART / columns.max(1)).max(1)
}

/// x += y, where `y` may be one row that is added to each.
pub(super) fn add(isa: Isa, x: &mut [f32], y: &[f32]) {
    if x.len() == y.len() {
        let parts = x.par_chunks_mut(PART).zip(y.par_chunks(PART));
        parts.for_each(|(x, y)| isa.run(Add(x, y, y.len())));
    } else if !y.is_empty() {
        x.par_chunks_mut(rows_of_task(y.len()) * y.len())
            .for_each(|x| isa.run(Add(x, y, y.len())));
    }
}

struct Add<'a>(&'a mut [f32], &'a [f32], usize);

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let Add(x, y, columns) = self;
        for x in x.chunks_mut(columns) {
            for (x, y) in x.iter_mut().zip(y) {
                *x += y;
            }
        }
    }
}

/// f(x), in place.
pub(super) fn activate(isa: Isa, x: &mut [f32], f: Activation) {
    x.par_chunks_mut(PART).for_each(|x| isa.run(Activate(x, None, f)));
}

/// gate = f(gate) * up, in place.
pub(super) fn gate(isa: Isa, gate: &mut [f32], up: &[f32], f: Activation) {
    let parts = gate.par_chunks_mut(PART).zip(up.par_chunks(PART));
    parts.for_each(|(gate, up)| isa.run(Activate(gate, Some(up), f)));
}

struct Activate<'a>(&'a mut [f32], Option<&'a [f32]>, Activation);

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let Activate(x, up, f) = self;
        match f {
            Activation::Silu => map::<V, 0>(v, x, up),
            Activation::Gelu => map::<V, 1>(v, x, up),
            Activation::GeluTanh => map::<V, 2>(v, x, up),
            Activation::Relu => map::<V, 3>(v, x, up),
            Activation::Tanh => map::<V, 4>(v, x, up),
        }
    }
}

/// Functions as the numbers that [`map`] is compiled for.
const FUNCTIONS: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
];

/// x = f(x), times `up` where there is one.
#[inline(always)]
fn map<V: Vector, const F: usize>(v: V, x: &mut [f32], up: Option<&[f32]>) {
    let f = FUNCTIONS[F];
    let (blocks, tail) = x.as_chunks_mut::<LANES>();
    let (up_blocks, up_tail) = up.map_or((None, None), |up| {
        let (blocks, tail) = up.as_chunks::<LANES>();
        (Some(blocks), Some(tail))
    });
    for (i, block) in blocks.iter_mut().enumerate() {
        let mut y = apply(v, f, v.load(block));
        if let Some(up) = up_blocks {
            y = v.mul(y, v.load(&up[i]));
        }
        v.store(y, block);
    }
    if !tail.is_empty() {
        let mut y = apply(v, f, v.load_partial(tail, 0.0));
        if let Some(up) = up_tail {
            y = v.mul(y, v.load_partial(up, 0.0));
        }
        let mut lanes = [0.0; LANES];
        v.store(y, &mut lanes);
        tail.copy_from_slice(&lanes[..tail.len()]);
    }
}

/// Turns the heads of each row by the angles of its position.
pub(super) fn rope(isa: Isa, x: &mut [f32], columns: usize, positions: &[u32], table: &RopeTable) {
    let rows = rows_of_task(columns);
    x.par_chunks_mut(rows * columns)
        .zip(positions.par_chunks(rows))
        .for_each(|(x, positions)| {
            isa.run(Rope {
                x,
                columns,
                positions,
                table,
            });
        });
}

struct Rope<'a> {
    x: &'a mut [f32],
    columns: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let half = self.table.half;
        for (row, &position) in self.x.chunks_exact_mut(self.columns).zip(self.positions) {
            let from = position as usize * half;
            let (cos, sin) = (&self.table.cos[from..][..half], &self.table.sin[from..][..half]);
            for head in row.chunks_exact_mut(2 * half) {
                match self.table.style {
                    RopeStyle::Halves => {
                        let (first, second) = head.split_at_mut(half);
                        let angles = cos.iter().zip(sin);
                        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(angles) {
                            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                        }
                    }
                    RopeStyle::Pairs => {
                        let (pairs, _) = head.as_chunks_mut::<2>();
                        for ([a, b], (cos, sin)) in pairs.iter_mut().zip(cos.iter().zip(sin)) {
                            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                        }
                    }
                }
            }
        }
    }
}

/// `into[rows[i]] += weights[i] * x[i]`, i rising.
pub(super) fn scatter_add(isa: Isa, into: &mut [f32], columns: usize, rows: &[usize], x: &[f32], w: &[f32]) {
    isa.run(ScatterAdd {
        into,
        columns,
        rows,
        x,
        w,
    });
}

struct ScatterAdd<'a> {
    into: &'a mut [f32],
    columns: usize,
    rows: &'a [usize],
    x: &'a [f32],
    w: &'a [f32],
}

impl Kernel for ScatterAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let rows = self
            .rows
            .iter()
            .zip(self.x.chunks_exact(self.columns))
            .zip(self.w);
        for ((&row, x), weight) in rows {
            let target = &mut self.into[row * self.columns..][..self.columns];
            for (t, x) in target.iter_mut().zip(x) {
                *t += weight * x;
            }
        }
    }
}
