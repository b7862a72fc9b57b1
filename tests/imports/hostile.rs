//! Folders that lie: each gives one sentence with file, tensor, what was expected and what to do, and no panic.

use std::fs;
use std::path::Path;

use qtool::verify;
use qtool_formats::import;
use qtool_formats::{Dtype, FloatDtype};
use serde_json::{Value, json};

use super::folders::golden;
use crate::model::{Tensor, read_model, write_file};

/// The tensors of a file.
type Tensors = Vec<(String, Tensor)>;

/// What is done to them.
type Damage = Box<dyn Fn(&mut Tensors)>;

/// A copy of a golden folder with its tensors and quantization config changed.
fn changed(name: &str, into: &Path, tensors: &dyn Fn(&mut Tensors), config: &dyn Fn(&mut Value)) {
    fs::create_dir_all(into).unwrap();
    let mut all = read_model(&golden(name).join("model.safetensors"));
    tensors(&mut all);
    write_file(&into.join("model.safetensors"), &all);
    let mut about: Value =
        serde_json::from_slice(&fs::read(golden(name).join("config.json")).unwrap()).unwrap();
    config(&mut about["quantization_config"]);
    fs::write(into.join("config.json"), about.to_string()).unwrap();
}

/// A module that every golden folder quantizes.
const MODULE: &str = "model.layers.0.mlp.down_proj";

fn part<'a>(all: &'a mut [(String, Tensor)], suffix: &str) -> &'a mut Tensor {
    let name = format!("{MODULE}.{suffix}");
    &mut all.iter_mut().find(|(known, _)| *known == name).unwrap().1
}

fn without(all: &mut Tensors, suffix: &str) {
    let before = all.len();
    all.retain(|(name, _)| *name != format!("{MODULE}.{suffix}"));
    assert_eq!(all.len(), before - 1, "{suffix}");
}

/// Cuts the first dimension by one.
fn shorter(tensor: &mut Tensor) {
    let rows = tensor.shape[0];
    tensor.bytes.truncate(tensor.bytes.len() / rows * (rows - 1));
    tensor.shape[0] = rows - 1;
}

/// A list of groups, all the same.
fn index(columns: usize, group: u32) -> Tensor {
    Tensor {
        dtype: Dtype::I32,
        shape: vec![columns],
        bytes: group.to_le_bytes().repeat(columns),
    }
}

type Change = (&'static str, &'static str, fn(&mut Tensors), fn(&mut Value));

