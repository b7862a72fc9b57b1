//! The layout by hand, its picture and formula executed, and the known answers.

use sha2::{Digest, Sha256};

use super::*;

/// The picture of the file's head, one character per bit, bit 14 first.
const PICTURE: [&str; VECTOR] = [
    "000000.........",
    "...111111......",
    "......222222...",
    ".........333333",
];

#[test]
fn windows_of_a_code_by_hand() {
    // 0b000_000_000_000_000: every window 0, minus 32.
    assert_eq!(windows(0), [-32; 4]);
    // 0b100_000_000_000_000: only the highest bit of w0.
    assert_eq!(windows(0x4000), [0, -32, -32, -32]);
    // 0b000_001_000_000_000: lowest of w0 (1) and bit 3 of w1 (8).
    assert_eq!(windows(0x0200), [-31, -24, -32, -32]);
    assert_eq!(windows(MAX_CODE), [31; 4]);
}

#[test]
fn the_picture_is_the_shift_formula() {
    for code in 0..=MAX_CODE {
        let drawn = PICTURE.map(|line| {
            let bits = line.chars().zip((0..15).rev()).filter(|(c, _)| *c != '.');
            bits.fold(0, |window, (_, bit)| (window << 1) | ((code >> bit) & 1)) - ZERO_POINT
        });
        assert_eq!(drawn, windows(code).map(i32::from));
    }
}

#[test]
fn codes_past_fifteen_bits_wrap() {
    for code in [0x8000, 0x1_2345, -1, -32768, i32::MAX, i32::MIN] {
        assert_eq!(windows(code), windows(code & MAX_CODE));
    }
}

#[test]
fn code_of_a_byte_by_hand() {
    for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
        assert_eq!(path.code(11, 128.0, 0.0), 1408);
        assert_eq!(path.code(11, 120.0, 604.0), 1924);
        assert_eq!(path.code(11, 128.5, 0.0), 1414); // 1413.5 + 0.5, floor
        assert_eq!(path.code(1, -0.75, 0.0), -1); // -0.25, floor
        assert_eq!(path.code(1, f32::NAN, 0.0), 0);
    }
}

#[test]
fn locals_pack_the_even_group_high() {
    assert_eq!(pack_locals(&[9, 3]).unwrap(), [0x93]);
    assert_eq!(pack_locals(&[9, 3, 15]).unwrap(), [0x93, 0xF0]);
    assert!(pack_locals(&[]).unwrap().is_empty());
    assert_eq!(unpack_locals(&[0x93, 0xF0], 3).unwrap(), [9, 3, 15]);
    assert!(pack_locals(&[16]).is_err());
    assert!(unpack_locals(&[0x93], 3).is_err());
}

#[test]
fn decode_of_one_group_by_hand() {
    // code 0x4000 for every byte: weights 0, -32, -32, -32, local 2, super 0.5.
    let channel = Channel {
        super_scale: bf16::from_f32(0.5),
        code_scale: 0.0,
        code_zp: 16384.0,
    };
    for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
        let mut out = [bf16::NAN; 64];
        decode_row(&[7; 16], &[0x20], channel, path, &mut out).unwrap();
        for four in out.chunks_exact(4) {
            assert_eq!([0.0, -32.0, -32.0, -32.0], [0, 1, 2, 3].map(|i| four[i].to_f32()));
        }
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let channel = Channel {
        super_scale: bf16::ONE,
        code_scale: 1.0,
        code_zp: 0.0,
    };
    let decode = |codes: usize, locals: usize, k: usize| {
        let (codes, locals) = (vec![0; codes], vec![0; locals]);
        decode_row(
            &codes,
            &locals,
            channel,
            Arithmetic::Unzip,
            &mut vec![bf16::ZERO; k],
        )
    };
    assert!(decode(48, 2, 192).is_ok());
    for (codes, locals, k) in [(0, 0, 0), (24, 1, 96), (47, 2, 192), (48, 1, 192), (48, 3, 192)] {
        assert!(decode(codes, locals, k).is_err(), "{codes} {locals} {k}");
    }
}

