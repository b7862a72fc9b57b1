//! Folders that FastDeploy loads: names, shapes and config, the same from both name families, whole
//! or split, verified and exported like any artifact; and what is refused.

mod kv_cache;
mod ranks;
mod refusals;
mod served;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qtool::fastdeploy::{Request, plans};
use qtool::quantize::{run, run_ranks};
use qtool_calib::ccq::Effort;
use qtool_formats::artifact::{Artifact, Manifest, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::fastdeploy::Wanted;
use qtool_formats::{Dtype, export};
use serde_json::{Value, json};

use crate::cli::qtool;
use crate::ernie::Ernie;
use crate::flow::{options, quantize, with_recipe};
use crate::model::read_model;

/// A whole folder of these bits.
pub fn request(bits: u8) -> Request {
    Request {
        wanted: Wanted { bits, w4_until: None },
        ranks: 1,
        method: None,
        calibrated: false,
        effort: None,
        max_shard_bytes: 5_000_000_000,
        kv_cache: None,
    }
}

/// Makes the folder and returns the manifest of each rank.
pub fn make(from: &Path, to: &Path, request: &Request) -> Vec<Manifest> {
    let checkpoint = Checkpoint::open(from).unwrap();
    let plans = plans(&checkpoint, request).unwrap();
    match plans.as_slice() {
        [plan] => vec![run(&checkpoint, plan, &options(to)).unwrap()],
        plans => run_ranks(&checkpoint, plans, &options(to)).unwrap(),
    }
}

/// Asserts that a folder is sound, checked against the model it was made from.
#[track_caller]
fn assert_sound(folder: &Path, base: &Path) {
    let outcome = qtool::verify::run(folder, Some(base), false).unwrap();
    assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
    assert!(outcome.figures_rederived > 0);
}

/// Stored tensors by name: type, shape, bytes.
fn stored(folder: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    read_model(folder)
        .into_iter()
        .map(|(name, t)| (name, (t.dtype, t.shape, t.bytes)))
        .collect()
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn a_dense_model_in_either_form_becomes_the_same_folder() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = Ernie::dense().with_mtp();
    model.write(&at("hf"));
    model.write_paddle(&at("paddle"));
    for (bits, codes) in [(8u8, [512, 128]), (4, [256, 128])] {
        let mut folders = Vec::new();
        for form in ["hf", "paddle"] {
            let out = at(&format!("{form}-{bits}"));
            let manifest = make(&at(form), &out, &request(bits)).remove(0);
            assert_eq!(manifest.source.dropped.len(), 2, "the prediction block");
            assert_sound(&out, &at(form));
            folders.push(stored(&out));
            assert!(out.join("tokenizer.model").is_file());
        }
        let (hf, paddle) = (&folders[0], &folders[1]);
        assert!(hf == paddle, "{bits} bits");
        assert_eq!(hf.len(), 2 + 2 * (2 + 4 * 2));
        let qkv = &hf["ernie.layers.1.self_attn.qkv_proj.quant_weight"];
        assert_eq!((qkv.0, qkv.1.as_slice()), (Dtype::I8, codes.as_slice()));
        let scale = &hf["ernie.layers.1.self_attn.qkv_proj.weight_scale"];
        assert_eq!((scale.0, scale.1.as_slice()), (Dtype::BF16, [512].as_slice()));
        assert_eq!(hf["ernie.norm.weight"].1, [128]);
        let config = config(&at(&format!("hf-{bits}")));
        assert_eq!(
            config["quantization_config"],
            json!({"quantization": format!("wint{bits}"), "is_quantized": true})
        );
        assert_eq!(
            (&config["dtype"], &config["is_quantized"]),
            (&json!("bfloat16"), &json!(true))
        );
        for gone in ["torch_dtype", "num_nextn_predict_layers"] {
            assert!(config.get(gone).is_none(), "{gone}");
        }
    }
}

/// What the strictest reader asks of a header: offset order, from 0, no gap, to the end.
#[test]
fn headers_are_in_offset_order_without_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    Ernie::moe().write(&model);
    make(&model, &out, &request(4));
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let (mut end, mut count) = (0, 0);
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offsets: [usize; 2] = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
        assert_eq!(offsets[0], end, "{name}");
        end = offsets[1];
        count += 1;
    }
    assert_eq!(end, bytes.len() - 8 - length);
    assert!(count > 50, "{count}");
}

