//! Feedback against the same written out in f64, descent against every single change, and what both must never do.

use qtool_formats::QuantizedWeight;

use super::*;
use crate::hessian::tests::{correlated, noise, slow_factor};
use crate::kquant::KQuantizer;
use crate::proxy::Proxy;
use crate::{Quantizer, stats::Moment};

const K: usize = 2 * SUPER_BLOCK;

fn weights(n: usize, seed: u64) -> Vec<f32> {
    let mut next = noise(seed);
    (0..n * K).map(|_| next() * next() * next()).collect()
}

/// Numbers and codes of a row by feedback in f64, blocks fitted by the code under test.
fn slow(feedback: &Feedback, v: &[f64], x: &[f32]) -> Vec<SuperBlock> {
    let (kind, order) = (feedback.kind, feedback.factor.order());
    let mut r = [0f64; K];
    let mut blocks = vec![None; K / SUPER_BLOCK];
    for from in (0..K).step_by(SUPER_BLOCK) {
        let mut delta = [0f64; SUPER_BLOCK];
        let (mut targets, mut weights) = ([0f32; SUPER_BLOCK], [0f32; SUPER_BLOCK]);
        for j in from..from + SUPER_BLOCK {
            let carried: f64 = (from..j).map(|i| delta[i - from] * v[i * K + j]).sum();
            delta[j - from] = (r[j] - carried) / v[j * K + j];
            let column = order[j] % SUPER_BLOCK;
            targets[column] = (f64::from(x[order[j]]) + delta[j - from]) as f32;
            weights[column] = (j..from + SUPER_BLOCK).map(|c| v[j * K + c].powi(2)).sum::<f64>() as f32;
        }
        let mut block = SuperBlock::of(kind, 0, &targets, &weights).unwrap();
        for j in from..from + SUPER_BLOCK {
            let column = order[j] % SUPER_BLOCK;
            let w = f64::from(x[order[j]]);
            let target = w + r[j] / v[j * K + j];
            let (scale, min) = block.line(kind, column);
            let most = f64::from((1u8 << kind.bits()) - 1);
            let code = ((target + f64::from(min)) / f64::from(scale))
                .round()
                .clamp(0.0, most);
            block.codes[column] = if scale > 0.0 { code as u8 } else { 0 };
            let error = w - f64::from(block.value(kind, column));
            for c in j..K {
                r[c] += error * v[j * K + c];
            }
        }
        blocks[order[from] / SUPER_BLOCK] = Some(block);
    }
    blocks.into_iter().flatten().collect()
}

#[test]
fn feedback_is_that_of_f64() {
    let stats = correlated(K, 900, 3, false);
    for kind in KQuant::ALL {
        let feedback = Feedback::new(kind, &stats).unwrap();
        let v = slow_factor(&stats, feedback.factor.order(), shrinkage(kind.bits()));
        let x = weights(6, 11);
        let (mut same, mut all) = (0, 0);
        for x in x.chunks_exact(K) {
            let mut row = Row::new(&feedback.factor, x);
            for from in (0..K).step_by(SUPER_BLOCK) {
                feedback.super_block(Isa::best(), 0, &mut row, from).unwrap();
            }
            let ours: Vec<SuperBlock> = row.blocks.into_iter().flatten().collect();
            let theirs = slow(&feedback, &v, x);
            let codes =
                |blocks: &[SuperBlock]| -> Vec<u8> { blocks.iter().flat_map(|b| b.codes.clone()).collect() };
            same += codes(&ours)
                .iter()
                .zip(codes(&theirs))
                .filter(|(a, b)| **a == *b)
                .count();
            all += K;
        }
        // A target on the border between two codes may fall to either side, and carries on from there.
        assert!(same * 100 >= all * 97, "{kind:?}: {same} of {all} codes");
    }
}

