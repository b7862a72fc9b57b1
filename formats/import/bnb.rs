//! bitsandbytes' 4-bit folders as transformers saves them: NF4 and FP4, blocks of any length, absmax plain or quantized a
//! second time. Layout and formula of the plain form: [`crate::export::bnb_nf4`].
//!
//! ```text
//! double quantization   absmax[i] = nested_quant_map[weight.absmax[i]] * nested_absmax[i / nested_blocksize] + nested_offset
//! ```
//!
//! with `weight.absmax` U8, two more tensors (`weight.nested_absmax`, `weight.nested_quant_map`) and block length and offset in
//! the state's JSON. In f32, product and sum rounded each by itself, as bitsandbytes does.
//!
//! NF4 in blocks that end where rows do stays packed, its absmax as f32; everything else becomes f32 values.

use serde_json::Value;

use super::linears::{LinearReader, Linears, Module};
use super::{Coded, Decoded, Faults, Place, Tensor};
use crate::checkpoint::Checkpoint;
use crate::dtype::{Dtype, FloatDtype};
use crate::scheme::nf4::{GROUP, LEVELS};
use crate::tensor::TensorView;
use crate::weight::{Nf4Weight, QuantizedWeight};
use crate::{FormatError, Result, limits};

/// The reader's only value.
pub const BNB: Linears<Bnb> = Linears(Bnb);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Bnb;

const STATES: [&str; 2] = [
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
];
const SUFFIXES: [&str; 7] = [
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    STATES[0],
    STATES[1],
];

/// A second quantization of the absmax.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Nested {
    block: usize,
    offset: f32,
}

/// How a linear lies.
#[derive(Debug)]
struct Linear {
    module: String,
    n: usize,
    k: usize,
    block: usize,
    nested: Option<Nested>,
}

impl LinearReader for Bnb {
    fn name(&self) -> &'static str {
        "bitsandbytes"
    }

    fn summary(&self) -> &'static str {
        "folders saved with load_in_4bit: NF4 and FP4, with double quantization or without"
    }

    fn method(&self) -> &'static str {
        "bitsandbytes"
    }

    fn marker(&self) -> &'static str {
        "weight.absmax"
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &SUFFIXES
    }

    fn refuses(&self, place: &Place) -> Option<String> {
        let flag = |key: &str| place.quantization.get(key).and_then(Value::as_bool);
        (flag("load_in_8bit") == Some(true) || flag("load_in_4bit") == Some(false)).then(|| {
            "expected bitsandbytes of 4 bits (load_in_4bit), got its 8-bit form, which is not read; save the model with load_in_4bit, or quantize the original with `qtool quantize --bits 8`".to_owned()
        })
    }

    fn linear(&self, _place: &Place, module: &Module<'_>) -> Result<Tensor> {
        let (suffix, state) = state(module)?;
        let fault = |reason: String| module.fault(suffix, reason);
        let number = |key: &str| {
            let value = state.get(key).and_then(Value::as_u64);
            value
                .and_then(|value| usize::try_from(value).ok())
                .filter(|value| *value > 0)
        };
        let block = number("blocksize").ok_or_else(|| fault("expected a blocksize above 0".to_owned()))?;
        let shape: Vec<usize> = state
            .get("shape")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(|d| d.as_u64().and_then(|d| usize::try_from(d).ok()))
            .collect();
        let elements = shape.iter().try_fold(1usize, |all, &d| all.checked_mul(d));
        let (&[n, k], Some(elements)) = (shape.as_slice(), elements.filter(|all| *all > 0)) else {
            return Err(fault(format!(
                "expected the shape of a matrix, got {}",
                state.get("shape").unwrap_or(&Value::Null)
            )));
        };
        let weight = module.need(
            "weight",
            &[Dtype::U8, Dtype::I8, Dtype::BF16, Dtype::F16, Dtype::F32],
            2,
        )?;
        let stored = weight.bytes().len();
        if stored != elements.div_ceil(2) {
            return Err(module.fault(
                "weight",
                format!("expected {} bytes for {n} x {k} codes of 4 bits, got {stored}; the parts do not belong together", elements.div_ceil(2)),
            ));
        }
        let blocks = elements.div_ceil(block);
        let map = module.need("weight.quant_map", &[Dtype::F32], 1)?;
        module.shaped("weight.quant_map", &map, &[LEVELS.len()])?;
        let nested = nested(module, &state, blocks, &fault)?;
        let kind = if suffix == STATES[0] { "nf4" } else { "fp4" };
        let double = if nested.is_some() { "-double" } else { "" };
        Ok(Tensor {
            name: module.part_name("weight"),
            shape: vec![n, k],
            stored_as: format!("{kind}-g{block}{double}"),
            parts: module.parts(&SUFFIXES),
            coded: Some(Box::new(Linear {
                module: module.name.to_owned(),
                n,
                k,
                block,
                nested,
            })),
        })
    }
}

/// The state's JSON and the part it stands in.
fn state(module: &Module<'_>) -> Result<(&'static str, Value)> {
    for suffix in STATES {
        if let Some(view) = module.find(suffix)? {
            let json = match view.dtype() {
                Dtype::U8 if view.bytes().len() as u64 <= limits::MAX_STATE_BYTES => view.bytes(),
                _ => &[],
            };
            return match serde_json::from_slice::<Value>(json) {
                Ok(state) if state.is_object() => Ok((suffix, state)),
                _ => Err(module.fault(
                    suffix,
                    format!(
                        "expected a JSON object of at most {} bytes of U8, got {} {:?}; download the file again",
                        limits::MAX_STATE_BYTES,
                        view.dtype(),
                        view.shape()
                    ),
                )),
            };
        }
    }
    Err(FormatError::MissingTensor {
        path: module.files.root().to_owned(),
        tensor: module.part_name(STATES[0]),
        advice: "it says what the codes mean; download the folder again",
    })
}

