//! Figures of labels: confusion, accuracy, and macro precision, recall and F1.
//!
//! ```text
//! precision of a class   TP / (TP + FP)          0 where nothing was predicted as it
//! recall                 TP / (TP + FN)          0 where nothing is of it
//! F1                     2 TP / (2 TP + FP + FN) 0 where that is 0 / 0
//! macro                  the plain mean over all classes of the label file
//! ```
//!
//! as scikit-learn computes them with `labels` = all classes and `zero_division=0`. An item without a prediction is in
//! none of these counts; the confusion matrix has a column for it.

use crate::report::{DetailTable, Metric, Unit};
use crate::statistics::baselines;
use crate::statistics::compare::{self, How, Items};

use super::Reporting;
use super::choice::Choice;
use super::decide::Decisions;

/// True and predicted labels of some items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    /// `counts[truth][predicted]`.
    counts: Vec<Vec<u64>>,
    /// Items of each class without a prediction.
    none: Vec<u64>,
}

impl Confusion {
    /// Counts.
    pub fn of(classes: usize, pairs: impl Iterator<Item = (usize, Option<usize>)>) -> Self {
        let mut this = Self {
            counts: vec![vec![0; classes]; classes],
            none: vec![0; classes],
        };
        for (truth, predicted) in pairs {
            match predicted {
                Some(predicted) => this.counts[truth][predicted] += 1,
                None => this.none[truth] += 1,
            }
        }
        this
    }

    /// Items with this truth and this prediction.
    pub fn count(&self, truth: usize, predicted: usize) -> u64 {
        self.counts[truth][predicted]
    }

    /// Precision, recall and F1 of a class.
    pub fn class(&self, class: usize) -> [f64; 3] {
        let right = self.counts[class][class] as f64;
        let predicted: u64 = self.counts.iter().map(|row| row[class]).sum();
        let there: u64 = self.counts[class].iter().sum();
        let over = |a: f64, b: f64| if b > 0.0 { a / b } else { 0.0 };
        [
            over(right, predicted as f64),
            over(right, there as f64),
            over(2.0 * right, (predicted + there) as f64),
        ]
    }

    /// Items of a class, those without a prediction included.
    pub fn support(&self, class: usize) -> u64 {
        self.counts[class].iter().sum::<u64>() + self.none[class]
    }

    /// Macro precision, recall and F1; `None` when nothing was predicted.
    pub fn mean(&self) -> Option<[f64; 3]> {
        let classes = self.counts.len();
        if self.counts.iter().flatten().sum::<u64>() == 0 {
            return None;
        }
        let mut sums = [0.0; 3];
        for class in 0..classes {
            let own = self.class(class);
            sums.iter_mut().zip(own).for_each(|(s, v)| *s += v);
        }
        Some(sums.map(|s| s / classes as f64))
    }

    /// The matrix as a table, truth down, prediction across.
    pub fn table(&self, model: usize, labels: &[String]) -> DetailTable {
        let mut columns = labels.to_vec();
        let missing = self.none.iter().any(|n| *n > 0);
        columns.extend(missing.then(|| "no answer".to_owned()));
        let row = |(truth, label): (usize, &String)| {
            let mut cells: Vec<Option<f64>> = self.counts[truth].iter().map(|c| Some(*c as f64)).collect();
            cells.extend(missing.then(|| Some(self.none[truth] as f64)));
            (label.clone(), cells)
        };
        DetailTable {
            name: "confusion".to_owned(),
            model,
            columns,
            rows: labels.iter().enumerate().map(row).collect(),
        }
    }

    /// Precision, recall, F1 and support of each class, and their mean.
    pub fn per_class(&self, model: usize, labels: &[String]) -> DetailTable {
        let mut rows: Vec<(String, Vec<Option<f64>>)> = labels
            .iter()
            .enumerate()
            .map(|(class, label)| {
                let mut cells: Vec<Option<f64>> = self.class(class).into_iter().map(Some).collect();
                cells.push(Some(self.support(class) as f64));
                (label.clone(), cells)
            })
            .collect();
        let total: u64 = (0..labels.len()).map(|c| self.support(c)).sum();
        let mut mean: Vec<Option<f64>> = self.mean().map_or(vec![None; 3], |m| m.map(Some).to_vec());
        mean.push(Some(total as f64));
        rows.push(("macro average".to_owned(), mean));
        DetailTable {
            name: "per class".to_owned(),
            model,
            columns: ["precision", "recall", "F1", "support"]
                .map(str::to_owned)
                .to_vec(),
            rows,
        }
    }
}

/// True label and every model's prediction of each labelled item.
pub struct Labelled<'a> {
    choice: &'a Choice,
    /// Indexes of the items.
    items: Vec<usize>,
    truth: Vec<usize>,
    predicted: Vec<Vec<Option<usize>>>,
}

