//! What a running model reports. Owns the one trait through which a model speaks to calibration, so that this
//! package needs to know no model.

use qtool_kernels::Backend;

/// Listens to a model that runs on `B`.
pub trait Observer<B: Backend> {
    /// `x` (rows, K) is about to enter every linear layer named in `weights` (full tensor names, as in the
    /// checkpoint). Reported once for all layers that share the input. With routed experts, rows are those
    /// routed to the expert, and there may be none.
    fn linear_input(&mut self, weights: &[&str], x: &B::Tensor);

    /// Keys, after the rotary embedding, and values of decoder layer `layer`: each (rows, kv heads * D).
    fn keys_and_values(&mut self, layer: usize, keys: &B::Tensor, values: &B::Tensor);
}
