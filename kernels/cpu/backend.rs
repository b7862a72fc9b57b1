//! [`Backend`] on the processor. Owns the choice of the page that does each operation.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use qtool_formats::{FloatDtype, QuantizedWeight};
use rayon::prelude::*;

use super::isa::Isa;
use super::widen::{widen_bf16, widen_f16, widen_f32};
use crate::backend::{Activation, Backend, Form, Heads, HostWeight, RopeStyle, RopeTable, Segment};

/// Rows of a weight that are decoded and multiplied together.
const TILE: usize = 64;
/// Numbers that one thread works on at a time, element by element.
const PART: usize = 16 << 10;
/// Rows of activations whose products are summed in f32 by [`Backend::gram`].
const GRAM_ROWS: usize = 512;

/// The processor, with the best instruction set it has.
#[derive(Debug, Clone, Copy)]
pub struct CpuBackend {
    isa: Isa,
}

impl CpuBackend {
    /// On this instruction set.
    pub fn new(isa: Isa) -> Self {
        Self { isa }
    }
}

/// (rows, columns), row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn zeros(rows: usize, columns: usize) -> Self {
        Self {
            columns,
            values: vec![0.0; rows * columns],
        }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.columns.max(1)
    }
}

impl CpuBackend {
    /// Rows `from..` of a weight as f32, as many as fit `out`.
    fn decode_rows(&self, w: &HostWeight, from: usize, out: &mut [f32]) {
        let rows = out.len() / w.k;
        match &w.form {
            Form::Dense { dtype, bytes } => {
                let width = dtype.bytes();
                let bytes = &bytes.bytes()[from * w.k * width..][..out.len() * width];
                match dtype {
                    FloatDtype::Bf16 => widen_bf16(self.isa, bytes, out),
                    FloatDtype::F16 => widen_f16(self.isa, bytes, out),
                    FloatDtype::F32 => widen_f32(self.isa, bytes, out),
                }
            }
            Form::Packed { scheme, parts } => {
                let forms = scheme.parts(w.n, w.k).expect("a weight that fits its scheme");
                let slices: Vec<&[u8]> = forms
                    .iter()
                    .zip(parts)
                    .map(|(form, part)| &part.bytes()[from * form.row_bytes..(from + rows) * form.row_bytes])
                    .collect();
                let weight =
                    QuantizedWeight::decode(*scheme, rows, w.k, &slices).expect("a weight that was checked");
                for (row, out) in out.chunks_exact_mut(w.k).enumerate() {
                    weight.dequantize_row(row, out);
                }
            }
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Matrix;
    type Weight = HostWeight;

    fn upload(&self, values: &[f32], columns: usize) -> Matrix {
        assert_eq!(values.len() % columns, 0, "whole rows");
        Matrix {
            columns,
            values: values.to_vec(),
        }
    }

    fn download(&self, x: &Matrix) -> Vec<f32> {
        x.values.clone()
    }

    fn dims(&self, x: &Matrix) -> (usize, usize) {
        (x.rows(), x.columns)
    }

    fn weight(&self, weight: &HostWeight) -> HostWeight {
        weight.clone()
    }

    fn embed(&self, table: &HostWeight, ids: &[u32]) -> Matrix {
        let mut out = Matrix::zeros(ids.len(), table.k);
        for (row, &id) in out.values.chunks_exact_mut(table.k).zip(ids) {
            self.decode_rows(table, id as usize, row);
        }
        out
    }

    fn matmul(&self, x: &Matrix, w: &HostWeight) -> Matrix {
        assert_eq!(x.columns, w.k, "columns of x and of w");
        let m = x.rows();
        let x = MatRef::from_row_major_slice(&x.values, m, w.k);
        let tiles: Vec<Vec<f32>> = (0..w.n.div_ceil(TILE))
            .into_par_iter()
            .map(|tile| {
                let from = tile * TILE;
                let rows = TILE.min(w.n - from);
                let mut decoded = vec![0.0; rows * w.k];
                self.decode_rows(w, from, &mut decoded);
                let mut out = vec![0.0; m * rows];
                let w = MatRef::from_row_major_slice(&decoded, rows, w.k).transpose();
                let target = MatMut::from_row_major_slice_mut(&mut out, m, rows);
                matmul(target, Accum::Replace, x, w, 1.0, Par::Seq);
                out
            })
            .collect();
        let mut out = Matrix::zeros(m, w.n);
        for (row, out) in out.values.chunks_exact_mut(w.n).enumerate() {
            for (tile, out) in tiles.iter().zip(out.chunks_mut(TILE)) {
                out.copy_from_slice(&tile[row * out.len()..][..out.len()]);
            }
        }
        out
    }

    fn add(&self, x: &mut Matrix, y: &Matrix) {
        assert_eq!(x.columns, y.columns, "columns");
        if y.rows() == 1 {
            for x in x.values.chunks_exact_mut(y.columns) {
                x.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
            }
        } else {
            assert_eq!(x.values.len(), y.values.len(), "rows");
            x.values.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
        }
    }

    fn rms_norm(&self, x: &Matrix, gain: &Matrix, eps: f32) -> Matrix {
        let mut out = x.clone();
        for row in out.values.chunks_exact_mut(gain.columns) {
            let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            row.iter_mut()
                .zip(&gain.values)
                .for_each(|(x, g)| *x = *x * scale * g);
        }
        out
    }

    fn layer_norm(&self, x: &Matrix, gain: &Matrix, bias: &Matrix, eps: f32) -> Matrix {
        let mut out = x.clone();
        for row in out.values.chunks_exact_mut(x.columns) {
            let count = row.len() as f32;
            let mean = row.iter().sum::<f32>() / count;
            let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / count;
            let scale = 1.0 / (variance + eps).sqrt();
            let affine = gain.values.iter().zip(&bias.values);
            row.iter_mut()
                .zip(affine)
                .for_each(|(x, (g, b))| *x = (*x - mean) * scale * g + b);
        }
        out
    }

    fn rope(&self, x: &mut Matrix, positions: &[u32], table: &RopeTable) {
        let half = table.half;
        for (row, &position) in x.values.chunks_exact_mut(x.columns).zip(positions) {
            let angles = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&table.cos[angles.clone()], &table.sin[angles]);
            for head in row.chunks_exact_mut(2 * half) {
                for i in 0..half {
                    let (a, b) = match table.style {
                        RopeStyle::Halves => (i, i + half),
                        RopeStyle::Pairs => (2 * i, 2 * i + 1),
                    };
                    let (x, y) = (head[a], head[b]);
                    head[a] = x * cos[i] - y * sin[i];
                    head[b] = y * cos[i] + x * sin[i];
                }
            }
        }
    }

    fn attention(
        &self,
        q: &Matrix,
        keys: &Matrix,
        values: &Matrix,
        segments: &[Segment],
        heads: Heads,
    ) -> Matrix {
        let mut out = Matrix::zeros(q.rows(), q.columns);
        let tasks: Vec<(&Segment, usize)> = segments
            .iter()
            .flat_map(|segment| (0..heads.query).map(move |h| (segment, h)))
            .collect();
        let done: Vec<Vec<f32>> = tasks
            .par_iter()
            .map(|(segment, h)| attend(q, keys, values, segment, heads, *h))
            .collect();
        for ((segment, h), y) in tasks.iter().zip(&done) {
            for (row, y) in segment.queries.clone().zip(y.chunks_exact(heads.dim)) {
                out.values[row * q.columns + h * heads.dim..][..heads.dim].copy_from_slice(y);
            }
        }
        out
    }

    fn activate(&self, x: &mut Matrix, f: Activation) {
        x.values
            .par_chunks_mut(PART)
            .for_each(|part| part.iter_mut().for_each(|x| *x = apply(f, *x)));
    }

    fn gate(&self, gate: &mut Matrix, up: &Matrix, f: Activation) {
        let parts = gate.values.par_chunks_mut(PART).zip(up.values.par_chunks(PART));
        parts.for_each(|(gate, up)| {
            gate.iter_mut()
                .zip(up)
                .for_each(|(gate, up)| *gate = apply(f, *gate) * up);
        });
    }

    fn gather(&self, x: &Matrix, rows: &[usize]) -> Matrix {
        let row = |&r: &usize| x.values[r * x.columns..(r + 1) * x.columns].iter().copied();
        Matrix {
            columns: x.columns,
            values: rows.iter().flat_map(row).collect(),
        }
    }

    fn scatter_add(&self, into: &mut Matrix, rows: &[usize], x: &Matrix, weights: &[f32]) {
        for ((&row, x), weight) in rows.iter().zip(x.values.chunks_exact(x.columns)).zip(weights) {
            let target = &mut into.values[row * x.len()..][..x.len()];
            target.iter_mut().zip(x).for_each(|(t, x)| *t += weight * x);
        }
    }

    fn place(&self, into: &mut Matrix, at: usize, x: &Matrix) {
        assert_eq!(into.columns, x.columns, "columns");
        into.values[at * x.columns..][..x.values.len()].copy_from_slice(&x.values);
    }

    fn gram(&self, x: &Matrix, moment: &mut [f64]) {
        let k = x.columns;
        assert_eq!(moment.len(), k * k, "K x K");
        for block in x.values.chunks(GRAM_ROWS * k) {
            let x = MatRef::from_row_major_slice(block, block.len() / k, k);
            moment
                .par_chunks_mut(TILE * k)
                .enumerate()
                .for_each(|(tile, moment)| {
                    let (rows, from) = (moment.len() / k, tile * TILE);
                    let width = k - from;
                    let mut out = vec![0.0; rows * width];
                    let target = MatMut::from_row_major_slice_mut(&mut out, rows, width);
                    let left = x.subcols(from, rows).transpose();
                    let right = x.subcols(from, width);
                    matmul(target, Accum::Replace, left, right, 1.0f32, Par::Seq);
                    for (moment, out) in moment.chunks_exact_mut(k).zip(out.chunks_exact(width)) {
                        moment[from..]
                            .iter_mut()
                            .zip(out)
                            .for_each(|(m, o)| *m += f64::from(*o));
                    }
                });
        }
        for i in 0..k {
            for j in 0..i {
                moment[i * k + j] = moment[j * k + i];
            }
        }
    }
}

/// One head of one segment: (queries, D).
fn attend(q: &Matrix, keys: &Matrix, values: &Matrix, segment: &Segment, heads: Heads, h: usize) -> Vec<f32> {
    let d = heads.dim;
    let at = h / (heads.query / heads.kv) * d;
    let strided = |x: &Matrix, rows: &Range<usize>, column: usize| -> Vec<f32> {
        let row = |r: usize| x.values[r * x.columns + column..][..d].iter().copied();
        rows.clone().flat_map(row).collect()
    };
    let both = |x: &Matrix| {
        let mut rows = strided(x, &segment.prefix, at);
        rows.extend(strided(x, &segment.own, at));
        rows
    };
    let (count, prefix) = (segment.queries.len(), segment.prefix.len());
    let seen = prefix + segment.own.len();
    let (query, key, value) = (strided(q, &segment.queries, h * d), both(keys), both(values));
    let mut out = vec![0f32; count * d];
    if count == 0 || seen == 0 {
        return out;
    }
    let mut scores = vec![0f32; count * seen];
    matmul(
        MatMut::from_row_major_slice_mut(&mut scores, count, seen),
        Accum::Replace,
        MatRef::from_row_major_slice(&query, count, d),
        MatRef::from_row_major_slice(&key, seen, d).transpose(),
        heads.scale,
        Par::Seq,
    );
    for (i, row) in scores.chunks_exact_mut(seen).enumerate() {
        let visible = if heads.causal { seen + i + 1 - count } else { seen };
        let (row, hidden) = row.split_at_mut(visible);
        hidden.fill(0.0);
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|s| *s = (*s - top).exp());
        let share = 1.0 / row.iter().sum::<f32>();
        row.iter_mut().for_each(|s| *s *= share);
    }
    matmul(
        MatMut::from_row_major_slice_mut(&mut out, count, d),
        Accum::Replace,
        MatRef::from_row_major_slice(&scores, count, seen),
        MatRef::from_row_major_slice(&value, seen, d),
        1.0,
        Par::Seq,
    );
    out
}

fn apply(f: Activation, x: f32) -> f32 {
    match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    }
}
