//! Which pairs of code scale and code zero suit a channel. Owns the race: many pairs judged on a few groups,
//! the better ones on more, the best on all. Does not own the list of pairs or the stored scales.

use qtool_kernels::Isa;

use super::pairs::PAIRS;
use super::row::Row;
use super::{Book, Effort};

/// How much work each effort does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Heats: how many pairs enter, and which part (one over this) of the groups judges them.
    heats: &'static [(usize, usize)],
    /// Pairs that are fitted completely.
    finalists: usize,
    /// Super scales fitted for each finalist.
    pub(super) supers: usize,
    /// Rounds of least squares at most.
    pub(super) rounds: usize,
}

impl Plan {
    pub(super) fn of(effort: Effort) -> Self {
        match effort {
            Effort::Fast => Self { heats: &[(16, 4)], finalists: 1, supers: 1, rounds: 1 },
            Effort::Default => Self { heats: &[(256, 16), (64, 4), (16, 1)], finalists: 1, supers: 2, rounds: 2 },
            Effort::Best => Self { heats: &[(512, 4), (128, 1)], finalists: 4, supers: 4, rounds: 6 },
        }
    }
}

/// Working memory of the race.
#[derive(Debug, Default)]
pub(super) struct Race {
    /// Gain so far, book.
    runners: Vec<(f64, Book)>,
    books: Vec<Book>,
    inverse: Vec<f32>,
    codes: Vec<u8>,
    gains: Vec<f32>,
}

impl Race {
    /// The pairs that did best with the groups' real-valued scales, best first.
    pub(super) fn run(&mut self, row: &Row, isa: Isa, plan: Plan) -> Vec<(u16, u16)> {
        if self.books.is_empty() {
            self.books = PAIRS.iter().map(|&pair| Book::new(pair)).collect();
        }
        let groups = row.groups();
        let mut runners: Vec<(f64, usize)> = (0..PAIRS.len()).map(|i| (0.0, i)).collect();
        let mut judged = 0;
        for &(entering, part) in plan.heats {
            runners.truncate(entering);
            let until = groups.div_ceil(part);
            let range = judged..until.max(judged);
            self.codes.resize(range.len() * 16, 0);
            self.gains.resize(range.len(), 0.0);
            for (gain, index) in &mut runners {
                let scale = &row.scale()[range.clone()];
                let (codes, gains) = (&mut self.codes, &mut self.gains);
                row.search(isa, &self.books[*index], range.clone(), scale, &mut self.inverse, codes, gains);
                *gain += self.gains.iter().map(|g| f64::from(*g)).sum::<f64>();
            }
            runners.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            judged = range.end;
        }
        runners.iter().take(plan.finalists).map(|&(_, index)| PAIRS[index]).collect()
    }
}
