//! Bytes and values of exports against golden files born from the formats' own libraries.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool_calib::METHODS;
use qtool_calib::options::PartialOptions;
use qtool_formats::export::LINEAR_FORMATS;
use qtool_formats::export::linears::lay_out;
use qtool_formats::packing::ggml::{GgmlType, pack_k};
use qtool_formats::scheme::{AffineScheme, KQuant};
use qtool_formats::weight::kquant::KScales;
use qtool_formats::weight::nested::{Nested, NestedScales};
use qtool_formats::weight::{AffineWeight, KWeight, Nf4Weight};
use qtool_formats::{Dtype, FloatDtype, QuantizedWeight, Scheme};
use qtool_kernels::Isa;

use crate::model::{Tensor, read_model};

/// The tensors of a golden file, by case and name.
fn golden(name: &str) -> BTreeMap<String, BTreeMap<String, Tensor>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/exports")
        .join(format!("{name}.safetensors"));
    let mut cases: BTreeMap<String, BTreeMap<String, Tensor>> = BTreeMap::new();
    for (name, tensor) in read_model(&path) {
        let (case, key) = name.split_once('/').unwrap();
        cases
            .entry(case.to_owned())
            .or_default()
            .insert(key.to_owned(), tensor);
    }
    cases
}

/// The neutral weight of a golden case.
fn golden_weight(scheme: &str, case: &BTreeMap<String, Tensor>) -> QuantizedWeight {
    let (codes, n, k) = (
        &case["codes"].bytes,
        case["codes"].shape[0],
        case["codes"].shape[1],
    );
    let scales = || FloatDtype::F32.widen(&case["scales"].bytes);
    let zeros = case.get("zeros").map(|z| z.bytes.clone()).unwrap_or_default();
    match AffineScheme::parse(scheme) {
        Some(scheme) => {
            QuantizedWeight::Affine(AffineWeight::new(scheme, n, k, codes.clone(), scales(), zeros).unwrap())
        }
        None if scheme.ends_with("-k") => QuantizedWeight::K(k_weight(scheme, case)),
        None if case.contains_key("nested") => {
            let float = |name: &str| FloatDtype::F32.widen(&case[name].bytes);
            let nested = Nested::new(float("nested"), float("offset")[0]).unwrap();
            let scales = NestedScales::new(0, case["scales"].bytes.clone(), Arc::new(nested)).unwrap();
            QuantizedWeight::Nf4(Nf4Weight::double(n, k, codes.clone(), scales).unwrap())
        }
        None => QuantizedWeight::Nf4(Nf4Weight::new(n, k, codes.clone(), scales()).unwrap()),
    }
}

fn k_weight(scheme: &str, case: &BTreeMap<String, Tensor>) -> KWeight {
    let Scheme::K(kind) = Scheme::parse(scheme).unwrap() else {
        panic!("{scheme}")
    };
    let halves = |name: &str| {
        let values = FloatDtype::F16.widen(&case[name].bytes);
        values.into_iter().map(half::f16::from_f32).collect()
    };
    let numbers = KScales {
        scales: case["scales"].bytes.clone(),
        mins: case["mins"].bytes.clone(),
        super_scales: halves("super_scales"),
        super_mins: halves("super_mins"),
    };
    let (codes, shape) = (&case["codes"].bytes, &case["codes"].shape);
    KWeight::new(kind, shape[0], shape[1], codes.clone(), numbers).unwrap()
}

/// Asserts that our values, rounded to the type the library decodes to, are the library's.
fn assert_values(what: &str, weight: &QuantizedWeight, theirs: &Tensor) {
    let dtype = FloatDtype::from_dtype(theirs.dtype).unwrap();
    let (n, k) = weight.dims();
    let theirs = dtype.widen(&theirs.bytes);
    let mut row = vec![0f32; k];
    for i in 0..n {
        weight.dequantize_row(i, &mut row);
        let ours: Vec<f32> = row.iter().map(|&v| dtype.round(v)).collect();
        assert_eq!(ours, theirs[i * k..(i + 1) * k], "{what}, row {i}");
    }
}

