//! The gated MLP, dense or as routed experts.
//!
//! ```text
//! mlp(x)   = down(f(gate(x)) * up(x))
//! p        = softmax(router(x)), in f32
//! chosen   = the `top` experts of largest p + bias; of equal ones the lower number
//! moe(x)   = sum over chosen e of p_e / max(sum of chosen p, least) * mlp_e(x)  +  mlp_shared(x)
//! ```

use qtool_calib::Observer;
use qtool_kernels::Backend;
use qtool_kernels::backend::{Activation, ExpertWeights, Routing};

use super::decoder::{Decoder, Moe};
use super::linear::{Linear, observe};
use crate::Result;
use crate::source::WeightSource;

/// One gated MLP.
pub struct Mlp<B: Backend> {
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
    activation: Activation,
}

impl<B: Backend> Mlp<B> {
    /// Reads the tensors below `stem` (which ends in a dot).
    pub fn read(
        backend: &B,
        source: &dyn WeightSource,
        decoder: &Decoder,
        stem: &str,
        width: usize,
    ) -> Result<Self> {
        let (gate, up) = if decoder.names.fused {
            let fused = format!("{stem}up_gate_proj");
            let mut parts = Linear::read_fused(backend, source, &fused, &[width, width], decoder.hidden)?;
            let up = parts.pop();
            (parts.pop(), up)
        } else {
            let read = |name| Linear::read(backend, source, &format!("{stem}{name}"), width, decoder.hidden);
            (Some(read("gate_proj")?), Some(read("up_proj")?))
        };
        let (Some(gate), Some(up)) = (gate, up) else {
            unreachable!("two parts were asked for")
        };
        Ok(Self {
            gate,
            up,
            down: Linear::read(
                backend,
                source,
                &format!("{stem}down_proj"),
                decoder.hidden,
                width,
            )?,
            activation: decoder.activation,
        })
    }

    /// x (M, K) to (M, K).
    pub fn run(
        &self,
        backend: &B,
        x: &B::Tensor,
        mut observer: Option<&mut (dyn Observer<B> + '_)>,
    ) -> B::Tensor {
        observe(observer.as_deref_mut(), &[&self.gate, &self.up], x);
        let mut gate = self.gate.run(backend, x);
        backend.gate(&mut gate, &self.up.run(backend, x), self.activation);
        observe(observer, &[&self.down], &gate);
        self.down.run(backend, &gate)
    }

    fn tensors(&self) -> impl Iterator<Item = &str> {
        [&self.gate, &self.up, &self.down]
            .into_iter()
            .map(|l| l.tensor.as_str())
    }
}

/// The second half of a block.
pub enum Feed<B: Backend> {
    /// Every token goes through it.
    Dense(Mlp<B>),
    /// Tokens are sent to some of many.
    Routed(Box<Experts<B>>),
}

/// Routed experts and what chooses among them.
pub struct Experts<B: Backend> {
    router: Linear<B>,
    bias: Option<Vec<f32>>,
    experts: Vec<Mlp<B>>,
    shared: Option<Mlp<B>>,
    moe: Moe,
}

impl<B: Backend> Feed<B> {
    /// Reads that of block `block`.
    pub fn read(backend: &B, source: &dyn WeightSource, decoder: &Decoder, block: usize) -> Result<Self> {
        let stem = format!("{}mlp.", decoder.names.block(block));
        let Some(moe) = decoder.moe.as_ref().filter(|moe| moe.is_in(block)) else {
            return Ok(Self::Dense(Mlp::read(
                backend,
                source,
                decoder,
                &stem,
                decoder.intermediate,
            )?));
        };
        let bias = format!("{stem}moe_statics.e_score_correction_bias");
        let expert = |e| {
            Mlp::read(
                backend,
                source,
                decoder,
                &format!("{stem}experts.{e}."),
                moe.intermediate,
            )
        };
        let shared = format!("{stem}shared_experts.");
        Ok(Self::Routed(Box::new(Experts {
            router: Linear::read(
                backend,
                source,
                &format!("{stem}gate"),
                moe.experts,
                decoder.hidden,
            )?,
            bias: source
                .contains(&bias)
                .then(|| source.vector(&bias, moe.experts))
                .transpose()?,
            experts: (0..moe.experts).map(expert).collect::<Result<_>>()?,
            shared: (moe.shared > 0)
                .then(|| Mlp::read(backend, source, decoder, &shared, moe.shared))
                .transpose()?,
            moe: moe.clone(),
        })))
    }

