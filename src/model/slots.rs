//! Several sequences that grow together, token by token, each in a stretch of one cache, perhaps behind a prefix
//! that all of them see.

use std::ops::Range;

use qtool_kernels::Backend;
use qtool_kernels::backend::Segment;

use super::attention::{KeysValues, Memory, Place, Target};
use super::{Batch, Cache, Model};
use crate::{Error, Result};

/// Keys and values of several sequences.
pub struct Slots<B: Backend> {
    blocks: Vec<KeysValues<B>>,
    prefix: usize,
    /// Rows of each sequence, and how many are filled.
    slots: Vec<(Range<usize>, usize)>,
}

impl<B: Backend> Slots<B> {
    /// Tokens of one sequence, the prefix included.
    pub fn len(&self, slot: usize) -> usize {
        self.prefix + self.slots[slot].1
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

impl<B: Backend> Model<B> {
    /// Room for a sequence of each of these capacities, tokens of the prefix not counted.
    pub fn slots(&self, prefix: Option<&Cache<B>>, capacities: &[usize]) -> Slots<B> {
        let before = prefix.map_or(0, |cache| cache.capacity);
        let mut rows = before;
        let slots = capacities.iter().map(|capacity| {
            let from = rows;
            rows += capacity;
            (from..rows, 0)
        });
        let slots = slots.collect();
        let block = |index: usize| {
            let mut room = self.room(rows);
            if let Some(shared) = prefix.and_then(|cache| cache.blocks.get(index)) {
                self.backend.place(&mut room.keys, 0, &shared.keys);
                self.backend.place(&mut room.values, 0, &shared.values);
            }
            room
        };
        Slots {
            blocks: (0..self.blocks.len()).map(block).collect(),
            prefix: before,
            slots,
        }
    }

    /// Appends ids to some of the sequences, each named once, and gives the logits (sequences, V) after the last
    /// of each. Fails when a sequence has no room or an id is beyond the vocabulary.
    pub fn grow(&self, slots: &mut Slots<B>, tokens: &[(usize, &[u32])]) -> Result<B::Tensor> {
        let mut batch = Batch::default();
        let (mut segments, mut rows, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for &(slot, ids) in tokens {
            let (range, filled) = &slots.slots[slot];
            if filled + ids.len() > range.len() || ids.is_empty() {
                return Err(Error::CacheFull {
                    tokens: slots.prefix + filled + ids.len(),
                    capacity: slots.prefix + range.len(),
                });
            }
            let from = batch.ids().len();
            batch.push(ids, slots.prefix + filled);
            let queries = from..batch.ids().len();
            let own = range.start..range.start + filled + ids.len();
            rows.extend(range.start + filled..own.end);
            last.push(queries.end - 1);
            segments.push(Segment {
                queries,
                prefix: 0..slots.prefix,
                own,
            });
        }
        let mut x = self.embed(&batch)?;
        let place = Place {
            segments,
            target: Target::Rows(rows),
            ..self.place(&batch)
        };
        self.backend.within(|| {
            for (block, kept) in self.blocks.iter().zip(&mut slots.blocks) {
                let memory = Memory::Kept(kept);
                block.run(&self.backend, &self.decoder, &mut x, &place, memory, None);
            }
        });
        for &(slot, ids) in tokens {
            slots.slots[slot].1 += ids.len();
        }
        let logits = self.logits(&x, Some(&last));
        self.backend.fault()?;
        Ok(logits)
    }
}
