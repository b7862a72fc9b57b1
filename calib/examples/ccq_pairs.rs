//! Finds good pairs.
use qtool_formats::packing::wint2::{Arithmetic, codebook};
use qtool_kernels::{Codewords, Isa, SearchWeights, nearest_codewords};
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
    fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }
}

struct Eval {
    x: Vec<f32>,
    energy: f64,
    words: Codewords,
    codes: Vec<u8>,
    gains: Vec<f32>,
}

impl Eval {
    fn new(groups: usize, seed: u64) -> Self {
        let mut r = Rng(seed);
        let x: Vec<f32> = (0..groups * 64).map(|_| r.gauss() as f32).collect();
        let energy = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        let words = Codewords::new(&[[0; 4]; 256]);
        Self {
            x,
            energy,
            words,
            codes: vec![0; groups * 16],
            gains: vec![0.0; groups],
        }
    }
    /// single scale error
    fn at(&mut self, isa: Isa, s: f32) -> f64 {
        let n = self.gains.len();
        nearest_codewords(
            isa,
            &self.words,
            SearchWeights::Even { x: &self.x },
            &vec![1.0 / s; n],
            &mut self.codes,
            &mut self.gains,
        );
        1.0 - self.gains.iter().map(|g| f64::from(*g)).sum::<f64>() * f64::from(s * s) / self.energy
    }
    fn set(&mut self, cs: u32, zp: u32) {
        self.words.set(&codebook(cs as f32, zp as f32, Arithmetic::Unzip));
    }
    /// local 4-bit error: per group the best of locals, for super s/12
    fn local(&mut self, isa: Isa, base: f32) -> f64 {
        let n = self.gains.len();
        let mut best = vec![0.0f64; n];
        for l in 7..=15 {
            let s = base * l as f32;
            nearest_codewords(
                isa,
                &self.words,
                SearchWeights::Even { x: &self.x },
                &vec![1.0 / s; n],
                &mut self.codes,
                &mut self.gains,
            );
            for (b, g) in best.iter_mut().zip(&self.gains) {
                *b = b.max(f64::from(*g) * f64::from(s * s));
            }
        }
        1.0 - best.iter().sum::<f64>() / self.energy
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mode = args.next().unwrap_or("narrow".into());
    let count: usize = args.next().map_or(100_000, |s| s.parse().unwrap());
    let keep: usize = args.next().map_or(512, |s| s.parse().unwrap());
    let isa = Isa::best();
    let mut small = Eval::new(64, 1);
    let mut r = Rng(77);
    let mut found: Vec<(f64, u32, u32, f32)> = vec![];
    if mode == "wide" {
        for _ in 0..count {
            found.push((9.0, r.below(32768), r.below(32768), 0.0));
        }
    } else {
        for cs in 100..=128 {
            for zp in 0..32768 - 255 * cs {
                found.push((9.0, cs, zp, 0.0));
            }
        }
    }
    let t = Instant::now();
    for f in &mut found {
        small.set(f.1, f.2);
        for s in [0.056, 0.062, 0.068] {
            f.0 = f.0.min(small.at(isa, s));
        }
    }
    eprintln!("stage 1: {:?} of {}", t.elapsed(), found.len());
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    found.truncate(20_000);
    let mut mid = Eval::new(512, 2);
    for f in &mut found {
        mid.set(f.1, f.2);
        f.0 = 9.0;
        for s in [0.058, 0.062, 0.066] {
            let err = mid.at(isa, s);
            if err < f.0 {
                f.0 = err;
                f.3 = s;
            }
        }
    }
    found.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut kept: Vec<(f64, u32, u32, f32)> = vec![];
    for f in &found {
        let far = |k: &(f64, u32, u32, f32)| {
            let d = (k.2 % k.1).abs_diff(f.2 % f.1);
            d.min(f.1 - d) > 1 || k.2.abs_diff(f.2) > 6 * f.1
        };
        if kept.iter().all(|k| k.1 != f.1 || far(k)) {
            kept.push(*f);
        }
    }
    eprintln!("stage 2: {:?}, kept {}", t.elapsed(), kept.len());
    for i in [0, 10, 50, 100, 200, 500, 1000, 2000, 4000] {
        if i < kept.len() {
            eprintln!("{i} {:?}", kept[i]);
        }
    }
    let mut line = String::new();
    for f in kept.iter().take(keep) {
        line += &format!("({}, {}), ", f.1, f.2);
    }
    println!("{line}");
}
