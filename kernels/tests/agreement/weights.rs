//! Weights in every form, for the tests of products: random codes with zero groups among them.

use std::sync::Arc;

use half::{bf16, f16};
use qtool_formats::packing::wint2::Channel;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::scheme::{AffineScheme, KQuant};
use qtool_formats::weight::kquant::KScales;
use qtool_formats::weight::nested::{Nested, NestedScales};
use qtool_formats::weight::{AffineWeight, Ccq25Weight, CcqWeight, KWeight, Nf4Weight};
use qtool_formats::{FloatDtype, QuantizedWeight, Scheme};
use qtool_kernels::backend::{Form, HostWeight, Storage};

use crate::Random;

/// Forms a weight can have: float types, and schemes with each number of bits, grid and length of groups.
pub const FORMS: [&str; 21] = [
    "f32",
    "f16",
    "bf16",
    "w8-sym-row-bf16",
    "w8-zp-g32-f16",
    "w4-sym-row-f32",
    "w4-narrow-row-bf16",
    "w4-sym-g64-bf16",
    "w4-zp-g16-f32",
    "w4-zp-g128-f16",
    "w3-sym-g32-f16",
    "w3-zp-row-f32",
    "w2-sym-row-f32",
    "w2-zp-g16-f32",
    "w2-sym-g64-f16",
    "wint2",
    "wint2.5",
    "nf4",
    "nf4-dq",
    "q4-k",
    "q2-k",
];

/// A weight (n, k) of this form, or `None` where the form asks for another k. `size` scales its values.
pub fn weight(form: &str, n: usize, k: usize, size: f32, random: &mut Random) -> Option<HostWeight> {
    if let Some(dtype) = FloatDtype::parse(form) {
        let mut bytes = Vec::new();
        for _ in 0..n * k {
            dtype.push(random.unit() * size, &mut bytes);
        }
        let bytes: Arc<dyn Storage> = Arc::new(bytes);
        return Some(HostWeight {
            n,
            k,
            form: Form::Dense { dtype, bytes },
        });
    }
    let scheme = Scheme::parse(form).unwrap();
    scheme.parts(n, k).ok()?;
    let weight = match scheme {
        Scheme::Affine(scheme) => affine(scheme, n, k, size, random),
        Scheme::Ccq => ccq(n, k, size, random),
        Scheme::Ccq25 => ccq25(n, k, size, random),
        Scheme::Nf4 => nf4(n, k, size, random),
        Scheme::Nf4Double => nf4_double(n, k, size, random),
        Scheme::K(kind) => k_type(kind, n, k, size, random),
    };
    let parts = weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
    let parts = parts.into_iter().map(|part| Arc::new(part) as Arc<dyn Storage>);
    Some(HostWeight {
        n,
        k,
        form: Form::Packed {
            scheme,
            parts: parts.collect(),
        },
    })
}

fn affine(scheme: AffineScheme, n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let groups = scheme.groups(n, k).unwrap();
    let (low, high) = scheme.code_range();
    let mut code = |low: u8| low + random.below(u64::from(high - low) + 1) as u8;
    let mut codes: Vec<u8> = (0..n * k).map(|_| code(low)).collect();
    let zeros: Vec<u8> = match scheme.fixed_zero() {
        Some(_) => Vec::new(),
        None => (0..n * groups).map(|_| code(low)).collect(),
    };
    // Every fifth group holds nothing but zeros.
    for (g, group) in codes.chunks_mut(k / groups).enumerate().step_by(5) {
        group.fill(zeros.get(g).copied().or(scheme.fixed_zero()).unwrap());
    }
    let dtype = scheme.scale_dtype();
    let scale = |_| match dtype {
        FloatDtype::Bf16 => bf16::from_f32((random.unit().abs() + 0.01) * size).to_f32(),
        FloatDtype::F16 => f16::from_f32((random.unit().abs() + 0.01) * size.clamp(1e-3, 1e3)).to_f32(),
        FloatDtype::F32 => (random.unit().abs() + 0.01) * size,
    };
    let scales = (0..n * groups).map(scale).collect();
    QuantizedWeight::Affine(AffineWeight::new(scheme, n, k, codes, scales, zeros).unwrap())
}

fn ccq(n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let codes = random.bytes(n * k / 4);
    let mut locals = random.small_codes(n * k / 64, 16);
    locals.iter_mut().step_by(5).for_each(|local| *local = 0);
    let channel = |_| Channel {
        super_scale: bf16::from_f32((random.unit().abs() + 0.01) * size),
        code_scale: 100.0 + 28.0 * random.unit().abs() * 0.99,
        code_zp: random.unit().abs() * 100.0,
    };
    QuantizedWeight::Ccq(CcqWeight::new(k, codes, locals, (0..n).map(channel).collect()).unwrap())
}

fn ccq25(n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let bytes = random.bytes(n * k / 64 * 20);
    let words = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    let scale = |_| bf16::from_f32((random.unit().abs() + 0.01) * size / 8192.0);
    let scales = (0..n).map(scale).collect();
    QuantizedWeight::Ccq25(Ccq25Weight::new(k, words.collect(), scales).unwrap())
}

fn nf4(n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let codes = random.small_codes(n * k, 16);
    let mut scales: Vec<f32> = (0..n * k / 64).map(|_| random.unit().abs() * size).collect();
    scales.iter_mut().step_by(5).for_each(|scale| *scale = 0.0);
    QuantizedWeight::Nf4(Nf4Weight::new(n, k, codes, scales).unwrap())
}

fn nf4_double(n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let codes = random.small_codes(n * k, 16);
    let scales = random.bytes(n * k / 64);
    let nested = (0..scales.len().div_ceil(256)).map(|_| random.unit().abs() * size);
    let nested = Nested::new(nested.collect(), size / 2.0).unwrap();
    let scales = NestedScales::new(0, scales, Arc::new(nested)).unwrap();
    QuantizedWeight::Nf4(Nf4Weight::double(n, k, codes, scales).unwrap())
}

fn k_type(kind: KQuant, n: usize, k: usize, size: f32, random: &mut Random) -> QuantizedWeight {
    let codes = random.small_codes(n * k, 1 << kind.bits());
    let mut small = || random.small_codes(n * k / kind.group(), 1 << kind.scale_bits());
    let (scales, mins) = (small(), small());
    let mut halves = || {
        let half = |_| f16::from_f32(random.unit().abs() * size.clamp(1e-3, 1e3) / 64.0);
        (0..n * k / 256).map(half).collect()
    };
    let numbers = KScales {
        scales,
        mins,
        super_scales: halves(),
        super_mins: halves(),
    };
    QuantizedWeight::K(KWeight::new(kind, n, k, codes, numbers).unwrap())
}
