//! `awq`: AutoAWQ's GEMM layout, 4 bits with a zero point per group, which GPTQModel, vLLM and transformers load. It
//! says how codes lie, not how they were chosen.
//!
//! ```text
//! for a LINEAR of N x K
//!   qweight  I32 [K, N / 8]   code[n][k] is nibble PLACE[n % 8] of word [k][n / 8]
//!   qzeros   I32 [G, N / 8]   zero[n][g] is nibble PLACE[n % 8] of word [g][n / 8]
//!   scales   F16 [G, N]
//! PLACE = 0 4 1 5 2 6 3 7
//! ```
//!
//! Formula: `value[n][k] = (code[n][k] - zero[n][k / group]) * scale[n][k / group]`. Words:
//! [`crate::packing::words`]. `docs/formats/awq.md` is the page about it.

use serde_json::{Value, json};

use super::gptq::one_scheme;
use super::linears::{Form, LinearFormat, Linears, Relaid, Stream, Subject, affine, scale_bytes};
use crate::Result;
use crate::dtype::{Dtype, FloatDtype};
use crate::packing::words;
use crate::scheme::{Grouping, Scheme};
use crate::weight::QuantizedWeight;

/// The exporter's only value.
pub const AWQ: Relaid<Awq> = Relaid(Awq);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Awq;

/// Longest group its readers take.
const LONGEST: usize = 128;

impl LinearFormat for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn summary(&self) -> &'static str {
        "folder in AutoAWQ's GEMM layout, which GPTQModel, vLLM and transformers load: 4 bits"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        if let Scheme::Affine(s) = scheme
            && s.bits() == 4
            && s.grouping().len(LONGEST) <= LONGEST
        {
            return None;
        }
        Some(format!(
            "AWQ holds codes of 4 bits in groups of 16 to {LONGEST} or whole rows with F16 scales (such as w4-zp-g128-f16), not {scheme}; quantize with --bits 4 --group-size 128 --asymmetric --scale-dtype f16"
        ))
    }

    fn forms(&self, weight: &Subject) -> std::result::Result<Vec<Form>, String> {
        let groups = weight.groups().map_err(|e| e.to_string())?;
        let (n, k) = (weight.n, weight.k);
        if !n.is_multiple_of(8) {
            return Err(format!(
                "a weight of {n} rows does not fit AWQ's words, expected a multiple of 8; leave it out: quantize with --skip"
            ));
        }
        let form = |suffix, dtype, shape: [usize; 2]| Form {
            suffix,
            dtype,
            shape: shape.to_vec(),
        };
        Ok(vec![
            form("qweight", Dtype::I32, [k, n / 8]),
            form("qzeros", Dtype::I32, [groups, n / 8]),
            form("scales", Dtype::F16, [groups, n]),
        ])
    }

    fn keeps_halves(&self) -> bool {
        true
    }

    fn codes(&self, rows: &QuantizedWeight, at: usize, n: usize, out: &mut [u8]) -> Result<()> {
        let rows = affine(rows)?;
        words::awq(rows.dims().1, rows.codes(), n, at, out);
        Ok(())
    }

    fn stream(&self, _weight: &Subject) -> Option<Stream> {
        Some(Stream::Awq)
    }

    fn rest(&self, weight: &Subject, scales: &[f32], zeros: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (scheme, n, k) = (weight.affine()?, weight.n, weight.k);
        let groups = scheme.groups(n, k)?;
        let fixed = scheme.fixed_zero().map(|zero| vec![zero; n * groups]);
        let mut qzeros = vec![0u8; groups * (n / 8) * words::WORD];
        words::awq(groups, fixed.as_deref().unwrap_or(zeros), n, 0, &mut qzeros);
        Ok(vec![qzeros, scale_bytes(FloatDtype::F16, n, scales, true)])
    }

    fn config(&self, linears: &Linears) -> std::result::Result<Value, String> {
        let scheme = one_scheme(linears, self.name())?;
        let not_converted = if linears.kept.is_empty() {
            Value::Null
        } else {
            json!(linears.kept)
        };
        Ok(json!({
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": match scheme.grouping() { Grouping::Row => -1, Grouping::Columns(len) => len as i64 },
            "zero_point": true,
            "modules_to_not_convert": not_converted,
        }))
    }
}
