//! The forward pass on the processor: products with a weight in each form, for one token, a few, and a prompt; and
//! attention. Shapes are SmolLM2-135M's (hidden 576, MLP 1536, 9 query heads on 3 key heads of 64).
//!
//! ```text
//! cargo bench -p qtool-kernels --bench forward
//! ```

use std::sync::Arc;

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use qtool_formats::packing::wint2::Channel;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::weight::{AffineWeight, CcqWeight};
use qtool_formats::{FloatDtype, QuantizedWeight, Scheme};
use qtool_kernels::backend::{Backend, Form, Heads, HostWeight, Segment, Storage};
use qtool_kernels::{CpuBackend, Isa, IsaKind};

const HIDDEN: usize = 576;
const MLP: usize = 1536;
const FORMS: [&str; 8] = [
    "f32",
    "bf16",
    "w8-sym-row-bf16",
    "w4-sym-g64-bf16",
    "w4-zp-g32-f16",
    "w3-sym-g64-bf16",
    "w2-sym-g64-bf16",
    "wint2",
];

fn main() {
    divan::main();
}

fn bytes(n: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn weight(form: &str, n: usize, k: usize) -> HostWeight {
    if let Some(dtype) = FloatDtype::parse(form) {
        let mut out = Vec::new();
        bytes(n * k)
            .iter()
            .for_each(|&b| dtype.push(f32::from(b) / 128.0 - 1.0, &mut out));
        let bytes: Arc<dyn Storage> = Arc::new(out);
        return HostWeight {
            n,
            k,
            form: Form::Dense { dtype, bytes },
        };
    }
    let scheme = Scheme::parse(form).expect("a scheme");
    let weight = match scheme {
        Scheme::Affine(affine) => {
            let (low, high) = affine.code_range();
            let groups = affine.groups(n, k).expect("groups");
            let code = |b: u8| (low + b % (high - low)).max(low);
            let codes = bytes(n * k).into_iter().map(code).collect();
            let zeros = match affine.fixed_zero() {
                Some(_) => Vec::new(),
                None => vec![low + 1; n * groups],
            };
            AffineWeight::new(affine, n, k, codes, vec![0.5; n * groups], zeros).map(QuantizedWeight::Affine)
        }
        Scheme::Ccq25 => unreachable!("not among the forms"),
        Scheme::Ccq => {
            let channel = Channel {
                super_scale: half::bf16::from_f32(0.01),
                code_scale: 120.0,
                code_zp: 600.0,
            };
            let locals = bytes(n * k / 64).iter().map(|b| b % 16).collect();
            CcqWeight::new(k, bytes(n * k / 4), locals, vec![channel; n]).map(QuantizedWeight::Ccq)
        }
        other => panic!("{other} is not measured here"),
    };
    let parts = weight
        .and_then(|w| w.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)))
        .expect("a weight");
    HostWeight {
        n,
        k,
        form: Form::Packed {
            scheme,
            parts: parts
                .into_iter()
                .map(|p| Arc::new(p) as Arc<dyn Storage>)
                .collect(),
        },
    }
}

fn product(bencher: Bencher, isa: Isa, form: &str, m: usize) {
    let backend = CpuBackend::new(isa);
    let w = backend.weight(&weight(form, MLP, HIDDEN));
    let x = backend.upload(&vec![0.25; m * HIDDEN], HIDDEN);
    bencher
        .counter(ItemsCount::new(m * MLP * HIDDEN))
        .bench_local(|| black_box(backend.matmul(black_box(&x), &w)));
}

/// Multiply-adds per second of one token, four, eight, and a prompt of 512.
#[divan::bench(args = FORMS, consts = [1, 4, 8, 512])]
fn best<const M: usize>(bencher: Bencher, form: &str) {
    product(bencher, Isa::best(), form, M);
}

/// The product `best` does with a weight in f32, by faer: what qtool would call if it did not need sums that no tiling and no
/// number of rows changes. On one thread: compare with `RAYON_NUM_THREADS=1`.
#[divan::bench(args = [1, 4, 8, 512])]
fn faer(bencher: Bencher, m: usize) {
    let x = vec![0.25f32; m * HIDDEN];
    let w = vec![0.5f32; MLP * HIDDEN];
    let mut y = vec![0.0f32; m * MLP];
    bencher
        .counter(ItemsCount::new(m * MLP * HIDDEN))
        .bench_local(|| {
            let x = MatRef::from_row_major_slice(black_box(&x[..]), m, HIDDEN);
            let w = MatRef::from_row_major_slice(&w[..], MLP, HIDDEN);
            matmul(
                MatMut::from_row_major_slice_mut(&mut y, m, MLP),
                Accum::Replace,
                x,
                w.transpose(),
                1.0,
                Par::Seq,
            );
        });
}

/// The same one instruction set down.
#[divan::bench(args = ["bf16", "w4-sym-g64-bf16", "wint2"], consts = [1, 512])]
fn avx2<const M: usize>(bencher: Bencher, form: &str) {
    if let Some(isa) = Isa::new(IsaKind::Avx2) {
        product(bencher, isa, form, M);
    }
}

/// Portable code.
#[divan::bench(args = ["bf16", "w4-sym-g64-bf16", "wint2"], consts = [1, 512])]
fn portable<const M: usize>(bencher: Bencher, form: &str) {
    if let Some(isa) = Isa::new(IsaKind::Portable) {
        product(bencher, isa, form, M);
    }
}

/// Pairs of query and key per second: one long prompt, and one token after 511.
#[divan::bench(args = [512, 1])]
fn attention(bencher: Bencher, queries: usize) {
    let backend = CpuBackend::new(Isa::best());
    let heads = Heads {
        query: 9,
        kv: 3,
        dim: 64,
        scale: 0.125,
        causal: true,
    };
    let q = backend.upload(&vec![0.1; queries * HIDDEN], HIDDEN);
    let keys = backend.upload(&vec![0.1; 512 * 192], 192);
    let segments = [Segment {
        queries: 0..queries,
        prefix: 0..0,
        own: 0..512,
    }];
    bencher
        .counter(ItemsCount::new(9 * queries * (512 - queries / 2)))
        .bench_local(|| black_box(backend.attention(black_box(&q), &keys, &keys, &segments, heads)));
}
