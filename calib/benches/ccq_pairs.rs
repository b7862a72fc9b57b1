//! Finds the pairs of code scale and code zero in `calib/ccq/pairs.rs`. Without arguments it prints that list;
//! `wide COUNT` judges COUNT random pairs instead whose codes may run past 15 bits. A minute at most, but for
//! `wide` with millions.

use qtool_formats::packing::wint2::{Arithmetic, MAX_CODE, codebook};
use qtool_kernels::{Codewords, Isa, SearchWeights, nearest_codewords};

/// Pairs printed.
const KEEP: usize = 256;
/// Pairs that come to the second judgement.
const SECOND: usize = 20_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn gaussian(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn code(&mut self) -> u32 {
        (self.next() % (MAX_CODE as u64 + 1)) as u32
    }
}

/// Gaussian groups on which pairs are judged.
struct Judge {
    x: Vec<f32>,
    energy: f64,
    words: Codewords,
    codes: Vec<u8>,
    gains: Vec<f32>,
}

impl Judge {
    fn new(groups: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let x: Vec<f32> = (0..groups * 64).map(|_| random.gaussian() as f32).collect();
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

    /// Relative squared error of a pair, the same scale for all groups, at the best of `scales`.
    fn error(&mut self, pair: (u32, u32), scales: [f32; 3]) -> f64 {
        self.words
            .set(&codebook(pair.0 as f32, pair.1 as f32, Arithmetic::Unzip));
        let at = |scale: f32| {
            let inverse = vec![1.0 / scale; self.gains.len()];
            let x = SearchWeights::Even { x: &self.x };
            nearest_codewords(
                Isa::best(),
                &self.words,
                x,
                &inverse,
                &mut self.codes,
                &mut self.gains,
            );
            let gain: f64 = self.gains.iter().map(|gain| f64::from(*gain)).sum();
            1.0 - gain * f64::from(scale * scale) / self.energy
        };
        scales.map(at).into_iter().fold(f64::INFINITY, f64::min)
    }

    /// Judges all pairs and sorts them, best first.
    fn sort(&mut self, pairs: &mut [(f64, (u32, u32))], scales: [f32; 3]) {
        for (error, pair) in pairs.iter_mut() {
            *error = self.error(*pair, scales);
        }
        pairs.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    }
}

/// Whether two pairs share nearly all codewords.
fn alike(a: (u32, u32), b: (u32, u32)) -> bool {
    let apart = (a.1 % a.0.max(1)).abs_diff(b.1 % b.0.max(1));
    a.0 == b.0 && apart.min(a.0.abs_diff(apart)) <= 1 && a.1.abs_diff(b.1) <= 6 * a.0
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut pairs: Vec<(f64, (u32, u32))> = match arguments.as_slice() {
        [mode, count] if mode == "wide" => {
            let mut random = Random(77);
            let count = count.parse().expect("wide COUNT, a number");
            (0..count)
                .map(|_| (0.0, (random.code(), random.code())))
                .collect()
        }
        _ => {
            let zeros = |scale: u32| 0..=MAX_CODE as u32 - 255 * scale;
            (100..=128)
                .flat_map(|scale| zeros(scale).map(move |zero| (0.0, (scale, zero))))
                .collect()
        }
    };
    Judge::new(64, 1).sort(&mut pairs, [0.056, 0.062, 0.068]);
    pairs.truncate(SECOND);
    Judge::new(512, 2).sort(&mut pairs, [0.058, 0.062, 0.066]);
    let mut kept: Vec<(f64, (u32, u32))> = Vec::new();
    for pair in pairs {
        if kept.len() < KEEP && kept.iter().all(|kept| !alike(kept.1, pair.1)) {
            kept.push(pair);
        }
    }
    eprintln!(
        "relative error of the first {:.5}, of the last {:.5}",
        kept[0].0,
        kept[kept.len() - 1].0
    );
    for eight in kept.chunks(8) {
        let line: Vec<String> = eight
            .iter()
            .map(|(_, (scale, zero))| format!("({scale}, {zero}),"))
            .collect();
        println!("    {}", line.join(" "));
    }
}
