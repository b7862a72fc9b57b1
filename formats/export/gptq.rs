//! `gptq` and `gptq-v2`: the folder GPTQModel, vLLM and transformers load, written from codes however they
//! were chosen. Columns keep their order (`desc_act` false), so `g_idx` is k / group; a model of others whose columns do not
//! (`desc_act` true) keeps its own.
//!
//! ```text
//! for a LINEAR of N x K at B bits
//!   qweight  I32 [K*B / 32, N]   code[n][k] in the straight stream down column n
//!   qzeros   I32 [G, N*B / 32]   zero[n][g] in the straight stream of row g; in v1 less one
//!   scales   F16 [G, N]
//!   g_idx    I32 [K]             k / group, or the list that was given
//! ```
//!
//! Formula: `value[n][k] = (code[n][k] - zero[n][g]) * scale[n][g]` with `g = g_idx[k]`. Streams:
//! [`crate::packing::words`].
//!
//! v1 stores each zero point less one, and its readers add the ones back to whole words: a zero point of 0 would
//! wrap and spoil its neighbours. GPTQModel therefore loads no foreign v1 folder with zero points of its own, and
//! here v1 is for symmetric grids alone. `docs/formats/gptq.md` is the page about it.

use serde_json::{Value, json};

use super::linears::{
    Form, LinearFormat, Linears, Relaid, Stream, Subject, affine, lay_out, scale_bytes, turned_zeros,
};
use crate::Result;
use crate::dtype::{Dtype, FloatDtype};
use crate::import::affine::{AffineCodes, Groups};
use crate::packing::words::{WORD, straight, turn, words};
use crate::scheme::{AffineScheme, Grid, Grouping, Scheme};
use crate::weight::{AffineWeight, QuantizedWeight};

/// Zero points less one; symmetric grids.
pub const GPTQ: Relaid<Gptq> = Relaid(Gptq { version: 1 });
/// Zero points as they are.
pub const GPTQ_V2: Relaid<Gptq> = Relaid(Gptq { version: 2 });

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gptq {
    version: u8,
}

/// Rows and columns come in whole words of codes whatever their width.
const MULTIPLE: usize = 32;

