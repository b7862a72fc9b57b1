//! Which prompts share a prefix, and which of them run in one batch. Both depend on the prompts alone, so the
//! same list of questions runs in the same batches for every model with the same tokenizer, on any number of
//! threads.

/// Rounds of looking for a prefix; whatever is left then runs without one.
const ROUNDS: usize = 8;
/// Tokens that a prefix must save to be worth its run.
const LEAST_SAVING: usize = 32;

/// Prompts that begin with the same tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// How many tokens they share; each prompt has at least one more.
    pub prefix: usize,
    /// Indices of the prompts, rising.
    pub items: Vec<usize>,
}

/// Splits prompts into groups with a common prefix each. A task's prompts usually form one: its instruction
/// and examples come first.
pub fn groups(prompts: &[&[u32]]) -> Vec<Group> {
    let mut rest: Vec<usize> = (0..prompts.len()).collect();
    rest.sort_by_key(|&i| prompts[i]);
    let mut groups = Vec::new();
    for _ in 0..ROUNDS {
        // The middle of the sorted list lies in any family of prompts that is more than half of it.
        let Some(&pivot) = rest.get(rest.len() / 2) else {
            break;
        };
        let shared: Vec<usize> = rest.iter().map(|&i| common(prompts[i], prompts[pivot])).collect();
        let mut lengths = shared.clone();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let savings = lengths
            .iter()
            .enumerate()
            .map(|(more, &length)| (more * length, length));
        let Some((saved, prefix)) = savings.max() else {
            break;
        };
        if saved < LEAST_SAVING {
            break;
        }
        let (with, without): (Vec<_>, Vec<_>) = rest.iter().zip(&shared).partition(|(_, s)| **s >= prefix);
        let mut items: Vec<usize> = with.into_iter().map(|(&i, _)| i).collect();
        items.sort_unstable();
        groups.push(Group { prefix, items });
        rest = without.into_iter().map(|(&i, _)| i).collect();
    }
    if !rest.is_empty() {
        rest.sort_unstable();
        groups.push(Group {
            prefix: 0,
            items: rest,
        });
    }
    groups
}

/// Tokens that both begin with, of which each has at least one more.
fn common(a: &[u32], b: &[u32]) -> usize {
    let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    same.min(a.len().saturating_sub(1)).min(b.len().saturating_sub(1))
}

/// Cuts items into batches of at most `budget` rows, longest first; an item that is longer runs alone. At most
/// `most` items a batch.
pub fn batches(
    items: &[usize],
    rows: impl Fn(usize) -> usize,
    budget: usize,
    most: usize,
) -> Vec<Vec<usize>> {
    let mut order = items.to_vec();
    order.sort_by_key(|&i| (std::cmp::Reverse(rows(i)), i));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut used = 0;
    for item in order {
        match batches.last_mut() {
            Some(batch) if used + rows(item) <= budget && batch.len() < most => batch.push(item),
            _ => {
                batches.push(vec![item]);
                used = 0;
            }
        }
        used += rows(item);
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_and_its_strays() {
        let shots: Vec<u32> = (100..140).collect();
        let item = |own: &[u32]| [shots.as_slice(), own].concat();
        let prompts = [item(&[1, 2]), vec![7, 8, 9], item(&[1, 3]), item(&[4]), vec![7]];
        let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let found = groups(&slices);
        let group = |prefix, items: &[usize]| Group {
            prefix,
            items: items.to_vec(),
        };
        assert_eq!(found, [group(40, &[0, 2, 3]), group(0, &[1, 4])]);
        // One of two equal prompts' tokens is left to run, so that there is a row to read.
        let twice = [shots.as_slice(), shots.as_slice()];
        assert_eq!(groups(&twice), [group(39, &[0, 1])]);
        // A single prompt shares with nobody.
        assert_eq!(groups(&slices[..1]), [group(0, &[0])]);
        assert!(groups(&[]).is_empty());
    }

    #[test]
    fn batches_keep_to_the_budget() {
        let lengths = [5, 1, 9, 3, 20];
        let cut = batches(&[0, 1, 2, 3, 4], |i| lengths[i], 10, 8);
        assert_eq!(cut, [vec![4], vec![2], vec![0, 3, 1]]);
        let few = batches(&[0, 1, 2, 3, 4], |i| lengths[i], 100, 2);
        assert_eq!(few, [vec![4, 2], vec![0, 3], vec![1]]);
    }
}
