//! All calibration rows through a model, one block at a time. Owns the order of the work: which rows run
//! together, and in which slice of the corpus they are counted. Both depend on the corpus alone, never on
//! threads, so that every sum comes out the same.

use std::ops::Range;
use std::path::Path;

use qtool_calib::Evidence;
use qtool_kernels::Backend;

use super::activations::Activations;
use super::corpus::{Corpus, SLICES, slice_rows};
use super::recorder::{BlockStatistics, Recorder};
use crate::model::{Batch, Block, Model};
use crate::progress::Progress;
use crate::{Error, Result, interrupt};

/// Tokens that run together, at most (a single longer row runs alone).
const TOKENS: usize = 2048;

/// Rows that run together.
struct Group {
    slice: usize,
    rows: Range<usize>,
}

/// See the module's text.
pub struct Walk<'a, B: Backend> {
    model: &'a Model<B>,
    corpus: &'a Corpus,
    groups: Vec<Group>,
    activations: Activations,
    progress: &'a Progress,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// Embeds the rows of these slices. Scratch files are made in `scratch`.
    pub fn begin(
        model: &'a Model<B>,
        corpus: &'a Corpus,
        slices: Range<usize>,
        scratch: &Path,
        progress: &'a Progress,
    ) -> Result<Self> {
        let length = corpus.rows().first().map_or(1, Vec::len);
        let together = (TOKENS / length).max(1);
        let mut groups = Vec::new();
        for slice in slices {
            let all = slice_rows(corpus.rows().len(), slice);
            for from in all.clone().step_by(together) {
                let rows = from..all.end.min(from + together);
                groups.push(Group { slice, rows });
            }
        }
        let hidden = model.decoder().hidden;
        let mut this = Self {
            activations: Activations::new(scratch, corpus.tokens(), hidden)?,
            model,
            corpus,
            groups,
            progress,
        };
        for group in 0..this.groups.len() {
            let (batch, at) = this.batch(group);
            let x = model.embed(&batch)?;
            this.activations.write(at, &model.backend().download(&x))?;
        }
        Ok(this)
    }

    /// The rows of a group, and where its activations lie.
    fn batch(&self, group: usize) -> (Batch, usize) {
        let rows = &self.groups[group].rows;
        let at = self.corpus.rows()[..rows.start].iter().map(Vec::len).sum();
        (Batch::new(&self.corpus.rows()[rows.clone()]), at)
    }

    /// Runs a block over all rows. With `evidence`, gives what was seen, by slice. With `advance`, what the
    /// block gives becomes the input of the next.
    ///
    /// Fails when an input of a layer is not finite.
    pub fn block(
        &mut self,
        block: &Block<B>,
        evidence: Option<Evidence>,
        advance: bool,
    ) -> Result<Vec<BlockStatistics>> {
        let backend = self.model.backend();
        let columns = self.activations.columns();
        let mut seen: Vec<(usize, Recorder<'_, B>)> = Vec::new();
        for group in 0..self.groups.len() {
            interrupt::check()?;
            let (batch, at) = self.batch(group);
            let mut values = vec![0f32; batch.ids().len() * columns];
            self.activations.read(at, &mut values)?;
            let mut x = backend.upload(&values, columns);
            let slice = self.groups[group].slice;
            if evidence.is_some() && seen.last().is_none_or(|(s, _)| *s != slice) {
                seen.push((slice, Recorder::new(backend, evidence.unwrap_or(Evidence::None))));
            }
            let recorder = seen.last_mut().map(|(_, recorder)| recorder);
            let place = self.model.place(&batch);
            match recorder {
                Some(recorder) => {
                    self.model.run(block, &mut x, &place, Some(recorder));
                    if let Some(layer) = recorder.fault.take() {
                        return Err(Error::NonFiniteActivation {
                            path: self.model.source().path().to_owned(),
                            layer,
                        });
                    }
                }
                None => self.model.run(block, &mut x, &place, None),
            }
            if advance {
                self.activations.write(at, &backend.download(&x))?;
            }
            self.progress.add(batch.ids().len() as u64);
        }
        Ok(seen.into_iter().map(|(_, recorder)| recorder.block).collect())
    }
}

/// Adds up what was seen in the slices, in order.
pub fn together(slices: &[BlockStatistics]) -> Result<BlockStatistics> {
    let mut whole = BlockStatistics::default();
    for slice in slices {
        whole.merge(slice).map_err(Error::Option)?;
    }
    Ok(whole)
}

/// The slices of part `part` of `parts`. `None` when [`SLICES`] cannot be shared evenly, or there is no such part.
pub fn slices_of(part: usize, parts: usize) -> Option<Range<usize>> {
    if parts == 0 || !SLICES.is_multiple_of(parts) || part >= parts {
        return None;
    }
    let each = SLICES / parts;
    Some(part * each..(part + 1) * each)
}
