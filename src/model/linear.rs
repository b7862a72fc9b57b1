//! A linear layer: its weight on the device, its bias where the checkpoint has one, and the name calibration
//! knows it by. Owns the split of fused weights (`qkv_proj`, `up_gate_proj`) into the layers they are made of.

use qtool_calib::Observer;
use qtool_kernels::Backend;

use crate::Result;
use crate::source::{WeightSource, rows_of};

/// See the module's text.
pub struct Linear<B: Backend> {
    /// Tensor it was read from; fused layers share it.
    pub tensor: String,
    weight: B::Weight,
    bias: Option<B::Tensor>,
}

impl<B: Backend> Linear<B> {
    /// Reads `stem.weight` (N, K) and, where there is one, `stem.bias` (N).
    pub fn read(backend: &B, source: &dyn WeightSource, stem: &str, n: usize, k: usize) -> Result<Self> {
        let mut parts = Self::read_fused(backend, source, stem, &[n], k)?;
        Ok(parts.swap_remove(0))
    }

    /// The same of a layer that never goes without a bias. Fails when that is missing, too.
    pub fn with_bias(backend: &B, source: &dyn WeightSource, stem: &str, n: usize, k: usize) -> Result<Self> {
        let linear = Self::read(backend, source, stem, n, k)?;
        if linear.bias.is_none() {
            // Asking for it gives the sentence that it is missing.
            source.vector(&format!("{stem}.bias"), n)?;
        }
        Ok(linear)
    }

    /// Reads one tensor whose rows are those of several layers, one after the other.
    pub fn read_fused(
        backend: &B,
        source: &dyn WeightSource,
        stem: &str,
        rows: &[usize],
        k: usize,
    ) -> Result<Vec<Self>> {
        let tensor = format!("{stem}.weight");
        let total = rows.iter().sum();
        let whole = source.matrix(&tensor, total, k)?;
        let bias_name = format!("{stem}.bias");
        let bias = if source.contains(&bias_name) {
            Some(source.vector(&bias_name, total)?)
        } else {
            None
        };
        let mut from = 0;
        let part = |&n: &usize| {
            let range = from..from + n;
            from += n;
            let weight = if n == total {
                whole.clone()
            } else {
                rows_of(&whole, range.clone())?
            };
            Ok(Self {
                tensor: tensor.clone(),
                weight: backend.weight(&weight),
                bias: bias.as_ref().map(|bias| backend.upload(&bias[range], n)),
            })
        };
        rows.iter().map(part).collect()
    }

    /// Its weight, when that is all there is: no bias.
    pub fn plain(&self) -> Option<&B::Weight> {
        self.bias.is_none().then_some(&self.weight)
    }

    /// x (M, K) to (M, N).
    pub fn run(&self, backend: &B, x: &B::Tensor) -> B::Tensor {
        let mut y = backend.matmul(x, &self.weight);
        if let Some(bias) = &self.bias {
            backend.add(&mut y, bias);
        }
        y
    }
}

/// Tells `observer` that `x` enters these layers.
pub fn observe<B: Backend>(
    observer: Option<&mut (dyn Observer<B> + '_)>,
    layers: &[&Linear<B>],
    x: &B::Tensor,
) {
    let Some(observer) = observer else { return };
    let mut names: Vec<&str> = layers.iter().map(|l| l.tensor.as_str()).collect();
    names.dedup();
    observer.linear_input(&names, x);
}
