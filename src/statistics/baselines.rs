//! What a model is worth that does not look at the items: the accuracy of a constant answer, and of a coin.

/// Name of the accuracy of the best constant answer.
pub const MAJORITY: &str = "majority";
/// Name of the accuracy of a draw with equal chances.
pub const COIN_FLIP: &str = "coin flip";

/// Baselines of each row of a task.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Baselines {
    /// Of the first row: the macro average, or `all`.
    pub headline: Vec<(String, f64)>,
    /// Of each group.
    pub groups: Vec<Vec<(String, f64)>>,
}

/// Baselines of accuracy, from the true class of each item.
///
/// In a group: the share of its commonest class. In the headline: the best that one and the same class reaches
/// everywhere, averaged over groups (`macro_average`) or items; it may be below the mean of the groups' own, which
/// takes knowing the group. The coin has one side for each of `classes`. A group without items has no majority.
pub fn of_labels(
    groups: usize,
    group_of: &[usize],
    labels: &[usize],
    classes: usize,
    macro_average: bool,
) -> Baselines {
    let classes = classes.max(labels.iter().map(|l| l + 1).max().unwrap_or(1));
    let mut counts = vec![vec![0_u64; classes]; groups];
    for (&group, &label) in group_of.iter().zip(labels) {
        counts[group][label] += 1;
    }
    let sum = |c: &Vec<u64>| c.iter().sum::<u64>() as f64;
    let filled: Vec<&Vec<u64>> = counts.iter().filter(|c| sum(c) > 0.0).collect();
    let items: f64 = filled.iter().map(|c| sum(c)).sum();
    let share = |class: usize| -> f64 {
        let of = |c: &&Vec<u64>| {
            c[class] as f64
                / if macro_average {
                    sum(c) * filled.len() as f64
                } else {
                    items
                }
        };
        filled.iter().map(of).sum()
    };
    let row = |majority: Option<f64>| {
        let majority = majority.map(|m| (MAJORITY.to_owned(), m));
        majority
            .into_iter()
            .chain([(COIN_FLIP.to_owned(), 1.0 / classes as f64)])
            .collect()
    };
    Baselines {
        headline: row((0..classes)
            .map(share)
            .max_by(f64::total_cmp)
            .filter(|_| items > 0.0)),
        groups: counts
            .iter()
            .map(|c| {
                row(c
                    .iter()
                    .max()
                    .filter(|_| sum(c) > 0.0)
                    .map(|&m| m as f64 / sum(c)))
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_constant_answer_for_all_groups() {
        // Group 0: three of class 1, one of class 0; group 1: two of class 0.
        let found = of_labels(2, &[0, 0, 0, 0, 1, 1], &[1, 1, 1, 0, 0, 0], 2, true);
        let values = |row: &[(String, f64)]| row.iter().map(|r| r.1).collect::<Vec<_>>();
        assert_eq!(values(&found.groups[0]), [0.75, 0.5]);
        assert_eq!(values(&found.groups[1]), [1.0, 0.5]);
        // Always 0: (0.25 + 1) / 2; always 1: (0.75 + 0) / 2.
        assert_eq!(values(&found.headline), [0.625, 0.5]);
        let micro = of_labels(2, &[0, 0, 0, 0, 1, 1], &[1, 1, 1, 0, 0, 0], 2, false);
        assert_eq!(values(&micro.headline), [0.5, 0.5]);
    }

    #[test]
    fn an_empty_group_has_no_majority() {
        let found = of_labels(1, &[], &[], 4, true);
        assert_eq!(found.groups[0], [(COIN_FLIP.to_owned(), 0.25)]);
        assert_eq!(found.headline, [(COIN_FLIP.to_owned(), 0.25)]);
    }
}
