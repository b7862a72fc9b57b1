//! Whole models as others' libraries saved them (tests/golden/imports): every weight against the library's own decoding,
//! logits against those of the reference library with these weights, and verification with and without the base.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::model::{Batch, Model};
use qtool::source::Source;
use qtool::verify;
use qtool_formats::FloatDtype;
use qtool_formats::import::{self, Decoded};
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::model::{Tensor, read_model};

/// Folder, format, what most weights are called, and whether they stay packed.
const FOLDERS: [(&str, &str, &str, bool); 11] = [
    ("bnb-nf4", "bitsandbytes", "nf4-g64", true),
    ("bnb-nf4-double", "bitsandbytes", "nf4-g64-double", true),
    ("bnb-fp4-double", "bitsandbytes", "fp4-g64-double", false),
    ("gptq", "gptq", "w4-sym-g32-f16", true),
    ("gptq-act-order", "gptq", "w4-sym-g32-f16", false),
    ("gptq-v2-zp", "gptq", "w4-zp-g32-f16", true),
    ("awq", "awq", "w4-zp-g32-bf16", true),
    ("ct-w4", "compressed-tensors", "w4-sym-g32-f16", true),
    ("ct-w4-zp", "compressed-tensors", "w4-zp-g32-f16", true),
    ("ct-w8-zp", "compressed-tensors", "w8-zp-row-f16", true),
    ("ct-w8-tensor", "compressed-tensors", "w8-sym-row-f16", true),
];

pub(super) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/imports")
        .join(name)
}

fn answers(name: &str) -> BTreeMap<String, Tensor> {
    read_model(&golden(name).join("golden.safetensors"))
        .into_iter()
        .collect()
}

#[test]
fn every_weight_is_what_the_library_decodes() {
    let mut compared = 0;
    for (name, format, stored_as, packed) in FOLDERS {
        let model = import::open(&golden(name)).unwrap().unwrap();
        assert_eq!(model.format(), format, "{name}");
        let mut weights = 0;
        for (key, theirs) in answers(name) {
            let Some(weight) = key.strip_prefix("values/") else {
                continue;
            };
            let tensor = model.tensor(weight).unwrap();
            assert_eq!(tensor.shape, theirs.shape, "{name} {weight}");
            assert_eq!(tensor.stored_as, stored_as, "{name} {weight}");
            let is_packed = matches!(model.decode(tensor).unwrap(), Some(Decoded::Weight(_)));
            assert_eq!(is_packed, packed, "{name} {weight}");
            let dtype = FloatDtype::from_dtype(theirs.dtype).unwrap();
            let ours: Vec<f32> = model
                .values(tensor)
                .unwrap()
                .iter()
                .map(|&v| dtype.round(v))
                .collect();
            assert_eq!(ours, dtype.widen(&theirs.bytes), "{name} {weight}");
            weights += 1;
        }
        assert_eq!(weights, 7, "{name}");
        compared += weights;
    }
    assert_eq!(compared, 11 * 7);
}

#[test]
fn logits_are_those_of_the_reference_library() {
    for (name, ..) in FOLDERS {
        let source = Arc::new(Source::open(&golden(name)).unwrap());
        let backend = CpuBackend::new(Isa::best());
        let model = Model::open(backend, source).unwrap().load().unwrap();
        let answers = answers(name);
        let ids: Vec<u32> = answers["ids"]
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        let theirs = FloatDtype::F32.widen(&answers["logits"].bytes);
        let got = model.forward(&Batch::at(&ids, 0)).unwrap();
        let got = model.backend().download(&got);
        assert_eq!(got.len(), theirs.len(), "{name}");
        let most = got
            .iter()
            .zip(&theirs)
            .map(|(a, b)| (a - b).abs())
            .fold(0f32, f32::max);
        // Where the library rounds decoded weights to F16, ours are not rounded.
        assert!(most < 0.02, "{name}: logits differ by {most}");
    }
}

#[test]
fn sound_models_verify_and_their_errors_are_measured() {
    for (name, format, ..) in FOLDERS {
        let found = verify::run(&golden(name), None, false).unwrap();
        assert_eq!(found.findings, [], "{name}");
        assert_eq!(found.notes, Vec::<String>::new(), "{name}");
        assert_eq!((found.format, found.tensors), (Some(format), 11), "{name}");
        let found = verify::run(&golden(name), Some(&golden("base")), false).unwrap();
        assert_eq!(found.findings, [], "{name}");
        assert_eq!(found.figures.len(), 11, "{name}");
        let rewritten = name == "awq";
        assert_eq!(!found.notes.is_empty(), rewritten, "{name}: {:?}", found.notes);
        let measured = found.figures.iter().filter_map(|f| f.sqnr_db);
        let worst = measured.fold(f64::INFINITY, f64::min);
        assert!(rewritten || (10.0..60.0).contains(&worst), "{name}: {worst} dB");
    }
}

#[test]
fn a_base_of_another_model_is_found() {
    let found = verify::run(
        &golden("gptq"),
        Some(&crate::model::sample("tiny-ernie45")),
        false,
    )
    .unwrap();
    let problems: Vec<&str> = found.findings.iter().map(|f| f.problem.as_str()).collect();
    assert!(
        problems.iter().any(|p| p.contains("another model")),
        "{problems:?}"
    );
    assert!(
        problems.iter().any(|p| p.contains("not in this model")),
        "{problems:?}"
    );
}
