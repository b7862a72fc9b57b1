//! Folders that FastDeploy loads: names, shapes and config, the same from both name families, whole
//! or split, verified and exported like any artifact; and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qtool::fastdeploy::{Request, plans};
use qtool::quantize::{run, run_ranks};
use qtool_formats::artifact::{Artifact, Manifest, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::fastdeploy::Wanted;
use qtool_formats::{Dtype, export};
use serde_json::{Value, json};

use crate::cli::{assert_error, qtool};
use crate::ernie::Ernie;
use crate::flow::{options, quantize, with_recipe};
use crate::model::read_model;

fn request(bits: u8) -> Request {
    Request {
        wanted: Wanted { bits, w4_until: None },
        ranks: 1,
        clip: None,
        max_shard_bytes: 5_000_000_000,
    }
}

fn make(from: &Path, to: &Path, request: &Request) -> Vec<Manifest> {
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

/// Column in the whole of a column of a rank's share.
type Column<'a> = &'a dyn Fn(usize, usize) -> usize;

/// Each rank is a whole artifact; the ranks' decoded shares make up the model.
#[test]
fn ranks_share_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    Ernie::moe().write_paddle(&at("paddle"));
    let two = Request {
        ranks: 2,
        ..request(4)
    };
    let manifests = make(&at("paddle"), &at("split"), &two);
    assert_eq!(manifests.len(), 2);
    assert_sound(&at("split"), &at("paddle"));
    let mut shares = Vec::new();
    for rank in ["rank0", "rank1"] {
        let folder = at("split").join(rank);
        assert_sound(&folder, &at("paddle"));
        assert!(folder.join("tokenizer.model").is_file() && folder.join("config.json").is_file());
        let dense = at(&format!("{rank}-bf16"));
        let bf16 = export::find("bf16").unwrap();
        qtool::export::run(&folder, bf16, &dense, false, 5_000_000_000, false).unwrap();
        shares.push(stored(&dense));
    }
    let base = stored(&at("paddle"));
    assert_eq!(shares[0].len(), base.len());
    let bytes_of = |folder: &BTreeMap<_, (Dtype, Vec<usize>, Vec<u8>)>, name: &str| folder[name].2.clone();
    let embedding = "ernie.embed_tokens.weight";
    let halves = [bytes_of(&shares[0], embedding), bytes_of(&shares[1], embedding)];
    assert!(halves.concat() == bytes_of(&base, embedding));
    let value = |bytes: &[u8], i: usize| half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f64();
    // Columns of a rank's share, counted in the whole: q heads, k heads and v heads of each rank.
    let qkv = |rank: usize, n: usize| match n {
        0..128 => 128 * rank + n,
        128..192 => 256 + 64 * rank + n - 128,
        _ => 384 + 64 * rank + n - 192,
    };
    let gate_up = |rank: usize, n: usize| {
        if n < 64 {
            64 * rank + n
        } else {
            128 + 64 * rank + n - 64
        }
    };
    let expert = "ernie.layers.1.mlp.experts.2.up_gate_proj.weight";
    let attention = "ernie.layers.0.self_attn.qkv_proj.weight";
    let columns: [(&str, usize, Column<'_>); 3] = [
        (attention, 512, &qkv),
        (expert, 256, &gate_up),
        ("lm_head.weight", 96, &|rank, n| 48 * rank + n),
    ];
    for (name, width, whole_column) in columns {
        for (rank, share) in shares.iter().enumerate() {
            let (_, shape, bytes) = &share[name];
            assert_eq!(shape[..], [128, width / 2], "{name}");
            let mut error = 0.0;
            for k in 0..128 {
                for n in 0..width / 2 {
                    let source = value(&base[name].2, k * width + whole_column(rank, n));
                    error += (source - value(bytes, k * (width / 2) + n)).abs();
                }
            }
            // Rounding leaves about 0.004, a wrong column 0.056.
            assert!(error / (64.0 * width as f64) < 0.01, "{name}: {error}");
        }
    }
    let down = "ernie.layers.0.mlp.down_proj.weight";
    for (rank, share) in shares.iter().enumerate() {
        let (_, shape, bytes) = &share[down];
        assert_eq!(shape[..], [128, 128], "rows of K are shared");
        for i in 0..128 * 128 {
            let source = value(&base[down].2, rank * 128 * 128 + i);
            assert!((source - value(bytes, i)).abs() < 0.01);
        }
    }
    for command in [["inspect", ""], ["export", "--to=bf16"]] {
        let split = at("split").to_string_lossy().into_owned();
        let out = at("nowhere").to_string_lossy().into_owned();
        let output = match command {
            ["inspect", _] => qtool(&["inspect", &split]),
            _ => qtool(&["export", &split, "--to", "bf16", "-o", &out]),
        };
        assert_error(&output, &["rank0"]);
    }
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

/// One sentence each, and nothing written.
#[test]
fn what_fastdeploy_cannot_load_is_refused_before_work() {
    let mut cases = 0;
    let mut refuse = |model: &Ernie, args: &[&str], words: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        model.write(Path::new(&path("model")));
        let (from, to) = (path("model"), path("out"));
        let output = qtool(&[&["quantize", &from, "-o", &to, "--format", "fastdeploy"], args].concat());
        assert_error(&output, words);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(message.trim_end().lines().count(), 1, "{message}");
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "nothing but the model"
        );
        cases += 1;
    };
    let (dense, moe) = (Ernie::dense(), Ernie::moe());
    refuse(
        &dense,
        &["--bits", "2"],
        &["routed experts only", "--bits 8 or --bits 4", "--to bf16"],
    );
    refuse(&moe, &["--bits", "8"], &["no INT8 experts", "--bits 4"]);
    refuse(
        &dense,
        &["--bits", "4", "--w4-until", "1"],
        &["--w4-until", "--bits 2"],
    );
    refuse(
        &dense,
        &["--bits", "4", "--group-size", "64"],
        &["--group-size", "output channel"],
    );
    refuse(&dense, &["--bits", "4", "--asymmetric"], &["--asymmetric"]);
    refuse(
        &dense,
        &["--bits", "4", "--scale-dtype", "f32"],
        &["--scale-dtype"],
    );
    refuse(&dense, &["--bits", "8", "--skip", "o_proj"], &["--skip"]);
    refuse(
        &dense,
        &["--bits", "8", "--tensor-parallel", "4"],
        &["2 key and value heads", "4 ranks"],
    );
    let missing = moe.clone().without("layers.2.mlp.experts.3.up_proj");
    refuse(
        &missing,
        &["--bits", "4"],
        &["layers.2.mlp.experts.3.up_proj.weight is missing"],
    );
    let missing = moe.clone().without("layers.3.mlp.experts.1.");
    refuse(
        &missing,
        &["--bits", "4"],
        &["layers.3.mlp.experts.1.gate_proj.weight is missing"],
    );
    let none = moe.clone().without("experts");
    refuse(&none, &["--bits", "4"], &["moe_num_experts", "hold none"]);
    let mut uneven = dense.clone();
    let up = uneven.tensor("model.layers.1.mlp.up_proj.weight");
    (up.shape, up.bytes) = (vec![240, 128], vec![0; 240 * 128 * 2]);
    refuse(
        &uneven,
        &["--bits", "8"],
        &["layers.1.mlp.up_proj.weight", "[256, 128]", "[240, 128]"],
    );
    let mut quantized = dense.clone();
    quantized.config["quantization_config"] = json!({"quantization": "wint8"});
    refuse(&quantized, &["--bits", "8"], &["quantized already", "wint8"]);
    let mut llama = dense.clone();
    llama.config["architectures"] = json!(["LlamaForCausalLM"]);
    refuse(
        &llama,
        &["--bits", "8"],
        &["LlamaForCausalLM", "ERNIE-4.5", "--format"],
    );
    let mut narrow = dense.clone();
    narrow.config["intermediate_size"] = json!(264);
    for (name, shape) in [
        ("gate_proj", [264, 128]),
        ("up_proj", [264, 128]),
        ("down_proj", [128, 264]),
    ] {
        for layer in 0..2 {
            let tensor = narrow.tensor(&format!("model.layers.{layer}.mlp.{name}.weight"));
            (tensor.shape, tensor.bytes) = (shape.to_vec(), vec![0; 264 * 128 * 2]);
        }
    }
    refuse(&narrow, &["--bits", "8"], &["mlp.down_proj.weight", "K of 64"]);
    let mut stranger = dense.clone();
    let tensor = stranger.tensors[0].1.clone();
    stranger.tensors.push(("model.vision.weight".to_owned(), tensor));
    refuse(
        &stranger,
        &["--bits", "8"],
        &["model.vision.weight", "no part of"],
    );
    assert_eq!(cases, 16);
}

#[test]
fn a_bad_value_is_named_by_its_place_in_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let nan = half::bf16::NAN.to_le_bytes();
    for (name, at, index) in [
        ("model.layers.1.self_attn.k_proj.weight", 5 * 128 + 7, "[5, 7]"),
        ("lm_head.weight", 9 * 128 + 3, "[9, 3]"),
        ("model.norm.weight", 11, "[11]"),
    ] {
        let mut model = Ernie::moe();
        model.tensor(name).bytes[2 * at..2 * at + 2].copy_from_slice(&nan);
        let folder = path(&format!("{name}-model"));
        model.write(Path::new(&folder));
        let args = [
            "quantize",
            &folder,
            "-o",
            &path("out"),
            "--format",
            "fastdeploy",
            "--bits",
            "4",
        ];
        assert_error(&qtool(&args), &[name, index]);
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