#[test]
fn experts_of_four_bits_and_routers_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = Ernie::moe();
    model.write(&at("hf"));
    model.write_paddle(&at("paddle"));
    for form in ["hf", "paddle"] {
        make(&at(form), &at(&format!("{form}-4")), &request(4));
        assert_sound(&at(&format!("{form}-4")), &at(form));
    }
    let (hf, paddle) = (stored(&at("hf-4")), stored(&at("paddle-4")));
    assert!(hf == paddle);
    let shape = |name: &str| (hf[name].0, hf[name].1.clone());
    let expert = "ernie.layers.2.mlp.experts.3";
    assert_eq!(
        shape(&format!("{expert}.up_gate_proj.quant_weight")),
        (Dtype::I8, vec![128, 128])
    );
    assert_eq!(
        shape(&format!("{expert}.down_proj.quant_weight")),
        (Dtype::I8, vec![64, 128])
    );
    let shared = "ernie.layers.2.mlp.shared_experts.up_gate_proj.quant_weight";
    assert_eq!(shape(shared), (Dtype::I8, vec![256, 128]));
    assert_eq!(
        shape("ernie.layers.2.mlp.gate.weight"),
        (Dtype::F32, vec![128, 4])
    );
    let bias = "ernie.layers.2.mlp.moe_statics.e_score_correction_bias";
    assert_eq!(shape(bias), (Dtype::F32, vec![1, 4]));
    assert_eq!(shape("lm_head.weight"), (Dtype::BF16, vec![128, 96]));
    let config = config(&at("hf-4"));
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["quantization"], "wint2");
    assert_eq!(
        quantization["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"],
        3
    );
    assert_eq!(config["moe_use_aux_free"], true);
}

/// The mixture: experts up to a layer INT4, the others 2 bits, all other linear weights INT8.
#[test]
fn experts_of_two_bits() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = Ernie::wide_moe();
    model.write(&at("hf"));
    model.write_paddle(&at("paddle"));
    let mut request = request(2);
    request.wanted.w4_until = Some(2);
    request.effort = Some(Effort::Fast);
    for form in ["hf", "paddle"] {
        make(&at(form), &at(&format!("{form}-2")), &request);
        assert_sound(&at(&format!("{form}-2")), &at(form));
    }
    let (hf, paddle) = (stored(&at("hf-2")), stored(&at("paddle-2")));
    assert!(hf == paddle);
    let expert = |layer: usize| format!("ernie.layers.{layer}.mlp.experts.1.down_proj");
    assert_eq!(hf[&format!("{}.quant_weight", expert(2))].1, [128, 128], "INT4");
    for (suffix, dtype, shape) in [
        ("quant_weight", Dtype::U8, &[32, 256][..]),
        ("weight_scale", Dtype::U8, &[1, 256]),
        ("super_scales", Dtype::BF16, &[256]),
        ("code_scale", Dtype::F32, &[256]),
        ("code_zp", Dtype::F32, &[256]),
    ] {
        let tensor = &hf[&format!("{}.{suffix}", expert(3))];
        assert_eq!((tensor.0, tensor.1.as_slice()), (dtype, shape), "{suffix}");
    }
    let config = config(&at("hf-2"));
    let quantization = &config["quantization_config"]["moe_quant_config"];
    assert_eq!(quantization["moe_w4_quant_config"]["quant_end_layer"], 2);
    assert_eq!(quantization["moe_w2_quant_config"]["quant_start_layer"], 3);
    let artifact = Artifact::open(&at("hf-2")).unwrap();
    let record = artifact.record(&format!("{}.weight", expert(3))).unwrap();
    let Stored::Quantized(q) = &record.stored else {
        panic!("quantized")
    };
    let (all, some) = (
        artifact.weight_rows(q, 0, 256).unwrap(),
        artifact.weight_rows(q, 77, 9).unwrap(),
    );
    assert_eq!(all.rows(77..86).unwrap(), some);
    let figures = &q.figures;
    assert!(
        figures.relative_mse.unwrap() < 0.13 && figures.bits_per_weight < 2.8,
        "{figures:?}"
    );
}

