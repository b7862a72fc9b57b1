//! Rounding and clip search on a GPU, with the codes that the processor gives. Owns the job that a scheme becomes, and
//! what is said of weights that have no codes; the arithmetic is `kernels/cuda/encode_affine.cu`.

use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::AffineWeight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::cuda::Encoder;
use qtool_kernels::cuda::encode::{AffineCodes, AffineJob, Rows};
use qtool_kernels::{Isa, first_non_finite};

use crate::clip::{ZERO_REACH, coarse_factors, fine_factors};
use crate::rtn::symmetric_steps;
use crate::{CalibError, Evidence, LayerStats, Quantizer, Result};

/// A method for affine schemes on a GPU.
pub(crate) struct DeviceAffine<Q> {
    /// The same on the processor, which names the method.
    processor: Q,
    scheme: AffineScheme,
    encoder: Encoder,
    coarse: Vec<f32>,
    fine: Vec<f32>,
    /// How much columns count in the search, above zero; none when all count the same.
    importance: Option<Vec<f32>>,
    informed: Informed<Q>,
}

/// What knowledge of the inputs makes of a method: its own way on a device, if it has one.
type Informed<Q> = fn(&DeviceAffine<Q>, &LayerStats) -> Result<Box<dyn Quantizer>>;

impl<Q: Quantizer> DeviceAffine<Q> {
    /// Plain rounding.
    pub(crate) fn rounding(processor: Q, scheme: AffineScheme, encoder: &Encoder) -> Self {
        Self {
            processor,
            scheme,
            encoder: encoder.clone(),
            coarse: Vec::new(),
            fine: Vec::new(),
            importance: None,
            informed: |this, stats| this.processor.informed(stats),
        }
    }

    /// Clip search.
    pub(crate) fn searching(processor: Q, scheme: AffineScheme, encoder: &Encoder) -> Self {
        Self {
            coarse: coarse_factors(scheme.bits()).collect(),
            fine: fine_factors().collect(),
            ..Self::rounding(processor, scheme, encoder)
        }
    }

    /// The same, where column c of every row counts `importance[c]`.
    pub(crate) fn weighted(self, importance: Vec<f32>) -> Self {
        Self {
            importance: Some(importance),
            ..self
        }
    }

    /// The same, with this way of becoming informed.
    pub(crate) fn informed_by(self, informed: Informed<Q>) -> Self {
        Self { informed, ..self }
    }

    /// Its scheme.
    pub(crate) fn scheme_of(&self) -> AffineScheme {
        self.scheme
    }

    /// Its device.
    pub(crate) fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The first weight in order without a code, as the processor says it.
    fn check(&self, x: &[f32], k: usize, codes: &AffineCodes) -> Result<()> {
        let len = self.scheme.grouping().len(k);
        let groups = codes.extents.iter().zip(&codes.scales).enumerate();
        for (g, (&extent, scale)) in groups {
            let row = g * len / k;
            if !extent.is_finite() {
                let values = &x[row * k..(row + 1) * k];
                let column = first_non_finite(values).unwrap_or(g * len % k);
                return Err(CalibError::NonFinite {
                    row,
                    column,
                    value: values[column].to_string(),
                });
            }
            if !scale.is_finite() {
                return Err(CalibError::ScaleOverflow {
                    row,
                    scale: extent,
                    dtype: self.scheme.scale_dtype().name(),
                });
            }
        }
        Ok(())
    }
}

impl<Q: Quantizer> Quantizer for DeviceAffine<Q> {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        self.processor.describe()
    }

    fn evidence(&self) -> Evidence {
        self.processor.evidence()
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        (self.informed)(self, stats)
    }

    fn rows_together(&self, k: usize) -> Option<usize> {
        Some(self.encoder.rows_together(k))
    }

    fn quantize(&self, _isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let scheme = self.scheme;
        scheme.groups(n, k)?;
        let job = AffineJob {
            group: scheme.grouping().len(k),
            range: scheme.code_range(),
            zero: scheme.fixed_zero(),
            scale: scheme.scale_dtype(),
            steps: symmetric_steps(scheme),
            coarse: &self.coarse,
            fine: &self.fine,
            reach: ZERO_REACH,
            importance: self.importance.as_deref(),
        };
        let chosen = self.encoder.affine(Rows::Values(x), n, k, &job)?;
        self.check(x, k, &chosen)?;
        let zeros = if job.zero.is_none() {
            chosen.zeros
        } else {
            Vec::new()
        };
        let weight = AffineWeight::new(scheme, n, k, chosen.codes, chosen.scales, zeros)?;
        Ok(QuantizedWeight::Affine(weight))
    }
}
