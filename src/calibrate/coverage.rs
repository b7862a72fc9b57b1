//! Evidence for a tensor, and what to do where there is too little of it. Owns the rule for routed experts:
//!
//! An expert that saw fewer rows than `--min-coverage` is calibrated with the statistics of all experts of its
//! layer together (their rows are inputs of the same kind); the manifest says so. Never a silent zero or NaN.

use std::sync::{Arc, Mutex, PoisonError};

use qtool_calib::LayerStats;

use super::recorder::BlockStatistics;
use super::statistics::Statistics;
use crate::Result;

/// Rows below which an expert borrows its layer's statistics.
pub const MIN_COVERAGE: u64 = 128;

/// Evidence for one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// Its input's statistics.
    pub stats: Arc<LayerStats>,
    /// What the manifest should say of them.
    pub note: Option<String>,
}

/// A place to look for evidence.
pub trait EvidenceSource: Sync {
    /// Statistics of the input of the source tensor `tensor`; `None` when it was not observed.
    fn evidence(&self, tensor: &str) -> Result<Option<Found>>;
}

/// Splits `..experts.7.up_proj.weight` around the expert's number.
pub fn expert_of(tensor: &str) -> Option<(&str, usize, &str)> {
    let (before, after) = tensor.split_once(".experts.")?;
    let (number, rest) = after.split_once('.')?;
    Some((before, number.parse().ok()?, rest))
}

/// Whether both are the same weight of two experts of one layer.
fn siblings(a: &str, b: &str) -> bool {
    matches!((expert_of(a), expert_of(b)), (Some(a), Some(b)) if (a.0, a.2) == (b.0, b.2))
}

/// The rule of the module's text. `rows` are those of all inputs by their tensors' names, `load` reads one.
fn covered(
    tensor: &str,
    index: usize,
    inputs: &[(&[String], u64)],
    min_coverage: u64,
    load: &dyn Fn(usize) -> Result<Arc<LayerStats>>,
) -> Result<Option<Found>> {
    let own = inputs[index].1;
    if expert_of(tensor).is_none() || own >= min_coverage {
        return Ok((own > 0).then_some(Found {
            stats: load(index)?,
            note: None,
        }));
    }
    let mut pooled: Option<LayerStats> = None;
    for (i, (tensors, rows)) in inputs.iter().enumerate() {
        if *rows > 0 && tensors.iter().any(|t| siblings(t, tensor)) {
            let stats = load(i)?;
            match &mut pooled {
                Some(pooled) => pooled.merge(&stats).map_err(crate::Error::Option)?,
                None => pooled = Some(stats.as_ref().clone()),
            }
        }
    }
    let note = format!(
        "statistics pooled over the layer's experts: {own} rows of its own, fewer than {min_coverage}"
    );
    Ok(pooled.map(|stats| Found {
        stats: Arc::new(stats),
        note: Some(note),
    }))
}

/// A block just observed.
pub struct Observed {
    inputs: Vec<(Vec<String>, Arc<LayerStats>)>,
    min_coverage: u64,
}

impl Observed {
    /// See [`MIN_COVERAGE`] for `min_coverage`.
    pub fn new(block: BlockStatistics, min_coverage: u64) -> Self {
        let inputs = block
            .inputs
            .into_iter()
            .map(|i| (i.tensors, Arc::new(i.stats)))
            .collect();
        Self { inputs, min_coverage }
    }
}

impl EvidenceSource for Observed {
    fn evidence(&self, tensor: &str) -> Result<Option<Found>> {
        let inputs: Vec<(&[String], u64)> = self
            .inputs
            .iter()
            .map(|(t, s)| (t.as_slice(), s.rows()))
            .collect();
        let Some(index) = inputs
            .iter()
            .position(|(tensors, _)| tensors.iter().any(|t| t == tensor))
        else {
            return Ok(None);
        };
        covered(tensor, index, &inputs, self.min_coverage, &|i| {
            Ok(Arc::clone(&self.inputs[i].1))
        })
    }
}

/// Statistics and where they were read.
type Numbered = ((usize, usize), Arc<LayerStats>);

/// A folder of statistics.
pub struct Stored {
    /// The folder.
    pub statistics: Statistics,
    /// See [`MIN_COVERAGE`].
    pub min_coverage: u64,
    /// The input read last: layers that share an input follow each other.
    last: Mutex<Option<Numbered>>,
}

impl Stored {
    /// Reads from `statistics`.
    pub fn new(statistics: Statistics, min_coverage: u64) -> Self {
        Self {
            statistics,
            min_coverage,
            last: Mutex::default(),
        }
    }
}

