//! The encoder of WINT2 on a GPU. Owns the job that an effort becomes, and what is left to the processor: error feedback
//! and descent on the first encodings, where the whole second moment of the inputs is known. The arithmetic is
//! `kernels/cuda/encode_wint2.cu`, step by step that of the processor's encoder.

use std::sync::Arc;

use half::bf16;
use qtool_formats::packing::wint2::{GROUP, VECTOR};
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;
use qtool_kernels::cuda::Encoder;
use qtool_kernels::cuda::encode::{Books, Heat, Importance, Rows, Wint2Codes, Wint2Job};
use rayon::prelude::*;

use super::feedback::TOGETHER;
use super::pairs::PAIRS;
use super::quantizer::{Ccq, Knowledge, located, stacked};
use super::race::{BOOKS, NEAR, Plan};
use super::row::{counts, stride};
use super::{CcqError, CcqRow, Effort, check};
use crate::{Evidence, LayerStats, Quantizer, Result};

/// The quantizer.
pub(super) struct DeviceCcq {
    /// The same on the processor, which names the method, and knows what is known of the inputs.
    processor: Ccq,
    encoder: Encoder,
    books: Arc<Books>,
    /// How much columns count and their sums over groups, where they do not all count the same.
    counts: Option<(Vec<f32>, Vec<f64>)>,
}

impl DeviceCcq {
    /// Copies the codebooks to the device.
    pub(super) fn new(processor: Ccq, encoder: &Encoder) -> Result<Self> {
        let mut list = Box::new([[[0i8; 4]; 256]; PAIRS.len()]);
        for (to, book) in list.iter_mut().zip(BOOKS.iter()) {
            *to = book.windows;
        }
        Ok(Self {
            processor,
            encoder: encoder.clone(),
            books: encoder.books(&list)?,
            counts: None,
        })
    }

    fn knowledge(&self) -> Option<&Knowledge> {
        self.processor.knowledge.as_deref()
    }

    /// Codes and scales of `n` rows, without a look at more than each column's importance.
    fn choose(&self, x: &[f32], n: usize, k: usize) -> Result<Wint2Codes> {
        let plan = Plan::of(self.processor.effort);
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
            refine: self.processor.effort != Effort::Fast,
            heats: &heats,
            factors: [NEAR[0], NEAR[1], NEAR[2]],
            finalists: plan.finalists,
            supers: plan.supers,
            rounds: plan.rounds,
            stride,
            importance: self
                .counts
                .as_ref()
                .map(|(columns, masses)| Importance { columns, masses }),
        };
        let chosen = self.encoder.wint2(Rows::Values(x), n, k, &job)?;
        match chosen.finite.iter().position(|&finite| finite == 0) {
            None => Ok(chosen),
            Some(row) => {
                let values = &x[row * k..(row + 1) * k];
                let column = values.iter().position(|x| !x.is_finite()).unwrap_or(0);
                Err(located(CcqError::NotFinite { column }, row, values))
            }
        }
    }
}

/// Its rows, of K weights each.
fn rows(chosen: &Wint2Codes, k: usize) -> Vec<CcqRow> {
    let row = |row: usize| {
        let (code_scale, code_zp) = PAIRS[chosen.pairs[row] as usize];
        CcqRow {
            code_bytes: chosen.codes[row * k / VECTOR..(row + 1) * k / VECTOR].to_vec(),
            local: chosen.locals[row * k / GROUP..(row + 1) * k / GROUP].to_vec(),
            super_scale: bf16::from_bits(chosen.supers[row]),
            code_scale: f32::from(code_scale),
            code_zp: f32::from(code_zp),
        }
    };
    (0..chosen.supers.len()).map(row).collect()
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

    fn rows_together(&self, k: usize) -> Option<usize> {
        Some(self.encoder.rows_together(k))
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        let processor = self.processor.knowing(stats);
        let importance = stats.importance();
        if check(&vec![0.0; importance.len()], Some(&importance)).is_err() {
            // The processor refuses these, and says why.
            return Ok(Box::new(processor));
        }
        Ok(Box::new(Self {
            processor,
            encoder: self.encoder.clone(),
            books: Arc::clone(&self.books),
            counts: counts(&importance),
        }))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        Scheme::Ccq.parts(n, k)?;
        self.knowledge().map_or(Ok(()), |known| known.fits(k))?;
        let first = rows(&self.choose(x, n, k)?, k);
        let prepared = self.knowledge().and_then(|known| known.prepared.as_ref());
        let Some(prepared) = prepared else {
            return stacked(first, k);
        };
        let improve = |(x, first)| prepared.improve(isa, x, first, self.processor.effort);
        let batches = x.par_chunks(TOGETHER * k).zip(first.par_chunks(TOGETHER));
        let last: Vec<Vec<CcqRow>> = batches.map(improve).collect();
        stacked(last.into_iter().flatten().collect(), k)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use qtool_kernels::cuda::probe;

    use super::super::{Scratch, fitted_row};
    use super::*;

    fn encoder(test: &str) -> Option<Encoder> {
        match probe(0) {
            Ok(device) => Some(Encoder::new(device)),
            Err(reason) => {
                let required = std::env::var_os("QTOOL_REQUIRE_CUDA").is_some_and(|v| v == "1");
                assert!(!required, "QTOOL_REQUIRE_CUDA=1, and {reason}");
                // Past the test harness, which swallows what a passing test prints.
                let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
                None
            }
        }
    }

    /// Codes are equal even where sums are not, unless two candidates are about as good. So the sums themselves: each
    /// group's energy and gain go into a row's error, and those of least squares into the scale that it asks for.
    #[test]
    fn sums_on_a_device_are_the_processors() {
        let Some(encoder) = encoder("sums_on_a_device_are_the_processors") else {
            return;
        };
        let mut state = 5u64;
        let mut number = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let (n, k, mut asked) = (6, 256, 0);
        for effort in Effort::ALL {
            let x: Vec<f32> = (0..n * k).map(|_| number() * number()).collect();
            let importance: Vec<f32> = (0..k).map(|_| number().abs() * 3.0).collect();
            for importance in [None, Some(importance.as_slice())] {
                let ccq = Ccq {
                    effort,
                    knowledge: None,
                };
                let mut there = DeviceCcq::new(ccq, &encoder).unwrap();
                there.counts = importance.and_then(counts);
                let chosen = there.choose(&x, n, k).unwrap();
                let mut scratch = Scratch::default();
                for (row, x) in x.chunks_exact(k).enumerate() {
                    let here = fitted_row(x, importance, effort, Isa::best(), &mut scratch).unwrap();
                    let what = format!("{effort}, row {row}, weighted {}", importance.is_some());
                    let error = here.unwrap().error;
                    assert_eq!(chosen.errors[row].to_bits(), error.to_bits(), "{what}: error");
                    let wish = scratch.fit.asked;
                    assert_eq!(chosen.asked[row].to_bits(), wish.to_bits(), "{what}: scale");
                    asked += usize::from(wish > 0.0);
                }
            }
        }
        assert!(asked >= 2 * 2 * n, "{asked}");
    }
}
