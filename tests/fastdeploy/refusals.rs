//! What FastDeploy cannot load, and weights that are no numbers: a sentence, and nothing written.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::cli::{assert_error, qtool};
use crate::ernie::Ernie;

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
    refuse(
        &moe,
        &["--bits", "2"],
        &["experts.0.down_proj.weight", "multiple of 256"],
    );
    refuse(&dense, &["--bits", "4", "--effort", "fast"], &["--effort"]);
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
    assert_eq!(cases, 18);
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
