//! All calibration rows through a model, one block at a time. Owns the order of the work: which rows run
//! together, and in which slice of the corpus they are counted. Both depend on the corpus alone, never on
//! threads, so that every sum comes out the same.

use std::ops::Range;
use std::path::Path;

use qtool_calib::{Evidence, Observer};
use qtool_kernels::Backend;

use super::activations::Activations;
use super::corpus::{Corpus, SLICES, slice_rows};
use super::recorder::{BlockStatistics, Recorder};
use crate::model::Batch;
use crate::model::stack::{Stack, StackLayer};
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
    model: &'a Stack<B>,
    corpus: &'a Corpus,
    groups: Vec<Group>,
    activations: Activations,
    progress: &'a Progress,
}

impl<'a, B: Backend> Walk<'a, B> {
    /// Embeds the rows of these slices. Scratch files are made in `scratch`.
    pub fn begin(
        model: &'a Stack<B>,
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
        let hidden = model.hidden();
        let mut this = Self {
            activations: Activations::new(scratch, corpus.tokens(), hidden)?,
            model,
            corpus,
            groups,
            progress,
        };
        for group in 0..this.groups.len() {
            let (batch, at) = this.batch(group);
            let x = model.begin(&batch)?;
            this.activations.write(at, &model.backend().read(&x)?)?;
        }
        Ok(this)
    }

    /// The rows of a group, and where its activations lie.
    fn batch(&self, group: usize) -> (Batch, usize) {
        let rows = &self.groups[group].rows;
        let at = self.corpus.rows()[..rows.start].iter().map(Vec::len).sum();
        (Batch::new(&self.corpus.rows()[rows.clone()]), at)
    }

    /// Runs a block over all rows. With `evidence`, tells `seen` what was seen, slice by slice. With `advance`,
    /// what the block gives becomes the input of the next.
    ///
    /// Fails when an input of a layer is not finite.
    pub fn block(
        &mut self,
        block: &StackLayer<B>,
        evidence: Option<(Evidence, &mut Seen)>,
        advance: bool,
    ) -> Result<()> {
        let backend = self.model.backend();
        let columns = self.activations.columns();
        let path = self.model.source().path();
        let mut listening = evidence.map(|(evidence, seen)| Listening::new(backend, path, evidence, seen));
        for group in 0..self.groups.len() {
            interrupt::check()?;
            let (batch, at) = self.batch(group);
            let mut values = vec![0f32; batch.ids().len() * columns];
            self.activations.read(at, &mut values)?;
            let mut x = backend.upload(&values, columns);
            match &mut listening {
                Some(listening) => {
                    let recorder = listening.turn_to(self.groups[group].slice)?;
                    self.model.run(block, &mut x, &batch, Some(recorder));
                }
                None => self.model.run(block, &mut x, &batch, None),
            }
            if advance {
                self.activations.write(at, &backend.read(&x)?)?;
            }
            self.progress.add(batch.ids().len() as u64);
        }
        listening.map_or(Ok(()), Listening::finish)
    }

    /// Tells `seen` what enters the output head when the last block has advanced: the final norm of its output.
    /// Nothing without such a head.
    ///
    /// Fails when it is not finite.
    pub fn head(&mut self, evidence: Evidence, seen: &mut Seen) -> Result<()> {
        let backend = self.model.backend();
        let Some(head) = self.model.head() else {
            return Ok(());
        };
        let columns = self.activations.columns();
        let path = self.model.source().path();
        let mut listening = Listening::new(backend, path, evidence, seen);
        for group in 0..self.groups.len() {
            interrupt::check()?;
            let (batch, at) = self.batch(group);
            let mut values = vec![0f32; batch.ids().len() * columns];
            self.activations.read(at, &mut values)?;
            let Some(normed) = self.model.head_input(&backend.upload(&values, columns)) else {
                continue;
            };
            let recorder = listening.turn_to(self.groups[group].slice)?;
            recorder.linear_input(&[head], &normed);
        }
        listening.finish()
    }
}

/// What was seen of one block.
pub enum Seen {
    /// Of all slices together, added up in order: no more than two slices' worth is held at any time.
    Whole(BlockStatistics),
    /// Of each slice by itself.
    Slices(Vec<BlockStatistics>),
}

impl Seen {
    /// Nothing yet, to be added up or kept apart.
    pub fn nothing(apart: bool) -> Self {
        if apart {
            Self::Slices(Vec::new())
        } else {
            Self::Whole(BlockStatistics::default())
        }
    }

    /// As parts in order: one, or one for each slice.
    pub fn into_parts(self) -> Vec<BlockStatistics> {
        match self {
            Self::Whole(whole) => vec![whole],
            Self::Slices(slices) => slices,
        }
    }

    fn take(&mut self, slice: BlockStatistics) -> Result<()> {
        match self {
            Self::Whole(whole) => whole.merge(&slice).map_err(Error::Option),
            Self::Slices(slices) => {
                slices.push(slice);
                Ok(())
            }
        }
    }
}

/// A recorder for the slice at hand, and what the slices before it gave.
struct Listening<'a, B: Backend> {
    backend: &'a B,
    path: &'a Path,
    evidence: Evidence,
    seen: &'a mut Seen,
    now: Option<(usize, Recorder<'a, B>)>,
}

impl<'a, B: Backend> Listening<'a, B> {
    fn new(backend: &'a B, path: &'a Path, evidence: Evidence, seen: &'a mut Seen) -> Self {
        Self {
            backend,
            path,
            evidence,
            seen,
            now: None,
        }
    }

    /// The recorder of a slice; slices come in order.
    fn turn_to(&mut self, slice: usize) -> Result<&mut Recorder<'a, B>> {
        if self.now.as_ref().is_some_and(|(s, _)| *s != slice)
            && let Some((_, done)) = self.now.take()
        {
            self.seen.take(done.finish(self.path)?)?;
        }
        let fresh = || (slice, Recorder::new(self.backend, self.evidence));
        Ok(&mut self.now.get_or_insert_with(fresh).1)
    }

    fn finish(mut self) -> Result<()> {
        match self.now.take() {
            Some((_, done)) => self.seen.take(done.finish(self.path)?),
            None => Ok(()),
        }
    }
}

/// The slices of part `part` of `parts`. `None` when [`SLICES`] cannot be shared evenly, or there is no such part.
pub fn slices_of(part: usize, parts: usize) -> Option<Range<usize>> {
    if parts == 0 || !SLICES.is_multiple_of(parts) || part >= parts {
        return None;
    }
    let each = SLICES / parts;
    Some(part * each..(part + 1) * each)
}