/// Folder, part of the sentence, and the lie.
const LIES: &[Change] = &[
    ("gptq", "qzeros is missing", |t| without(t, "qzeros"), |_| {}),
    ("gptq", "qweight is missing", |t| without(t, "qweight"), |_| {}),
    ("gptq", "scales is missing", |t| without(t, "scales"), |_| {}),
    (
        "gptq",
        "expected the shape",
        |t| shorter(part(t, "g_idx")),
        |_| {},
    ),
    (
        "gptq",
        "groups do not divide",
        |t| {
            shorter(part(t, "scales"));
            shorter(part(t, "qzeros"));
        },
        |_| {},
    ),
    (
        "gptq",
        "expected I32 of 2 dimensions",
        |t| part(t, "qweight").dtype = Dtype::F32,
        |_| {},
    ),
    (
        "gptq",
        "bits a code",
        |t| {
            let scales = part(t, "scales");
            scales.shape = vec![scales.bytes.len() / 2, 1];
        },
        |_| {},
    ),
    (
        "gptq",
        "expected GPTQ of 2, 3, 4 or 8 bits, got bits 5",
        |_| {},
        |c| c["bits"] = json!(5),
    ),
    (
        "gptq",
        "got marlin",
        |_| {},
        |c| c["checkpoint_format"] = json!("marlin"),
    ),
    (
        "gptq",
        "pack_dtype int32, got int64",
        |_| {},
        |c| c["pack_dtype"] = json!("int64"),
    ),
    (
        "gptq",
        "quantized by hqq, which is not read; those read are",
        |_| {},
        |c| c["quant_method"] = json!("hqq"),
    ),
    (
        "gptq",
        "no tensor ends in .weight.absmax",
        |_| {},
        |c| {
            *c = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
        },
    ),
    ("awq", "qzeros is missing", |t| without(t, "qzeros"), |_| {}),
    (
        "awq",
        "expected the shape",
        |t| shorter(part(t, "qzeros")),
        |_| {},
    ),
    (
        "awq",
        "whole words of 8",
        |t| {
            let scales = part(t, "scales");
            scales.shape = vec![scales.bytes.len() / 2, 1];
        },
        |_| {},
    ),
    (
        "awq",
        "expected AWQ of 4 bits, got bits 3",
        |_| {},
        |c| c["bits"] = json!(3),
    ),
    (
        "ct-w4",
        "weight_shape is missing",
        |t| without(t, "weight_shape"),
        |_| {},
    ),
    (
        "ct-w4",
        "weight_scale is missing",
        |t| without(t, "weight_scale"),
        |_| {},
    ),
    (
        "ct-w4",
        "are no weight of",
        |t| {
            let shape = part(t, "weight_shape");
            shape.bytes = [u64::MAX / 2, u64::MAX / 2]
                .iter()
                .flat_map(|d| d.to_le_bytes())
                .collect();
        },
        |_| {},
    ),
    (
        "ct-w4",
        "expected two numbers",
        |t| shorter(part(t, "weight_shape")),
        |_| {},
    ),
    (
        "ct-w4",
        "expected scales for",
        |t| shorter(part(t, "weight_scale")),
        |_| {},
    ),
    (
        "ct-w4",
        "expected scales of BF16",
        |t| {
            part(t, "weight_scale").dtype = Dtype::I16;
        },
        |_| {},
    ),
    (
        "ct-w4",
        "its transform_config asks for work at run time",
        |_| {},
        |c| {
            c["transform_config"] = json!({"config_groups": {"R1": {"type": "hadamard"}}});
        },
    ),
    (
        "ct-w4",
        "its sparsity_config asks for work",
        |_| {},
        |c| {
            c["sparsity_config"] = json!({"format": "sparse-24-bitmask"});
        },
    ),
    (
        "ct-w4",
        "got float-quantized",
        |_| {},
        |c| c["format"] = json!("float-quantized"),
    ),
    (
        "ct-w4-zp",
        "expected zero points of I8",
        |t| part(t, "weight_zero_point").dtype = Dtype::F32,
        |_| {},
    ),
    (
        "ct-w4-zp",
        "expected the shape",
        |t| shorter(part(t, "weight_zero_point")),
        |_| {},
    ),
    (
        "ct-w4",
        "expected the shape",
        |t| t.push((format!("{MODULE}.weight_g_idx"), index(3, 0))),
        |_| {},
    ),
    (
        "ct-w8-zp",
        "expected the shape",
        |t| shorter(part(t, "weight_zero_point")),
        |_| {},
    ),
    (
        "bnb-nf4",
        "bitsandbytes__nf4 is missing",
        |t| without(t, "weight.quant_state.bitsandbytes__nf4"),
        |_| {},
    ),
    (
        "bnb-nf4",
        "expected a JSON object",
        |t| part(t, "weight.quant_state.bitsandbytes__nf4").bytes.fill(b'x'),
        |_| {},
    ),
    (
        "bnb-nf4",
        "expected the shape",
        |t| shorter(part(t, "weight.absmax")),
        |_| {},
    ),
    (
        "bnb-nf4",
        "quant_map is missing",
        |t| without(t, "weight.quant_map"),
        |_| {},
    ),
    (
        "bnb-nf4",
        "codes of 4 bits",
        |t| shorter(part(t, "weight")),
        |_| {},
    ),
    (
        "bnb-nf4",
        "8-bit form",
        |_| {},
        |c| c["load_in_8bit"] = json!(true),
    ),
    (
        "bnb-nf4-double",
        "nested_absmax is missing",
        |t| without(t, "weight.nested_absmax"),
        |_| {},
    ),
    (
        "bnb-nf4-double",
        "expected the shape",
        |t| shorter(part(t, "weight.nested_quant_map")),
        |_| {},
    ),
];

#[test]
fn each_lie_gets_its_sentence() {
    let dir = tempfile::tempdir().unwrap();
    for (number, (name, expected, tensors, config)) in LIES.iter().enumerate() {
        let path = dir.path().join(format!("{number}-{name}"));
        changed(name, &path, tensors, config);
        let what = format!("{name}: {expected}");
        let message = match import::open(&path) {
            Ok(_) => panic!("{what}: opened"),
            Err(error) => error.to_string(),
        };
        assert!(message.contains(expected), "{what}: {message}");
        assert!(message.contains(&path.display().to_string()), "{what}: {message}");
        assert_eq!(message.lines().count(), 1, "{what}: {message}");
    }
    assert!(LIES.len() > 30);
}

