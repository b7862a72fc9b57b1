//! The encoder of WINT2 on a GPU, for weights that all count the same. Owns the job that an effort becomes; the
//! arithmetic is `kernels/cuda/encode_wint2.cu`, step by step that of the processor's encoder.

use half::bf16;
use qtool_formats::packing::wint2::{Channel, GROUP};
use qtool_formats::weight::CcqWeight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;
use qtool_kernels::cuda::Encoder;
use qtool_kernels::cuda::encode::{Books, Heat, Rows, Wint2Job};

use super::pairs::PAIRS;
use super::quantizer::{Ccq, located};
use super::race::{BOOKS, NEAR, Plan};
use super::row::stride;
use super::{CcqError, Effort};
use crate::{Evidence, LayerStats, Quantizer, Result};

/// The quantizer.
pub(super) struct DeviceCcq {
    /// The same on the processor, which names the method.
    processor: Ccq,
    effort: Effort,
    encoder: Encoder,
    books: Books,
}

impl DeviceCcq {
    /// Copies the codebooks to the device.
    pub(super) fn new(processor: Ccq, effort: Effort, encoder: &Encoder) -> Result<Self> {
        let mut list = Box::new([[[0i8; 4]; 256]; PAIRS.len()]);
        for (to, book) in list.iter_mut().zip(BOOKS.iter()) {
            *to = book.windows;
        }
        Ok(Self {
            processor,
            effort,
            encoder: encoder.clone(),
            books: encoder.books(&list)?,
        })
    }
}

impl Quantizer for DeviceCcq {
    fn scheme(&self) -> Scheme {
        Scheme::Ccq
    }

    fn describe(&self) -> String {
        self.processor.describe()
    }

    fn evidence(&self) -> Evidence {
        self.processor.evidence()
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        self.processor.informed(stats)
    }

    fn quantize(&self, _isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        Scheme::Ccq.parts(n, k)?;
        let plan = Plan::of(self.effort);
        let heat = |heat: &super::race::Heat| {
            debug_assert!(NEAR.starts_with(heat.scales), "scales in NEAR's order");
            Heat {
                pairs: heat.pairs,
                part: heat.part,
                tried: heat.scales.len(),
            }
        };
        let heats: Vec<Heat> = plan.heats.iter().map(heat).collect();
        let job = Wint2Job {
            books: &self.books,
            refine: self.effort != Effort::Fast,
            heats: &heats,
            factors: [NEAR[0], NEAR[1], NEAR[2]],
            finalists: plan.finalists,
            supers: plan.supers,
            rounds: plan.rounds,
            stride,
        };
        let chosen = self.encoder.wint2(Rows::Values(x), n, k, &job)?;
        if let Some(row) = chosen.finite.iter().position(|&finite| finite == 0) {
            let values = &x[row * k..(row + 1) * k];
            let column = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
            return Err(located(CcqError::NotFinite { column }, row, values));
        }
        let channel = |(&bits, &pair): (&u16, &i32)| {
            let (code_scale, code_zp) = PAIRS[pair as usize];
            Channel {
                super_scale: bf16::from_bits(bits),
                code_scale: f32::from(code_scale),
                code_zp: f32::from(code_zp),
            }
        };
        let channels = chosen.supers.iter().zip(&chosen.pairs).map(channel).collect();
        debug_assert_eq!(chosen.locals.len(), n * (k / GROUP), "a local scale a group");
        let weight = CcqWeight::new(k, chosen.codes, chosen.locals, channels)?;
        Ok(QuantizedWeight::Ccq(weight))
    }
}
