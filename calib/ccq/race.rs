//! Which pairs of code scale and code zero suit a channel. Owns the race: many pairs judged on a few groups,
//! the better ones on more, the best on all. Does not own the list of pairs or the stored scales.

use std::ops::Range;
use std::sync::LazyLock;

use qtool_kernels::Isa;

use super::pairs::PAIRS;
use super::row::{Found, Row};
use super::{Book, Effort};

/// One heat of the race.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heat {
    /// Pairs that enter.
    pub(super) pairs: usize,
    /// One over the part of the groups that judges them.
    pub(super) part: usize,
    /// Scales tried for each group, of which the best counts, relative to the group's own.
    pub(super) scales: &'static [f32],
}

/// Only the group's own scale.
const OWN: &[f32] = &[1.0];
/// The own scale and a local step to both sides: how well a pair uses the freedom of local scales.
pub(super) const NEAR: &[f32] = &[1.0, 0.92, 1.085];

/// How much work each effort does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) heats: &'static [Heat],
    /// Pairs that are fitted completely.
    pub(super) finalists: usize,
    /// Super scales fitted for each finalist.
    pub(super) supers: usize,
    /// Rounds of least squares at most.
    pub(super) rounds: usize,
}

impl Plan {
    pub(super) fn of(effort: Effort) -> Self {
        const FAST: &[Heat] = &[heat(12, 6, OWN)];
        const DEFAULT: &[Heat] = &[heat(64, 16, OWN), heat(16, 4, OWN), heat(4, 1, NEAR)];
        const BEST: &[Heat] = &[heat(256, 4, OWN), heat(96, 1, NEAR)];
        match effort {
            Effort::Fast => Self::new(FAST, 1, 1, 0),
            Effort::Default => Self::new(DEFAULT, 1, 1, 1),
            Effort::Best => Self::new(BEST, 6, 4, 6),
        }
    }

    fn new(heats: &'static [Heat], finalists: usize, supers: usize, rounds: usize) -> Self {
        Self {
            heats,
            finalists,
            supers,
            rounds,
        }
    }
}

const fn heat(pairs: usize, part: usize, scales: &'static [f32]) -> Heat {
    Heat { pairs, part, scales }
}

/// Every pair of the list with its codebook.
pub(super) static BOOKS: LazyLock<Vec<Book>> =
    LazyLock::new(|| PAIRS.iter().map(|&pair| Book::new(pair)).collect());

/// The first pair of the list, the best single one.
pub(super) fn typical() -> &'static Book {
    &BOOKS[0]
}

/// Working memory of the race.
#[derive(Debug, Default)]
pub(super) struct Race {
    /// Gain so far and place in the list.
    runners: Vec<(f64, usize)>,
    scale: Vec<f32>,
    found: Found,
    best: Vec<f32>,
}

impl Race {
    /// The pairs that did best with the groups' real-valued scales, best first. Heats with the same scales
    /// build on each other: only the groups not judged before are searched.
    pub(super) fn run(&mut self, row: &Row, isa: Isa, plan: Plan) -> Vec<&'static Book> {
        let groups = row.groups();
        let mut runners = std::mem::take(&mut self.runners);
        runners.clear();
        runners.extend((0..BOOKS.len()).map(|place| (0.0, place)));
        let (mut judged, mut scales) = (0, OWN);
        for heat in plan.heats {
            runners.truncate(heat.pairs);
            if heat.scales != scales {
                (judged, scales) = (0, heat.scales);
                runners.iter_mut().for_each(|(gain, _)| *gain = 0.0);
            }
            let range = judged..groups.div_ceil(heat.part).max(judged);
            for (gain, place) in &mut runners {
                *gain += self.gain(row, isa, &BOOKS[*place], range.clone(), scales);
            }
            runners.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            judged = range.end;
        }
        let finalists = runners
            .iter()
            .take(plan.finalists)
            .map(|&(_, place)| &BOOKS[place])
            .collect();
        self.runners = runners;
        finalists
    }

    /// The gain of the groups in `range`, each with the best of `scales`.
    fn gain(&mut self, row: &Row, isa: Isa, book: &Book, range: Range<usize>, scales: &[f32]) -> f64 {
        self.best.clear();
        self.best.resize(range.len(), 0.0);
        for factor in scales {
            self.scale.clear();
            self.scale
                .extend(row.scale()[range.clone()].iter().map(|s| s * factor));
            row.search(isa, book, range.clone(), &self.scale, &mut self.found);
            for (best, gain) in self.best.iter_mut().zip(&self.found.gains) {
                *best = best.max(*gain);
            }
        }
        self.best.iter().map(|gain| f64::from(*gain)).sum()
    }
}
