//! The search by hand, against brute force in f64, and on all instruction sets.

use super::*;

/// A small deterministic generator; uniform in -1..1.
fn noise(seed: u32) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 8_388_608.0 - 1.0
    }
}

fn book() -> [[i8; 4]; 256] {
    let mut next = noise(1);
    std::array::from_fn(|_| std::array::from_fn(|_| (next() * 32.0).floor() as i8))
}

/// Nearest by f64 brute force over components 16 apart, and the gain.
fn brute(book: &[[i8; 4]; 256], x: [f64; 4], w: [f64; 4]) -> (u8, f64) {
    let gain = |c: &[i8; 4]| -> f64 {
        (0..4)
            .map(|i| w[i] * (2.0 * x[i] - f64::from(c[i])) * f64::from(c[i]))
            .sum()
    };
    let mut best = (0, gain(&book[0]));
    for (byte, word) in book.iter().enumerate().skip(1) {
        if gain(word) > best.1 {
            best = (byte as u8, gain(word));
        }
    }
    best
}

fn search(isa: Isa, weights: SearchWeights, inv: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (mut codes, mut gains) = (vec![0; inv.len() * 16], vec![0.0; inv.len()]);
    nearest_codewords(
        isa,
        &Codewords::new(&book()),
        weights,
        inv,
        &mut codes,
        &mut gains,
    );
    (codes, gains)
}

#[test]
fn one_vector_by_hand() {
    let mut words = [[31_i8; 4]; 256];
    words[3] = [1, 2, 3, 4];
    words[9] = [1, 2, 3, 4];
    words[7] = [1, 2, 3, 5];
    let mut x = [0.0; 64];
    for (i, c) in [2.0, 4.0, 6.0, 8.5].into_iter().enumerate() {
        x[16 * i..16 * (i + 1)].fill(c);
    }
    for isa in Isa::available() {
        let (mut codes, mut gains) = ([0; 16], [0.0]);
        let weights = SearchWeights::Even { x: &x };
        nearest_codewords(
            isa,
            &Codewords::new(&words),
            weights,
            &[0.5],
            &mut codes,
            &mut gains,
        );
        // scaled x = 1, 2, 3, 4.25: the nearest is (1, 2, 3, 4), lower byte 3;
        // gain = |x|^2 - 0.0625 = 14 + 18.0625 - 0.0625 = 32 per vector.
        assert_eq!(codes, [3; 16]);
        assert_eq!(gains, [512.0]);
    }
}

#[test]
fn search_is_the_brute_force_and_equal_on_all_machines() {
    for groups in [1, 2, 4, 5, 9] {
        let mut next = noise(groups as u32);
        let x: Vec<f32> = (0..groups * 64).map(|_| next() * 40.0).collect();
        let w: Vec<f32> = (0..groups * 64).map(|_| (next() + 1.0).powi(3) + 1e-3).collect();
        let wx: Vec<f32> = x.iter().zip(&w).map(|(x, w)| x * w).collect();
        let inv: Vec<f32> = (0..groups).map(|g| 0.3 + 0.4 * g as f32).collect();
        let all = [
            (SearchWeights::Even { x: &x }, None),
            (SearchWeights::Weighted { wx: &wx, w: &w }, Some(&w)),
        ];
        for (weights, importance) in all {
            let (codes, gains) = search(Isa::available()[0], weights, &inv);
            for isa in Isa::available() {
                let other = search(isa, weights, &inv);
                assert_eq!(codes, other.0, "{isa:?}");
                assert!(
                    gains
                        .iter()
                        .zip(&other.1)
                        .all(|(a, b)| a.to_bits() == b.to_bits())
                );
            }
            let mut equal = 0;
            for g in 0..groups {
                let mut gain = 0.0;
                for v in 0..16 {
                    let at = |i: usize| g * 64 + 16 * i + v;
                    let x4 = std::array::from_fn(|i| f64::from(x[at(i)]) * f64::from(inv[g]));
                    let w4 = std::array::from_fn(|i| importance.map_or(1.0, |w| f64::from(w[at(i)])));
                    let (code, best) = brute(&book(), x4, w4);
                    gain += best;
                    equal += usize::from(code == codes[g * 16 + v]);
                }
                let close = (gain - f64::from(gains[g])).abs() < 3e-3 * gain.abs().max(1.0);
                assert!(close, "{gain} {}", gains[g]);
            }
            assert!(equal * 100 >= groups * 16 * 95, "{equal} of {}", groups * 16);
        }
    }
}

#[test]
fn extremes_do_not_overflow() {
    let corners: [[i8; 4]; 256] =
        std::array::from_fn(|b| std::array::from_fn(|i| if (b >> i) & 1 == 0 { -32 } else { 31 }));
    for value in [1e30, -1e30, 1e-30, 0.0, 484.0, -484.0] {
        let x = [value; 64];
        let w: [f32; 64] = std::array::from_fn(|k| if k % 5 == 0 { 1e4 } else { 1e-4 });
        let wx = w.map(|w| w * value);
        let tests = [
            SearchWeights::Even { x: &x },
            SearchWeights::Weighted { wx: &wx, w: &w },
        ];
        for weights in tests {
            for isa in Isa::available() {
                let (mut codes, mut gains) = ([0; 16], [0.0]);
                let book = Codewords::new(&corners);
                nearest_codewords(isa, &book, weights, &[1.0], &mut codes, &mut gains);
                assert!(gains[0].is_finite());
                if value.abs() > 100.0 {
                    let expected = if value > 0.0 { 15 } else { 0 };
                    let even = matches!(weights, SearchWeights::Even { .. });
                    assert!(!even || codes == [expected; 16], "{value} {codes:?}");
                }
            }
        }
    }
}
