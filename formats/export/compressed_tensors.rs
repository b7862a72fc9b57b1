//! `compressed-tensors` and `compressed-tensors-int8`: folders that transformers loads with the
//! compressed-tensors package, and vLLM by its configuration.
//!
//! ```text
//! pack-quantized, for a LINEAR of N x K at B bits (`compressed-tensors`)
//!   weight_packed      I32 [N, ceil(K*B / 32)]   code[n][k] in the straight stream of row n
//!   weight_scale       as stored, [N, G]
//!   weight_zero_point  I32 [ceil(N*B / 32), G]   zero[n][g] in the straight stream down column g
//!   weight_shape       I64 [2]                   N, K
//! int-quantized, INT8 per channel (`compressed-tensors-int8`)
//!   weight             I8 [N, K]                 code - 128
//!   weight_scale       as stored, [N, 1]
//! ```
//!
//! Formula: `value[n][k] = (code[n][k] - zero[n][k / group]) * scale[n][k / group]`; the package says the same
//! with 2^(B-1) taken off code and zero. Streams: [`crate::packing::words`].
//! `docs/formats/compressed-tensors.md` is the page about it.

use serde_json::{Value, json};

use super::linears::{
    Form, LinearFormat, Linears, Relaid, Stream, Subject, affine, scale_bytes, turned_zeros,
};
use crate::Result;
use crate::dtype::Dtype;
use crate::import::affine::AffineCodes;
use crate::packing::words::{WORD, straight, turn, words};
use crate::scheme::{Grid, Grouping, Scheme};
use crate::weight::QuantizedWeight;

/// Codes in words, of every affine scheme.
pub const COMPRESSED_TENSORS: Relaid<CompressedTensors> = Relaid(CompressedTensors::Packed);
/// INT8 as it is, for runtimes that round activations to INT8 as well.
pub const COMPRESSED_TENSORS_INT8: Relaid<CompressedTensors> = Relaid(CompressedTensors::Int8);

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressedTensors {
    /// `pack-quantized`.
    Packed,
    /// `int-quantized`.
    Int8,
}

