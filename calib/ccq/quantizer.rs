//! The encoder as a quantizer: blocks of rows in, a WINT2 weight out. Owns no decision; each row is
//! encoded by itself.

use qtool_formats::packing::wint2::GROUP;
use qtool_formats::weight::CcqWeight;
use qtool_formats::{FormatError, QuantizedWeight, Scheme};
use qtool_kernels::Isa;

use super::{CcqError, Effort, Scratch, encode_row};
use crate::{CalibError, Method, Quantizer, Result, TensorOptions};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "ccq",
    bits: &[2],
    summary: "WINT2, the 2-bit convolutional code of FastDeploy: pair, scale and code search (2 bits only)",
    build,
};

fn build(options: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Ccq {
        effort: options.effort,
    }))
}

/// The quantizer.
#[derive(Debug, Clone, Copy)]
pub struct Ccq {
    effort: Effort,
}

impl Quantizer for Ccq {
    fn scheme(&self) -> Scheme {
        Scheme::Ccq
    }

    fn describe(&self) -> String {
        format!("ccq, effort {}", self.effort)
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        thread_local!(static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default());
        Scheme::Ccq.parts(n, k)?;
        let (mut codes, mut locals) = (Vec::with_capacity(n * k / 4), Vec::with_capacity(n * k / GROUP));
        let mut channels = Vec::with_capacity(n);
        SCRATCH.with_borrow_mut(|scratch| {
            for (row, x) in x.chunks_exact(k).enumerate() {
                let encoded =
                    encode_row(x, None, self.effort, isa, scratch).map_err(|e| located(e, row, x))?;
                channels.push(encoded.channel());
                codes.extend(encoded.code_bytes);
                locals.extend(encoded.local);
            }
            Ok(QuantizedWeight::Ccq(CcqWeight::new(k, codes, locals, channels)?))
        })
    }
}

/// An encoder's error with its row.
fn located(error: CcqError, row: usize, x: &[f32]) -> CalibError {
    match error {
        CcqError::NotFinite { column } => CalibError::NonFinite {
            row,
            column,
            value: x[column].to_string(),
        },
        other => CalibError::Format(FormatError::Weight {
            what: "row of a WINT2 weight",
            expected: "a row that can be encoded".to_owned(),
            got: other.to_string(),
        }),
    }
}