impl EvidenceSource for Stored {
    fn evidence(&self, tensor: &str) -> Result<Option<Found>> {
        let Some((block, index)) = self.statistics.find(tensor) else {
            return Ok(None);
        };
        let inputs: Vec<(&[String], u64)> = self.statistics.index().blocks[block]
            .inputs
            .iter()
            .map(|i| (i.tensors.as_slice(), i.rows.iter().sum()))
            .collect();
        covered(tensor, index, &inputs, self.min_coverage, &|i| {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((at, stats)) = last.as_ref()
                && *at == (block, i)
            {
                return Ok(Arc::clone(stats));
            }
            let stats = Arc::new(self.statistics.load(block, i, None)?);
            *last = Some(((block, i), Arc::clone(&stats)));
            Ok(stats)
        })
    }
}

/// Rows that reached the experts of one layer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LayerCoverage {
    /// Name up to `.experts`.
    pub layer: String,
    /// Experts.
    pub experts: usize,
    /// Fewest rows of one expert.
    pub fewest: u64,
    /// Rows of the middle expert.
    pub median: u64,
    /// Most rows.
    pub most: u64,
    /// Experts below the least coverage.
    pub below: usize,
}

/// Coverage of every layer with routed experts: `inputs` are the tensors and rows of each input.
pub fn report<'a>(inputs: impl Iterator<Item = (&'a str, u64)>, min_coverage: u64) -> Vec<LayerCoverage> {
    let mut layers: Vec<(String, String, Vec<u64>)> = Vec::new();
    for (tensor, rows) in inputs {
        let Some((layer, _, rest)) = expert_of(tensor) else {
            continue;
        };
        match layers.iter_mut().find(|(l, _, _)| l == layer) {
            // One input of each expert counts, not its second.
            Some((_, weight, counts)) if weight == rest => counts.push(rows),
            Some(_) => {}
            None => layers.push((layer.to_owned(), rest.to_owned(), vec![rows])),
        }
    }
    let figures = |(layer, _, mut rows): (String, String, Vec<u64>)| {
        rows.sort_unstable();
        LayerCoverage {
            layer,
            experts: rows.len(),
            fewest: rows.first().copied().unwrap_or(0),
            median: rows.get(rows.len() / 2).copied().unwrap_or(0),
            most: rows.last().copied().unwrap_or(0),
            below: rows.iter().filter(|&&r| r < min_coverage).count(),
        }
    };
    layers.into_iter().map(figures).collect()
}

#[cfg(test)]
mod tests {
    use qtool_calib::stats::Moment;

    use super::*;
    use crate::calibrate::recorder::Input;

    fn block() -> BlockStatistics {
        let input = |tensor: String, rows: usize, value: f32| {
            let squares = Moment::Diagonal(vec![rows as f64 * f64::from(value * value)]);
            let top = if rows > 0 { value.abs() } else { 0.0 };
            Input {
                tensors: vec![tensor],
                stats: LayerStats::new(1, rows as u64, squares, vec![top]).unwrap(),
            }
        };
        let mut inputs = vec![input("l.0.o_proj.weight".to_owned(), 1, 1.0)];
        for (expert, rows) in [200, 3, 0].into_iter().enumerate() {
            inputs.push(input(
                format!("l.0.mlp.experts.{expert}.up_proj.weight"),
                rows,
                1.0,
            ));
            inputs.push(input(
                format!("l.0.mlp.experts.{expert}.down_proj.weight"),
                rows,
                2.0,
            ));
        }
        BlockStatistics {
            inputs,
            magnitudes: None,
        }
    }

    #[test]
    fn experts_with_few_rows_borrow_their_layers() {
        let block = block();
        let seen = Observed::new(block.clone(), 100);
        let found = |name: &str| seen.evidence(name).unwrap();
        let rows = |name: &str| found(name).map(|f| (f.stats.rows(), f.note.is_some()));
        assert_eq!(rows("l.0.mlp.experts.0.up_proj.weight"), Some((200, false)));
        assert_eq!(rows("l.0.mlp.experts.1.up_proj.weight"), Some((203, true)));
        assert_eq!(rows("l.0.mlp.experts.2.down_proj.weight"), Some((203, true)));
        assert_eq!(
            found("l.0.mlp.experts.2.down_proj.weight")
                .unwrap()
                .stats
                .importance(),
            [4.0]
        );
        assert_eq!(
            rows("l.0.o_proj.weight"),
            Some((1, false)),
            "no expert: what there is"
        );
        assert_eq!(rows("l.1.o_proj.weight"), None);
        let inputs = block
            .inputs
            .iter()
            .map(|i| (i.tensors[0].as_str(), i.stats.rows()));
        let report = report(inputs, 100);
        assert_eq!(report.len(), 1);
        assert_eq!(
            (
                report[0].experts,
                report[0].fewest,
                report[0].median,
                report[0].most,
                report[0].below
            ),
            (3, 0, 3, 200, 2)
        );
    }
}
