//! The choice of a K type's numbers: what fits exactly, what inputs change, and beside affine codes.

use super::*;
use crate::stats::Moment;

/// Something like a normal distribution, the same on every run.
fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.05)
        .collect()
}

fn errors(x: &[f32], weight: &QuantizedWeight, importance: &[f32]) -> f64 {
    let (n, k) = weight.dims();
    let mut row = vec![0f32; k];
    let mut sum = 0.0;
    for i in 0..n {
        weight.dequantize_row(i, &mut row);
        let of_row = x[i * k..].iter().zip(&row).zip(importance);
        sum += of_row
            .map(|((x, y), h)| f64::from(*h) * f64::from(x - y).powi(2))
            .sum::<f64>();
    }
    sum
}

/// Weights that a super-block can hold exactly come out as they were, up to the last bits of F16.
#[test]
fn what_fits_is_found_again() {
    for kind in KQuant::ALL {
        let top = (1usize << kind.bits()) - 1;
        let most = (1usize << kind.scale_bits()) - 1;
        let group = kind.group();
        let x: Vec<f32> = (0..SUPER_BLOCK)
            .map(|i| {
                let g = i / group;
                // One group has the highest scale and minimum, every group both ends of its codes.
                let (s, m) = (most - g % 5, most - 2 * (g % 3));
                let code = if i % group < 2 {
                    i % group * top
                } else {
                    i * 7 % (top + 1)
                };
                0.01 * (s * code) as f32 - 0.02 * m as f32
            })
            .collect();
        let weight = KQuantizer::new(kind).quantize(Isa::best(), &x, 1, 256).unwrap();
        let energy: f64 = x.iter().map(|x| f64::from(x * x)).sum();
        let error = errors(&x, &weight, &[1.0; 256]) / energy;
        assert!(error < 1e-5, "{kind:?}: {error:e}");
    }
}

#[test]
fn inputs_decide_what_counts() {
    let k = 512;
    let x = numbers(5, 24 * k);
    let importance: Vec<f32> = (0..k).map(|c| if c % 7 == 3 { 100.0 } else { 0.5 }).collect();
    let sums = importance.iter().map(|v| f64::from(*v)).collect();
    let stats = LayerStats::new(k, 1, Moment::Diagonal(sums), vec![1.0; k]).unwrap();
    for kind in KQuant::ALL {
        let plain = KQuantizer::new(kind);
        let informed = plain.informed(&stats).unwrap();
        assert!(informed.describe().contains("weighted by inputs"));
        let run = |q: &dyn Quantizer| q.quantize(Isa::best(), &x, 24, k).unwrap();
        let (a, b) = (run(&plain), run(informed.as_ref()));
        let (under, over) = (errors(&x, &b, &importance), errors(&x, &a, &importance));
        assert!(under < 0.8 * over, "{kind:?}: {under} {over}");
        let same = vec![1.0; k];
        assert!(errors(&x, &a, &same) < errors(&x, &b, &same), "{kind:?}");
        assert!(
            informed
                .quantize(Isa::best(), &x[..256], 1, 256)
                .unwrap_err()
                .to_string()
                .contains("512")
        );
    }
}

/// Groups of 32 with 6-bit scales lose less than groups of 64 with their own F16 scale and zero point of whole codes.
#[test]
fn it_beats_affine_codes_of_more_bits() {
    let x = numbers(9, 16 * 512);
    let ours = KQuantizer::new(KQuant::Q4)
        .quantize(Isa::best(), &x, 16, 512)
        .unwrap();
    let options =
        crate::options::PartialOptions::parse("bits:4,group:64,grid:zp,clip:mse,scale:f16").unwrap();
    let affine = (crate::clip::METHOD.build)(&options.complete(4).unwrap()).unwrap();
    let affine = affine.quantize(Isa::best(), &x, 16, 512).unwrap();
    let same = vec![1.0; 512];
    assert!(errors(&x, &ours, &same) < errors(&x, &affine, &same));
    assert!(
        KQuantizer::new(KQuant::Q4)
            .quantize(Isa::best(), &x[..320], 1, 320)
            .is_err()
    );
}
