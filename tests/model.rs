//! Checkpoints for tests: the bundled sample models, and small ones made from a seed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::{Dtype, FloatDtype};
use safetensors::tensor::TensorView;

/// The bundled trained model of this name.
pub fn sample(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/models")
        .join(name);
    assert!(
        path.join("model.safetensors").is_file(),
        "{} is part of the project",
        path.display()
    );
    path
}

/// Every bundled model.
pub const SAMPLES: [&str; 2] = ["tiny-ernie45", "tiny-ernie45-moe"];

/// A tensor to be stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// `values` in this float type.
    pub fn floats(dtype: FloatDtype, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let mut bytes = Vec::new();
        values.iter().for_each(|&v| dtype.push(v, &mut bytes));
        Self {
            dtype: dtype.dtype(),
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// The matrix with rows and columns exchanged.
    pub fn transposed(&self) -> Self {
        let [n, k] = self.shape[..] else {
            panic!("a matrix")
        };
        let width = self.dtype.bitsize() / 8;
        let at = |row: usize, column: usize| &self.bytes[(row * k + column) * width..][..width];
        let bytes = (0..k)
            .flat_map(|c| (0..n).flat_map(move |r| at(r, c).to_vec()))
            .collect();
        Self {
            dtype: self.dtype,
            shape: vec![k, n],
            bytes,
        }
    }

    /// These matrices on top of each other.
    pub fn stacked(parts: &[Self]) -> Self {
        let shape = vec![parts.iter().map(|p| p.shape[0]).sum(), parts[0].shape[1]];
        assert!(
            parts
                .iter()
                .all(|p| p.shape[1] == shape[1] && p.dtype == parts[0].dtype)
        );
        Self {
            dtype: parts[0].dtype,
            shape,
            bytes: parts.iter().flat_map(|p| p.bytes.clone()).collect(),
        }
    }
}

/// Writes tensors as a single-file model folder with a small config and one side file.
pub fn write_model(folder: &Path, tensors: &[(String, Tensor)]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(
        folder.join("config.json"),
        "{\n  \"model_type\": \"test\",\n  \"torch_dtype\": \"bfloat16\"\n}\n",
    )
    .unwrap();
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    write_file(&folder.join("model.safetensors"), tensors);
}

/// Writes tensors as one safetensors file, by the format's own library.
pub fn write_file(path: &Path, tensors: &[(String, Tensor)]) {
    let views = tensors
        .iter()
        .map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    safetensors::serialize_to_file(views, None::<HashMap<String, String>>, path).unwrap();
}

/// All tensors of a checkpoint.
pub fn read_model(folder: &Path) -> Vec<(String, Tensor)> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let tensors = checkpoint.tensors().map(|t| t.unwrap());
    tensors
        .map(|t| {
            let tensor = Tensor {
                dtype: t.dtype(),
                shape: t.shape().to_vec(),
                bytes: t.bytes().to_vec(),
            };
            (t.name().to_owned(), tensor)
        })
        .collect()
}

/// A generator of normal numbers, the same on every machine.
pub struct Normal(u64);

impl Normal {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    pub fn take(&mut self, count: usize, deviation: f64) -> Vec<f32> {
        let mut next = || {
            (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos() * deviation
        };
        (0..count).map(|_| next() as f32).collect()
    }
}

/// A model of `layers` layers with an embedding, norms, three linear weights of awkward heights,
/// and an integer tensor. Widths are multiples of 64.
pub fn small(seed: u64, layers: usize, dtype: FloatDtype) -> Vec<(String, Tensor)> {
    let mut normal = Normal::new(seed);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = normal.take(shape.iter().product(), 0.05);
        tensors.push((name, Tensor::floats(dtype, shape, &values)));
    };
    add("model.embed_tokens.weight".to_owned(), &[50, 128]);
    for layer in 0..layers {
        add(format!("model.layers.{layer}.input_layernorm.weight"), &[128]);
        add(
            format!("model.layers.{layer}.self_attn.q_proj.weight"),
            &[33, 128],
        );
        add(format!("model.layers.{layer}.mlp.up_proj.weight"), &[192, 128]);
        add(format!("model.layers.{layer}.mlp.down_proj.weight"), &[128, 192]);
    }
    let ids = Tensor {
        dtype: Dtype::I64,
        shape: vec![2],
        bytes: vec![7; 16],
    };
    tensors.push(("model.position_ids".to_owned(), ids));
    tensors
}