/// Checks the absmax: floats, or codes with what they need.
fn nested(
    module: &Module<'_>,
    state: &Value,
    blocks: usize,
    fault: &dyn Fn(String) -> FormatError,
) -> Result<Option<Nested>> {
    let absmax = module.need("weight.absmax", &[Dtype::F32, Dtype::U8], 1)?;
    module.shaped("weight.absmax", &absmax, &[blocks])?;
    if absmax.dtype() == Dtype::F32 {
        return Ok(None);
    }
    let block = state.get("nested_blocksize").and_then(Value::as_u64);
    let block = block
        .and_then(|block| usize::try_from(block).ok())
        .filter(|block| *block > 0);
    let offset = state.get("nested_offset").and_then(Value::as_f64);
    let (Some(block), Some(offset)) = (block, offset.filter(|offset| offset.is_finite())) else {
        return Err(fault(
            "absmax is quantized a second time; expected numbers nested_blocksize and nested_offset"
                .to_owned(),
        ));
    };
    let map = module.need("weight.nested_quant_map", &[Dtype::F32], 1)?;
    module.shaped("weight.nested_quant_map", &map, &[256])?;
    let second = module.need("weight.nested_absmax", &[Dtype::F32], 1)?;
    module.shaped("weight.nested_absmax", &second, &[blocks.div_ceil(block)])?;
    Ok(Some(Nested {
        block,
        offset: offset as f32,
    }))
}

impl Linear {
    fn module<'a>(&'a self, files: &'a Checkpoint) -> Module<'a> {
        Module {
            files,
            name: &self.module,
        }
    }

    /// The absmax of every block.
    fn absmax(&self, module: &Module<'_>) -> Result<Vec<f32>> {
        let floats = |view: TensorView<'_>| FloatDtype::F32.widen(view.bytes());
        let absmax = module.need("weight.absmax", &[Dtype::F32, Dtype::U8], 1)?;
        let Some(nested) = self.nested else {
            return Ok(floats(absmax));
        };
        let map = floats(module.need("weight.nested_quant_map", &[Dtype::F32], 1)?);
        let second = floats(module.need("weight.nested_absmax", &[Dtype::F32], 1)?);
        let value = |(i, code): (usize, &u8)| {
            let level = map.get(usize::from(*code)).copied().unwrap_or(f32::NAN);
            level * second.get(i / nested.block).copied().unwrap_or(f32::NAN) + nested.offset
        };
        Ok(absmax.bytes().iter().enumerate().map(value).collect())
    }
}

impl Coded for Linear {
    fn decode(&self, files: &Checkpoint) -> Result<Decoded> {
        let module = self.module(files);
        let (n, k) = (self.n, self.k);
        let absmax = self.absmax(&module)?;
        let map = FloatDtype::F32.widen(module.need("weight.quant_map", &[Dtype::F32], 1)?.bytes());
        if let Some(bad) = absmax.iter().chain(&map).find(|value| !value.is_finite()) {
            return Err(module.fault(
                "weight.absmax",
                format!("a scale or level is {bad}; expected finite numbers"),
            ));
        }
        let weight = module.find("weight")?;
        let bytes = weight.map_or(&[][..], |view| view.bytes());
        let codes = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(n * k);
        let whole = self.block.is_multiple_of(GROUP) && k.is_multiple_of(GROUP);
        if whole && map == LEVELS && absmax.iter().all(|scale| *scale >= 0.0) {
            let scale = |group: usize| absmax.get(group * GROUP / self.block).copied().unwrap_or(0.0);
            let scales = (0..n * k / GROUP).map(scale).collect();
            let weight = Nf4Weight::new(n, k, codes.collect(), scales);
            return weight
                .map(|weight| Decoded::Weight(QuantizedWeight::Nf4(weight)))
                .map_err(|error| module.located("weight.absmax", error));
        }
        let mut values = Vec::with_capacity(n * k * 4);
        for (i, code) in codes.enumerate() {
            let scale = absmax.get(i / self.block).copied().unwrap_or(0.0);
            let level = map.get(usize::from(code)).copied().unwrap_or(0.0);
            values.extend_from_slice(&(level * scale).to_le_bytes());
        }
        Ok(Decoded::Floats {
            dtype: FloatDtype::F32,
            bytes: values,
        })
    }

    fn faults(&self, files: &Checkpoint) -> Result<Faults> {
        let absmax = self.absmax(&self.module(files))?;
        let mut faults = Vec::new();
        let zero = absmax.iter().filter(|scale| **scale == 0.0).count();
        if zero > 0 && zero * 2 > absmax.len() {
            faults.push(format!(
                "{zero} of {} blocks have an absmax of zero: they hold nothing but zeros",
                absmax.len()
            ));
        }
        let odd = absmax
            .iter()
            .filter(|scale| !(**scale >= 0.0 && scale.is_finite()))
            .count();
        if odd > 0 {
            faults.push(format!(
                "{odd} of {} absmax are negative or not finite",
                absmax.len()
            ));
        }
        Ok(faults)
    }
}
