//! Attention over keys and values where they lie. Owns the cut into tasks and the running softmax.
//!
//! ```text
//! task: a segment, a key head, a run of queries of all its query heads (rows r = query * heads + head)
//!   for each block of at most 256 keys that some row sees, the prefix first:
//!     scores (R, keys) = scale q k^T          a few rows: `gemv.rs`; many: k^T in panels and `matmul.rs`
//!     m' = max(m, scores),  p = exp(scores - m'),  sum = sum exp(m - m') + p
//!     acc (R, D) = acc exp(m - m') + p v      v is read in place
//!   out = acc / sum                           zeros where a row sees nothing
//! ```
//!
//! The running softmax is Milakov and Gimelshein's, "Online normalizer calculation for softmax" (2018), blocked as
//! in FlashAttention. Tasks and blocks are cut by shape alone.

use std::ops::Range;

use rayon::prelude::*;

use super::functions::exp;
use super::gemv::{FEW, dot_rows};
use super::isa::Isa;
use super::matmul::{by_panels, to_panels};
use super::scratch;
use super::simd::tile::{Start, multiply, panel_columns};
use super::simd::view::{View, ViewMut};
use super::simd::{Kernel, LANES, Vector};
use super::weight::{QUAD, Strided};
use crate::backend::{Heads, Segment};

/// Keys of a block: whole panels on every instruction set.
const KEYS: usize = 256;
/// Rows of a task, about.
const ROWS: usize = 96;

/// A (rows, columns) matrix in row-major order.
#[derive(Clone, Copy)]
pub(super) struct Rowed<'a> {
    pub(super) values: &'a [f32],
    pub(super) columns: usize,
}

impl<'a> Rowed<'a> {
    fn view(&self, rows: Range<usize>, from: usize, columns: usize) -> View<'a> {
        let all = View::new(
            self.values,
            self.columns,
            self.values.len() / self.columns.max(1),
            self.columns,
        );
        all.part(rows.start, rows.len(), from, columns)
    }
}

/// One call: what is read, and the layer's sizes.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub(super) q: Rowed<'a>,
    pub(super) keys: Rowed<'a>,
    pub(super) values: Rowed<'a>,
    pub(super) heads: Heads,
}

struct Task<'a, 'b> {
    segment: &'a Segment,
    /// Key head.
    head: usize,
    /// Its queries, counted in the segment.
    queries: Range<usize>,
    /// Their rows, the columns of the key head's query heads.
    out: ViewMut<'b>,
}

/// softmax(scale q k^T) v for each segment, into `out` (M, query * D), which holds zeros.
///
/// # Panics
///
/// If segments share queries, or a range is outside its matrix.
pub(super) fn attention(isa: Isa, call: Call<'_>, segments: &[Segment], out: &mut [f32]) {
    let heads = call.heads;
    let group = heads.query / heads.kv;
    let queries = (ROWS / group).max(1);
    let mut ordered: Vec<&Segment> = segments.iter().filter(|s| !s.queries.is_empty()).collect();
    ordered.sort_by_key(|s| s.queries.start);
    let mut tasks = Vec::new();
    let (mut rest, mut row) = (ViewMut::new(out, heads.query * heads.dim), 0);
    for segment in ordered {
        assert!(segment.queries.start >= row, "segments share queries");
        let (_, below) = rest.split_rows(segment.queries.start - row);
        let (mut own, below) = below.split_rows(segment.queries.len());
        (rest, row) = (below, segment.queries.end);
        for from in (0..segment.queries.len()).step_by(queries) {
            let count = queries.min(segment.queries.len() - from);
            let (run, others) = own.split_rows(count);
            own = others;
            let tiles = run.column_tiles(group * heads.dim);
            tasks.extend(tiles.into_iter().enumerate().map(|(head, out)| Task {
                segment,
                head,
                queries: from..from + count,
                out,
            }));
        }
    }
    tasks.into_par_iter().for_each(|mut task| {
        let rows = task.queries.len() * group;
        let (dim, padded) = (heads.dim, heads.dim.next_multiple_of(QUAD));
        scratch::with(
            [
                rows * padded,
                rows * KEYS,
                rows * dim,
                3 * rows,
                KEYS * dim,
                LANES * padded,
            ],
            |[q, scores, acc, state, panels, strip]| {
                isa.run(Attend {
                    call,
                    task: &mut task,
                    q,
                    scores,
                    acc,
                    state,
                    panels,
                    strip,
                });
            },
        );
    });
}

struct Attend<'a, 'b, 'c> {
    call: Call<'a>,
    task: &'a mut Task<'b, 'c>,
    /// (R, D padded to quads), scaled.
    q: &'a mut [f32],
    /// (R, keys of a block)
    scores: &'a mut [f32],
    /// (R, D)
    acc: &'a mut [f32],
    /// Largest score, sum of exponentials and correction, (3, R).
    state: &'a mut [f32],
    /// Keys of a block as panels.
    panels: &'a mut [f32],
    strip: &'a mut [f32],
}

