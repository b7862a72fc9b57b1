//! GPTQ's folders as AutoGPTQ, GPTQModel and others write them, versions 1 and 2, 2, 3, 4 and 8 bits, with columns in
//! any order of groups (`desc_act`). Layout and formula: [`crate::export::gptq`].
//!
//! Version 1 keeps zero points less one. A stored zero point of all ones then means one beyond the codes' range, and the
//! format's readers do not agree on it: AutoGPTQ adds one, GPTQModel lets it wrap. Here one is added, and `qtool verify` tells.
//!
//! Bits and groups of a linear are taken from its shapes, so that rules for single modules (`dynamic`) need not be read.

use super::affine::{AffineCodes, Groups, label};
use super::linears::{LinearReader, Linears, Module, dims, integers};
use super::{Coded, Decoded, Faults, Place, Tensor};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::packing::words::{straight_codes, turned};
use crate::{FormatError, Result};

/// The reader's only value.
pub const GPTQ: Linears<Gptq> = Linears(Gptq);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Gptq;

const SUFFIXES: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// How a linear lies.
#[derive(Debug)]
struct Linear {
    module: String,
    k: usize,
    bits: u8,
    /// Columns of a group where `g_idx` is left out.
    group: usize,
    /// Added to stored zero points.
    more: u16,
}

impl LinearReader for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn summary(&self) -> &'static str {
        "folders of AutoGPTQ and GPTQModel, versions 1 and 2: 2, 3, 4 and 8 bits, with act-order"
    }

    fn method(&self) -> &'static str {
        "gptq"
    }

    fn marker(&self) -> &'static str {
        "qweight"
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &SUFFIXES
    }

    fn refuses(&self, place: &Place) -> Option<String> {
        let bits = place.number(&["bits"]);
        if !bits.is_none_or(|bits| [2, 3, 4, 8].contains(&bits)) {
            return Some(format!(
                "expected GPTQ of 2, 3, 4 or 8 bits, got bits {}; give a folder quantized to one of these",
                bits.unwrap_or_default()
            ));
        }
        let format = place.text(&["checkpoint_format", "format"]);
        match format.as_deref() {
            None | Some("gptq" | "gptq_v2") => {}
            Some(other) => {
                return Some(format!(
                    "expected checkpoint_format gptq or gptq_v2, got {}; convert the folder with GPTQModel",
                    crate::error::quoted(other)
                ));
            }
        }
        match place.text(&["pack_dtype"]).as_deref() {
            None | Some("int32") => None,
            Some(other) => Some(format!(
                "expected words of pack_dtype int32, got {}; convert the folder with GPTQModel",
                crate::error::quoted(other)
            )),
        }
    }

    fn linear(&self, place: &Place, module: &Module<'_>) -> Result<Tensor> {
        let (scales, scale_dtype) = module.floats("scales", 2)?;
        let (groups, n) = dims(&scales);
        let qzeros = module.need("qzeros", &[Dtype::I32], 2)?;
        let (_, zero_words) = dims(&qzeros);
        let bits = zero_words
            .checked_mul(32)
            .filter(|_| n > 0)
            .map_or(0, |all| all / n);
        let Some(bits) = [2u8, 3, 4, 8]
            .into_iter()
            .find(|&known| usize::from(known) == bits)
        else {
            return Err(module.fault(
                "qzeros",
                format!(
                    "{zero_words} words for {n} output rows are {bits} bits a code; expected 2, 3, 4 or 8"
                ),
            ));
        };
        module.shaped("qzeros", &qzeros, &[groups, zero_words])?;
        let qweight = module.need("qweight", &[Dtype::I32], 2)?;
        let (words, _) = dims(&qweight);
        module.shaped("qweight", &qweight, &[words, n])?;
        let k = words.checked_mul(32).map_or(0, |all| all / usize::from(bits));
        if k == 0 || groups == 0 {
            return Err(module.fault("qweight", "it is empty; expected a weight".to_owned()));
        }
        let stated = place
            .number(&["group_size"])
            .and_then(|size| usize::try_from(size).ok());
        let group = match stated.filter(|&size| size > 0) {
            Some(size) if k.div_ceil(size) == groups => size,
            _ if k.is_multiple_of(groups) => k / groups,
            _ => {
                return Err(module.fault(
                    "scales",
                    format!("{groups} groups do not divide {k} columns, and group_size of the config gives another number"),
                ));
            }
        };
        if let Some(index) = module.find("g_idx")? {
            module.need("g_idx", &[Dtype::I32], 1)?;
            module.shaped("g_idx", &index, &[k])?;
        }
        let second = place.text(&["checkpoint_format", "format"]).as_deref() == Some("gptq_v2");
        let symmetric = place.quantization.get("sym").and_then(serde_json::Value::as_bool);
        Ok(Tensor {
            name: module.part_name("weight"),
            shape: vec![n, k],
            stored_as: label(bits, symmetric != Some(false), group, k, scale_dtype),
            parts: module.parts(&SUFFIXES),
            coded: Some(Box::new(Linear {
                module: module.name.to_owned(),
                k,
                bits,
                group,
                more: u16::from(!second),
            })),
        })
    }
}

impl Linear {
    fn read(&self, module: &Module<'_>) -> Result<AffineCodes> {
        let (scales, scale_dtype) = module.floats("scales", 2)?;
        let (groups, n) = dims(&scales);
        let groups_of_columns = match module.find("g_idx")? {
            Some(index) => Groups::listed(integers(&index), groups).map_err(|(column, group)| {
                module.fault(
                    "g_idx",
                    format!(
                        "column {column} is in group {}, expected 0 to {}; download the file again",
                        group as i32,
                        groups - 1
                    ),
                )
            })?,
            None => Groups::Every(self.group),
        };
        let qweight = module.need("qweight", &[Dtype::I32], 2)?;
        let words = turned(4, dims(&qweight).0, n, qweight.bytes());
        let codes = straight_codes(self.bits, self.k, &words)?;
        let qzeros = module.need("qzeros", &[Dtype::I32], 2)?;
        let zeros = straight_codes(self.bits, n, qzeros.bytes())?;
        let zeros = turned(1, groups, n, &zeros);
        Ok(AffineCodes {
            n,
            k: self.k,
            bits: self.bits,
            codes,
            scales: scale_dtype.widen(&turned(scale_dtype.bytes(), groups, n, scales.bytes())),
            scale_dtype,
            zeros: Some(
                zeros
                    .into_iter()
                    .map(|zero| u16::from(zero) + self.more)
                    .collect(),
            ),
            groups: groups_of_columns,
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
        let located = |error: FormatError| module.located("scales", error);
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
