//! Models that other ecosystems' libraries quantized, read: codes and values against what these libraries decode,
//! logits against theirs, and what is refused.

mod architectures;
mod folders;
mod gguf;
mod hostile;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::export::LINEAR_FORMATS;
use qtool_formats::import::{self, Decoded};
use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::AffineWeight;
use qtool_formats::{FloatDtype, QuantizedWeight};
use serde_json::{Value, json};

use crate::model::{Tensor, read_model, write_file};

/// A golden file of the exporters, by case and tensor.
fn exported(name: &str) -> BTreeMap<String, BTreeMap<String, Tensor>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/exports/{name}.safetensors"));
    let mut cases: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in read_model(&path) {
        let (case, key) = name.split_once('/').unwrap();
        let case = cases.entry(case.to_owned()).or_default();
        case.insert(key.to_owned(), tensor);
    }
    cases
}

/// `quantization_config` as the format's writers have it.
fn config(format: &str) -> Value {
    match format {
        "gptq" => json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}),
        "gptq-v2" => json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
        "awq" => json!({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": true}),
        "bnb-nf4" => json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
        _ => json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    }
}

/// A folder with one quantized linear, `m`.
fn folder(path: &Path, about: &Value, parts: &[(String, Tensor)]) -> PathBuf {
    fs::create_dir_all(path).unwrap();
    let config = json!({"model_type": "llama", "quantization_config": about});
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    write_file(&path.join("model.safetensors"), parts);
    path.to_owned()
}

fn values_of(weight: &QuantizedWeight) -> Vec<f32> {
    let (n, k) = weight.dims();
    let mut values = vec![0f32; n * k];
    for (row, out) in values.chunks_exact_mut(k).enumerate() {
        weight.dequantize_row(row, out);
    }
    values
}

/// What the exporters' golden files hold, laid out by the formats' own libraries, reads back as the codes, scales and zero
/// points it was laid out from.
#[test]
fn codes_are_read_back_from_the_libraries_own_layouts() {
    let dir = tempfile::tempdir().unwrap();
    let (mut cases, mut plain) = (0, 0);
    for format in LINEAR_FORMATS {
        for (scheme, case) in exported(format.name()) {
            let what = format!("{} {scheme}", format.name());
            let out = case.iter().filter_map(|(key, t)| {
                let suffix = key.strip_prefix("out.")?;
                Some((format!("m.{suffix}"), t.clone()))
            });
            let path = dir.path().join(what.replace(' ', "-"));
            folder(&path, &config(format.name()), &out.collect::<Vec<_>>());
            let model = import::open(&path).unwrap().unwrap();
            let tensor = model.tensor("m.weight").unwrap();
            let (n, k) = (case["codes"].shape[0], case["codes"].shape[1]);
            assert_eq!(tensor.shape, [n, k], "{what}");
            let decoded = model.decode(tensor).unwrap().unwrap();
            let theirs = &case["values"];
            let dtype = FloatDtype::from_dtype(theirs.dtype).unwrap();
            let rounded: Vec<f32> = model
                .values(tensor)
                .unwrap()
                .iter()
                .map(|&v| dtype.round(v))
                .collect();
            assert_eq!(rounded, dtype.widen(&theirs.bytes), "{what}");
            match (decoded, AffineScheme::parse(&scheme)) {
                (Decoded::Weight(QuantizedWeight::Affine(weight)), Some(_)) => {
                    assert_eq!(weight.codes(), case["codes"].bytes, "{what}");
                    assert_eq!(
                        weight.scales(),
                        FloatDtype::F32.widen(&case["scales"].bytes),
                        "{what}"
                    );
                    if let Some(zeros) = case.get("zeros") {
                        assert_eq!(weight.zeros(), zeros.bytes, "{what}");
                    }
                }
                (Decoded::Weight(QuantizedWeight::Nf4(weight)), None) => {
                    assert_eq!((weight.n(), weight.k()), (n, k), "{what}");
                    assert_eq!(weight.codes(), case["codes"].bytes, "{what}");
                    // Scales that are codes themselves are compared by the values above.
                    if !case.contains_key("nested") {
                        let scales = FloatDtype::F32.widen(&case["scales"].bytes);
                        assert_eq!(weight.scales(), scales, "{what}");
                        plain += 1;
                    }
                }
                (other, _) => panic!("{what}: {other:?}"),
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 9 + 2 + 5 + 5 + 3 + 4);
    assert_eq!(plain, 2, "NF4 with scales that are numbers");
}

/// Symmetric INT8 of others uses code 0, GGML's blocks have negative scales: both stay packed.
#[test]
fn others_use_codes_and_scales_that_ours_do_not() {
    let scheme = AffineScheme::parse("w8-sym-row-f32").unwrap();
    let make = |code, scale| AffineWeight::foreign(scheme, 1, 2, vec![code, 255], vec![scale], vec![]);
    let odd = QuantizedWeight::Affine(make(0, -0.5).unwrap());
    assert_eq!(values_of(&odd), [64.0, -63.5]);
    assert!(AffineWeight::new(scheme, 1, 2, vec![0, 255], vec![0.5], vec![]).is_err());
    for scale in [f32::NAN, f32::INFINITY] {
        assert!(make(1, scale).is_err());
    }
}

/// Every format that is read has its paragraph.
#[test]
fn readers_are_documented() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats/reading.md");
    let page = fs::read_to_string(path).unwrap();
    for reader in import::READERS {
        assert!(
            page.contains(&format!("`{}`", reader.name())),
            "{}",
            reader.name()
        );
        assert!(
            !reader.summary().is_empty() && reader.summary().len() < 120,
            "{}",
            reader.name()
        );
    }
    assert_eq!(import::READERS.len(), 5);
}
