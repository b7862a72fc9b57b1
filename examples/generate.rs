//! Makes a checkpoint of any size for benchmarks: the tensors of a Llama-like model, normal random
//! weights from a fixed seed, or with `--sparse` all zeros in a file that takes no disk space.
//!
//! ```text
//! cargo run --release --example generate -- FOLDER --gigabytes 1 [--sparse]
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use half::bf16;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 8192;
const KV: usize = 256;
const HEAD: usize = 64;
const VOCABULARY: usize = 32_000;

fn layer(i: usize) -> Vec<(String, Vec<usize>)> {
    let shapes: [(&str, &[usize]); 9] = [
        ("input_layernorm", &[HIDDEN]),
        ("self_attn.q_proj", &[HIDDEN, HIDDEN]),
        ("self_attn.k_proj", &[KV, HIDDEN]),
        ("self_attn.v_proj", &[KV, HIDDEN]),
        ("self_attn.o_proj", &[HIDDEN, HIDDEN]),
        ("post_attention_layernorm", &[HIDDEN]),
        ("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]),
        ("mlp.up_proj", &[INTERMEDIATE, HIDDEN]),
        ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
    ];
    shapes
        .map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape.to_vec()))
        .to_vec()
}

fn config(layers: usize) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HIDDEN / HEAD,
        "num_key_value_heads": KV / HEAD,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
    })
}

/// A table of normal numbers with deviation 0.02; weights walk through it at odd strides.
fn table() -> Vec<[u8; 2]> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..1 << 22)
        .map(|_| bf16::from_f64(normal() * 0.02).to_le_bytes())
        .collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let folder = PathBuf::from(
        args.first()
            .ok_or("usage: generate FOLDER --gigabytes N [--sparse]")?,
    );
    let after = |flag: &str| args.iter().position(|a| a == flag).and_then(|i| args.get(i + 1));
    let gigabytes: f64 = after("--gigabytes").ok_or("--gigabytes is missing")?.parse()?;
    let sparse = args.iter().any(|a| a == "--sparse");

    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN])];
    let mut bytes = 2 * VOCABULARY * HIDDEN;
    for i in 0.. {
        if i > 0 && bytes as f64 >= gigabytes * 1e9 {
            break;
        }
        let layer = layer(i);
        bytes += layer
            .iter()
            .map(|(_, shape)| 2 * shape.iter().product::<usize>())
            .sum::<usize>();
        tensors.extend(layer);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![HIDDEN]));

    let mut at = 0;
    let mut infos = Vec::new();
    for (name, shape) in &tensors {
        let end = at + 2 * shape.iter().product::<usize>();
        infos.push((
            name.clone(),
            TensorInfo {
                dtype: Dtype::BF16,
                shape: shape.clone(),
                data_offsets: (at, end),
            },
        ));
        at = end;
    }
    let mut header = serde_json::to_vec(&Metadata::new(None, infos)?)?;
    header.resize(header.len().next_multiple_of(8), b' ');

    fs::create_dir_all(&folder)?;
    let layers = tensors.len() / layer(0).len();
    fs::write(folder.join("config.json"), format!("{:#}\n", config(layers)))?;
    let mut file = BufWriter::with_capacity(8 << 20, File::create(folder.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    if sparse {
        file.flush()?;
        file.get_ref().set_len((8 + header.len() + at) as u64)?;
    } else {
        let table = table();
        for (i, (_, shape)) in tensors.iter().enumerate() {
            for (row, _) in (0..shape.iter().product::<usize>()).step_by(2048).enumerate() {
                let from = (i * 7919 + row * 104_729) % (table.len() - 2048);
                file.write_all(table[from..from + 2048].as_flattened())?;
            }
        }
        file.flush()?;
    }
    println!(
        "{}: {} tensors, {:.2} GB",
        folder.display(),
        tensors.len(),
        at as f64 / 1e9
    );
    Ok(())
}
