//! Deciding codes: which quantizer each tensor gets, and which code each weight.
//!
//! Some decisions need evidence from a running model, some do not; both live here. This package
//! knows no ecosystem and no model architecture: it sees tensor names, shapes and rows of `f32`.
//!
//! | Idea | Where |
//! |---|---|
//! | what can be asked of a tensor | [`options`] |
//! | which tensor gets what | [`recipe`] |
//! | which values a scale may take | [`scale_grid`] |
//! | plain absmax and min-max rounding | [`rtn`] |
//! | WINT2, the 2-bit convolutional code | [`ccq`] |
//! | WINT2.5, its 2.5-bit sibling | [`ccq25`] |
//! | NormalFloat, 16 levels of a normal distribution | [`nf4`] |
//! | scales that are quantized a second time | [`nested`] |
//! | GGML's K types, super-blocks of 256 weights | [`kquant`] |
//! | clip search for the least squared error | [`clip`] |
//! | a second moment, damped and factored | [`hessian`] |
//! | rounding with error feedback | [`gptq`] |
//! | the encoder of WINT2, two bits a weight | [`ccq`] |
//! | what is known about a layer's inputs | [`stats`] |
//! | how a running model reports them | [`observe`] |
//! | how much of a layer's output is error | [`proxy`] |
//! | scales of input channels, by search | [`awq`] |
//! | how many bits each tensor gets under a budget | [`allocation`] |
//! | rounding and clip search on a GPU | [`device`] |
//! | error figures of a block of rows | [`measure`] |
#![forbid(unsafe_code)]

pub mod affine;
pub mod allocation;
pub mod awq;
pub mod ccq;
pub mod ccq25;
pub mod clip;
pub mod device;
pub mod error;
pub mod gptq;
pub mod hessian;
pub mod kquant;
pub mod measure;
pub mod nested;
pub mod nf4;
pub mod observe;
pub mod options;
pub mod proxy;
pub mod recipe;
pub mod rtn;
pub mod scale_grid;
pub mod stats;

use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;
use qtool_kernels::cuda::Encoder;

pub use error::CalibError;
pub use observe::Observer;
pub use options::TensorOptions;
pub use recipe::{Decision, Recipe};
pub use stats::LayerStats;

/// Result of this package.
pub type Result<T, E = CalibError> = std::result::Result<T, E>;

/// What a method can learn from a layer's inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// Nothing: it looks at the weights alone.
    None,
    /// The mean square of each input column.
    Diagonal,
    /// The whole second moment.
    Full,
}

/// One way to choose codes for rows of weights.
///
/// A quantizer always sees whole rows, and treats each row by itself: the codes of a row do not
/// depend on which other rows are in the block. Threads and memory are the caller's business.
pub trait Quantizer: Send + Sync {
    /// The scheme its results have.
    fn scheme(&self) -> Scheme;

    /// Name and options, as written into the manifest.
    fn describe(&self) -> String;

    /// The most that [`informed`](Self::informed) has use for.
    fn evidence(&self) -> Evidence {
        Evidence::None
    }

    /// The same method for one weight whose inputs are described by `stats`. What all rows share (a
    /// factorisation) is made here, once. The result says in [`describe`](Self::describe) what it had to do:
    /// the damping it needed, a fall back to less evidence.
    ///
    /// Fails when the method has no use for evidence, or the statistics are of another width.
    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        Err(CalibError::Statistics {
            reason: format!(
                "the method {:?} has no use for statistics of {} columns",
                self.describe(),
                stats.columns()
            ),
        })
    }

    /// Whether something of its results depends on all rows of a weight: then rows are to be quantized by what
    /// [`surveyed`](Self::surveyed) returns, and [`quantize`](Self::quantize) takes its rows for a whole weight.
    fn surveys(&self) -> bool {
        false
    }

    /// What it has to know of each of these rows. Fails when a value is not finite.
    fn survey(&self, _isa: Isa, _x: &[f32], _n: usize, _k: usize) -> Result<Vec<f32>> {
        Ok(Vec::new())
    }

    /// The same method for one weight, of whose rows of `k` values it was told `notes`, one row's after the other's.
    fn surveyed(&self, _notes: Vec<f32>, k: usize) -> Result<Box<dyn Quantizer>> {
        Err(CalibError::Statistics {
            reason: format!(
                "the method {:?} has no use for a survey of rows of {k}",
                self.describe()
            ),
        })
    }

    /// The same method, with the same codes, on a GPU; `None` when it has no kernel for it. What
    /// [`informed`](Self::informed) makes of the result has the codes of the processor's, too.
    ///
    /// Fails when the device does.
    fn on_device(&self, _encoder: &Encoder) -> Result<Option<Box<dyn Quantizer>>> {
        Ok(None)
    }

    /// Rows of `k` values that are best quantized together, where that is not for the caller to say: a GPU wants many.
    fn rows_together(&self, _k: usize) -> Option<usize> {
        None
    }

    /// Chooses codes for `x`, a block of `n` rows of `k` values, row-major.
    ///
    /// Fails when a value is not finite, or when a scale does not fit the scheme's scale dtype.
    /// Every instruction set gives the same result.
    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight>;

    /// The same for the rows of a weight from `first_row` on.
    fn quantize_rows(
        &self,
        isa: Isa,
        _first_row: usize,
        x: &[f32],
        (n, k): (usize, usize),
    ) -> Result<QuantizedWeight> {
        self.quantize(isa, x, n, k)
    }
}

/// A way of choosing codes, as listed for people.
pub struct Method {
    /// Name; at 4 and 8 bits the value of `--clip` that selects it.
    pub name: &'static str,
    /// Code widths it is for.
    pub bits: &'static [u8],
    /// One line for `--help` and the docs.
    pub summary: &'static str,
    /// Makes the quantizer for these options.
    pub build: fn(&TensorOptions) -> Result<Box<dyn Quantizer>>,
}

/// Every method.
pub const METHODS: &[Method] = &[
    rtn::METHOD,
    clip::METHOD,
    gptq::METHOD,
    ccq::METHOD,
    ccq25::METHOD,
    nf4::METHOD,
    nf4::DOUBLE_METHOD,
    kquant::Q4,
    kquant::Q2,
];

/// The method of this name.
pub fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|m| m.name == name)
}