#[test]
fn no_single_code_can_be_bettered() {
    let stats = correlated(K, 900, 5, true);
    let mut tried = 0;
    for kind in KQuant::ALL {
        let feedback = Feedback::new(kind, &stats).unwrap();
        let x = weights(2, 21);
        for (i, blocks) in feedback.rows(Isa::best(), 0, &x).unwrap().iter().enumerate() {
            let (x, factor) = (&x[i * K..(i + 1) * K], &feedback.factor);
            let errors: Vec<f64> = factor
                .order()
                .iter()
                .map(|&c| f64::from(x[c]) - f64::from(blocks[c / SUPER_BLOCK].value(kind, c % SUPER_BLOCK)))
                .collect();
            let h = |i: usize, j: usize| f64::from(factor.h(i)[j]);
            let total: f64 = (0..K)
                .map(|i| (0..K).map(|j| errors[i] * h(i, j) * errors[j]).sum::<f64>())
                .sum();
            let mut better = 0;
            for (place, &column) in factor.order().iter().enumerate() {
                let slope: f64 = (0..K).map(|j| errors[j] * h(place, j)).sum();
                let (scale, _) = blocks[column / SUPER_BLOCK].line(kind, column % SUPER_BLOCK);
                let code = blocks[column / SUPER_BLOCK].codes[column % SUPER_BLOCK];
                for (possible, by) in [(code > 0, scale), (code + 1 < 1 << kind.bits(), -scale)] {
                    let by = f64::from(by);
                    let change = 2.0 * by * slope + by * by * h(place, place);
                    better += usize::from(possible && change < -1e-4 * total);
                    tried += 1;
                }
            }
            // The last sweep may leave a few columns whose neighbours moved after them.
            assert!(better * 100 <= K, "{kind:?}: {better} of {K} columns");
        }
    }
    assert_eq!(tried, 2 * 2 * K * 2);
}

#[test]
fn a_row_is_never_worse_than_without_feedback_and_depends_on_no_other() {
    let stats = correlated(K, 900, 7, true);
    let diagonal = stats.importance().iter().map(|v| f64::from(*v)).collect();
    let diagonal = LayerStats::new(K, 1, Moment::Diagonal(diagonal), stats.absmax().to_vec()).unwrap();
    let proxy = Proxy::new(&stats);
    let n = 19;
    let mut x = weights(n, 31);
    x[K..2 * K].fill(0.0);
    for kind in KQuant::ALL {
        let plain = KQuantizer::new(kind);
        let (fed_back, weighted) = (
            plain.informed(&stats).unwrap(),
            plain.informed(&diagonal).unwrap(),
        );
        assert!(
            fed_back.describe().contains("error feedback, damping 0.001"),
            "{}",
            fed_back.describe()
        );
        assert!(
            weighted.describe().ends_with("weighted by inputs"),
            "{}",
            weighted.describe()
        );
        let run = |q: &dyn Quantizer, isa| q.quantize(isa, &x, n, K).unwrap();
        let ours = run(fed_back.as_ref(), Isa::best());
        let others = [run(&plain, Isa::best()), run(weighted.as_ref(), Isa::best())];
        let costs = proxy.row_errors(&x, &ours);
        for other in &others {
            for (row, (a, b)) in costs.iter().zip(proxy.row_errors(&x, other)).enumerate() {
                assert!(*a <= b * 1.001, "{kind:?}, row {row}: {a} against {b}");
            }
        }
        let sum = |costs: &[f64]| costs.iter().sum::<f64>();
        let (with, without) = (sum(&costs), sum(&proxy.row_errors(&x, &others[1])));
        assert!(with < 0.6 * without, "{kind:?}: {with} against {without}");

        for isa in Isa::available() {
            assert_eq!(run(fed_back.as_ref(), isa), ours, "{kind:?} on {isa}");
        }
        let parts = [0..3, 3..n].map(|rows| {
            let x = &x[rows.start * K..rows.end * K];
            fed_back.quantize(Isa::best(), x, rows.len(), K).unwrap()
        });
        assert_eq!(QuantizedWeight::stack(&parts), Some(ours), "{kind:?}");
    }
}