impl Kernel for Attend<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let Heads { dim, causal, .. } = self.call.heads;
        let group = self.call.heads.query / self.call.heads.kv;
        let (segment, queries) = (self.task.segment, self.task.queries.clone());
        let rows = queries.len() * group;
        let padded = dim.next_multiple_of(QUAD);
        self.acc.fill(0.0);
        let (top, rest) = self.state.split_at_mut(rows);
        let (sum, correction) = rest.split_at_mut(rows);
        top.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        for (r, q) in self.q.chunks_exact_mut(padded).enumerate() {
            let from = self.call.q.columns * (segment.queries.start + queries.start + r / group)
                + (self.task.head * group + r % group) * dim;
            let source = &self.call.q.values[from..from + dim];
            let (q, beyond) = q.split_at_mut(dim);
            for (q, source) in q.iter_mut().zip(source) {
                *q = source * self.call.heads.scale;
            }
            beyond.fill(0.0);
        }
        let (count, own) = (segment.queries.len(), segment.own.len());
        // Of a range of keys that begins as the `before`-th of its kind, how many a query sees.
        let seen = |query: usize, keys: usize, before: usize, is_own: bool| {
            if is_own && causal {
                (own + query + 1).saturating_sub(count + before).min(keys)
            } else {
                keys
            }
        };
        let at = self.task.head * dim;
        for (range, is_own) in [(&segment.prefix, false), (&segment.own, true)] {
            for before in (0..range.len()).step_by(KEYS) {
                let keys = KEYS.min(range.len() - before);
                if seen(queries.end - 1, keys, before, is_own) == 0 {
                    break;
                }
                let here = range.start + before..range.start + before + keys;
                let k = Strided {
                    data: &self.call.keys.values[at..],
                    stride: self.call.keys.columns,
                    columns: dim,
                };
                let scores = &mut self.scores[..rows * keys];
                let mut out = ViewMut::new(scores, keys);
                if rows <= FEW {
                    dot_rows(v, self.q, dim, k, here.start, &mut out);
                } else {
                    to_panels(v, k, here.start, keys, 0, dim, self.strip, self.panels);
                    let q = View::new(self.q, padded, rows, dim);
                    by_panels(v, q, self.panels, &mut out, Start::Zero);
                }
                for (r, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    let visible = seen(queries.start + r / group, keys, before, is_own);
                    let (scores, hidden) = scores.split_at_mut(visible);
                    hidden.fill(0.0);
                    let largest = largest(v, scores).max(top[r]);
                    let total = exponentials(v, scores, largest);
                    correction[r] = if top[r] == largest {
                        1.0
                    } else {
                        (top[r] - largest).exp()
                    };
                    sum[r] = sum[r] * correction[r] + total;
                    top[r] = largest;
                }
                for (acc, correction) in self.acc.chunks_exact_mut(dim).zip(&*correction) {
                    if *correction != 1.0 {
                        acc.iter_mut().for_each(|a| *a *= correction);
                    }
                }
                let p = View::new(scores, keys, rows, keys);
                let values = self.call.values.view(here, at, dim);
                let mut acc = ViewMut::new(self.acc, dim);
                let width = panel_columns(V::KIND);
                for from in (0..dim).step_by(width) {
                    let columns = width.min(dim - from);
                    let panel = values.part(0, keys, from, columns);
                    multiply(v, p, panel, &mut acc.part(0, rows, from, columns), Start::Sum);
                }
            }
        }
        for (r, acc) in self.acc.chunks_exact(dim).enumerate() {
            let out = &mut self.task.out.row(r / group)[r % group * dim..][..dim];
            // A row that sees nothing has no sum, and stays as it is: zeros.
            if top[r] != f32::NEG_INFINITY || sum[r] != 0.0 {
                let share = 1.0 / sum[r];
                out.iter_mut().zip(acc).for_each(|(out, a)| *out = a * share);
            }
        }
    }
}

/// The largest of `x`; of NaN it is unspecified.
#[inline(always)]
fn largest<V: Vector>(v: V, x: &[f32]) -> f32 {
    let mut top = v.splat(f32::NEG_INFINITY);
    let (blocks, tail) = x.as_chunks::<LANES>();
    for block in blocks {
        top = v.max(top, v.load(block));
    }
    top = v.max(top, v.load_partial(tail, f32::NEG_INFINITY));
    let mut lanes = [0.0; LANES];
    v.store(top, &mut lanes);
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// x = exp(x - largest), and their sum: lane by lane, then in the fixed tree.
#[inline(always)]
fn exponentials<V: Vector>(v: V, x: &mut [f32], largest: f32) -> f32 {
    let mut sum = v.splat(0.0);
    let (blocks, tail) = x.as_chunks_mut::<LANES>();
    for block in blocks {
        let e = exp(v, v.sub(v.load(block), v.splat(largest)));
        sum = v.add(sum, e);
        v.store(e, block);
    }
    if !tail.is_empty() {
        let e = exp(
            v,
            v.sub(v.load_partial(tail, f32::NEG_INFINITY), v.splat(largest)),
        );
        sum = v.add(sum, e);
        let mut lanes = [0.0; LANES];
        v.store(e, &mut lanes);
        tail.copy_from_slice(&lanes[..tail.len()]);
    }
    v.sum(sum)
}
