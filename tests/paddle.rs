//! The -Paddle form of an ERNIE-4.5 checkpoint, made from the Hugging Face form: `ernie.` names,
//! linear weights [in, out], q, k and v fused, gate and up fused.

use std::fs;
use std::path::Path;

use qtool::quantize::NonFinite;
use qtool_calib::Recipe;
use qtool_calib::options::PartialOptions;
use qtool_formats::artifact::{Artifact, Stored};

use crate::flow::options;
use crate::model::{SAMPLES, Tensor, read_model, sample, write_file};

/// Converts tensors of the Hugging Face form.
pub fn to_paddle(tensors: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let find = |name: &str| {
        &tensors
            .iter()
            .find(|(n, _)| n == name)
            .unwrap_or_else(|| panic!("{name}"))
            .1
    };
    let mut converted = Vec::new();
    for (name, tensor) in tensors {
        let renamed = name.replacen("model.", "ernie.", 1);
        let fuse = |first: &str, others: &[&str]| {
            let mut parts = vec![tensor.clone()];
            parts.extend(
                others
                    .iter()
                    .map(|other| find(&name.replace(first, other)).clone()),
            );
            Tensor::stacked(&parts).transposed()
        };
        if name.ends_with("q_proj.weight") {
            converted.push((
                renamed.replace("q_proj", "qkv_proj"),
                fuse("q_proj", &["k_proj", "v_proj"]),
            ));
        } else if name.ends_with("gate_proj.weight") {
            converted.push((
                renamed.replace("gate_proj", "up_gate_proj"),
                fuse("gate_proj", &["up_proj"]),
            ));
        } else if ["k_proj.weight", "v_proj.weight", "up_proj.weight"]
            .iter()
            .any(|end| name.ends_with(end))
        {
            // Part of a fused weight.
        } else if tensor.shape.len() == 2
            && !name.contains("embed_tokens")
            && !name.contains("correction_bias")
        {
            converted.push((renamed, tensor.transposed()));
        } else {
            converted.push((renamed, tensor.clone()));
        }
    }
    converted
}

/// Writes the Paddle form of a sample model.
pub fn write_paddle(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    write_file(&to.join("model.safetensors"), &to_paddle(&read_model(from)));
}

/// Both forms give the same codes and scales: a fused weight is its parts on top of each other.
#[test]
fn both_forms_of_a_model_get_the_same_codes() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let paddle = dir.path().join("paddle");
        write_paddle(&sample(name), &paddle);
        let mut compared = 0;
        for bits in [8, 4] {
            let recipe = Recipe::new(PartialOptions::default().complete(bits).unwrap(), &[], &[]).unwrap();
            let quantize = |from: &Path, to: &str| {
                let mut options = options(&dir.path().join(format!("{to}-{bits}")));
                options.recipe = recipe.clone();
                options.non_finite = NonFinite::Refuse;
                crate::flow::quantize(from, &options);
                Artifact::open(&options.target).unwrap()
            };
            let (hf, fused) = (quantize(&sample(name), "hf"), quantize(&paddle, "fused"));
            for record in &fused.manifest().tensors {
                let Stored::Quantized(q) = &record.stored else {
                    continue;
                };
                let parts: Vec<String> = match record.name.replacen("ernie.", "model.", 1) {
                    n if n.contains("qkv_proj") => ["q_proj", "k_proj", "v_proj"]
                        .map(|p| n.replace("qkv_proj", p))
                        .to_vec(),
                    n if n.contains("up_gate_proj") => ["gate_proj", "up_proj"]
                        .map(|p| n.replace("up_gate_proj", p))
                        .to_vec(),
                    n => vec![n],
                };
                for (i, part) in q.parts.iter().enumerate() {
                    let expected: Vec<u8> = parts
                        .iter()
                        .flat_map(|p| {
                            let Stored::Quantized(q) = &hf.record(p).unwrap().stored else {
                                panic!("{p} is quantized")
                            };
                            hf.stored(&q.parts[i].tensor).unwrap().bytes().to_vec()
                        })
                        .collect();
                    assert!(
                        fused.stored(&part.tensor).unwrap().bytes() == expected,
                        "{} of {name}",
                        part.tensor
                    );
                    compared += 1;
                }
            }
        }
        assert!(compared >= 4 * 6, "{compared}");
    }
}
