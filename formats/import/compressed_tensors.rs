//! compressed-tensors' folders, as llm-compressor writes them: `pack-quantized` (2, 3, 4 and 8 bits) and `int-quantized` (INT8),
//! per tensor, per channel or in groups, symmetric or with zero points, columns in any order of groups (`actorder`).
//! Layout and formula: [`crate::export::compressed_tensors`].
//!
//! Every linear is read by its own tensors: which of them there are, their types and shapes say what the config's groups of
//! targets would. Activations that the runtime rounds (`input_activations`) are not rounded here.

use serde_json::json;

use super::affine::{AffineCodes, Groups, label};
use super::linears::{LinearReader, Linears, Module, dims, integers};
use super::{Coded, Decoded, Faults, Place, Tensor};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::packing::words::{straight_codes, turned, words};
use crate::tensor::TensorView;
use crate::{FormatError, Result};

/// The reader's only value.
pub const COMPRESSED_TENSORS: Linears<CompressedTensors> = Linears(CompressedTensors);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct CompressedTensors;

const SUFFIXES: [&str; 6] = [
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
];

/// How a linear lies.
#[derive(Debug)]
struct Linear {
    module: String,
    n: usize,
    k: usize,
    bits: u8,
    packed: bool,
    group: usize,
}

impl LinearReader for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn summary(&self) -> &'static str {
        "folders of llm-compressor, pack-quantized and int-quantized: 2, 3, 4 and 8 bits"
    }

    fn method(&self) -> &'static str {
        "compressed-tensors"
    }

    fn marker(&self) -> &'static str {
        "weight_scale"
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &SUFFIXES
    }

    fn refuses(&self, place: &Place) -> Option<String> {
        let filled = |key: &str, inner: &str| {
            let value = place.quantization.get(key).and_then(|about| about.get(inner));
            value.is_some_and(|value| !value.is_null() && *value != json!({}) && *value != json!("dense"))
        };
        for (key, inner) in [
            ("transform_config", "config_groups"),
            ("sparsity_config", "format"),
        ] {
            if filled(key, inner) {
                return Some(format!(
                    "its {key} asks for work at run time that is not done here; validate such a model behind a server with --endpoint"
                ));
            }
        }
        let format = place.text(&["format"])?;
        let read = [
            "pack-quantized",
            "int-quantized",
            "naive-quantized",
            "mixed-precision",
        ];
        (!read.contains(&format.as_str())).then(|| {
            format!(
                "expected the format pack-quantized or int-quantized, got {}; validate such a model behind a server with --endpoint",
                crate::error::quoted(&format)
            )
        })
    }

    fn linear(&self, _place: &Place, module: &Module<'_>) -> Result<Tensor> {
        let packed = module.find("weight_packed")?.is_some();
        let (n, k, bits) = if packed {
            packed_shape(module)?
        } else {
            plain_shape(module)?
        };
        let scale = scales(module)?;
        let scale_dtype = scale.float_dtype().unwrap_or(crate::dtype::FloatDtype::F32);
        let groups = match scale.shape() {
            [] | [1] | [1, 1] => 1,
            [rows] if *rows == n => 1,
            [rows, groups] if *rows == n && *groups > 0 && k.is_multiple_of(*groups) => *groups,
            other => {
                return Err(module.fault(
                    "weight_scale",
                    format!("expected scales for {n} rows in groups that divide {k} columns, got {other:?}"),
                ));
            }
        };
        if let Some(zeros) = module.find("weight_zero_point")? {
            let elements: usize = scale.shape().iter().product();
            let rows = scale.shape().first().copied().unwrap_or(1);
            let columns = elements / rows.max(1);
            let expected: &[usize] = match zeros.dtype() {
                Dtype::I32 if packed => &[words(bits, rows), columns],
                Dtype::I8 => scale.shape(),
                other => {
                    return Err(module.fault(
                        "weight_zero_point",
                        format!("expected zero points of I8, or packed in I32, got {other}"),
                    ));
                }
            };
            module.shaped("weight_zero_point", &zeros, expected)?;
        }
        if module.find("weight_g_idx")?.is_some() {
            let index = module.need("weight_g_idx", &[Dtype::I32], 1)?;
            module.shaped("weight_g_idx", &index, &[k])?;
        }
        let symmetric = module.find("weight_zero_point")?.is_none();
        let group = k / groups;
        Ok(Tensor {
            name: module.part_name("weight"),
            shape: vec![n, k],
            stored_as: label(bits, symmetric, group, k, scale_dtype),
            parts: module.parts(&SUFFIXES),
            coded: Some(Box::new(Linear {
                module: module.name.to_owned(),
                n,
                k,
                bits,
                packed,
                group,
            })),
        })
    }
}

fn scales<'a>(module: &Module<'a>) -> Result<TensorView<'a>> {
    let view = module.find("weight_scale")?;
    match view.filter(|view| view.float_dtype().is_some()) {
        Some(view) => Ok(view),
        None => Err(module.fault(
            "weight_scale",
            "expected scales of BF16, F16 or F32; other types of compressed-tensors are not read".to_owned(),
        )),
    }
}