    /// x (M, K) to (M, K).
    pub fn run(
        &self,
        backend: &B,
        x: &B::Tensor,
        observer: Option<&mut (dyn Observer<B> + '_)>,
    ) -> B::Tensor {
        match self {
            Self::Dense(mlp) => mlp.run(backend, x, observer),
            Self::Routed(experts) => experts.run(backend, x, observer),
        }
    }

    /// Names of its linear weights, the router's left out.
    pub fn tensors(&self) -> Vec<&str> {
        match self {
            Self::Dense(mlp) => mlp.tensors().collect(),
            Self::Routed(moe) => moe
                .experts
                .iter()
                .chain(&moe.shared)
                .flat_map(Mlp::tensors)
                .collect(),
        }
    }
}

impl<B: Backend> Experts<B> {
    fn run(
        &self,
        backend: &B,
        x: &B::Tensor,
        mut observer: Option<&mut (dyn Observer<B> + '_)>,
    ) -> B::Tensor {
        let (rows, columns) = backend.dims(x);
        let logits = self.router.run(backend, x);
        if observer.is_none()
            && let Some(out) = self.run_together(backend, x, &logits)
        {
            return out;
        }
        let logits = backend.download(&logits);
        let mut sent: Vec<(Vec<usize>, Vec<f32>)> = vec![Default::default(); self.moe.experts];
        for (row, logits) in logits.chunks_exact(self.moe.experts).enumerate() {
            for (expert, weight) in choose(logits, self.bias.as_deref(), &self.moe) {
                sent[expert].0.push(row);
                sent[expert].1.push(weight);
            }
        }
        let mut out = match &self.shared {
            Some(shared) => shared.run(backend, x, observer.as_deref_mut()),
            None => backend.zeros(rows, columns),
        };
        for (mlp, (rows, weights)) in self.experts.iter().zip(&sent) {
            if rows.is_empty() && observer.is_none() {
                continue;
            }
            let y = mlp.run(backend, &backend.gather(x, rows), observer.as_deref_mut());
            backend.scatter_add(&mut out, rows, &y, weights);
        }
        out
    }
}

impl<B: Backend> Experts<B> {
    /// All experts by one operation of the device, when it has one for them.
    fn run_together(&self, backend: &B, x: &B::Tensor, logits: &B::Tensor) -> Option<B::Tensor> {
        let plain = |part: fn(&Mlp<B>) -> &Linear<B>| -> Option<Vec<&B::Weight>> {
            self.experts.iter().map(|mlp| part(mlp).plain()).collect()
        };
        let experts = ExpertWeights {
            gate: plain(|mlp| &mlp.gate)?,
            up: plain(|mlp| &mlp.up)?,
            down: plain(|mlp| &mlp.down)?,
        };
        let routing = Routing {
            top: self.moe.top,
            bias: self.bias.as_deref(),
            least_sum: self.moe.least_sum,
        };
        let activation = self.experts.first()?.activation;
        let routed = backend.experts(x, logits, &routing, &experts, activation)?;
        let Some(shared) = &self.shared else {
            return Some(routed);
        };
        let mut out = shared.run(backend, x, None);
        backend.add(&mut out, &routed);
        Some(out)
    }
}

/// The experts of one token and their weights, in order of falling score.
fn choose(logits: &[f32], bias: Option<&[f32]>, moe: &Moe) -> Vec<(usize, f32)> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f32> = logits.iter().map(|l| (l - top).exp()).collect();
    let total: f32 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= total);
    let score = |e: usize| p[e] + bias.map_or(0.0, |bias| bias[e]);
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    order.truncate(moe.top);
    let sum = order.iter().map(|&e| p[e]).sum::<f32>().max(moe.least_sum);
    order.into_iter().map(|e| (e, p[e] / sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let moe = Moe {
            experts: 3,
            top: 2,
            intermediate: 1,
            shared: 0,
            blocks: (0, 0, 1),
            least_sum: 1e-12,
        };
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let near = |chosen: Vec<(usize, f32)>, expected: [(usize, f32); 2]| {
            chosen
                .iter()
                .zip(expected)
                .all(|(a, b)| a.0 == b.0 && (a.1 - b.1).abs() < 1e-6)
        };
        assert!(near(choose(&logits, None, &moe), [(0, 0.625), (1, 0.375)]));
        let biased = choose(&logits, Some(&[0.0, 0.0, 0.9]), &moe);
        assert!(near(biased, [(2, 0.2 / 0.7), (0, 0.5 / 0.7)]));
    }
}