#[test]
fn relayout_is_a_transpose_and_its_own_way_back() {
    let rows = [1, 2, 3, 4, 5, 6]; // (2, 3)
    assert_eq!(rows_to_fastdeploy(&rows, 2, 3).unwrap(), [1, 4, 2, 5, 3, 6]);
    let long: Vec<u8> = (0..130 * 67).map(|i| (i % 251) as u8).collect();
    let there = rows_to_fastdeploy(&long, 130, 67).unwrap();
    assert_eq!(there[66 * 130 + 129], long[129 * 67 + 66]);
    assert_eq!(fastdeploy_to_rows(&there, 130, 67).unwrap(), long);
    assert!(rows_to_fastdeploy(&rows, 2, 4).is_err());
    assert!(fastdeploy_to_rows(&rows, usize::MAX, 3).is_err());
}

#[test]
fn fastdeploy_refuses_with_a_reason() {
    assert_eq!(fastdeploy_refusal(256, 1536), None);
    assert!(fastdeploy_refusal(256, 192).unwrap().contains("128"));
    assert!(fastdeploy_refusal(8, 128).unwrap().contains("256"));
    assert!(fastdeploy_refusal(0, 128).is_some() && fastdeploy_refusal(256, 0).is_some());
}

/// A known-answer vector: K = 128, N = 8, bytes by formula, in FastDeploy's order.
struct Vector {
    channel: fn(u16) -> Channel,
    unzip: &'static str,
    gemm: &'static str,
}

const V1: Vector = Vector {
    channel: |n| Channel {
        super_scale: bf16::from_bits(0x3B00 + 16 * n),
        code_scale: 128.0 - f32::from(n),
        code_zp: 3.0 * f32::from(n),
    },
    unzip: "cd92eebca2eab935e9b22505d15b2d0f44ebdbb869d60dd9e3dd2d650447cde8",
    gemm: "cd92eebca2eab935e9b22505d15b2d0f44ebdbb869d60dd9e3dd2d650447cde8",
};
const V2: Vector = Vector {
    channel: |n| Channel {
        super_scale: bf16::from_bits(0x3B00 + 16 * n),
        code_scale: 128.5 - 0.25 * f32::from(n),
        code_zp: 0.25 * f32::from(n),
    },
    unzip: "95654c7fca7846d3482712f321c40d63666f0efe612ae28cb595911a307b7742",
    gemm: "95654c7fca7846d3482712f321c40d63666f0efe612ae28cb595911a307b7742",
};
const V3: Vector = Vector {
    channel: |n| Channel {
        super_scale: bf16::from_bits(0x3B01 + 15 * n),
        code_scale: 120.0,
        code_zp: 604.0 + f32::from(n),
    },
    unzip: "96e7e6135cf7eac562c8f78fcad912eb3079ae31062a1342cf6149dfd03b7f08",
    gemm: "32e8c262dd0e37d7ffb633cb6ef2fdcaa34139dba2ef7b48b6f58dabb85bbbb9",
};

fn sha256(bytes: impl AsRef<[u8]>) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The decoded vector as (128, 8) bf16 bits, FastDeploy's orientation.
fn decoded(vector: &Vector, arithmetic: Arithmetic) -> Vec<u16> {
    let (k, n) = (128, 8);
    let on_disk: Vec<u8> = (0..k / 4)
        .flat_map(|r| (0..n).map(move |n| ((37 * r + 101 * n + 11) % 256) as u8))
        .collect();
    assert_eq!(
        sha256(&on_disk),
        "af458cdaee5b3441dc1a93a7aa38ac6b75c4079d871db81a7acbf577b51d96e1"
    );
    let codes = fastdeploy_to_rows(&on_disk, n, k / 4).unwrap();
    let mut bits = vec![0; k * n];
    for column in 0..n {
        let locals = [((29 * column + 147) % 256) as u8];
        let mut out = vec![bf16::ZERO; k];
        let codes = &codes[column * k / 4..(column + 1) * k / 4];
        decode_row(
            codes,
            &locals,
            (vector.channel)(column as u16),
            arithmetic,
            &mut out,
        )
        .unwrap();
        for (row, value) in out.iter().enumerate() {
            bits[row * n + column] = value.to_bits();
        }
    }
    bits
}

