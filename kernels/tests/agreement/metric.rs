//! The search in a metric against the naive one, on every instruction set.

use qtool_kernels::{Isa, Metric, MetricBook, add_scaled, nearest_in_metric, reference};

/// Numbers of about unit size from a seed.
fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

#[test]
fn the_nearest_codeword_costs_what_the_naive_search_finds() {
    let mut next = numbers(7);
    let mut book = [[0i8; 4]; 256];
    for word in &mut book {
        *word = std::array::from_fn(|_| (next() * 31.0) as i8);
    }
    let prepared = MetricBook::new(&book);
    for round in 0..200 {
        let a: [[f32; 4]; 4] = std::array::from_fn(|_| std::array::from_fn(|_| next()));
        let mut b = [[0f32; 4]; 4];
        for i in 0..4 {
            for j in 0..4 {
                b[i][j] = (0..4).map(|k| a[i][k] * a[j][k]).sum();
            }
        }
        let t = std::array::from_fn(|_| next() * 30.0);
        let (_, least) = reference::nearest_in_metric(&book, t, b);
        let bytes: Vec<u8> = Isa::available()
            .into_iter()
            .map(|isa| nearest_in_metric(isa, &prepared, t, &Metric::new(b)))
            .collect();
        assert!(bytes.windows(2).all(|w| w[0] == w[1]), "round {round}: {bytes:?}");
        let mut only = book;
        only.fill(book[usize::from(bytes[0])]);
        let (_, cost) = reference::nearest_in_metric(&only, t, b);
        // Scores are sums of numbers up to a few thousand, in f32.
        assert!(cost <= least + 2e-2, "round {round}: {cost} against {least}");
    }
}

#[test]
fn scaled_rows_add_up_alike_everywhere() {
    let mut next = numbers(11);
    for len in [1, 15, 16, 17, 64, 129] {
        let rows: Vec<Vec<f32>> = (0..4).map(|_| (0..len).map(|_| next()).collect()).collect();
        let a = std::array::from_fn(|_| next());
        let start: Vec<f32> = (0..len).map(|_| next()).collect();
        let results: Vec<Vec<f32>> = Isa::available()
            .into_iter()
            .map(|isa| {
                let mut out = start.clone();
                add_scaled(isa, a, std::array::from_fn(|i| rows[i].as_slice()), &mut out);
                out
            })
            .collect();
        assert!(results.windows(2).all(|w| w[0] == w[1]), "{len}");
        for k in 0..len {
            let sum: f64 = (0..4).map(|i| f64::from(a[i]) * f64::from(rows[i][k])).sum();
            assert!((f64::from(results[0][k]) - sum - f64::from(start[k])).abs() < 1e-6);
        }
    }
}