#[test]
fn bytes_are_those_of_the_formats_own_libraries() {
    let mut cases = 0;
    for format in LINEAR_FORMATS {
        for (scheme, case) in golden(format.name()) {
            let what = format!("{} {scheme}", format.name());
            let weight = golden_weight(&scheme, &case);
            let source = case.get("source").map_or(Dtype::BF16, |source| source.dtype);
            let ours = lay_out(*format, &weight, source).unwrap();
            let theirs = case.keys().filter(|key| key.starts_with("out.")).count();
            assert_eq!(ours.len(), theirs, "{what}");
            for (form, bytes) in ours {
                let expected = &case[&format!("out.{}", form.suffix)];
                assert_eq!(
                    (form.dtype, &form.shape),
                    (expected.dtype, &expected.shape),
                    "{what} {}",
                    form.suffix
                );
                assert!(bytes == expected.bytes, "{what} {}: other bytes", form.suffix);
            }
            assert_values(&what, &weight, &case["values"]);
            cases += 1;
        }
    }
    assert_eq!(cases, 9 + 2 + 5 + 5 + 3 + 4);
}

/// Our quantizer chooses the codes bitsandbytes chose.
#[test]
fn nf4_codes_are_those_of_bitsandbytes() {
    let quantizer = |name: &str| {
        let method = METHODS.iter().find(|m| m.name == name).unwrap();
        let options = PartialOptions::parse(&format!("method:{name}")).unwrap();
        (method.build)(&options.complete(4).unwrap()).unwrap()
    };
    let (plain, double) = (quantizer("nf4"), quantizer("nf4-dq"));
    let mut compared = 0;
    for (name, case) in golden("bnb-nf4") {
        let source = &case["source"];
        let (n, k) = (source.shape[0], source.shape[1]);
        let x = FloatDtype::from_dtype(source.dtype).unwrap().widen(&source.bytes);
        let theirs = golden_weight(&name, &case);
        compared += 1;
        if theirs.scheme() == Scheme::Nf4 {
            assert_eq!(plain.quantize(Isa::best(), &x, n, k).unwrap(), theirs, "{name}");
            continue;
        }
        let ours = double.quantize(Isa::best(), &x, n, k).unwrap();
        assert_eq!(ours.codes(), theirs.codes(), "{name}");
        // The library's mean is a sum of f32 in an order of its own: one unit in the last place apart at most.
        let (QuantizedWeight::Nf4(ours), QuantizedWeight::Nf4(theirs)) = (ours, theirs) else {
            panic!("{name}")
        };
        let (ours, theirs) = (ours.nested().unwrap(), theirs.nested().unwrap());
        let offset = theirs.nested().offset();
        let apart = ours.nested().offset().to_bits().abs_diff(offset.to_bits());
        assert!(apart <= 1, "{name}: {} {offset}", ours.nested().offset());
        // Around the same mean everything is the same.
        let magnitudes: Vec<f32> = x
            .chunks_exact(64)
            .map(|group| group.iter().fold(0f32, |m, x| m.max(x.abs())))
            .collect();
        let around = qtool_calib::nested::around(offset, &magnitudes).unwrap();
        assert_eq!(&around, theirs, "{name}");
    }
    assert_eq!(compared, 4);
}

#[test]
fn blocks_are_those_of_gguf() {
    let mut kinds = Vec::new();
    for (scheme, case) in golden("gguf") {
        let weight = golden_weight(&scheme, &case);
        let mut blocks = Vec::new();
        let kind = match &weight {
            QuantizedWeight::Affine(weight) => {
                let kind = GgmlType::of(weight.scheme(), weight.dims().1).unwrap();
                kind.pack(weight, &mut blocks);
                kind
            }
            QuantizedWeight::K(weight) => {
                pack_k(weight, &mut blocks);
                match weight.kind() {
                    KQuant::Q4 => GgmlType::Q4K,
                    KQuant::Q2 => GgmlType::Q2K,
                }
            }
            other => panic!("{}", other.scheme()),
        };
        assert_eq!(
            u64::from(kind.id()).to_le_bytes()[..],
            case["out.kind"].bytes,
            "{scheme}"
        );
        assert!(
            blocks == case["out.blocks"].bytes,
            "{scheme} as {}: other bytes",
            kind.name()
        );
        assert_values(&scheme, &weight, &case["values"]);
        kinds.push(kind.name());
    }
    assert_eq!(kinds.len(), 12);
    kinds.sort_unstable();
    kinds.dedup();
    assert_eq!(kinds, ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q8_0"]);
}
