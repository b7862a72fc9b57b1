//! Throughput of the codeword search, as the least time of many short runs (so that a busy machine disturbs it
//! little), beside the processor's clock as a chain of dependent additions shows it.

use std::hint::black_box;
use std::time::Instant;

use qtool_kernels::{Codewords, Isa, SearchWeights, nearest_codewords};

const GROUPS: usize = 64;
const RUNS: usize = 3000;

fn least(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(time).fold(f64::INFINITY, f64::min)
}

/// Cycles per second: each step waits for the one before, one cycle for the exclusive or and three for the
/// multiplication on current x86-64.
fn clock() -> f64 {
    const STEPS: u64 = 20_000;
    let seconds = least(|| {
        let mut x = black_box(1_u64);
        for i in 0..STEPS {
            x = (x ^ i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        black_box(x);
    });
    4.0 * STEPS as f64 / seconds
}

fn main() {
    let clock = clock();
    println!("clock {:.2} GHz", clock / 1e9);
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    };
    let book = std::array::from_fn(|_| std::array::from_fn(|_| (next() * 32.0).floor() as i8));
    let book = Codewords::new(&book);
    let x: Vec<f32> = (0..GROUPS * 64).map(|_| next() * 30.0).collect();
    let w: Vec<f32> = (0..GROUPS * 64).map(|_| next() + 1.01).collect();
    let wx: Vec<f32> = x.iter().zip(&w).map(|(x, w)| x * w).collect();
    let (mut codes, mut gains) = (vec![0; GROUPS * 16], vec![0.0; GROUPS]);
    for isa in Isa::available() {
        let all = [
            ("even", SearchWeights::Even { x: &x }),
            ("weighted", SearchWeights::Weighted { wx: &wx, w: &w }),
        ];
        for (name, weights) in all {
            let seconds = least(|| {
                nearest_codewords(isa, &book, weights, &[1.0; GROUPS], &mut codes, &mut gains);
                black_box((&codes, &gains));
            });
            let per_weight = seconds / (GROUPS * 64) as f64;
            let macs = if name == "even" { 256.0 } else { 512.0 } / (per_weight * clock);
            println!(
                "{isa:9} {name:9} {:.3} ns per weight, {:.0} Mweights/s, {macs:.1} multiply-adds per cycle",
                per_weight * 1e9,
                1e-6 / per_weight
            );
        }
    }
}
