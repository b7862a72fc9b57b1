//! What cannot be rewritten, and what shows that something is wrong.

use std::path::Path;

use qtool_formats::artifact::Artifact;
use qtool_formats::{Dtype, FloatDtype};

use super::{findings, quantized, rotated};
use crate::cli::qtool;
use crate::flow::with_recipe;
use crate::model::{Tensor, read_model, sample, write_model};

#[test]
fn what_cannot_be_rotated_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45");
    let message = |folder: &Path| rotated(folder, 0).map(|_| ()).unwrap_err().to_string();
    let with = |name: &str, config: &dyn Fn(&mut serde_json::Value), tensor: Option<(&str, Tensor)>| {
        let folder = dir.path().join(name);
        let mut tensors = read_model(&base);
        tensors.extend(tensor.map(|(name, t)| (name.to_owned(), t)));
        write_model(&folder, &tensors);
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(base.join("config.json")).unwrap()).unwrap();
        config(&mut json);
        std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
        folder
    };
    let encoder = with("encoder", &|c| c["model_type"] = "bert".into(), None);
    assert!(message(&encoder).contains("RMS norms"), "{}", message(&encoder));
    let extra = Tensor::floats(FloatDtype::F32, &[2, 2], &[1.0; 4]);
    let stranger = with(
        "stranger",
        &|_| {},
        Some(("model.mtp_block.0.mlp.down_proj.weight", extra)),
    );
    let text = message(&stranger);
    assert!(text.contains("mtp_block") && text.contains("--rotate"), "{text}");
    // NaN in a tensor that is made as a whole, and in one that is made by rows.
    for tensor in [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ] {
        let mut tensors = read_model(&base);
        let bad = tensors.iter_mut().find(|(name, _)| name == tensor).unwrap();
        assert_eq!(bad.1.dtype, Dtype::BF16);
        let k = bad.1.shape[1];
        bad.1.bytes[(2 * k + 5) * 2..][..2].copy_from_slice(&[0xc0, 0x7f]);
        let folder = dir.path().join(format!("nan-{}", tensor.len()));
        write_model(&folder, &tensors);
        std::fs::copy(base.join("config.json"), folder.join("config.json")).unwrap();
        let out = dir.path().join("out");
        let text = quantized(&folder, &with_recipe(&out, "bits:4", &[], &[]), None)
            .unwrap_err()
            .to_string();
        assert!(text.contains(tensor) && text.contains("[2, 5]"), "{text}");
        assert!(!out.exists());
    }
    // An artifact whose record was tampered with.
    let out = dir.path().join("tampered");
    quantized(&base, &with_recipe(&out, "bits:8", &[], &[]), None).unwrap();
    let path = out.join("qtool.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"seed\": 3"));
    std::fs::write(&path, text.replace("\"seed\": 3", "\"seed\": 4")).unwrap();
    assert!(Artifact::open(&out).is_ok());
    let found = findings(&out, &base);
    assert!(found.iter().any(|f| f.contains("relative MSE")), "{found:?}");
    let elsewhere = r#""transform": { "scales": { "file": "../elsewhere" },"#;
    std::fs::write(&path, text.replace("\"transform\": {", elsewhere)).unwrap();
    let refused = Artifact::open(&out).unwrap_err().to_string();
    assert!(
        refused.contains("scales of the transform") && refused.contains("elsewhere"),
        "{refused}"
    );
    std::fs::write(&path, text.replace("hadamard", "hadamart")).unwrap();
    let refused = qtool::verify::run(&out, Some(&base), false)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("hadamart") && refused.contains("qtool that made it"),
        "{refused}"
    );
}

#[test]
fn the_command_line_says_what_rewriting_costs_and_what_it_does_not_go_with() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (sample("tiny-ernie45"), dir.path().join("out"));
    let run = |options: &[&str]| {
        let out = out.to_str().unwrap();
        let mut args = vec!["quantize", model.to_str().unwrap(), "-o", out, "--bits", "4"];
        args.extend(options);
        qtool(&args)
    };
    let plan = run(&["--rotate", "--dry-run"]);
    assert_eq!(plan.status.code(), Some(0));
    let text = String::from_utf8_lossy(&plan.stdout).into_owned();
    assert!(
        text.contains("tensor of its own") && text.contains("untied"),
        "{text}"
    );
    assert!(!run(&["--dry-run"]).stdout.windows(6).any(|w| w == b"untied"));
    for (options, expected) in [
        (
            &["--rotate", "--non-finite", "keep"][..],
            "does not go with --rotate",
        ),
        (&["--awq"], "--calib"),
        (&["--rotate=many"], "invalid value"),
        (
            &["--awq", "--calib", "x.txt", "--format", "fastdeploy"],
            "--awq does not go with --format fastdeploy",
        ),
        (
            &["--awq", "--calib", "x.txt", "--non-finite", "keep"],
            "does not go with --awq",
        ),
    ] {
        let refused = run(options);
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{options:?}: {text}");
        assert!(text.contains(expected), "{options:?}: {text}");
        assert!(!out.exists());
    }
}
