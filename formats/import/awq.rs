//! AWQ's folders in AutoAWQ's GEMM layout, 4 bits with a zero point per group, as AutoAWQ and GPTQModel write them. Layout
//! and formula: [`crate::export::awq`].

use super::affine::{AffineCodes, Groups, label};
use super::linears::{LinearReader, Linears, Module, dims};
use super::{Coded, Decoded, Faults, Place, Tensor};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::packing::words::{awq_codes, turned};
use crate::{FormatError, Result};

/// The reader's only value.
pub const AWQ: Linears<Awq> = Linears(Awq);

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Awq;

const SUFFIXES: [&str; 3] = ["qweight", "qzeros", "scales"];
const BITS: u8 = 4;

/// How a linear lies.
#[derive(Debug)]
struct Linear {
    module: String,
    n: usize,
    k: usize,
    group: usize,
}

impl LinearReader for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn summary(&self) -> &'static str {
        "folders of AutoAWQ and GPTQModel in the GEMM layout: 4 bits"
    }

    fn method(&self) -> &'static str {
        "awq"
    }

    fn marker(&self) -> &'static str {
        "qweight"
    }

    fn suffixes(&self) -> &'static [&'static str] {
        &SUFFIXES
    }

    fn refuses(&self, place: &Place) -> Option<String> {
        let bits = place.number(&["bits", "w_bit"]);
        if bits.is_some_and(|bits| bits != i64::from(BITS)) {
            return Some(format!(
                "expected AWQ of 4 bits, got bits {}; give a folder quantized to 4 bits",
                bits.unwrap_or_default()
            ));
        }
        // GPTQModel writes the layout under `format`, too, AutoAWQ under `version`.
        match place.text(&["version", "format", "checkpoint_format"]).as_deref() {
            None | Some("gemm") => None,
            Some(other) => Some(format!(
                "expected AWQ's layout gemm, got {}; convert the folder with AutoAWQ, version=\"GEMM\"",
                crate::error::quoted(other)
            )),
        }
    }

    fn linear(&self, _place: &Place, module: &Module<'_>) -> Result<Tensor> {
        let (scales, scale_dtype) = module.floats("scales", 2)?;
        let (groups, n) = dims(&scales);
        let qweight = module.need("qweight", &[Dtype::I32], 2)?;
        let (k, _) = dims(&qweight);
        if n == 0 || !n.is_multiple_of(8) || groups == 0 || k == 0 || !k.is_multiple_of(groups) {
            return Err(module.fault(
                "scales",
                format!(
                    "{groups} groups of {n} rows for {k} columns; expected rows in whole words of 8, and groups that divide the columns"
                ),
            ));
        }
        module.shaped("qweight", &qweight, &[k, n / 8])?;
        let qzeros = module.need("qzeros", &[Dtype::I32], 2)?;
        module.shaped("qzeros", &qzeros, &[groups, n / 8])?;
        let group = k / groups;
        Ok(Tensor {
            name: module.part_name("weight"),
            shape: vec![n, k],
            stored_as: label(BITS, false, group, k, scale_dtype),
            parts: module.parts(&SUFFIXES),
            coded: Some(Box::new(Linear {
                module: module.name.to_owned(),
                n,
                k,
                group,
            })),
        })
    }
}

impl Linear {
    fn read(&self, module: &Module<'_>) -> Result<AffineCodes> {
        let (scales, scale_dtype) = module.floats("scales", 2)?;
        let (groups, n) = dims(&scales);
        let qweight = module.need("qweight", &[Dtype::I32], 2)?;
        let qzeros = module.need("qzeros", &[Dtype::I32], 2)?;
        let zeros = awq_codes(groups, n, qzeros.bytes());
        Ok(AffineCodes {
            n: self.n,
            k: self.k,
            bits: BITS,
            codes: awq_codes(self.k, n, qweight.bytes()),
            scales: scale_dtype.widen(&turned(scale_dtype.bytes(), groups, n, scales.bytes())),
            scale_dtype,
            zeros: Some(zeros.into_iter().map(u16::from).collect()),
            groups: Groups::Every(self.group),
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

    fn faults(&self, files: &Checkpoint) -> Result<Faults> {
        Ok(self.read(&self.module(files))?.faults())
    }
}