impl<'a> Labelled<'a> {
    /// Of a task's decisions.
    pub fn new(choice: &'a Choice, decisions: &[Decisions]) -> Self {
        let gold = |i: usize| choice.data.items[i].gold;
        let items: Vec<usize> = (0..choice.data.items.len())
            .filter(|&i| gold(i).is_some())
            .collect();
        let label = |d: &Decisions, i: usize| d.items[i].map(|d| d.label);
        Self {
            choice,
            truth: items.iter().filter_map(|&i| gold(i)).collect(),
            predicted: decisions
                .iter()
                .map(|d| items.iter().map(|&i| label(d, i)).collect())
                .collect(),
            items,
        }
    }

    fn group_of(&self) -> Vec<usize> {
        self.items
            .iter()
            .map(|&i| self.choice.data.items[i].group)
            .collect()
    }

    /// Accuracy: over kinds and their macro average, or over all. `classes` is what a coin has sides.
    pub fn accuracy(&self, how: &Reporting, classes: usize) -> (Vec<Metric>, Vec<String>) {
        let right = |p: &Option<usize>, t: &usize| p.map(|p| f64::from(u8::from(p == *t)));
        let items = Items {
            groups: self.choice.data.groups.clone(),
            group_of: self.group_of(),
            scores: self
                .predicted
                .iter()
                .map(|p| p.iter().zip(&self.truth).map(|(p, t)| right(p, t)).collect())
                .collect(),
            weights: None,
        };
        let base = baselines::of_labels(items.groups.len(), &items.group_of, &self.truth, classes, true);
        let asked = How {
            resamples: how.resamples,
            ..How::accuracy(base, how.seed)
        };
        let mut warnings = compare::warnings(&items, &asked, &how.models);
        let none = |m: usize| self.predicted[m].iter().all(Option::is_none) && !self.truth.is_empty();
        for (_, label) in how.models.iter().enumerate().filter(|(m, _)| none(*m)) {
            warnings.push(format!(
                "{label} has no usable answer to any item; nothing can be said of it"
            ));
        }
        (compare::compare(&items, &asked), warnings)
    }

    /// Macro precision, recall and F1.
    pub fn macro_scores(&self, how: &Reporting) -> Vec<Metric> {
        let classes = self.choice.data.labels.len();
        let group_of = vec![0; self.truth.len()];
        ["precision", "recall", "F1"]
            .into_iter()
            .enumerate()
            .map(|(which, name)| {
                let asked = How {
                    resamples: how.resamples,
                    ..How::mean(name, Unit::Share, Some(true), how.seed)
                };
                compare::bootstrap_statistic(compare::MACRO, &group_of, &asked, |drawn| {
                    let one = |predicted: &Vec<Option<usize>>| {
                        let pairs = drawn.iter().map(|&i| (self.truth[i], predicted[i]));
                        Confusion::of(classes, pairs).mean().map(|m| m[which])
                    };
                    self.predicted.iter().map(one).collect()
                })
            })
            .collect()
    }

    /// Confusion of each model, over the items of one kind or all.
    pub fn confusion(&self, group: Option<usize>) -> Vec<Confusion> {
        let classes = self.choice.data.labels.len();
        let of = |predicted: &Vec<Option<usize>>| {
            let members = self
                .items
                .iter()
                .enumerate()
                .filter(|(_, item)| group.is_none_or(|g| self.choice.data.items[**item].group == g));
            Confusion::of(classes, members.map(|(i, _)| (self.truth[i], predicted[i])))
        };
        self.predicted.iter().map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confusion_by_hand() {
        // Truth 0 0 0 1 1 2, predicted 0 0 1 1 - 1.
        let truth = [0, 0, 0, 1, 1, 2];
        let predicted = [Some(0), Some(0), Some(1), Some(1), None, Some(1)];
        let confusion = Confusion::of(3, truth.into_iter().zip(predicted));
        assert_eq!(confusion.class(0), [1.0, 2.0 / 3.0, 0.8]);
        assert_eq!(confusion.class(1), [1.0 / 3.0, 1.0, 0.5]);
        assert_eq!(confusion.class(2), [0.0, 0.0, 0.0]);
        assert_eq!([0, 1, 2].map(|c| confusion.support(c)), [3, 2, 1]);
        let mean = confusion.mean().unwrap();
        assert!((mean[2] - 1.3 / 3.0).abs() < 1e-12);
        let labels = ["a", "b", "c"].map(str::to_owned);
        let table = confusion.table(0, &labels);
        assert_eq!(table.columns.last().unwrap(), "no answer");
        assert_eq!(table.rows[1].1, [Some(0.0), Some(1.0), Some(0.0), Some(1.0)]);
        assert_eq!(Confusion::of(2, [(0, None)].into_iter()).mean(), None);
    }
}
