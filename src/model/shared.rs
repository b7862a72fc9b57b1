//! Many sequences behind one prefix: a task's instruction and examples run once, and of every prompt only what
//! is its own. A prompt with several answers is a tree: its trunk runs once, too, and each answer is a branch
//! that sees the trunk and itself.
//!
//! ```text
//! batch     trunk 1 | branch 1a | branch 1b | trunk 2 | branch 2a ...                    M rows
//! memory    prefix | trunk 1 | branch 1a | trunk 1 again | branch 1b | trunk 2 | branch 2a ...
//! ```
//!
//! A segment sees the prefix and one stretch of rows of its own; that is why the keys and values of a trunk are
//! copied before its second branch. They are few beside the products that a second run would cost.

use qtool_kernels::Backend;
use qtool_kernels::backend::Segment;

use super::attention::{Memory, Place, Target};
use super::{Batch, Cache, Model};
use crate::Result;

/// Rows that run together while a prefix is read.
const PREFIX_ROWS: usize = 512;

/// A prompt's own tokens and what may follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree<'a> {
    /// Tokens behind the prefix, at least one.
    pub trunk: &'a [u32],
    /// Tokens behind the trunk; branches do not see each other. May be empty.
    pub branches: &'a [&'a [u32]],
}

impl Tree<'_> {
    /// Rows of it in a batch.
    pub fn rows(&self) -> usize {
        self.trunk.len() + self.branches.iter().map(|b| b.len()).sum::<usize>()
    }
}

/// How the rows of trees lie in a memory, behind `prefix` rows.
struct Layout {
    batch: Batch,
    segments: Vec<Segment>,
    /// Row of the batch for each row of the memory behind the prefix.
    rows: Vec<usize>,
}

impl Layout {
    fn new(trees: &[Tree<'_>], prefix: usize) -> Self {
        let mut layout = Self {
            batch: Batch::default(),
            segments: Vec::new(),
            rows: Vec::new(),
        };
        for tree in trees {
            layout.add(tree, prefix);
        }
        layout
    }

    fn add(&mut self, tree: &Tree<'_>, prefix: usize) {
        let trunk = self.batch.ids().len();
        self.batch.push(tree.trunk, prefix);
        let trunk = trunk..self.batch.ids().len();
        let mut queries = trunk.clone();
        let mut own = prefix + self.rows.len();
        self.rows.extend(trunk.clone());
        let mut first = true;
        for branch in tree.branches.iter().filter(|b| !b.is_empty()) {
            let from = self.batch.ids().len();
            self.batch.push(branch, prefix + tree.trunk.len());
            let rows = from..self.batch.ids().len();
            if first {
                // It lies behind the trunk and runs as its continuation.
                queries.end = rows.end;
                first = false;
            } else {
                self.see(queries, prefix, own);
                queries = rows.clone();
                own = prefix + self.rows.len();
                self.rows.extend(trunk.clone());
            }
            self.rows.extend(rows);
        }
        self.see(queries, prefix, own);
    }

    /// A segment that sees what was laid down from row `own` on.
    fn see(&mut self, queries: std::ops::Range<usize>, prefix: usize, own: usize) {
        self.segments.push(Segment {
            queries,
            prefix: 0..prefix,
            own: own..prefix + self.rows.len(),
        });
    }
}

impl<B: Backend> Model<B> {
    /// Runs a prefix that many sequences share. Fails when an id is beyond the vocabulary, or there are none.
    pub fn prefix(&self, ids: &[u32]) -> Result<Cache<B>> {
        let mut cache = self.cache(ids.len());
        for part in ids.chunks(PREFIX_ROWS) {
            self.append(&mut cache, part)?;
        }
        Ok(cache)
    }

    /// What the last of the loaded blocks gives for trees behind a prefix, (M, hidden): of each tree the rows of
    /// its trunk, then of its branches, in order. `prefix` must be full, as [`prefix`](Self::prefix) makes it.
    pub fn behind(&self, prefix: Option<&Cache<B>>, trees: &[Tree<'_>]) -> Result<B::Tensor> {
        let before = prefix.map_or(0, |cache| cache.capacity);
        let layout = Layout::new(trees, before);
        let mut x = self.embed(&layout.batch)?;
        let mut room = self.room(before + layout.rows.len());
        let straight = layout.rows.len() == layout.batch.ids().len();
        let place = Place {
            segments: layout.segments,
            target: if straight {
                Target::From(before)
            } else {
                Target::Copies(before, layout.rows)
            },
            ..self.place(&layout.batch)
        };
        self.backend.within(|| {
            for (index, block) in self.blocks.iter().enumerate() {
                let memory = Memory::Behind {
                    prefix: prefix.and_then(|cache| cache.blocks.get(index)),
                    room: &mut room,
                };
                block.run(&self.backend, &self.decoder, &mut x, &place, memory, None);
            }
        });
        self.backend.fault()?;
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_branch_lies_behind_a_copy_of_its_trunk() {
        let trees = [
            Tree {
                trunk: &[1, 2],
                branches: &[&[3], &[], &[4, 5]],
            },
            Tree {
                trunk: &[6],
                branches: &[],
            },
        ];
        let layout = Layout::new(&trees, 10);
        assert_eq!(layout.batch.ids(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(layout.batch.positions(), [10, 11, 12, 12, 13, 10]);
        assert_eq!(layout.rows, [0, 1, 2, 0, 1, 3, 4, 5]);
        let segment = |queries, own| Segment {
            queries,
            prefix: 0..10,
            own,
        };
        assert_eq!(
            layout.segments,
            [
                segment(0..3, 10..13),
                segment(3..5, 13..17),
                segment(5..6, 17..18)
            ]
        );
        assert_eq!(trees[0].rows(), 5);
    }
}
