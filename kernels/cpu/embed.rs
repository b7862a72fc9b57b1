//! Rows of a weight as activations. Owns the decoding of whole rows into memory.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};
use super::weight::{CpuWeight, ForRows, QUAD, Row, Rows};

/// Row `ids[i]` of the table becomes row i of `out`.
pub(super) fn embed(isa: Isa, table: &CpuWeight, ids: &[u32], out: &mut [f32]) {
    table.with_rows(Embed {
        isa,
        k: table.k,
        ids,
        out,
    });
}

struct Embed<'a> {
    isa: Isa,
    k: usize,
    ids: &'a [u32],
    out: &'a mut [f32],
}

impl ForRows for Embed<'_> {
    type Output = ();

    fn run<R: Rows>(self, rows: R) {
        self.isa.run(EmbedRows(self, rows));
    }
}

struct EmbedRows<'a, R>(Embed<'a>, R);

impl<R: Rows> Kernel for EmbedRows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let EmbedRows(e, rows) = self;
        for (out, &id) in e.out.chunks_exact_mut(e.k).zip(e.ids) {
            let row = rows.row(id as usize);
            for (q, out) in out.chunks_mut(QUAD).enumerate() {
                let values = if out.len() == QUAD {
                    row.quad::<V, true>(v, q)
                } else {
                    row.quad::<V, false>(v, q)
                };
                for (out, value) in out.chunks_mut(LANES).zip(values) {
                    let mut lanes = [0.0; LANES];
                    v.store(value, &mut lanes);
                    out.copy_from_slice(&lanes[..out.len()]);
                }
            }
        }
    }
}