impl LinearFormat for Gptq {
    fn name(&self) -> &'static str {
        match self.version {
            1 => "gptq",
            _ => "gptq-v2",
        }
    }

    fn summary(&self) -> &'static str {
        match self.version {
            1 => {
                "folder in AutoGPTQ's format, which GPTQModel and transformers load, at 8 and 4 bits vLLM: 8, 4, 3 and 2 bits"
            }
            _ => "the same in GPTQModel's second version, which holds zero points, too",
        }
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        match scheme {
            Scheme::Affine(s) if self.version == 1 && s.grid() == Grid::ZeroPoint => Some(format!(
                "the first version of GPTQ's format is for symmetric grids (such as w4-sym-g128-f16), not {scheme}: its readers do not agree on zero points; export --to gptq-v2, or quantize without --asymmetric"
            )),
            Scheme::Affine(_) => None,
            other => Some(format!(
                "GPTQ holds affine codes of 2, 3, 4 or 8 bits with F16 scales (such as w4-sym-g128-f16), not {other}; quantize with --bits 4 --group-size 128 --scale-dtype f16, or with --bits 2 --method mse --scale-dtype f16"
            )),
        }
    }

    fn forms(&self, weight: &Subject) -> std::result::Result<Vec<Form>, String> {
        let scheme = weight.affine().map_err(|e| e.to_string())?;
        let groups = weight.groups().map_err(|e| e.to_string())?;
        let (n, k) = (weight.n, weight.k);
        if !n.is_multiple_of(MULTIPLE) || !k.is_multiple_of(MULTIPLE) {
            return Err(format!(
                "a weight of {n} x {k} does not fit GPTQ's words, expected both a multiple of {MULTIPLE}; leave it out: quantize with --skip"
            ));
        }
        let form = |suffix, dtype, shape: &[usize]| Form {
            suffix,
            dtype,
            shape: shape.to_vec(),
        };
        let bits = scheme.bits();
        Ok(vec![
            form("qweight", Dtype::I32, &[words(bits, k), n]),
            form("qzeros", Dtype::I32, &[groups, words(bits, n)]),
            form("scales", Dtype::F16, &[groups, n]),
            form("g_idx", Dtype::I32, &[k]),
        ])
    }

    fn keeps_halves(&self) -> bool {
        true
    }

    fn codes(&self, rows: &QuantizedWeight, at: usize, n: usize, out: &mut [u8]) -> Result<()> {
        let (rows, k) = (affine(rows)?, rows.dims().1);
        let bits = rows.scheme().bits();
        let packed = straight(bits, k, rows.codes())?;
        turn(WORD, words(bits, k), &packed, n, at, out);
        Ok(())
    }

    fn stream(&self, _weight: &Subject) -> Option<Stream> {
        Some(Stream::Turned)
    }

    fn rest(&self, weight: &Subject, scales: &[f32], zeros: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (scheme, n, k) = (weight.affine()?, weight.n, weight.k);
        let groups = scheme.groups(n, k)?;
        let mut zeros = turned_zeros(scheme, n, groups, zeros);
        if self.version == 1 {
            zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_sub(1));
        }
        let group = scheme.grouping().len(k).max(1);
        Ok(vec![
            straight(scheme.bits(), n, &zeros)?,
            scale_bytes(FloatDtype::F16, n, scales, true),
            (0..k).flat_map(|k| ((k / group) as u32).to_le_bytes()).collect(),
        ])
    }

    /// `g_idx` as it is, `desc_act` true.
    fn listed(&self, weight: &AffineCodes) -> std::result::Result<Vec<(Form, Vec<u8>)>, String> {
        let top = (1u16 << weight.bits) - 1;
        let (Groups::Listed(list), Some(scheme)) = (&weight.groups, weight.scheme()) else {
            return Err(
                "its groups are of odd lengths, which GPTQ has no place for; export --to bf16 or f32"
                    .to_owned(),
            );
        };
        if weight.zeros.iter().flatten().any(|zero| *zero > top) {
            return Err(format!(
                "it has zero points beyond {top}, which readers of GPTQ do not agree on; export --to bf16 or f32"
            ));
        }
        if let Some(reason) = self.refuses(&Scheme::Affine(scheme)) {
            return Err(reason);
        }
        let zeros = weight.zeros.iter().flatten().map(|zero| *zero as u8);
        let zeros = if scheme.fixed_zero().is_some() {
            Vec::new()
        } else {
            zeros.collect()
        };
        let (codes, scales) = (weight.codes.clone(), weight.scales.clone());
        let in_words = |error: crate::FormatError| error.to_string();
        // Its scheme is that of the groups; where columns belong stands in the list alone.
        let weight =
            AffineWeight::foreign(scheme, weight.n, weight.k, codes, scales, zeros).map_err(in_words)?;
        let mut tensors = lay_out(self, &QuantizedWeight::Affine(weight), Dtype::F16).map_err(in_words)?;
        if let Some((_, index)) = tensors.last_mut() {
            *index = list.iter().flat_map(|group| group.to_le_bytes()).collect();
        }
        Ok(tensors)
    }

    /// Modules that stay as they are stand under `dynamic`, each as a rule that takes it out.
    fn config(&self, linears: &Linears) -> std::result::Result<Value, String> {
        let scheme = one_scheme(linears, self.name())?;
        let rule = |module: &String| (format!("-:^{}$", module.replace('.', "\\.")), json!({}));
        let kept = linears.kept.iter().filter(|module| *module != "lm_head");
        let dynamic: serde_json::Map<String, Value> = kept.map(rule).collect();
        let mut config = json!({
            "quant_method": "gptq",
            "checkpoint_format": if self.version == 1 { "gptq" } else { "gptq_v2" },
            "bits": scheme.bits(),
            "group_size": match scheme.grouping() { Grouping::Row => -1, Grouping::Columns(len) => len as i64 },
            "sym": scheme.fixed_zero().is_some(),
            "desc_act": linears.listed,
            "lm_head": false,
            "pack_dtype": "int32",
        });
        if !dynamic.is_empty()
            && let Some(object) = config.as_object_mut()
        {
            object.insert("dynamic".to_owned(), Value::Object(dynamic));
        }
        Ok(config)
    }
}

/// The scheme all weights share, or why there is none.
pub(super) fn one_scheme(linears: &Linears, format: &str) -> std::result::Result<AffineScheme, String> {
    let Some((first, rest)) = linears.quantized.split_first() else {
        return Err(format!(
            "no linear weight is quantized, there is nothing to say in {format}; export --to bf16"
        ));
    };
    match rest.iter().find(|other| other.scheme != first.scheme) {
        None => match first.scheme {
            Scheme::Affine(scheme) => Ok(scheme),
            other => Err(format!("{other} is not affine")),
        },
        Some(other) => Err(format!(
            "{} is {} and {} is {}, and {format} describes one scheme for the whole model; quantize without a --rule, or export --to compressed-tensors",
            first.module, first.scheme, other.module, other.scheme
        )),
    }
}