impl LinearFormat for CompressedTensors {
    fn name(&self) -> &'static str {
        match self {
            Self::Packed => "compressed-tensors",
            Self::Int8 => "compressed-tensors-int8",
        }
    }

    fn summary(&self) -> &'static str {
        match self {
            Self::Packed => {
                "pack-quantized folder for vLLM and transformers: INT8, INT4, INT3 and INT2 with groups or without"
            }
            Self::Int8 => {
                "int-quantized folder for vLLM and transformers: INT8 per channel, activations rounded to INT8 per token at run time"
            }
        }
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        match (self, scheme) {
            (Self::Packed, Scheme::Affine(_)) => None,
            (Self::Packed, other) => Some(format!(
                "compressed-tensors holds affine codes of 2, 3, 4 or 8 bits (such as w4-sym-g128-bf16), not {other}; quantize with --bits 4, or with --bits 2 --method mse"
            )),
            (Self::Int8, Scheme::Affine(s))
                if s.bits() == 8 && s.grid() == Grid::Symmetric && s.grouping() == Grouping::Row =>
            {
                None
            }
            (Self::Int8, other) => Some(format!(
                "int-quantized weights are w8-sym-row, with scales of any type, not {other}; quantize with --bits 8, or export --to compressed-tensors"
            )),
        }
    }

    fn forms(&self, weight: &Subject) -> std::result::Result<Vec<Form>, String> {
        let scheme = weight.affine().map_err(|e| e.to_string())?;
        let groups = weight.groups().map_err(|e| e.to_string())?;
        let (n, k) = (weight.n, weight.k);
        let form = |suffix, dtype, shape: &[usize]| Form {
            suffix,
            dtype,
            shape: shape.to_vec(),
        };
        let scale = form("weight_scale", scheme.scale_dtype().dtype(), &[n, groups]);
        if *self == Self::Int8 {
            return Ok(vec![form("weight", Dtype::I8, &[n, k]), scale]);
        }
        let bits = scheme.bits();
        let mut forms = vec![
            form("weight_packed", Dtype::I32, &[n, words(bits, k)]),
            scale,
            form("weight_shape", Dtype::I64, &[2]),
        ];
        if scheme.fixed_zero().is_none() {
            forms.push(form("weight_zero_point", Dtype::I32, &[words(bits, n), groups]));
        }
        Ok(forms)
    }

    fn codes(&self, rows: &QuantizedWeight, at: usize, _n: usize, out: &mut [u8]) -> Result<()> {
        let (rows, k) = (affine(rows)?, rows.dims().1);
        let (bytes, row) = match self {
            Self::Int8 => (rows.codes().iter().map(|c| c.wrapping_sub(128)).collect(), k),
            Self::Packed => {
                let bits = rows.scheme().bits();
                (straight(bits, k, rows.codes())?, words(bits, k) * WORD)
            }
        };
        let place: &mut [u8] = out.get_mut(at * row..at * row + bytes.len()).unwrap_or_default();
        if place.len() == bytes.len() {
            place.copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn stream(&self, _weight: &Subject) -> Option<Stream> {
        (*self == Self::Packed).then_some(Stream::Rows)
    }

    fn rest(&self, weight: &Subject, scales: &[f32], zeros: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (scheme, n, k) = (weight.affine()?, weight.n, weight.k);
        let mut rest = vec![scale_bytes(scheme.scale_dtype(), n, scales, false)];
        if *self == Self::Int8 {
            return Ok(rest);
        }
        rest.push([n, k].iter().flat_map(|d| (*d as u64).to_le_bytes()).collect());
        if scheme.fixed_zero().is_none() {
            let groups = scheme.groups(n, k)?;
            let columns = straight(scheme.bits(), n, &turned_zeros(scheme, n, groups, zeros))?;
            let mut turned = vec![0u8; columns.len()];
            turn(WORD, words(scheme.bits(), n), &columns, groups, 0, &mut turned);
            rest.push(turned);
        }
        Ok(rest)
    }

    /// One group for each scheme. Where there is only one, it is for every linear module that is not
    /// ignored, as other writers of this format have it; else modules are named.
    fn config(&self, linears: &Linears) -> std::result::Result<Value, String> {
        let mut schemes: Vec<Scheme> = Vec::new();
        for linear in &linears.quantized {
            if !schemes.contains(&linear.scheme) {
                schemes.push(linear.scheme);
            }
        }
        let affine = |scheme: &Scheme| match scheme {
            Scheme::Affine(scheme) => Ok(*scheme),
            other => Err(format!("{other} is not affine")),
        };
        let format = match self {
            Self::Packed => "pack-quantized",
            Self::Int8 => "int-quantized",
        };
        let mut groups = serde_json::Map::new();
        for scheme in &schemes {
            let named = scheme;
            let scheme = affine(named)?;
            let members = linears.quantized.iter().filter(|l| l.scheme == *named);
            let targets: Vec<&str> = match schemes.len() {
                1 => vec!["Linear"],
                _ => members.map(|l| l.module.as_str()).collect(),
            };
            let (strategy, group) = match scheme.grouping() {
                Grouping::Row => ("channel", Value::Null),
                Grouping::Columns(len) => ("group", json!(len)),
            };
            let activations = match self {
                Self::Packed => Value::Null,
                Self::Int8 => json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "token",
                    "group_size": null, "dynamic": true}),
            };
            let about = json!({
                "targets": targets,
                "format": format,
                "weights": {
                    "num_bits": scheme.bits(),
                    "type": "int",
                    "symmetric": scheme.fixed_zero().is_some(),
                    "strategy": strategy,
                    "group_size": group,
                    "dynamic": false,
                },
                "input_activations": activations,
                "output_activations": null,
            });
            groups.insert(format!("group_{}", groups.len()), about);
        }
        let mut ignore = linears.kept.clone();
        // A head tied to the embedding is no tensor of its own, and a linear module all the same.
        let quantized = linears.quantized.iter().map(|l| &l.module);
        if !quantized.chain(&linears.kept).any(|name| name == "lm_head") {
            ignore.push("lm_head".to_owned());
        }
        Ok(json!({
            "quant_method": "compressed-tensors",
            "format": format,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": null,
            "global_compression_ratio": null,
        }))
    }

    /// The format had a place for it once, `weight_g_idx` with `actorder: "group"`, and its readers have taken it out.
    fn listed(&self, _weight: &AffineCodes) -> std::result::Result<Vec<(Form, Vec<u8>)>, String> {
        Err("its columns come in another order than their groups (g_idx), which compressed-tensors 0.20 and vLLM 0.33 read no more (actorder: group); export --to gptq, gptq-v2, bf16 or f32".to_owned())
    }

    fn takes_heads(&self) -> bool {
        true
    }
}
