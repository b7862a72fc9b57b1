//! Models split for tensor parallelism: a whole artifact per rank, whose shares make up the model.

use std::collections::BTreeMap;

use qtool::fastdeploy::Request;
use qtool_formats::{Dtype, export};

use super::{assert_sound, make, request, stored};
use crate::cli::{assert_error, qtool};
use crate::ernie::Ernie;

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
