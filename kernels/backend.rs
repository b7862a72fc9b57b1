//! What a model needs from a device. Owns the vocabulary ([`Backend`], [`HostWeight`], [`Segment`]); each device
//! implements it on a page of its own (`cpu/backend.rs`), and [`mod@crate::reference`] says what is right.
//!
//! Letters: **M** rows of activations (tokens of all sequences, one after the other, no padding), **K** input
//! columns, **N** output columns, **D** width of an attention head. Activations are f32, row-major.
//!
//! A result never depends on the number of threads: work is cut by shape alone, and sums run in a fixed order.
//! Between devices, and between instruction sets, results agree within rounding only.

use std::ops::Range;
use std::sync::Arc;

use qtool_formats::{FloatDtype, Scheme};

/// Bytes that live as long as somebody holds them: a mapped tensor, or a buffer.
pub trait Storage: Send + Sync {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

impl Storage for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// How the numbers of a weight are stored.
#[derive(Clone)]
pub enum Form {
    /// N rows of K little-endian floats.
    Dense {
        /// Their type.
        dtype: FloatDtype,
        /// N * K of them.
        bytes: Arc<dyn Storage>,
    },
    /// Packed codes and scales, in our own family's forms.
    Packed {
        /// Their meaning.
        scheme: Scheme,
        /// The stored tensors, in the order of [`Scheme::parts`].
        parts: Vec<Arc<dyn Storage>>,
    },
}

/// A weight matrix (N, K) before it is on a device. Holds what lies in the file, never a decoded copy.
#[derive(Clone)]
pub struct HostWeight {
    /// Output rows.
    pub n: usize,
    /// Input columns.
    pub k: usize,
    /// Its numbers.
    pub form: Form,
}

/// One sequence's part of an attention call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its rows in the queries and in the result.
    pub queries: Range<usize>,
    /// Rows of keys and values that every query sees (a prompt shared with others); may be empty.
    pub prefix: Range<usize>,
    /// Rows of its own keys and values. When causal, query i of q sees the first
    /// `own.len() - q + 1 + i` of them: the last query sees all.
    pub own: Range<usize>,
}

/// The sizes of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`. Query head h reads key head `h / (query / kv)`.
    pub kv: usize,
    /// D.
    pub dim: usize,
    /// What scores are multiplied by, usually 1 / sqrt(D).
    pub scale: f32,
    /// Whether a query sees only what comes before it.
    pub causal: bool,
}

/// Which two columns of a head are turned together by a rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Columns i and i + D/2, as Llama in Hugging Face form.
    Halves,
    /// Columns 2i and 2i + 1, as ERNIE-4.5.
    Pairs,
}

/// Rotary angles: row p of `cos` and `sin` (positions, D/2) belongs to position p.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// Which columns turn together.
    pub style: RopeStyle,
    /// D/2.
    pub half: usize,
    /// (positions, D/2)
    pub cos: Vec<f32>,
    /// (positions, D/2)
    pub sin: Vec<f32>,
}

/// Functions of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x / (1 + exp(-x)).
    Silu,
    /// x (1 + erf(x / sqrt 2)) / 2.
    Gelu,
    /// The tanh approximation of [`Self::Gelu`].
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// tanh(x).
    Tanh,
}

/// How tokens choose experts: p = softmax of their logits; the `top` experts of largest p + bias, of equal ones the
/// lower number; each weighs p over the sum of the chosen p, which is at least `least_sum`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing<'a> {
    /// Experts a token is sent to.
    pub top: usize,
    /// Added to p for the choice alone, one an expert.
    pub bias: Option<&'a [f32]>,
    /// Least sum that weights are divided by.
    pub least_sum: f32,
}

/// The gated MLPs of experts, down(f(gate(x)) * up(x)), a weight of each kind an expert.
#[derive(Debug, Clone)]
pub struct ExpertWeights<'a, W> {
    /// (F, K) each.
    pub gate: Vec<&'a W>,
    /// (F, K) each.
    pub up: Vec<&'a W>,
    /// (K, F) each.
    pub down: Vec<&'a W>,
}

/// A row of a candidate's logits beside the base's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// KL(base || candidate), in nats: sum over the vocabulary of p (ln p - ln q), at least 0.
    pub kl: f64,
    /// Change of the probability of the token that stands in the text.
    pub delta_p: f64,
    /// Whether both find the same token most likely; of equal ones the lowest number.
    pub agreed: bool,
}

/// What the inputs of a layer add up to, rows (M, K).
#[derive(Debug, Clone, PartialEq)]
pub struct InputSums {
    /// M.
    pub rows: u64,
    /// Largest magnitude of each column, (K).
    pub tops: Vec<f32>,
    /// x^T x, (K, K) and symmetric, or its diagonal alone, (K).
    pub moment: Vec<f64>,
    /// Whether all were finite.
    pub finite: bool,
}

/// Why a device stopped computing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the device {device} failed to {what}: {reason}")]
pub struct Fault {
    /// Its name.
    pub device: String,
    /// What it was asked to do.
    pub what: &'static str,
    /// Its own words.
    pub reason: String,
}

/// A device. `Tensor` is (rows, columns) of f32 on it; `Weight` a matrix in whatever form it multiplies best.
///
/// Shapes are the caller's business: operations panic when they disagree.
pub trait Backend: Send + Sync {
    /// Activations on the device.
    type Tensor: Send + Sync;
    /// A weight on the device.
    type Weight: Send + Sync;
    /// [`InputSums`] that are being added up, where the device adds.
    type Sums: Send;