/// An artifact whose codes fit is laid out anew, to the bytes `quantize` writes.
#[test]
fn relaying_an_artifact_equals_quantizing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let fastdeploy = export::find("fastdeploy").unwrap();
    let relay =
        |from: &Path, to: &Path| qtool::export::run(from, fastdeploy, to, false, 5_000_000_000, false);
    Ernie::dense().write(&at("hf"));
    Ernie::dense().write_paddle(&at("paddle"));
    let mut compared = 0;
    for form in ["hf", "paddle"] {
        for (bits, recipe) in [(8, "bits:8"), (4, "bits:4,group:row,grid:narrow")] {
            let name = |what: &str| at(&format!("{form}-{bits}-{what}"));
            quantize(&at(form), &with_recipe(&name("own"), recipe, &[], &[]));
            let bytes = relay(&name("own"), &name("relaid")).unwrap();
            make(&at(form), &name("direct"), &request(bits));
            assert!(stored(&name("relaid")) == stored(&name("direct")));
            assert_eq!(config(&name("relaid")), config(&name("direct")));
            assert_eq!(bytes, Checkpoint::open(&name("relaid")).unwrap().tensor_bytes());
            compared += 1;
        }
    }
    assert_eq!(compared, 4);
    Ernie::moe().write(&at("moe"));
    let experts = ["experts\\.[0-9]=bits:4,group:row,grid:narrow"];
    quantize(&at("moe"), &with_recipe(&at("moe-own"), "bits:8", &[], &experts));
    relay(&at("moe-own"), &at("moe-relaid")).unwrap();
    make(&at("moe"), &at("moe-direct"), &request(4));
    assert!(stored(&at("moe-relaid")) == stored(&at("moe-direct")));

    let wide = Ernie::wide_moe();
    wide.write(&at("wide"));
    let experts = [
        "layers\\.1.*experts\\.[0-9]=bits:4,group:row,grid:narrow",
        "experts\\.[0-9]=bits:2,effort:fast",
    ];
    quantize(
        &at("wide"),
        &with_recipe(&at("wide-own"), "bits:8", &[], &experts),
    );
    relay(&at("wide-own"), &at("wide-relaid")).unwrap();
    let mut mixture = request(2);
    (mixture.wanted.w4_until, mixture.effort) = (Some(1), Some(Effort::Fast));
    make(&at("wide"), &at("wide-direct"), &mixture);
    assert!(stored(&at("wide-relaid")) == stored(&at("wide-direct")));
    assert_eq!(config(&at("wide-relaid")), config(&at("wide-direct")));

    for (recipe, skips, words) in [
        (
            "bits:4",
            &[][..],
            ["w4-sym-g64-bf16", "--format fastdeploy --bits 4"],
        ),
        (
            "bits:8,scale:f16",
            &[],
            ["w8-sym-row-f16", "--format fastdeploy --bits 8"],
        ),
        ("bits:8", &["o_proj"], ["o_proj", "--format fastdeploy"]),
        ("bits:8", &["q_proj"], ["qkv_proj", "different schemes"]),
    ] {
        let out = at("unfit");
        quantize(&at("hf"), &with_recipe(&out, recipe, skips, &[]));
        let message = relay(&out, &at("never")).unwrap_err().to_string();
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
        assert!(!at("never").exists());
        fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn inspecting_shows_fused_weights_and_records_name_their_sources() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    Ernie::dense().write(&model);
    make(&model, &out, &request(4));
    let artifact = Artifact::open(&out).unwrap();
    let record = artifact
        .record("ernie.layers.0.self_attn.qkv_proj.weight")
        .unwrap();
    assert_eq!(record.shape, [128, 512]);
    let names: Vec<&str> = record.sources.iter().map(|s| s.tensor.as_str()).collect();
    let at = "model.layers.0.self_attn";
    assert_eq!(names, ["q", "k", "v"].map(|p| format!("{at}.{p}_proj.weight")));
    let Stored::Quantized(q) = &record.stored else {
        panic!("quantized")
    };
    let (all, some) = (
        artifact.weight_rows(q, 0, 512).unwrap(),
        artifact.weight_rows(q, 37, 5).unwrap(),
    );
    assert_eq!(
        all.rows(37..42).unwrap(),
        some,
        "rows inside of an interleaved block"
    );
    let folder = out.to_string_lossy().into_owned();
    let shown = qtool(&[
        "inspect",
        &folder,
        "--tensor",
        "ernie.layers.0.self_attn.qkv_proj.weight",
    ]);
    assert_eq!(shown.status.code(), Some(0));
    assert!(
        String::from_utf8(shown.stdout)
            .unwrap()
            .contains("w4-narrow-row-bf16")
    );
}