/// Numbers inside the tensors: opening does not look at them, decoding and verifying do.
#[test]
fn wrong_numbers_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let half = |value: f32| half::f16::from_f32(value).to_le_bytes();
    let cases: Vec<(&str, &str, Damage)> = vec![
        (
            "gptq",
            "column 3 is in group 9999, expected 0 to 3",
            Box::new(|t| {
                part(t, "g_idx").bytes[12..16].copy_from_slice(&9999u32.to_le_bytes());
            }),
        ),
        (
            "gptq",
            "column 3 is in group -1",
            Box::new(|t| {
                part(t, "g_idx").bytes[12..16].copy_from_slice(&(-1i32).to_le_bytes());
            }),
        ),
        (
            "gptq",
            "scale: expected a finite number, got NaN",
            Box::new(move |t| {
                part(t, "scales").bytes[..2].copy_from_slice(&half(f32::NAN));
            }),
        ),
        (
            "gptq",
            "1 of 256 scales are zero",
            Box::new(move |t| {
                part(t, "scales").bytes[..2].copy_from_slice(&half(0.0));
            }),
        ),
        (
            "gptq",
            "8 of 256 zero points are beyond the codes' range",
            Box::new(|t| {
                part(t, "qzeros").bytes[..4].fill(0xff);
            }),
        ),
        (
            "gptq",
            "constant codes",
            Box::new(|t| part(t, "qweight").bytes.fill(0x77)),
        ),
        (
            "awq",
            "scales are negative",
            Box::new(move |t| {
                part(t, "scales").bytes[..2].copy_from_slice(&half(-1.0));
            }),
        ),
        (
            "ct-w4",
            "scale: expected a finite number, got inf",
            Box::new(move |t| {
                part(t, "weight_scale").bytes[..2].copy_from_slice(&half(f32::INFINITY));
            }),
        ),
        (
            "ct-w4",
            "column 0 is in group 4, expected 0 to 3",
            Box::new(|t| {
                t.push((format!("{MODULE}.weight_g_idx"), index(128, 4)));
            }),
        ),
        (
            "bnb-nf4",
            "expected finite numbers",
            Box::new(|t| {
                part(t, "weight.absmax").bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
        ),
        (
            "ct-w4",
            "values are NaN or infinite",
            Box::new(move |t| {
                let norm = t
                    .iter_mut()
                    .find(|(name, _)| name == "model.norm.weight")
                    .unwrap();
                norm.1.bytes[..2].copy_from_slice(&half(f32::NAN));
            }),
        ),
        (
            "ct-w4",
            "model.norm.weight is missing",
            Box::new(|t| {
                t.retain(|(name, _)| name != "model.norm.weight");
            }),
        ),
    ];
    let count = cases.len();
    for (number, (name, expected, change)) in cases.into_iter().enumerate() {
        let path = dir.path().join(format!("{number}-{name}"));
        changed(name, &path, &*change, &|_| {});
        let found = verify::run(&path, None, false).unwrap();
        let problems: Vec<&str> = found.findings.iter().map(|f| f.problem.as_str()).collect();
        assert!(
            problems.iter().any(|p| p.contains(expected)),
            "{name}: {expected}: {problems:?}"
        );
        assert!(problems.iter().all(|p| p.lines().count() == 1), "{problems:?}");
    }
    assert_eq!(count, 12);
}

/// Columns of compressed-tensors in the order of `weight_g_idx`, which today's library writes no more: by the formula.
#[test]
fn columns_may_belong_to_any_group() {
    let dir = tempfile::tempdir().unwrap();
    let (n, k) = (64, 128);
    let groups: Vec<u32> = (0..k as u32).map(|column| column * 7 % 128 / 32).collect();
    let mut order = index(k, 0);
    order.bytes = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let mut scales = Vec::new();
    let all = read_model(&golden("ct-w4").join("model.safetensors"));
    let stored = &all
        .iter()
        .find(|(name, _)| *name == format!("{MODULE}.weight_scale"))
        .unwrap()
        .1;
    assert_eq!(stored.shape, [n, 4]);
    scales.extend(FloatDtype::F16.widen(&stored.bytes));
    changed(
        "ct-w4",
        dir.path(),
        &|t| t.push((format!("{MODULE}.weight_g_idx"), order.clone())),
        &|_| {},
    );
    let name = format!("{MODULE}.weight");
    let plain = import::open(&golden("ct-w4")).unwrap().unwrap();
    let plain = plain.values(plain.tensor(&name).unwrap()).unwrap();
    let model = import::open(dir.path()).unwrap().unwrap();
    let got = model.values(model.tensor(&name).unwrap()).unwrap();
    let mut moved = 0;
    for row in 0..n {
        for column in 0..k {
            let scale = |group: usize| scales[row * 4 + group];
            let code = (plain[row * k + column] / scale(column / 32)).round();
            let expected = code * scale(groups[column] as usize);
            assert_eq!(got[row * k + column], expected, "{row} {column}");
            moved += usize::from(groups[column] as usize != column / 32);
        }
    }
    assert!(moved > n * k / 2);
    // GPTQ has a place for them.
    let out = dir.path().join("gptq");
    let gptq = qtool_formats::export::find("gptq").unwrap();
    qtool::export::run(dir.path(), gptq, &out, false, 5_000_000_000, false).unwrap();
    let again = import::open(&out).unwrap().unwrap();
    assert_eq!(again.values(again.tensor(&name).unwrap()).unwrap(), got);
}
