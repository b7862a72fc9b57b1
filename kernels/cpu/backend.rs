//! [`Backend`] on the processor. Owns the choice of the page that does each operation.

use super::attention::{Call, Rowed, attention};
use super::divergence::divergences;
use super::gemv::{FEW, gemv};
use super::gram::gram;
use super::isa::Isa;
use super::matmul::matmul;
use super::simd::view::{View, ViewMut};
use super::sums::CpuSums;
use super::weight::CpuWeight;
use super::{elementwise, embed, norm};
use crate::backend::{
    Activation, Backend, Divergence, Fault, Heads, HostWeight, InputSums, RopeTable, Segment,
};

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

    fn rowed(&self) -> Rowed<'_> {
        Rowed {
            values: &self.values,
            columns: self.columns,
        }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.columns.max(1)
    }
}

impl Backend for CpuBackend {
    type Tensor = Matrix;
    type Weight = CpuWeight;
    type Sums = CpuSums;

    /// On a thread of the pool, which hands work to the others without waking up for each operation.
    fn within<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        rayon::scope(|_| f())
    }

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

    fn divergences(&self, base: &Matrix, candidate: &Matrix, targets: &[u32]) -> Vec<Option<Divergence>> {
        assert_eq!(base.columns, candidate.columns, "columns");
        divergences(&base.values, &candidate.values, targets)
    }

    fn dims(&self, x: &Matrix) -> (usize, usize) {
        (x.rows(), x.columns)
    }

    fn weight(&self, weight: &HostWeight) -> CpuWeight {
        CpuWeight::new(self.isa, weight)
    }

    fn embed(&self, table: &CpuWeight, ids: &[u32]) -> Matrix {
        let mut out = Matrix::zeros(ids.len(), table.k);
        embed::embed(self.isa, table, ids, &mut out.values);
        out
    }

    fn matmul(&self, x: &Matrix, w: &CpuWeight) -> Matrix {
        assert_eq!(x.columns, w.k, "columns of x and of w");
        let mut out = Matrix::zeros(x.rows(), w.n);
        let view = View::new(&x.values, w.k, x.rows(), w.k);
        let target = ViewMut::new(&mut out.values, w.n);
        match x.rows() {
            0 => {}
            1..=FEW => gemv(self.isa, view, w, target),
            _ => matmul(self.isa, view, w, target),
        }
        out
    }

    fn add(&self, x: &mut Matrix, y: &Matrix) {
        assert_eq!(x.columns, y.columns, "columns");
        assert!(y.rows() == 1 || x.rows() == y.rows(), "rows");
        elementwise::add(self.isa, &mut x.values, &y.values);
    }

    fn rms_norm(&self, x: &Matrix, gain: &Matrix, eps: f32) -> Matrix {
        assert!(x.columns.is_multiple_of(gain.columns), "whole stretches");
        let mut out = Matrix::zeros(x.rows(), x.columns);
        norm::rms_norm(self.isa, &x.values, &gain.values, eps, &mut out.values);
        out
    }

    fn layer_norm(&self, x: &Matrix, gain: &Matrix, bias: &Matrix, eps: f32) -> Matrix {
        assert!(x.columns == gain.columns && x.columns == bias.columns, "columns");
        let mut out = Matrix::zeros(x.rows(), x.columns);
        norm::layer_norm(
            self.isa,
            &x.values,
            &gain.values,
            &bias.values,
            eps,
            &mut out.values,
        );
        out
    }

    fn rope(&self, x: &mut Matrix, positions: &[u32], table: &RopeTable) {
        assert_eq!(x.rows(), positions.len(), "a position for each row");
        elementwise::rope(self.isa, &mut x.values, x.columns, positions, table);
    }

    fn attention(
        &self,
        q: &Matrix,
        keys: &Matrix,
        values: &Matrix,
        segments: &[Segment],
        heads: Heads,
    ) -> Matrix {
        assert_eq!(q.columns, heads.query * heads.dim, "columns of q");
        assert_eq!(keys.columns, heads.kv * heads.dim, "columns of keys");
        assert_eq!(values.columns, heads.kv * heads.dim, "columns of values");
        let mut out = Matrix::zeros(q.rows(), q.columns);
        let call = Call {
            q: q.rowed(),
            keys: keys.rowed(),
            values: values.rowed(),
            heads,
        };
        attention(self.isa, call, segments, &mut out.values);
        out
    }

    fn activate(&self, x: &mut Matrix, f: Activation) {
        elementwise::activate(self.isa, &mut x.values, f);
    }

    fn gate(&self, gate: &mut Matrix, up: &Matrix, f: Activation) {
        assert_eq!(gate.values.len(), up.values.len(), "rows and columns");
        elementwise::gate(self.isa, &mut gate.values, &up.values, f);
    }

    fn gather(&self, x: &Matrix, rows: &[usize]) -> Matrix {
        let row = |&r: &usize| x.values[r * x.columns..(r + 1) * x.columns].iter().copied();
        Matrix {
            columns: x.columns,
            values: rows.iter().flat_map(row).collect(),
        }
    }

    fn scatter_add(&self, into: &mut Matrix, rows: &[usize], x: &Matrix, weights: &[f32]) {
        assert_eq!(into.columns, x.columns, "columns");
        let columns = x.columns;
        elementwise::scatter_add(self.isa, &mut into.values, columns, rows, &x.values, weights);
    }

    fn place(&self, into: &mut Matrix, at: usize, x: &Matrix) {
        assert_eq!(into.columns, x.columns, "columns");
        into.values[at * x.columns..][..x.values.len()].copy_from_slice(&x.values);
    }

    fn gram(&self, x: &Matrix, moment: &mut [f64]) {
        assert_eq!(moment.len(), x.columns * x.columns, "K x K");
        gram(&x.values, x.columns, moment);
    }

    fn sums(&self, columns: usize, full: bool) -> CpuSums {
        CpuSums::new(columns, full)
    }

    fn watch(&self, x: &Matrix, sums: &mut CpuSums) {
        sums.add(&x.values);
    }

    fn summed(&self, sums: CpuSums) -> Result<InputSums, Fault> {
        Ok(sums.take())
    }
}
