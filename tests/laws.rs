//! One law, every implementation: functions over the registries, so that whatever is added there
//! comes under them with no further edit.

use qtool_calib::METHODS;
use qtool_calib::measure::{BlockFigures, measure};
use qtool_calib::options::PartialOptions;
use qtool_formats::export::EXPORTERS;
use qtool_formats::packing::PACKINGS;
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::Isa;

use crate::model::Normal;

/// Relative MSE of Gaussian rows that no method may exceed, by code width: plain rounding in
/// groups of 64 measured 0.01056 (4 bits), of whole rows of 256 at 8 bits 0.00005; plus a third.
const CEILING: [(u8, f64); 4] = [(2, 0.14), (3, 0.08), (4, 0.014), (8, 0.00007)];
/// The same for 2-bit codes that are rounded one by one, plain or with clip search.
const CEILING_AFFINE_2: f64 = 0.75;

#[test]
fn unpack_after_pack_is_identity() {
    for packing in PACKINGS {
        let mut cases = 0;
        let rows = 5 * packing.row_multiple();
        for bits in 1..=8u8 {
            for k in [1usize, 7, 31, 32, 33, 64, 100, 127, 129, 192] {
                let codes: Vec<u8> = (0..rows * k)
                    .map(|i| ((i * 29 + 3) % (1 << bits)) as u8)
                    .collect();
                let (mut packed, mut back) = (Vec::new(), Vec::new());
                // Some layouts are for one width and whole tiles only.
                if packing.pack(bits, k, &codes, &mut packed).is_err() {
                    assert_ne!(packing.name(), "lsb-rows");
                    continue;
                }
                assert_eq!(
                    packed.len(),
                    rows * packing.row_bytes(bits, k),
                    "{} declares its size",
                    packing.name()
                );
                packing.unpack(bits, k, &packed, &mut back).unwrap();
                assert_eq!(back, codes, "{} {bits} bits, rows of {k}", packing.name());
                cases += 1;
            }
        }
        let expected = match packing.name() {
            "lsb-rows" => 80,
            "high-nibbles" => 10,
            _ => 2,
        };
        assert_eq!(cases, expected, "{}", packing.name());
    }
}

