//! Scales of a quantized key-value cache: against a slow computation of the first layer's keys and values, and
//! the same by every way of calibration, whole or split.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool::calibrate::corpus::{Corpus, CorpusOptions};
use qtool::calibrate::recorder::KeyValueMagnitudes;
use qtool::fastdeploy::{Request, plans};
use qtool::kv_scales;
use qtool::plan::Action;
use qtool::tokenizer::Tokenizer;
use qtool_formats::FloatDtype;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::fastdeploy::kv_cache::{KvCache, scale_names};
use serde_json::{Value, json};

use super::{assert_sound, config, request, stored};
use crate::calibrate::ids_file;
use crate::cli::{assert_error, qtool};
use crate::ernie::Ernie;
use crate::model::sample;

const ROWS: usize = 12;

/// Quantizes the dense sample with these options and gives its folder.
fn quantized(dir: &Path, name: &str, args: &[&str]) -> PathBuf {
    let to = dir.join(name);
    let model = sample("tiny-ernie45");
    let (model, out) = (model.to_str().unwrap(), to.to_str().unwrap());
    let fixed = [
        "quantize",
        model,
        "-o",
        out,
        "--format",
        "fastdeploy",
        "--bits",
        "8",
    ];
    let output = qtool(&[&fixed, args].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    to
}

/// The stored scales by name.
fn scales(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    let all = stored(folder)
        .into_iter()
        .filter(|(name, _)| name.contains("_matmul"));
    all.map(|(name, (_, shape, bytes))| {
        let values = FloatDtype::F32.widen(&bytes);
        assert_eq!(shape, [values.len()], "{name}");
        (name, values)
    })
    .collect()
}

/// Largest magnitudes of the first layer's keys and values over the corpus, in f64, one token at a time.
fn slow(model: &Path, corpus: &Corpus) -> [Vec<f64>; 2] {
    let config: Value = serde_json::from_slice(&fs::read(model.join("config.json")).unwrap()).unwrap();
    let number = |key: &str| config[key].as_f64().unwrap();
    let (hidden, dim) = (number("hidden_size") as usize, number("head_dim") as usize);
    let channels = number("num_key_value_heads") as usize * dim;
    let theta = config["rope_theta"]
        .as_f64()
        .or(config["rope_parameters"]["rope_theta"].as_f64());
    let tensors = stored(model);
    let read = |name: &str| -> Vec<f64> {
        let (dtype, _, bytes) = &tensors[name];
        let dtype = FloatDtype::from_dtype(*dtype).unwrap();
        dtype.widen(bytes).into_iter().map(f64::from).collect()
    };
    let (embedding, gain) = (
        read("model.embed_tokens.weight"),
        read("model.layers.0.input_layernorm.weight"),
    );
    let weights = ["k_proj", "v_proj"].map(|p| read(&format!("model.layers.0.self_attn.{p}.weight")));
    let mut tops = [vec![0f64; channels], vec![0f64; channels]];
    for row in corpus.rows() {
        for (position, &id) in row.iter().enumerate() {
            let x = &embedding[id as usize * hidden..][..hidden];
            let scale =
                1.0 / (x.iter().map(|v| v * v).sum::<f64>() / hidden as f64 + number("rms_norm_eps")).sqrt();
            let x: Vec<f64> = x.iter().zip(&gain).map(|(v, g)| v * scale * g).collect();
            let project = |w: &Vec<f64>| -> Vec<f64> {
                let dot = |line: &[f64]| line.iter().zip(&x).map(|(w, x)| w * x).sum();
                w.chunks(hidden).map(dot).collect()
            };
            let [mut keys, values] = [project(&weights[0]), project(&weights[1])];
            // Neighbouring columns turn together.
            for head in keys.chunks_mut(dim) {
                for pair in 0..dim / 2 {
                    let angle = position as f64 * theta.unwrap().powf(-2.0 * pair as f64 / dim as f64);
                    let (a, b) = (head[2 * pair], head[2 * pair + 1]);
                    head[2 * pair] = a * angle.cos() - b * angle.sin();
                    head[2 * pair + 1] = b * angle.cos() + a * angle.sin();
                }
            }
            for (tops, seen) in tops.iter_mut().zip([keys, values]) {
                tops.iter_mut()
                    .zip(seen)
                    .for_each(|(top, v)| *top = top.max(v.abs()));
            }
        }
    }
    tops
}

#[test]
fn scales_are_the_largest_magnitudes_of_keys_and_values() {
    let dir = tempfile::tempdir().unwrap();
    let ids = ids_file(dir.path());
    let model = sample("tiny-ernie45");
    let rows = ROWS.to_string();
    let calib = [
        "--calib",
        ids.to_str().unwrap(),
        "--rows",
        &rows,
        "--length",
        "64",
    ];
    let make = |name: &str, more: &[&str]| quantized(dir.path(), name, &[&calib, more].concat());
    let int8 = make("int8", &["--one-pass", "--kv-cache", "int8"]);
    let whole = scales(&int8);
    let config8 = config(&int8);
    let shape = |key: &str| config8[key].as_u64().unwrap() as usize;
    let (layers, kv_heads, dim) = (
        shape("num_hidden_layers"),
        shape("num_key_value_heads"),
        shape("head_dim"),
    );
    assert_eq!(whole.len(), 2 * layers);
    assert_sound(&int8, &model);
    assert!(!int8.join("kv_cache_scale.json").exists());
    assert_eq!(
        config8["quantization_config"],
        json!({
            "quantization": "mix_quant", "is_quantized": true, "dense_quant_type": "wint8",
            "moe_quant_type": "wint8", "kv_cache_quant_type": "int8", "is_channel_wise": true,
            "has_zero_point": false,
        })
    );

    let options = CorpusOptions {
        files: vec![ids.clone()],
        rows: ROWS,
        length: 64,
        seed: 0,
    };
    let corpus = Corpus::read(&options, &Tokenizer::open(&model).unwrap(), 4096).unwrap();
    assert_eq!(corpus.rows().len(), ROWS);
    for (which, expected) in ["k", "v"].iter().zip(slow(&model, &corpus)) {
        let got = &whole[&format!("ernie.layers.0.self_attn.cache{which}_matmul.activation_scale")];
        assert_eq!(got.len(), kv_heads * dim);
        for (got, expected) in got.iter().zip(&expected) {
            let off = (f64::from(*got) - expected).abs() / expected.max(1e-6);
            assert!(off < 1e-4, "{which}: {got} {expected}");
        }
    }

    // What is measured is no part of the model.
    let dense = dir.path().join("dense");
    let (from, to) = (int8.to_str().unwrap(), dense.to_str().unwrap());
    let output = qtool(&["export", from, "--to", "bf16", "-o", to]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(stored(&dense).keys().all(|name| !name.contains("_matmul")));
    assert!(stored(&dense).len() > 6);

    // FP8: one number a head; the file holds a 448th.
    let fp8 = make("fp8", &["--one-pass", "--kv-cache", "fp8"]);
    let by_head = scales(&fp8);
    let file: Value = serde_json::from_slice(&fs::read(fp8.join("kv_cache_scale.json")).unwrap()).unwrap();
    assert_eq!(file.as_object().unwrap().len(), whole.len());
    for (name, channels) in &whole {
        let heads: Vec<f32> = channels
            .chunks(dim)
            .map(|head| head.iter().copied().fold(0.0, f32::max))
            .collect();
        assert_eq!(by_head[name], heads, "{name}");
        let listed = file[name].as_array().unwrap();
        assert_eq!(listed.len(), kv_heads);
        for (listed, head) in listed.iter().zip(&heads) {
            assert_eq!(listed.as_f64().unwrap(), f64::from(*head) / 448.0, "{name}");
        }
    }
    assert_eq!(
        config(&fp8)["quantization_config"]["kv_cache_quant_type"],
        json!("float8_e4m3fn")
    );
    assert_sound(&fp8, &model);

    // Block by block, the first layer sees the same; the others see quantized blocks before them.
    let sequential = scales(&make("sequential", &["--kv-cache", "int8"]));
    let (mut same, mut moved) = (0, 0);
    for (name, values) in &whole {
        if name.contains("layers.0.") {
            assert_eq!(&sequential[name], values, "{name}");
            same += 1;
        } else {
            moved += usize::from(&sequential[name] != values);
        }
    }
    assert!(same == 2 && moved > 0, "{same} {moved}");

    // Statistics measured before.
    let statistics = dir.path().join("statistics");
    let (from, to) = (model.to_str().unwrap(), statistics.to_str().unwrap());
    let data = ["--data", ids.to_str().unwrap(), "--rows", &rows, "--length", "64"];
    let output = qtool(&[&["calibrate", from, "-o", to], &data[..]].concat());
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let again = quantized(dir.path(), "again", &["--calib", to, "--kv-cache", "int8"]);
    assert_eq!(scales(&again), whole);
}

/// Ranks share heads as they share the rows of keys and values.
#[test]
fn ranks_have_the_scales_of_their_own_heads() {
    let dir = tempfile::tempdir().unwrap();
    Ernie::dense().write(dir.path());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    // Two layers; two heads of 64 channels. Every channel has a magnitude of its own.
    let seen = |layer: usize| KeyValueMagnitudes {
        keys: (0..128).map(|c| (layer * 1000 + c) as f32).collect(),
        values: (0..128).map(|c| (layer * 1000 + c) as f32 + 0.5).collect(),
    };
    for (kv_cache, each) in [(KvCache::Int8, 64), (KvCache::Fp8, 1)] {
        let request = Request {
            ranks: 2,
            kv_cache: Some(kv_cache),
            ..request(8)
        };
        let mut plans = plans(&checkpoint, &request).unwrap();
        kv_scales::fill(&mut plans, &|layer| Ok(Some(seen(layer)))).unwrap();
        let mut checked = 0;
        for (rank, plan) in plans.iter().enumerate() {
            for (layer, [keys, values]) in (0..2).map(|layer| (layer, scale_names(layer))) {
                for (name, all) in [(keys, seen(layer).keys), (values, seen(layer).values)] {
                    let tensor = plan.tensors.iter().find(|t| t.name == name).unwrap();
                    let Action::Measure(measured) = &tensor.action else {
                        panic!("{name} is measured")
                    };
                    let own = &all[rank * 64..(rank + 1) * 64];
                    let expected = if each == 1 { &own[63..] } else { own };
                    assert_eq!(measured.values, expected, "{name} of rank {rank}");
                    assert_eq!(tensor.shape, [each]);
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, 8);
        let unseen = kv_scales::fill(&mut plans, &|_| Ok(None))
            .unwrap_err()
            .to_string();
        assert!(
            unseen.contains("layer 0") && unseen.contains("cachek"),
            "{unseen}"
        );
    }
}

#[test]
fn a_cache_that_fastdeploy_cannot_use_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ids = ids_file(dir.path());
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    Ernie::moe().write(Path::new(&path("moe")));
    let (moe, out, ids) = (path("moe"), path("out"), ids.to_str().unwrap());
    let dense = sample("tiny-ernie45");
    let dense = dense.to_str().unwrap();
    let fastdeploy = ["--format", "fastdeploy", "--kv-cache", "int8"];
    for (model, args, words) in [
        (
            &*moe,
            [&["--bits", "4", "--calib", ids], &fastdeploy[..]].concat(),
            &["dense models only", "--kv-cache"][..],
        ),
        (
            dense,
            vec!["--bits", "8", "--calib", ids, "--kv-cache", "int8"],
            &["--format fastdeploy only"],
        ),
        (dense, [&["--bits", "8"], &fastdeploy[..]].concat(), &["--calib"]),
    ] {
        let output = qtool(&[&["quantize", model, "-o", &out], &args[..]].concat());
        assert_error(&output, words);
        assert!(!Path::new(&out).exists());
    }
}
