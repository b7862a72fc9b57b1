//! Speed of the WINT2 encoder: the least and the median time of single rows on one core, and all rows on all
//! cores. The least time is what the loop costs, the others say how busy the machine was.

use std::hint::black_box;
use std::time::Instant;

use qtool_calib::ccq::{Effort, Scratch, encode_row};
use qtool_kernels::Isa;
use rayon::prelude::*;

const K: usize = 4096;
const ROWS: usize = 256;

/// Nearly Gaussian: the sum of twelve uniform numbers.
fn rows() -> Vec<Vec<f32>> {
    let mut state = 1_u64;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0
    };
    (0..ROWS)
        .map(|_| {
            (0..K)
                .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
                .collect()
        })
        .collect()
}

fn main() {
    let rows = rows();
    let importance: Vec<f32> = (0..K).map(|k| 1.0 + (k % 13) as f32).collect();
    for weights in [None, Some(importance.as_slice())] {
        for effort in [Effort::Fast, Effort::Default, Effort::Best] {
            let count = if effort == Effort::Best { 16 } else { ROWS };
            let isa = Isa::best();
            let mut scratch = Scratch::default();
            let mut times = Vec::new();
            for row in &rows[..count] {
                let start = Instant::now();
                black_box(encode_row(row, weights, effort, isa, &mut scratch)).ok();
                times.push(start.elapsed().as_secs_f64());
            }
            times.sort_by(f64::total_cmp);
            let start = Instant::now();
            rows[..count]
                .par_iter()
                .for_each_init(Scratch::default, |scratch, row| {
                    black_box(encode_row(row, weights, effort, isa, scratch)).ok();
                });
            let all = start.elapsed().as_secs_f64();
            let rate = |seconds: f64, rows: usize| (rows * K) as f64 / seconds / 1e6;
            println!(
                "{effort:?} {}: one core, least time {:.1}, median {:.1}; all cores {:.1} Mweights/s",
                if weights.is_some() { "weighted" } else { "even" },
                rate(times[0], 1),
                rate(times[count / 2], 1),
                rate(all, count)
            );
        }
    }
}
