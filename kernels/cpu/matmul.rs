//! Many rows of activations times a weight. Owns the way of a weight through the caches: strips of rows are
//! decoded, turned into panels and multiplied while they are warm; nothing larger than a tile is ever decoded.
//!
//! ```text
//! tile of 96 rows of w, in parallel             -> its columns of the result, in place
//!   block of at most 768 columns of w           -> panels (block, 32) in the second-level cache
//!     rows of x, 12 at a time                   -> their part of the block stays in the first-level cache
//!       panel                                   -> `simd/tile.rs`
//! ```
//!
//! Tiles and blocks are cut by shape alone, and an element of the result is one chain over k however they are cut.

use rayon::prelude::*;

use super::isa::Isa;
use super::scratch;
use super::simd::tile::{Start, multiply, panel_columns};
use super::simd::view::{View, ViewMut};
use super::simd::{Kernel, LANES, Vector};
use super::weight::{CpuWeight, ForRows, QUAD, Row, Rows};

/// Rows of a weight that one task decodes and multiplies: whole panels on every instruction set.
const TILE: usize = 96;
/// Most columns of a weight that are decoded at a time.
const BLOCK: usize = 768;
/// Rows of x that run over all panels of a block before the next do; a multiple of all tiles' rows.
const ROWS: usize = 12;

/// out (M, N) = x (M, K) w (N, K)^T.
pub(super) fn matmul(isa: Isa, x: View<'_>, w: &CpuWeight, out: ViewMut<'_>) {
    out.column_tiles(TILE)
        .into_par_iter()
        .enumerate()
        .for_each(|(tile, mut out)| {
            let from = tile * TILE;
            let block = block_of(w.k);
            scratch::with(
                [TILE * block, LANES * block.next_multiple_of(QUAD)],
                |[panels, strip]| {
                    for at in (0..w.k).step_by(block) {
                        let columns = block.min(w.k - at);
                        let decode = Decode {
                            isa,
                            from,
                            rows: out.columns(),
                            at,
                            columns,
                            strip: &mut *strip,
                            panels: &mut *panels,
                        };
                        w.with_rows(decode);
                        isa.run(Multiply {
                            x: x.part(0, x.rows(), at, columns),
                            panels: &*panels,
                            out: &mut out,
                            start: if at == 0 { Start::Zero } else { Start::Sum },
                        });
                    }
                },
            );
        });
}

/// Columns of a block: even shares of K, in whole quads.
fn block_of(k: usize) -> usize {
    let blocks = k.div_ceil(BLOCK).max(1);
    k.div_ceil(blocks).next_multiple_of(QUAD).max(QUAD)
}

/// Rows `from..from + rows`, columns `at..at + columns`, into panels: panel p holds rows 32 p to 32 p + 31 (16 on
/// narrower instruction sets) as (columns, 32), with zeros for rows that are not there.
struct Decode<'a> {
    isa: Isa,
    from: usize,
    rows: usize,
    at: usize,
    columns: usize,
    strip: &'a mut [f32],
    panels: &'a mut [f32],
}

impl ForRows for Decode<'_> {
    type Output = ();

    fn run<R: Rows>(self, rows: R) {
        self.isa.run(DecodeRows(self, rows));
    }
}

struct DecodeRows<'a, R>(Decode<'a>, R);

impl<R: Rows> Kernel for DecodeRows<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let DecodeRows(d, rows) = self;
        to_panels(v, rows, d.from, d.rows, d.at, d.columns, d.strip, d.panels);
    }
}

/// See [`Decode`]. `at` is the start of a quad; `strip` has room for 16 rows of whole quads.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn to_panels<V: Vector, R: Rows>(
    v: V,
    rows: R,
    from: usize,
    count: usize,
    at: usize,
    columns: usize,
    strip: &mut [f32],
    panels: &mut [f32],
) {
    let width = panel_columns(V::KIND);
    let (quads, full) = (columns.div_ceil(QUAD), columns / QUAD);
    for top in (0..count).step_by(LANES) {
        let here = LANES.min(count - top);
        for (r, strip) in strip.chunks_exact_mut(quads * QUAD).enumerate().take(here) {
            let row = rows.row(from + top + r);
            let (blocks, _) = strip.as_chunks_mut::<LANES>();
            for (q, blocks) in blocks.chunks_exact_mut(4).enumerate() {
                let values = if q < full {
                    row.quad::<V, true>(v, at / QUAD + q)
                } else {
                    row.quad::<V, false>(v, at / QUAD + q)
                };
                for (block, value) in blocks.iter_mut().zip(values) {
                    v.store(value, block);
                }
            }
        }
        let panel = &mut panels[top / width * width * columns..][..width * columns];
        for k in (0..columns).step_by(LANES) {
            let mut lanes = [v.splat(0.0); LANES];
            for (r, lanes) in lanes.iter_mut().enumerate().take(here) {
                let row = &strip[r * quads * QUAD + k..];
                *lanes = v.load(row.first_chunk().expect("whole quads"));
            }
            let turned = v.transpose(&lanes);
            for (j, lanes) in turned.iter().enumerate().take(columns - k) {
                let line = &mut panel[(k + j) * width + top % width..];
                v.store(*lanes, line.first_chunk_mut().expect("a whole panel"));
            }
        }
    }
}

struct Multiply<'a, 'b> {
    x: View<'a>,
    panels: &'a [f32],
    out: &'a mut ViewMut<'b>,
    start: Start,
}

impl Kernel for Multiply<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        by_panels(v, self.x, self.panels, self.out, self.start);
    }
}

/// `out` (M, C) = or += x (M, K) times panels (K, 32), side by side.
#[inline(always)]
pub(super) fn by_panels<V: Vector>(v: V, x: View<'_>, panels: &[f32], out: &mut ViewMut<'_>, start: Start) {
    let (width, k) = (panel_columns(V::KIND), x.columns());
    for top in (0..x.rows()).step_by(ROWS) {
        let rows = ROWS.min(x.rows() - top);
        let x = x.part(top, rows, 0, k);
        for (p, from) in (0..out.columns()).step_by(width).enumerate() {
            let columns = width.min(out.columns() - from);
            let panel = View::new(&panels[p * width * k..], width, k, columns);
            multiply(v, x, panel, &mut out.part(top, rows, from, columns), start);
        }
    }
}
