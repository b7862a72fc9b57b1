//! Relative squared error of WINT2 at each effort, of WINT2.5 and of plain 2-bit rounding, on synthetic rows:
//! `ccq_quality [ROWS [K [EFFORT]]]`, 48 rows of 4096 if not said. `a` and `b` are the two serving arithmetics;
//! `agree` counts the rows on which they give the same bits.

use half::bf16;
use qtool_calib::ccq::{Effort, Scratch, decode_row, encode_row};
use qtool_calib::ccq25;
use qtool_formats::packing::wint2::Arithmetic;
use qtool_kernels::Isa;
use rayon::prelude::*;
use std::time::Instant;

struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }
    fn gauss(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

fn row(kind: &str, k: usize, r: &mut Rng) -> Vec<f32> {
    (0..k)
        .map(|_| match kind {
            "laplace" => {
                let u = r.uniform() - 0.5;
                (-u.signum() * (1.0 - 2.0 * u.abs()).ln()) as f32
            }
            "t5" => {
                let z = r.gauss();
                let chi: f64 = (0..5).map(|_| r.gauss().powi(2)).sum();
                (z / (chi / 5.0).sqrt()) as f32
            }
            _ => r.gauss() as f32,
        })
        .collect()
}

/// User time of this process so far, in seconds, from the kernel's account in ticks of 10 ms.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    fields
        .get(11)
        .and_then(|t| t.parse::<f64>().ok())
        .unwrap_or(f64::NAN)
        / 100.0
}

/// Squared error of 2-bit codes with a scale and a zero point per 64 weights, the best of 60 scales and of the
/// zero points 1, 1.5 and 2, none of them rounded: what clip search can reach at best.
fn int2_error(row: &[f32]) -> f64 {
    let group = |x: &[f32]| {
        let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let error = |scale: f32, zero: f32| -> f64 {
            let decoded = |x: f32| ((x / scale + zero).round_ties_even().clamp(0.0, 3.0) - zero) * scale;
            x.iter().map(|x| f64::from(x - decoded(*x)).powi(2)).sum()
        };
        let scales = (1..=60).map(|i| largest * i as f32 / 60.0);
        scales
            .flat_map(|s| [1.0, 1.5, 2.0].map(|z| error(s, z)))
            .fold(f64::INFINITY, f64::min)
    };
    row.chunks_exact(64).map(group).sum()
}

fn relative(rows: &[Vec<f32>], error: impl Fn(&[f32]) -> f64 + Sync) -> f64 {
    let energy: f64 = rows.iter().flatten().map(|x| f64::from(*x).powi(2)).sum();
    rows.par_iter()
        .map(|row| error(row))
        .collect::<Vec<f64>>()
        .iter()
        .sum::<f64>()
        / energy
}

fn wint25_error(row: &[f32]) -> f64 {
    let mut out = vec![bf16::ZERO; row.len()];
    let encoded = ccq25::encode_row(row, None).unwrap();
    ccq25::decode_row(&encoded, &mut out).unwrap();
    row.iter()
        .zip(&out)
        .map(|(x, y)| (f64::from(*x) - y.to_f64()).powi(2))
        .sum()
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let n: usize = args.get(1).map_or(48, |s| s.parse().unwrap());
    let k: usize = args.get(2).map_or(4096, |s| s.parse().unwrap());
    let only = args.get(3).cloned();
    let isa = Isa::best();
    for kind in ["gauss", "laplace", "t5"] {
        let mut r = Rng(42);
        let rows: Vec<Vec<f32>> = (0..n).map(|_| row(kind, k, &mut r)).collect();
        let int2 = relative(&rows, int2_error);
        println!("{kind:8} plain INT2, group 64, clip search: {int2:.5}");
        let cpu = cpu_seconds();
        let wint25 = relative(&rows, wint25_error);
        println!(
            "{kind:8} WINT2.5: {wint25:.5}, {:.2} Mweights per core second",
            (n * k) as f64 / (cpu_seconds() - cpu) / 1e6
        );
        for effort in [Effort::Fast, Effort::Default, Effort::Best] {
            if only.as_ref().is_some_and(|o| *o != format!("{effort:?}")) {
                continue;
            }
            let (t, cpu) = (Instant::now(), cpu_seconds());
            let res: Vec<[f64; 4]> = rows
                .par_iter()
                .map_init(Scratch::default, |scratch, x| {
                    let e = encode_row(x, None, effort, isa, scratch).unwrap();
                    let mut sums = [0.0; 4];
                    let (mut a, mut b) = (vec![bf16::ZERO; k], vec![bf16::ZERO; k]);
                    decode_row(&e, Arithmetic::Unzip, &mut a).unwrap();
                    decode_row(&e, Arithmetic::Gemm, &mut b).unwrap();
                    for i in 0..k {
                        sums[0] += f64::from(x[i]).powi(2);
                        sums[1] += (f64::from(x[i]) - a[i].to_f64()).powi(2);
                        sums[2] += (f64::from(x[i]) - b[i].to_f64()).powi(2);
                    }
                    sums[3] = f64::from(u8::from(a == b));
                    sums
                })
                .collect();
            let dt = t.elapsed().as_secs_f64();
            let s = |i: usize| res.iter().map(|r| r[i]).sum::<f64>();
            println!(
                "{kind:8} {effort:?} a {:.5} b {:.5} agree {}/{n}  {:.2} Mweights/s wall, {:.2} per core second",
                s(1) / s(0),
                s(2) / s(0),
                s(3),
                n as f64 * k as f64 / dt / 1e6,
                n as f64 * k as f64 / (cpu_seconds() - cpu) / 1e6
            );
        }
    }
}
