//! The forward pass of models, naive: what every [`crate::Backend`] must give within rounding. Sums, exponentials
//! and square roots are in f64; weights are decoded by their one definition.

use qtool_formats::{FloatDtype, QuantizedWeight};

use crate::backend::{Activation, Form, Heads, HostWeight, RopeStyle, RopeTable, Segment};

/// All values of a weight, (N, K).
pub fn decode(w: &HostWeight) -> Vec<f32> {
    match &w.form {
        Form::Dense { dtype, bytes } => match dtype {
            FloatDtype::Bf16 => super::widen_bf16(bytes.bytes()),
            FloatDtype::F16 => super::widen_f16(bytes.bytes()),
            FloatDtype::F32 => super::widen_f32(bytes.bytes()),
        },
        Form::Packed { scheme, parts } => {
            let parts: Vec<&[u8]> = parts.iter().map(|part| part.bytes()).collect();
            let weight = QuantizedWeight::decode(*scheme, w.n, w.k, &parts).expect("a valid weight");
            let mut out = vec![0.0; w.n * w.k];
            for (n, row) in out.chunks_exact_mut(w.k).enumerate() {
                weight.dequantize_row(n, row);
            }
            out
        }
    }
}

/// x (M, K) times the transpose of w (N, K): (M, N), and for each element the sum of the products' magnitudes,
/// which bounds its rounding.
pub fn matmul(x: &[f32], w: &[f32], k: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut magnitudes) = (Vec::new(), Vec::new());
    for x in x.chunks_exact(k) {
        for w in w.chunks_exact(k) {
            let products = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            out.push(products().sum());
            magnitudes.push(products().map(f64::abs).sum());
        }
    }
    (out, magnitudes)
}

/// Each stretch of `gain.len()` over sqrt(mean(x^2) + eps), times `gain`.
pub fn rms_norm(x: &[f32], gain: &[f32], eps: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(gain.len()) {
        let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (squares / row.len() as f64 + f64::from(eps)).sqrt();
        out.extend(
            row.iter()
                .zip(gain)
                .map(|(&x, &g)| f64::from(x) * scale * f64::from(g)),
        );
    }
    out
}

/// (x - mean) / sqrt(variance + eps) * gain + bias, row by row.
pub fn layer_norm(x: &[f32], gain: &[f32], bias: &[f32], eps: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks_exact(gain.len()) {
        let count = row.len() as f64;
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        for ((&x, &g), &b) in row.iter().zip(gain).zip(bias) {
            out.push((f64::from(x) - mean) * scale * f64::from(g) + f64::from(b));
        }
    }
    out
}

/// Heads turned by the angles of their row's position.
pub fn rope(x: &[f32], columns: usize, positions: &[u32], table: &RopeTable) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let half = table.half;
    for (row, &position) in out.chunks_exact_mut(columns).zip(positions) {
        for head in row.chunks_exact_mut(2 * half) {
            for i in 0..half {
                let (a, b) = match table.style {
                    RopeStyle::Halves => (i, i + half),
                    RopeStyle::Pairs => (2 * i, 2 * i + 1),
                };
                let at = position as usize * half + i;
                let (cos, sin) = (f64::from(table.cos[at]), f64::from(table.sin[at]));
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
    }
    out
}

/// softmax(scale q k^T) v for each segment and head, zeros where a query sees nothing; and for each row and head
/// the largest sum of magnitudes behind a score, which bounds its rounding.
pub fn attention(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    segments: &[Segment],
    heads: Heads,
) -> (Vec<f64>, Vec<f64>) {
    let (d, width, kv) = (heads.dim, heads.query * heads.dim, heads.kv * heads.dim);
    let mut out = vec![0.0; q.len()];
    let mut magnitudes = vec![0.0f64; q.len() / d];
    for segment in segments {
        for (i, row) in segment.queries.clone().enumerate() {
            let own = if heads.causal {
                let end = segment.own.end as isize - (segment.queries.len() - 1 - i) as isize;
                segment.own.start..(end.max(segment.own.start as isize) as usize)
            } else {
                segment.own.clone()
            };
            let seen: Vec<usize> = segment.prefix.clone().chain(own).collect();
            for h in 0..heads.query {
                let q = &q[row * width + h * d..][..d];
                let at = h / (heads.query / heads.kv) * d;
                let products = |&s: &usize| {
                    let k = &keys[s * kv + at..][..d];
                    q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k))
                };
                let scale = f64::from(heads.scale);
                let scores: Vec<f64> = seen.iter().map(|s| products(s).sum::<f64>() * scale).collect();
                let size = |s| products(s).map(f64::abs).sum::<f64>() * scale;
                magnitudes[row * heads.query + h] = seen.iter().map(size).fold(0.0, f64::max);
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - top).exp()).sum();
                for (s, score) in seen.iter().zip(&scores) {
                    let share = (score - top).exp() / total;
                    for j in 0..d {
                        out[row * width + h * d + j] += share * f64::from(values[s * kv + at + j]);
                    }
                }
            }
        }
    }
    (out, magnitudes)
}

/// f(x).
pub fn activation(f: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => 0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    }
}

/// x^T x, (K, K), for x (M, K).
pub fn gram(x: &[f32], k: usize) -> Vec<f64> {
    let mut out = vec![0.0; k * k];
    for row in x.chunks_exact(k) {
        for (i, &a) in row.iter().enumerate() {
            for (out, &b) in out[i * k..].iter_mut().zip(row) {
                *out += f64::from(a) * f64::from(b);
            }
        }
    }
    out
}

/// ln(sum of exp(x)).
pub fn log_sum_exp(x: &[f32]) -> f64 {
    let top = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|&x| (f64::from(x) - f64::from(top)).exp()).sum();
    f64::from(top) + sum.ln()
}
