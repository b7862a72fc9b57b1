//! Small ERNIE-4.5 checkpoints made from a seed, dense or with experts, in both name families.

use std::fs;
use std::path::Path;

use qtool_formats::FloatDtype;
use serde_json::{Value, json};

use crate::model::{Normal, Tensor, write_file};
use crate::paddle::to_paddle;

/// A checkpoint in the Hugging Face form.
#[derive(Debug, Clone)]
pub struct Ernie {
    pub config: Value,
    pub tensors: Vec<(String, Tensor)>,
}

const HIDDEN: usize = 128;
const INTERMEDIATE: usize = 256;
const EXPERT: usize = 128;
const VOCAB: usize = 96;
const EXPERTS: usize = 4;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;

impl Ernie {
    /// Two layers without experts; the output head is the embedding.
    pub fn dense() -> Self {
        Self::new(2, None)
    }

    /// A dense layer and three with experts; the output head is a matrix of its own.
    pub fn moe() -> Self {
        Self::new(4, Some(1))
    }

    fn new(layers: usize, first: Option<usize>) -> Self {
        let mut normal = Normal::new(7);
        let mut tensors = Vec::new();
        let mut add = |name: &str, shape: &[usize], dtype: FloatDtype| {
            let values = normal.take(shape.iter().product(), 0.05);
            tensors.push((name.to_owned(), Tensor::floats(dtype, shape, &values)));
        };
        let bf16 = FloatDtype::Bf16;
        add("model.embed_tokens.weight", &[VOCAB, HIDDEN], bf16);
        for layer in 0..layers {
            let at = format!("model.layers.{layer}");
            add(&format!("{at}.input_layernorm.weight"), &[HIDDEN], bf16);
            for (name, n, k) in [
                ("q_proj", HEADS * HEAD_DIM, HIDDEN),
                ("k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
                ("v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
                ("o_proj", HIDDEN, HEADS * HEAD_DIM),
            ] {
                add(&format!("{at}.self_attn.{name}.weight"), &[n, k], bf16);
            }
            add(&format!("{at}.post_attention_layernorm.weight"), &[HIDDEN], bf16);
            let mut blocks = Vec::new();
            if first.is_some_and(|first| layer >= first) {
                add(
                    &format!("{at}.mlp.gate.weight"),
                    &[EXPERTS, HIDDEN],
                    FloatDtype::F32,
                );
                let bias = format!("{at}.mlp.moe_statics.e_score_correction_bias");
                add(&bias, &[1, EXPERTS], FloatDtype::F32);
                blocks.extend((0..EXPERTS).map(|e| (format!("{at}.mlp.experts.{e}"), EXPERT)));
                blocks.push((format!("{at}.mlp.shared_experts"), EXPERT));
            } else {
                blocks.push((format!("{at}.mlp"), INTERMEDIATE));
            }
            for (block, width) in blocks {
                add(&format!("{block}.gate_proj.weight"), &[width, HIDDEN], bf16);
                add(&format!("{block}.up_proj.weight"), &[width, HIDDEN], bf16);
                add(&format!("{block}.down_proj.weight"), &[HIDDEN, width], bf16);
            }
        }
        add("model.norm.weight", &[HIDDEN], bf16);
        let mut config = json!({
            "architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5",
            "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
            "vocab_size": VOCAB, "tie_word_embeddings": first.is_none(), "torch_dtype": "bfloat16",
        });
        if let Some(first) = first {
            add("lm_head.weight", &[VOCAB, HIDDEN], bf16);
            config["architectures"] = json!(["Ernie4_5_MoeForCausalLM"]);
            config["model_type"] = json!("ernie4_5_moe");
            config["moe_num_experts"] = json!(EXPERTS);
            config["moe_intermediate_size"] = json!(EXPERT);
            config["moe_num_shared_experts"] = json!(1);
            config["moe_layer_start_index"] = json!(first);
        }
        Self { config, tensors }
    }

    /// Adds a multi-token prediction block.
    pub fn with_mtp(mut self) -> Self {
        self.config["num_nextn_predict_layers"] = json!(1);
        for name in [
            "model.mtp_block.0.mlp.down_proj.weight",
            "model.mtp_linear_proj.0.weight",
        ] {
            let tensor = Tensor::floats(FloatDtype::Bf16, &[64, 64], &[0.5; 4096]);
            self.tensors.push((name.to_owned(), tensor));
        }
        self
    }

    /// The tensor of this name, to be changed.
    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        let found = self.tensors.iter_mut().find(|(n, _)| n == name);
        &mut found.unwrap_or_else(|| panic!("{name}")).1
    }

    /// Removes the tensors whose name contains `part`, which must be some.
    pub fn without(mut self, part: &str) -> Self {
        let before = self.tensors.len();
        self.tensors.retain(|(name, _)| !name.contains(part));
        assert!(self.tensors.len() < before, "{part}");
        self
    }

    /// Writes the Hugging Face form.
    pub fn write(&self, folder: &Path) {
        write(folder, &self.config, &self.tensors);
    }

    /// Writes the Paddle form.
    pub fn write_paddle(&self, folder: &Path) {
        let mut config = self.config.clone();
        config["dtype"] = config["torch_dtype"].take();
        config.as_object_mut().unwrap().remove("torch_dtype");
        write(folder, &config, &to_paddle(&self.tensors));
    }
}

fn write(folder: &Path, config: &Value, tensors: &[(String, Tensor)]) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.model"), "words").unwrap();
    write_file(&folder.join("model.safetensors"), tensors);
}