/// N, K and bits of codes in words.
fn packed_shape(module: &Module<'_>) -> Result<(usize, usize, u8)> {
    let packed = module.need("weight_packed", &[Dtype::I32], 2)?;
    let (rows, row_words) = dims(&packed);
    let shape = module.need("weight_shape", &[Dtype::I64, Dtype::I32], 1)?;
    let stated: Vec<usize> = match shape.dtype() {
        Dtype::I64 => {
            let numbers = shape.bytes().as_chunks::<8>().0.iter();
            let number = |bytes: &[u8; 8]| usize::try_from(i64::from_le_bytes(*bytes)).unwrap_or(0);
            numbers.map(number).collect()
        }
        _ => integers(&shape)
            .into_iter()
            .map(|number| number as usize)
            .collect(),
    };
    let [n, k] = stated.as_slice() else {
        return Err(module.fault("weight_shape", format!("expected two numbers, got {stated:?}")));
    };
    let (n, k) = (*n, *k);
    let fits = |bits: &u8| k.checked_mul(8).is_some() && words(*bits, k) == row_words;
    let bits = [4u8, 8, 2, 3].into_iter().find(fits);
    match bits.filter(|_| n == rows && n > 0 && k > 0) {
        Some(bits) => Ok((n, k, bits)),
        None => Err(module.fault(
            "weight_packed",
            format!(
                "{rows} rows of {row_words} words are no weight of {n} x {k} (weight_shape) at 2, 3, 4 or 8 bits; the parts do not belong together, or the width is not read"
            ),
        )),
    }
}

/// N, K and bits of codes that lie one by one.
fn plain_shape(module: &Module<'_>) -> Result<(usize, usize, u8)> {
    let weight = module.need("weight", &[Dtype::I8], 2)?;
    let (n, k) = dims(&weight);
    if n == 0 || k == 0 {
        return Err(module.fault("weight", "it is empty; expected a weight".to_owned()));
    }
    Ok((n, k, 8))
}

/// One row for each of `n`, where there may be only one for all.
fn spread<T: Clone>(values: Vec<T>, n: usize) -> Vec<T> {
    match values.as_slice() {
        [one] if n > 1 => vec![one.clone(); n],
        _ => values,
    }
}

impl Linear {
    fn read(&self, module: &Module<'_>) -> Result<AffineCodes> {
        let middle = 1u8 << (self.bits - 1);
        let codes = if self.packed {
            let packed = module.need("weight_packed", &[Dtype::I32], 2)?;
            straight_codes(self.bits, self.k, packed.bytes())?
        } else {
            let weight = module.need("weight", &[Dtype::I8], 2)?;
            weight
                .bytes()
                .iter()
                .map(|code| code.wrapping_add(middle))
                .collect()
        };
        let scale = scales(module)?;
        let scale_dtype = scale.float_dtype().unwrap_or(crate::dtype::FloatDtype::F32);
        let zeros = match module.find("weight_zero_point")? {
            None => None,
            Some(zeros) if zeros.dtype() == Dtype::I32 => {
                let rows = scale.shape().first().copied().unwrap_or(1);
                let (stream, groups) = dims(&zeros);
                let columns = turned(4, stream, groups, zeros.bytes());
                Some(turned(
                    1,
                    groups,
                    rows,
                    &straight_codes(self.bits, rows, &columns)?,
                ))
            }
            Some(zeros) => {
                let zeros = zeros.bytes().iter();
                Some(zeros.map(|zero| zero.wrapping_add(middle)).collect::<Vec<u8>>())
            }
        };
        let zeros = zeros.map(|zeros| spread(zeros, self.n).into_iter().map(u16::from).collect());
        let groups = match module.find("weight_g_idx")? {
            None => Groups::Every(self.group),
            // A list of -1 stands for none.
            Some(index) if integers(&index).iter().all(|&group| group == u32::MAX) => {
                Groups::Every(self.group)
            }
            Some(index) => {
                let count = self.k / self.group.max(1);
                Groups::listed(integers(&index), count).map_err(|(column, group)| {
                    module.fault(
                        "weight_g_idx",
                        format!(
                            "column {column} is in group {}, expected 0 to {}; download the file again",
                            group as i32,
                            count - 1
                        ),
                    )
                })?
            }
        };
        Ok(AffineCodes {
            n: self.n,
            k: self.k,
            bits: self.bits,
            codes,
            scales: spread(scale_dtype.widen(scale.bytes()), self.n),
            scale_dtype,
            zeros,
            groups,
        })
    }

    fn module<'a>(&'a self, files: &'a Checkpoint) -> Module<'a> {
        Module {
            files,
            name: &self.module,
        }
    }
}

impl Coded for Linear {
    fn decode(&self, files: &Checkpoint) -> Result<Decoded> {
        let module = self.module(files);
        let located = |error: FormatError| module.located("weight_scale", error);
        self.read(&module)?.decoded().map_err(located)
    }

    fn listed(&self, files: &Checkpoint) -> Result<Option<AffineCodes>> {
        let codes = self.read(&self.module(files))?;
        Ok(matches!(codes.groups, Groups::Listed(_)).then_some(codes))
    }

    fn faults(&self, files: &Checkpoint) -> Result<Faults> {
        Ok(self.read(&self.module(files))?.faults())
    }
}
