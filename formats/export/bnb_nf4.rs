//! `bnb-nf4`: the folder bitsandbytes saves and transformers loads with `load_in_4bit`.
//!
//! ```text
//! for a LINEAR of N x K
//!   weight                                    U8 [N*K / 2, 1]   two codes to a byte, the first in the high nibble
//!   weight.absmax                             F32 [N*K / 64]    scale[n][k / 64]
//!   weight.quant_map                          F32 [16]          the levels
//!   weight.quant_state.bitsandbytes__nf4      U8 [length]       JSON: kind, block, type and shape of the weight
//! and of nf4-dq
//!   weight.absmax                             U8 [N*K / 64]     codes of the scales
//!   weight.nested_absmax                      F32 [that / 256]  scales of scales, rounded up
//!   weight.nested_quant_map                   F32 [256]         the levels of scales
//!                                                               their offset is in the JSON
//! ```
//!
//! Formula: weight `i = n*K + k` has the code `(byte[i / 2] >> (4 if i is even else 0)) & 15`, and its value is
//! `quant_map[code] * absmax[i / 64]`. Bytes: [`crate::packing::high_nibbles`]. `docs/formats/bnb-nf4.md` is the page
//! about it.

use serde_json::{Value, json};

use super::linears::{Form, LinearFormat, Linears, Relaid, Stream, Subject};
use crate::dtype::Dtype;
use crate::packing::{HIGH_NIBBLES, Packing};
use crate::scheme::dynamic_map::MAP;
use crate::scheme::{Scheme, nf4};
use crate::weight::QuantizedWeight;
use crate::weight::nested::NestedScales;
use crate::{FormatError, Result};

/// The exporter's only value.
pub const BNB_NF4: Relaid<BnbNf4> = Relaid(BnbNf4);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct BnbNf4;

impl LinearFormat for BnbNf4 {
    fn name(&self) -> &'static str {
        "bnb-nf4"
    }

    fn summary(&self) -> &'static str {
        "folder as bitsandbytes saves it, which transformers loads with load_in_4bit: NF4"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let fits = matches!(scheme, Scheme::Nf4 | Scheme::Nf4Double);
        (!fits).then(|| {
            format!("bitsandbytes' 4-bit folders hold nf4 and nf4-dq, not {scheme}; quantize with --bits 4 --method nf4-dq")
        })
    }

    fn forms(&self, weight: &Subject) -> std::result::Result<Vec<Form>, String> {
        let form = |suffix, dtype, shape: &[usize]| Form {
            suffix,
            dtype,
            shape: shape.to_vec(),
        };
        let weights = weight.n * weight.k;
        let scales = weights / nf4::GROUP;
        let double = weight.scheme == Scheme::Nf4Double;
        let mut forms = vec![
            form("weight", Dtype::U8, &[weights / 2, 1]),
            form(
                "weight.absmax",
                if double { Dtype::U8 } else { Dtype::F32 },
                &[scales],
            ),
            form("weight.quant_map", Dtype::F32, &[nf4::LEVELS.len()]),
            form(
                "weight.quant_state.bitsandbytes__nf4",
                Dtype::U8,
                &[state(weight).len()],
            ),
        ];
        if double {
            let blocks = scales.div_ceil(nf4::NESTED_GROUP);
            forms.push(form("weight.nested_absmax", Dtype::F32, &[blocks]));
            forms.push(form("weight.nested_quant_map", Dtype::F32, &[MAP.len()]));
        }
        Ok(forms)
    }

    fn codes(&self, rows: &QuantizedWeight, at: usize, _n: usize, out: &mut [u8]) -> Result<()> {
        let QuantizedWeight::Nf4(rows) = rows else {
            return Err(FormatError::Scheme {
                got: rows.scheme().to_string(),
                expected: "expected nf4".to_owned(),
            });
        };
        let mut bytes = Vec::with_capacity(rows.codes().len() / 2);
        HIGH_NIBBLES.pack(4, rows.k(), rows.codes(), &mut bytes)?;
        let from = at * rows.k() / 2;
        if let Some(place) = out.get_mut(from..from + bytes.len()) {
            place.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn stream(&self, _weight: &Subject) -> Option<Stream> {
        Some(Stream::Swapped)
    }

    fn rest(&self, weight: &Subject, scales: &[f32], _zeros: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![
            bytes(scales),
            bytes(&nf4::LEVELS),
            state(weight).into_bytes(),
        ])
    }

    fn rest_nested(&self, weight: &Subject, scales: &NestedScales) -> Result<Vec<Vec<u8>>> {
        Ok(vec![
            scales.codes().to_vec(),
            bytes(&nf4::LEVELS),
            state(weight).into_bytes(),
            bytes(scales.nested().scales()),
            bytes(&MAP),
        ])
    }

    fn config(&self, linears: &Linears) -> std::result::Result<Value, String> {
        if linears.quantized.is_empty() {
            return Err("no linear weight is quantized; export --to bf16".to_owned());
        }
        let mut skipped = linears.kept.clone();
        if !skipped.iter().any(|name| name == "lm_head") {
            skipped.push("lm_head".to_owned());
        }
        Ok(json!({
            "quant_method": "bitsandbytes",
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": linears.quantized.iter().any(|l| l.scheme == Scheme::Nf4Double),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }))
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// What bitsandbytes keeps of a weight beside its numbers, with the spaces its own JSON has.
fn state(weight: &Subject) -> String {
    let dtype = match weight.dtype {
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
        _ => "bfloat16",
    };
    let nested = match weight.scheme {
        Scheme::Nf4Double => format!(
            ", \"nested_blocksize\": {}, \"nested_dtype\": \"float32\", \"nested_offset\": {}",
            nf4::NESTED_GROUP,
            python_float(f64::from(weight.offset))
        ),
        _ => String::new(),
    };
    format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {}, \"dtype\": \"{dtype}\", \"shape\": [{}, {}]{nested}}}",
        nf4::GROUP,
        weight.n,
        weight.k
    )
}

/// A finite number as Python spells it: the shortest digits, with an exponent of at least two of them below a
/// ten-thousandth and from ten to the sixteenth on.
fn python_float(value: f64) -> String {
    if value == 0.0 || (1e-4..1e16).contains(&value.abs()) {
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(rest) => ('-', rest),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `repr` gives in Python.
    #[test]
    fn numbers_are_spelled_as_python_spells_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (2.0, "2.0"),
            (f64::from(0.1f32), "0.10000000149011612"),
            (0.0001, "0.0001"),
            (9.5e-5, "9.5e-05"),
            (-1e-7, "-1e-07"),
            (1.5e-123, "1.5e-123"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
        ] {
            assert_eq!(python_float(value), text);
        }
    }
}
