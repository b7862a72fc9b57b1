//! `bf16-gemm`: 2-bit weights as the matrix product of serving rounds them, all others as in `bf16`.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use qtool_formats::artifact::Stored;
use qtool_formats::packing::wint2::{Arithmetic, Channel, decode_row, fastdeploy_to_rows};
use qtool_formats::{Scheme, export};

use super::{make, request, stored};
use crate::ernie::Ernie;

/// A number that grows by one from each bf16 value to the next larger one; both zeros are 0.
fn step(bits: &[u8]) -> i32 {
    let bits = i32::from(u16::from_le_bytes([bits[0], bits[1]]));
    if bits < 0x8000 { bits } else { 0x8000 - bits }
}

#[test]
fn the_second_rounding_is_that_of_serving() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    Ernie::wide_moe().write(&at("model"));
    let mut request = request(2);
    request.wanted.w4_until = Some(1);
    let manifest = make(&at("model"), &at("out"), &request).remove(0);
    let decoded = |name: &str| -> BTreeMap<_, _> {
        let exporter = export::find(name).unwrap();
        qtool::export::run(&at("out"), exporter, &at(name), false, 1 << 40, false).unwrap();
        stored(Path::new(&at(name)))
    };
    let (once, twice) = (decoded("bf16"), decoded("bf16-gemm"));
    assert_eq!(once.len(), twice.len());
    let parts = stored(&at("out"));
    let (mut weights, mut values, mut apart) = (0, 0, 0);
    for record in &manifest.tensors {
        let (once, twice) = (&once[&record.name], &twice[&record.name]);
        let Stored::Quantized(q) = record.stored.clone() else {
            assert!(once == twice, "{}", record.name);
            continue;
        };
        if q.scheme != Scheme::Ccq {
            assert!(once == twice, "{}", record.name);
            continue;
        }
        assert_eq!((once.0, &once.1), (twice.0, &twice.1));
        let (n, k) = (q.rows, q.columns);
        let part = |suffix: &str| &parts[&record.name.replace(".weight", suffix)].2;
        let codes = fastdeploy_to_rows(part(".quant_weight"), n, k / 4).unwrap();
        let locals = fastdeploy_to_rows(part(".weight_scale"), n, k / 128).unwrap();
        let f32_of = |suffix: &str, row: usize| f32::from_le_bytes(part(suffix).as_chunks().0[row]);
        let mut served = vec![bf16::ZERO; k];
        for row in 0..n {
            let channel = Channel {
                super_scale: bf16::from_le_bytes(part(".super_scales").as_chunks().0[row]),
                code_scale: f32_of(".code_scale", row),
                code_zp: f32_of(".code_zp", row),
            };
            let (codes, locals) = (
                &codes[row * k / 4..][..k / 4],
                &locals[row * k / 128..][..k / 128],
            );
            decode_row(codes, locals, channel, Arithmetic::Gemm, &mut served).unwrap();
            for (column, value) in served.iter().enumerate() {
                let place = 2 * (column * n + row)..2 * (column * n + row) + 2;
                let (once, twice) = (&once.2[place.clone()], &twice.2[place]);
                assert_eq!(twice, value.to_le_bytes(), "{} {row} {column}", record.name);
                let steps = step(once).abs_diff(step(twice));
                assert!(steps <= 1, "{} {row} {column}: {steps}", record.name);
                values += 1;
                apart += steps;
            }
        }
        weights += 1;
    }
    // Layers 2 and 3, four experts, two weights each.
    assert_eq!(weights, 16);
    assert!(apart > 0 && apart < values / 2, "{apart} of {values}");
}
