//! Token rows that run through a model together. Sequences of unequal length lie one after the other, without
//! padding.

use std::ops::Range;

use crate::tokenizer::Row;

/// See the module's text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    ids: Vec<u32>,
    types: Vec<u32>,
    tasks: Vec<u32>,
    sequences: Vec<Range<usize>>,
    positions: Vec<u32>,
}

impl Batch {
    /// Sequences of ids, each from position 0.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S]) -> Self {
        let mut batch = Self::default();
        for ids in sequences {
            batch.push(ids.as_ref(), 0);
        }
        batch
    }

    /// One sequence that goes on at `position`.
    pub fn at(ids: &[u32], position: usize) -> Self {
        let mut batch = Self::default();
        batch.push(ids, position);
        batch
    }

    /// Rows of a tokenizer, each from position 0, with their types.
    pub fn of_rows<'r>(rows: impl IntoIterator<Item = &'r Row>) -> Self {
        let mut batch = Self::default();
        for row in rows {
            batch.push(&row.ids, 0);
            batch.types.extend_from_slice(&row.types);
        }
        batch
    }

    /// Adds a sequence that goes on at `position`.
    pub fn push(&mut self, ids: &[u32], position: usize) {
        let from = self.ids.len();
        self.ids.extend_from_slice(ids);
        self.sequences.push(from..self.ids.len());
        self.positions
            .extend((position..position + ids.len()).map(|p| p as u32));
    }

    /// With a type for each token, for encoders of pairs of texts.
    pub fn with_types(mut self, types: Vec<u32>) -> Self {
        self.types = types;
        self
    }

    /// With a task for each token, for encoders that know several.
    pub fn with_tasks(mut self, tasks: Vec<u32>) -> Self {
        self.tasks = tasks;
        self
    }

    /// Token ids of all sequences, (M).
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Token types, (M); empty when all are 0.
    pub fn types(&self) -> &[u32] {
        &self.types
    }

    /// Task types, (M); empty when all are 0.
    pub fn tasks(&self) -> &[u32] {
        &self.tasks
    }

    /// Rows of each sequence.
    pub fn sequences(&self) -> &[Range<usize>] {
        &self.sequences
    }

    /// Position of each token in its sequence, (M).
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }
}
