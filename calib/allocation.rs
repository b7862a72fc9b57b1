//! Which of several choices each of many items gets, under a budget for all together: the multiple-choice knapsack
//! behind `--target-bpw`. Owns the search and the proof of how far from the best it can be.
//!
//! ```text
//! minimise sum of loss(item, choice)   subject to   sum of bytes(item, choice) <= budget
//! ```
//!
//! Of each item the choices on the lower convex hull of (bytes, loss) are walked in order of falling gain per byte,
//! over all items together (the Lagrangian relaxation, solved exactly). Where the next step does not fit, the part of
//! it that would fit gives a lower bound on the loss of *any* plan; then smaller steps, and choices off the hull, use
//! up what is left of the budget.

/// One way to treat an item.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// What it takes.
    pub bytes: u64,
    /// What it costs, at least zero.
    pub loss: f64,
}

/// A plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Allocation {
    /// Number of the choice of each item.
    pub chosen: Vec<usize>,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Loss of all of them.
    pub loss: f64,
    /// No plan within the budget has a smaller loss than this.
    pub bound: f64,
}

/// The smallest and largest number of bytes that choices can add up to.
pub fn range(items: &[Vec<Choice>]) -> (u64, u64) {
    let bytes = |item: &Vec<Choice>| {
        let all = || item.iter().map(|c| c.bytes);
        (all().min().unwrap_or(0), all().max().unwrap_or(0))
    };
    items
        .iter()
        .map(bytes)
        .fold((0, 0), |(low, high), (l, h)| (low + l, high + h))
}

/// A step from one choice of an item to the next on its hull.
struct Step {
    item: usize,
    to: usize,
    bytes: u64,
    gain: f64,
}

impl Step {
    fn slope(&self) -> f64 {
        self.gain / self.bytes as f64
    }
}

/// The plan of least loss within `budget` that the module's method finds. `None` when even the smallest choices
/// exceed it. Ties go to the earlier item.
///
/// # Panics
///
/// When an item has no choice, or a loss is not a number.
pub fn allocate(items: &[Vec<Choice>], budget: u64) -> Option<Allocation> {
    let hulls: Vec<Vec<usize>> = items.iter().map(|choices| hull(choices)).collect();
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull[0]).collect();
    let at = |chosen: &[usize]| {
        let pairs = chosen.iter().zip(items);
        pairs.fold((0u64, 0f64), |(bytes, loss), (&c, item)| {
            (bytes + item[c].bytes, loss + item[c].loss)
        })
    };
    let (mut bytes, mut loss) = at(&chosen);
    if bytes > budget {
        return None;
    }
    let mut steps: Vec<Step> = Vec::new();
    for (item, hull) in hulls.iter().enumerate() {
        steps.extend(hull.windows(2).map(|pair| {
            let (from, to) = (items[item][pair[0]], items[item][pair[1]]);
            Step {
                item,
                to: pair[1],
                bytes: to.bytes - from.bytes,
                gain: from.loss - to.loss,
            }
        }));
    }
    // Slopes of one item fall along its hull, and the sort is stable: its steps stay in order.
    steps.sort_by(|a, b| b.slope().total_cmp(&a.slope()));
    let mut stuck = vec![false; items.len()];
    let mut bound = None;
    for step in &steps {
        if bytes + step.bytes > budget {
            bound.get_or_insert(loss - step.slope() * (budget - bytes) as f64);
            stuck[step.item] = true;
        } else if !stuck[step.item] {
            chosen[step.item] = step.to;
            bytes += step.bytes;
            loss -= step.gain;
        }
    }
    let bound = bound.unwrap_or(loss);
    fill(items, budget, &mut chosen, bytes);
    let (bytes, loss) = at(&chosen);
    Some(Allocation {
        chosen,
        bytes,
        loss,
        bound: bound.min(loss),
    })
}

/// Uses up what is left of the budget: again and again the change of one item that saves most.
fn fill(items: &[Vec<Choice>], budget: u64, chosen: &mut [usize], mut bytes: u64) {
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, item) in items.iter().enumerate() {
            let now = item[chosen[i]];
            for (c, choice) in item.iter().enumerate() {
                let gain = now.loss - choice.loss;
                let fits = bytes - now.bytes + choice.bytes <= budget;
                if fits && gain > best.map_or(0.0, |(gain, ..)| gain) {
                    best = Some((gain, i, c));
                }
            }
        }
        let Some((_, i, c)) = best else { return };
        bytes = bytes - items[i][chosen[i]].bytes + items[i][c].bytes;
        chosen[i] = c;
    }
}