/// Every method at every width, grid and grouping it is offered for.
fn each_quantizer(mut law: impl FnMut(&str, u8, &dyn qtool_calib::Quantizer)) {
    let mut cases = 0;
    for method in METHODS {
        for (bits, _) in CEILING.iter().filter(|(bits, _)| method.bits.contains(bits)) {
            let rests: &[&str] = match method.name {
                "ccq" => &[",effort:fast", ",effort:default"],
                "ccq25" | "nf4" | "nf4-dq" | "q4-k" | "q2-k" => &[""],
                _ => &[
                    ",group:64,grid:sym",
                    ",group:64,grid:zp",
                    ",group:row,grid:sym",
                    ",group:32,grid:zp,scale:f16",
                    ",group:32,grid:zp,scale:f16,scale-bits:7",
                    ",group:32,grid:sym,scale:f32,scale-bits:8",
                ],
            };
            let bits = *bits;
            for rest in rests {
                let text = format!("bits:{bits},method:{}{rest}", method.name);
                let options = PartialOptions::parse(&text).unwrap().complete(bits).unwrap();
                law(&text, bits, (method.build)(&options).unwrap().as_ref());
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 3 * 4 * 6 + 2 + 1 + 2 + 2);
}

fn relative_mse(quantizer: &dyn qtool_calib::Quantizer, x: &[f32], n: usize) -> f64 {
    let weight = quantizer.quantize(Isa::best(), x, n, x.len() / n).unwrap();
    let mut figures = BlockFigures::default();
    measure(Isa::best(), x, &weight, &mut figures);
    figures.sums.relative_mse()
}

#[test]
fn errors_stay_below_the_ceiling_of_their_width() {
    let x = Normal::new(1).take(64 * 256, 0.02);
    each_quantizer(|name, bits, quantizer| {
        let ceiling = CEILING.iter().find(|c| c.0 == bits).unwrap().1;
        // A whole row has one scale: at 4 bits, that costs more.
        let ceiling = if bits == 2 && !name.contains("ccq") {
            CEILING_AFFINE_2
        } else if name.contains("group:row") && bits < 8 {
            ceiling * 1.4
        } else {
            ceiling
        };
        let mse = relative_mse(quantizer, &x, 64);
        assert!(mse < ceiling, "{name}: {mse}");
    });
}

#[test]
fn odd_rows_decode_to_finite_values_and_zeros_to_zeros() {
    let zeros = vec![0.0f32; 256];
    let constant = vec![-0.37f32; 256];
    let mut outlier = Normal::new(2).take(256, 1e-3);
    outlier[200] = 50.0;
    let tiny = vec![1e-41f32; 256];
    let huge = Normal::new(3).take(256, 1e37);
    let mixed: Vec<f32> = [zeros.as_slice(), &constant].concat();
    each_quantizer(|name, _, quantizer| {
        for (what, x) in [
            ("zeros", &zeros),
            ("constant", &constant),
            ("outlier", &outlier),
            ("tiny", &tiny),
            ("huge", &huge),
            ("mixed", &mixed),
        ] {
            let n = x.len() / 256;
            match quantizer.quantize(Isa::best(), x, n, 256) {
                Ok(weight) => {
                    let mut row = vec![f32::NAN; 256];
                    weight.dequantize_row(0, &mut row);
                    assert!(row.iter().all(|v| v.is_finite()), "{name} {what}");
                    if ["zeros", "mixed"].contains(&what) {
                        assert_eq!(row, zeros, "{name} {what}");
                    }
                }
                Err(error) => {
                    let halves = name.contains("f16") || name.ends_with("-k");
                    assert!(what == "huge" && halves, "{name} {what}: {error}");
                    assert!(error.to_string().contains("--scale-dtype"), "{error}");
                }
            }
        }
    });
}

#[test]
fn non_finite_values_are_refused_with_their_place() {
    each_quantizer(|name, _, quantizer| {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![0.5f32; 512];
            x[256 + 77] = bad;
            let message = quantizer
                .quantize(Isa::best(), &x, 2, 256)
                .unwrap_err()
                .to_string();
            assert_eq!(message, format!("row 1, column 77 is {bad}"), "{name}");
        }
    });
}

#[test]
fn rows_are_independent_and_every_instruction_set_agrees() {
    let x = Normal::new(4).take(8 * 256, 0.1);
    assert!(!Isa::available().is_empty());
    each_quantizer(|name, _, quantizer| {
        let whole = quantizer.quantize(Isa::best(), &x, 8, 256).unwrap();
        for isa in Isa::available() {
            assert_eq!(
                quantizer.quantize(isa, &x, 8, 256).unwrap(),
                whole,
                "{name} on {isa}"
            );
        }
        let alone = quantizer
            .quantize(Isa::best(), &x[3 * 256..4 * 256], 1, 256)
            .unwrap();
        let row = whole.codes().len() / 8;
        assert_eq!(alone.codes(), &whole.codes()[3 * row..4 * row], "{name}");
    });
}

/// A product of seven significant bits and a zero point of four is an F16 value.
#[test]
fn coarse_scales_times_zero_points_are_halves() {
    let mut cases = 0;
    let x: Vec<f32> = [0.02, 3e-6, 20_000.0]
        .iter()
        .flat_map(|&size| Normal::new(6).take(8 * 256, size))
        .collect();
    each_quantizer(|name, bits, quantizer| {
        if !name.contains("scale-bits:7") || bits > 4 {
            return;
        }
        let QuantizedWeight::Affine(weight) = quantizer.quantize(Isa::best(), &x, 24, 256).unwrap() else {
            panic!("{name} is affine");
        };
        for (scale, zero) in weight.scales().iter().zip(weight.zeros()) {
            for value in [*scale, scale * f32::from(*zero)] {
                let half = FloatDtype::F16.round(value);
                assert!(value == half || value > 65_504.0, "{name}: {value:e}");
            }
            cases += 1;
        }
    });
    assert_eq!(cases, 3 * 3 * 24 * 8);
}

#[test]
fn registry_names_are_unique_and_printable() {
    let lists: [Vec<&str>; 3] = [
        METHODS.iter().map(|m| m.name).collect(),
        PACKINGS.iter().map(|p| p.name()).collect(),
        EXPORTERS.iter().map(|e| e.name()).collect(),
    ];
    for names in lists {
        assert!(!names.is_empty());
        for (i, name) in names.iter().enumerate() {
            assert!(
                !name.is_empty()
                    && name
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            );
            assert!(!names[..i].contains(name), "{name} twice");
        }
    }
    assert!(METHODS.iter().all(|m| !m.summary.is_empty()));
    assert!(EXPORTERS.iter().all(|e| !e.summary().is_empty()));
}
