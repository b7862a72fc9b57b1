//! Error feedback against a slow version in f64, and what descent may not do.

use super::*;
use crate::hessian::cost;
use crate::hessian::tests::{correlated, noise, slow_factor};

/// Columns of the tests: three groups.
const K: usize = 192;

/// Statistics and a few rows on their first encoding.
fn begun() -> (LayerStats, Prepared, Vec<Row>) {
    let stats = correlated(K, 400, 3, false);
    let prepared = Prepared::new(&stats).unwrap();
    let (mut next, importance) = (noise(8), stats.importance());
    let row = |_| {
        let x: Vec<f32> = (0..K).map(|_| next() + next() + next()).collect();
        let mut scratch = Scratch::default();
        let first = encode_row(&x, Some(&importance), Effort::Fast, Isa::best(), &mut scratch).unwrap();
        Row::new(&prepared.factor, &x, &first)
    };
    let rows = (0..5).map(row).collect();
    (stats, prepared, rows)
}

/// Block LDLQ in f64, scales as they are: the codes of a row in the factor's order.
fn slow(v: &[f64], row: &Row) -> Vec<u8> {
    let at = |i: usize, j: usize| v[i * K + j];
    let (mut e, mut codes) = (vec![0f64; K], Vec::new());
    for p in (0..K).step_by(VECTOR) {
        let scale = f64::from(row.scale(p));
        let cost = |word: &[f32; VECTOR]| -> f64 {
            let own: [f64; VECTOR] =
                std::array::from_fn(|i| f64::from(row.w[p + i]) - f64::from(word[i]) * scale);
            let column = |j: usize| {
                let before: f64 = (0..p).map(|i| e[i] * at(i, p + j)).sum();
                before + (0..=j).map(|i| own[i] * at(p + i, p + j)).sum::<f64>()
            };
            (0..VECTOR).map(|j| column(j).powi(2)).sum()
        };
        let best = (0..=u8::MAX)
            .min_by(|a, b| {
                cost(&row.windows[usize::from(*a)]).total_cmp(&cost(&row.windows[usize::from(*b)]))
            })
            .unwrap();
        let word = row.windows[usize::from(best)];
        (0..VECTOR).for_each(|i| e[p + i] = f64::from(row.w[p + i]) - f64::from(word[i]) * scale);
        codes.push(best);
    }
    codes
}

#[test]
fn feedback_is_that_of_the_slow_version() {
    let (stats, prepared, mut rows) = begun();
    let v = slow_factor(&stats, prepared.factor.order(), shrinkage(2));
    let expected: Vec<Vec<u8>> = rows.iter().map(|row| slow(&v, row)).collect();
    prepared.feed_back(Isa::best(), &mut rows);
    for (row, expected) in rows.iter().zip(expected) {
        assert_eq!(row.codes, expected);
    }
}

#[test]
fn descent_never_rises_and_keeps_its_books() {
    let (_, prepared, mut rows) = begun();
    let isa = Isa::best();
    let price = |rows: &[Row]| -> Vec<f64> {
        rows.iter()
            .map(|row| cost(isa, &prepared.factor, &row.errors()))
            .collect()
    };
    let first = price(&rows);
    prepared.feed_back(isa, &mut rows);
    let fed_back = price(&rows);
    for row in &mut rows {
        row.gradient = gradient(isa, &prepared.factor, &row.e);
    }
    let mut last = fed_back.clone();
    for _ in 0..6 {
        prepared.descend(isa, &mut rows);
        let now = price(&rows);
        for ((now, last), row) in now.iter().zip(&last).zip(&rows) {
            assert!(*now <= last * 1.000_01, "{now} after {last}");
            let fresh = gradient(isa, &prepared.factor, &row.errors());
            let off = row
                .gradient
                .iter()
                .zip(&fresh)
                .fold(0f32, |off, (a, b)| off.max((a - b).abs()));
            assert!(off < 1e-2, "the gradient kept is off by {off}");
        }
        last = now;
    }
    let sum = |prices: &[f64]| prices.iter().sum::<f64>();
    let (first, fed_back, last) = (sum(&first), sum(&fed_back), sum(&last));
    assert!(fed_back < 0.9 * first, "{fed_back} after {first}");
    assert!(last < 0.99 * fed_back, "{last} after {fed_back}");
}

#[test]
fn inverses_by_hand() {
    let a = [
        [2.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 4.0, 0.0],
        [0.0, 0.0, 0.0, 0.5],
    ];
    let expected = [
        [0.5, 0.0, 0.0, 0.0],
        [0.0, 1.0, -0.25, 0.0],
        [0.0, 0.0, 0.25, 0.0],
        [0.0, 0.0, 0.0, 2.0],
    ];
    assert_eq!(inverse(a), expected);
}