/// Choices on the lower convex hull, from the fewest bytes on, losses falling.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|&a, &b| {
        let (a, b) = (choices[a], choices[b]);
        a.bytes.cmp(&b.bytes).then(a.loss.total_cmp(&b.loss))
    });
    let mut hull: Vec<usize> = Vec::new();
    for c in order {
        let new = choices[c];
        if hull.last().is_some_and(|&last| choices[last].loss <= new.loss) {
            continue;
        }
        while let [.., a, b] = hull.as_slice() {
            let (a, b) = (choices[*a], choices[*b]);
            let slope = |from: Choice, to: Choice| (from.loss - to.loss) / (to.bytes - from.bytes) as f64;
            if slope(b, new) < slope(a, b) {
                break;
            }
            hull.pop();
        }
        hull.push(c);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::noise;

    /// The least loss by trying everything.
    fn exhaustive(items: &[Vec<Choice>], budget: u64) -> f64 {
        let mut best: Vec<f64> = vec![f64::INFINITY; budget as usize + 1];
        best[0] = 0.0;
        for item in items {
            let mut next = vec![f64::INFINITY; best.len()];
            for (bytes, loss) in best.iter().enumerate() {
                for choice in item {
                    if let Some(slot) = next.get_mut(bytes + choice.bytes as usize) {
                        *slot = slot.min(loss + choice.loss);
                    }
                }
            }
            best = next;
        }
        best.into_iter().fold(f64::INFINITY, f64::min)
    }

    #[test]
    fn the_optimum_lies_between_the_bound_and_the_plan() {
        let mut next = noise(11);
        let (mut plans, mut exact) = (0, 0);
        for case in 0..60 {
            let items: Vec<Vec<Choice>> = (0..12)
                .map(|_| {
                    let size = 3.0 + 2.0 * next().abs();
                    let weight = (4.0 * next()).exp();
                    [2u64, 3, 4, 8]
                        .map(|bits| Choice {
                            bytes: (size * bits as f32) as u64,
                            loss: f64::from(weight * (0.25f32 + 0.1 * next()).powi(bits as i32)),
                        })
                        .to_vec()
                })
                .collect();
            let (least, most) = range(&items);
            let budget = least + (most - least) * (case % 10) / 9;
            let plan = allocate(&items, budget).unwrap();
            let best = exhaustive(&items, budget);
            let bytes: u64 = plan.chosen.iter().zip(&items).map(|(&c, i)| i[c].bytes).sum();
            assert!(bytes == plan.bytes && bytes <= budget);
            assert!(plan.bound <= best * 1.000_001 + 1e-12, "{} {best}", plan.bound);
            assert!(best <= plan.loss * 1.000_001, "{best} {}", plan.loss);
            // The plan misses the bound by less than one step of one item.
            let steepest = items
                .iter()
                .flat_map(|i| i.iter().map(|c| c.loss))
                .fold(0.0, f64::max);
            assert!(plan.loss - plan.bound <= steepest);
            plans += 1;
            exact += usize::from(plan.loss <= best * 1.000_001);
        }
        assert_eq!(plans, 60);
        assert!(exact > 20, "{exact} of 60 are the very best");
    }

    #[test]
    fn by_hand() {
        let item = |losses: [f64; 3]| {
            let choice = |(bytes, loss)| Choice { bytes, loss };
            [2, 4, 8].into_iter().zip(losses).map(choice).collect::<Vec<_>>()
        };
        let items = [item([10.0, 1.0, 0.0]), item([2.0, 1.5, 0.0])];
        assert_eq!(range(&items), (4, 16));
        assert_eq!(allocate(&items, 3), None);
        // 4 bytes: both at the bottom. 6: the first rises. 12: the second goes to 8 (1.5 for 6 beats 1 for 4).
        for (budget, chosen, loss) in [
            (4, [0, 0], 12.0),
            (6, [1, 0], 3.0),
            (12, [1, 2], 1.0),
            (16, [2, 2], 0.0),
        ] {
            let plan = allocate(&items, budget).unwrap();
            assert_eq!(
                (plan.chosen.as_slice(), plan.loss),
                (chosen.as_slice(), loss),
                "{budget}"
            );
            assert!(plan.bound <= loss);
        }
        // A choice that takes more and costs more is never taken.
        let odd = [vec![
            Choice { bytes: 1, loss: 1.0 },
            Choice { bytes: 2, loss: 2.0 },
        ]];
        assert_eq!(allocate(&odd, 9).unwrap().chosen, [0]);
    }
}