    /// Waits for what was started. After a failure every result is meaningless, and this says what failed first.
    fn fault(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Runs `f`, which calls several operations, where this device takes work from: each of them then starts
    /// sooner. The results are the same without.
    fn within<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        f()
    }

    /// Rows of activations that are worth running together, when what a batch keeps at a time is about `bytes` a row.
    fn rows_together(&self, _bytes: usize) -> usize {
        1024
    }

    /// `values` (rows, columns) to the device.
    fn upload(&self, values: &[f32], columns: usize) -> Self::Tensor;
    /// (rows, columns) zeros.
    fn zeros(&self, rows: usize, columns: usize) -> Self::Tensor {
        self.upload(&vec![0.0; rows * columns], columns)
    }
    /// All values of `x`, row-major.
    fn download(&self, x: &Self::Tensor) -> Vec<f32>;
    /// The same, after asking whether they mean anything.
    fn read(&self, x: &Self::Tensor) -> Result<Vec<f32>, Fault> {
        let values = self.download(x);
        self.fault()?;
        Ok(values)
    }
    /// ln p of tokens `wanted[m]` under the softmax of row m of `logits` (M, V), in nats, NaN in a row with a logit that is not
    /// finite; `None` from a device that leaves this to who reads the logits. After a failure they mean nothing.
    fn log_probabilities(&self, _logits: &Self::Tensor, _wanted: &[Vec<u32>]) -> Option<Vec<Vec<f64>>> {
        None
    }
    /// Row m of `candidate` (M, V) beside row m of `base` (M, V), logits of both, with the token `targets[m]`. `None` for a row with
    /// a logit that is not finite, and where the token is not below V. Sums are f64 on every device, in an order of its own: KL
    /// is the same within 1e-12 of 1 + KL + |ln sum e^l|. After a failure they mean nothing.
    fn divergences(
        &self,
        base: &Self::Tensor,
        candidate: &Self::Tensor,
        targets: &[u32],
    ) -> Vec<Option<Divergence>>;
    /// (rows, columns).
    fn dims(&self, x: &Self::Tensor) -> (usize, usize);
    /// A weight to the device. Lengths of its parts must fit its scheme.
    fn weight(&self, weight: &HostWeight) -> Self::Weight;

    /// Row `ids[i]` of the table (V, K) as row i of the result (M, K).
    fn embed(&self, table: &Self::Weight, ids: &[u32]) -> Self::Tensor;
    /// x (M, K) times the transpose of w (N, K): (M, N).
    fn matmul(&self, x: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// x += y; `y` has the rows of `x`, or a single row that is added to each.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor);
    /// Each row divided by sqrt(mean(x^2) + eps), times `gain` (1, K). `gain` may be shorter than a row: then
    /// each stretch of its length is normalised by itself, as the query and key heads of Qwen3.
    fn rms_norm(&self, x: &Self::Tensor, gain: &Self::Tensor, eps: f32) -> Self::Tensor;
    /// (x - mean) / sqrt(variance + eps) * gain + bias, row by row; gain and bias (1, K).
    fn layer_norm(
        &self,
        x: &Self::Tensor,
        gain: &Self::Tensor,
        bias: &Self::Tensor,
        eps: f32,
    ) -> Self::Tensor;
    /// Turns each head of each row by the angles of the row's position, in place. x is (M, heads * D).
    fn rope(&self, x: &mut Self::Tensor, positions: &[u32], table: &RopeTable);
    /// softmax(scale q k^T) v for each segment and head. q (M, query * D); keys and values (rows, kv * D).
    fn attention(
        &self,
        q: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        segments: &[Segment],
        heads: Heads,
    ) -> Self::Tensor;
    /// f(x), in place.
    fn activate(&self, x: &mut Self::Tensor, f: Activation);
    /// gate = f(gate) * up, in place.
    fn gate(&self, gate: &mut Self::Tensor, up: &Self::Tensor, f: Activation);
    /// Rows `rows` of x, in that order.
    fn gather(&self, x: &Self::Tensor, rows: &[usize]) -> Self::Tensor;
    /// `into[rows[i]] += weights[i] * x[i]`, i rising. Rows may repeat.
    fn scatter_add(&self, into: &mut Self::Tensor, rows: &[usize], x: &Self::Tensor, weights: &[f32]);
    /// `into[at + i] = x[i]` for all rows of x: how a cache of keys and values grows.
    fn place(&self, into: &mut Self::Tensor, at: usize, x: &Self::Tensor);
    /// For each token of x (M, K) the sum of its experts' results times their weights, (M, K); `logits` (M, E) are the
    /// router's. `None` when this device leaves it to the operations above.
    fn experts(
        &self,
        _x: &Self::Tensor,
        _logits: &Self::Tensor,
        _routing: &Routing<'_>,
        _experts: &ExpertWeights<'_, Self::Weight>,
        _f: Activation,
    ) -> Option<Self::Tensor> {
        None
    }
    /// `moment` += x^T x, (K, K), the upper triangle and its mirror. Products of at most 512 rows are summed
    /// in f32, those sums in f64, in order.
    fn gram(&self, x: &Self::Tensor, moment: &mut [f64]);
    /// Sums of no rows yet, of K columns, with all of x^T x or its diagonal alone.
    fn sums(&self, columns: usize, full: bool) -> Self::Sums;
    /// Adds the rows of x (M, K); x^T x as [`gram`](Self::gram) does, its diagonal alone in f64.
    fn watch(&self, x: &Self::Tensor, sums: &mut Self::Sums);
    /// What was added up.
    fn summed(&self, sums: Self::Sums) -> Result<InputSums, Fault>;
}