#[test]
fn known_answers_on_both_paths() {
    for vector in [V1, V2, V3] {
        for (arithmetic, answer) in [(Arithmetic::Unzip, vector.unzip), (Arithmetic::Gemm, vector.gemm)] {
            let bytes: Vec<u8> = decoded(&vector, arithmetic)
                .iter()
                .flat_map(|b| b.to_le_bytes())
                .collect();
            assert_eq!(sha256(&bytes), answer);
        }
    }
}

#[test]
fn known_answers_readable() {
    let bytes = [11, 112, 213, 58, 159, 4, 105, 206];
    let codes = |vector: Vector, arithmetic: Arithmetic| {
        [0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| {
            let channel = (vector.channel)(n as u16);
            arithmetic.code(bytes[n], channel.code_scale, channel.code_zp)
        })
    };
    for path in [Arithmetic::Unzip, Arithmetic::Gemm] {
        assert_eq!(
            codes(V1, path),
            [1408, 14227, 26844, 7259, 19728, 507, 12828, 24947]
        );
        assert_eq!(
            codes(V2, path),
            [1414, 14364, 27265, 7410, 20274, 510, 13337, 26112]
        );
        assert_eq!(
            codes(V3, path),
            [1924, 14045, 26166, 7567, 19688, 1089, 13210, 25331]
        );
        let v1 = decoded(&V1, path);
        let value = |k: usize| bf16::from_bits(v1[k * 8]).to_f32();
        assert_eq!(
            [0, 1, 2, 3].map(value),
            [-0.527_343_75, -0.175_781_25, 0.281_25, -0.562_5]
        );
        assert_eq!(
            [64, 65, 66, 67].map(value),
            [-0.058_593_75, 0.128_906_25, 0.093_75, -0.187_5]
        );
    }
    assert_eq!(windows(1408), [-30, -10, 16, -32]);
    let (a, b) = (decoded(&V3, Arithmetic::Unzip), decoded(&V3, Arithmetic::Gemm));
    assert_eq!((a[0], b[0]), (0xBF04, 0xBF03));
    assert_eq!(a.iter().zip(&b).filter(|(a, b)| a != b).count(), 157);
    assert!(a.iter().zip(&b).all(|(a, b)| a.abs_diff(*b) <= 1));
}

#[test]
fn the_closed_formula_is_the_loop() {
    let (k, channel) = (
        192,
        Channel {
            super_scale: bf16::from_f32(0.0075),
            code_scale: 113.0,
            code_zp: 421.0,
        },
    );
    let codes: Vec<u8> = (0..k / 4).map(|i| (i * 91 + 5) as u8).collect();
    let locals = pack_locals(&[3, 14, 7]).unwrap();
    let mut out = vec![bf16::ZERO; k];
    decode_row(&codes, &locals, channel, Arithmetic::Unzip, &mut out).unwrap();
    for (i, value) in out.iter().enumerate() {
        let code = i32::from(codes[i / 4]) * 113 + 421;
        let w = ((code >> (9 - 3 * (i % 4))) & 63) - 32;
        let local = (locals[i / 128] >> (if (i / 64) % 2 == 0 { 4 } else { 0 })) & 15;
        let exact = w as f32 * f32::from(local) * channel.super_scale.to_f32();
        assert_eq!(*value, bf16::from_f32(exact));
    }
}
