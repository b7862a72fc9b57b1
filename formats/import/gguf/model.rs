//! What makes a checkpoint of a GGUF file: names of tensors as Hugging Face has them, a config with the dimensions, and
//! the order of rows. `bert` and `experts` have what is theirs alone. The reverse of [`crate::export::gguf::model`], whose text says which rows lie in pairs.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::header::{Head, Info, Metadata};
use super::{bert, experts};
use crate::dtype::FloatDtype;
use crate::import::gguf::blocks::Type;
use crate::{FormatError, Result, limits};

/// Factors that rotary frequencies are divided by, of models that scale them.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Architecture of GGUF, `model_type` of Hugging Face and its class there, of those that run here.
const ARCHITECTURES: [(&str, &str, &str); 5] = [
    ("llama", "llama", "LlamaForCausalLM"),
    ("qwen2", "qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "qwen3", "Qwen3ForCausalLM"),
    ("ernie4_5", "ernie4_5", "Ernie4_5ForCausalLM"),
    (experts::ARCHITECTURE, "ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
];

/// A model as a checkpoint has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Its `config.json`.
    pub config: Json,
    /// Rows of a head of queries and keys, where they lie in pairs.
    pub head: Option<usize>,
    /// How its tensors are called.
    pub names: Names,
}

/// How the tensors of an architecture are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// As those of language models without experts.
    Dense,
    /// Likewise, with so many routed experts in a layer.
    Experts(usize),
    /// As an encoder's.
    Encoder {
        /// Whether it has a classification head.
        headed: bool,
    },
}

impl Model {
    /// Name in a checkpoint of a tensor of the file.
    pub fn checkpoint_name(&self, name: &str) -> Option<String> {
        match self.names {
            Names::Dense => checkpoint_name(name),
            Names::Experts(_) => checkpoint_name(name).or_else(|| experts::checkpoint_name(name)),
            Names::Encoder { headed } => bert::checkpoint_name(name, headed),
        }
    }

    /// The tensors of a file, those that hold all experts of a layer taken apart. Fails when such a one holds another number.
    pub fn tensors(&self, path: &Path, head: &Head) -> Result<Vec<Info>> {
        let Names::Experts(count) = self.names else {
            return Ok(head.tensors.clone());
        };
        let mut all = Vec::new();
        for info in &head.tensors {
            let parts = experts::apart(info, count).map_err(|reason| FormatError::TensorEntry {
                path: path.to_owned(),
                tensor: info.name.clone(),
                reason,
            })?;
            all.extend(parts);
        }
        Ok(all)
    }

    /// Rows of a head of this tensor, when its rows lie in pairs and are whole heads.
    pub fn paired(&self, name: &str, shape: &[usize]) -> Option<usize> {
        let module = name.rsplit('.').nth(1).unwrap_or_default();
        let rows = shape.first().copied().unwrap_or(0);
        let head = self.head.filter(|_| ["attn_q", "attn_k"].contains(&module))?;
        (head > 0 && head.is_multiple_of(2) && rows.is_multiple_of(head)).then_some(head)
    }
}

/// The config of a file. Fails when a dimension is missing; an architecture that does not run here gets its name and
/// nothing else, so that its tensors can be looked at.
pub fn config(path: &Path, head: &Head) -> Result<Model> {
    let about = &head.metadata;
    let fault = |reason: String| FormatError::Gguf {
        path: path.to_owned(),
        reason,
    };
    let named = about
        .text("general.architecture")
        .ok_or_else(|| fault("it has no general.architecture; expected a model".to_owned()))?;
    if named == bert::ARCHITECTURE {
        return Ok(Model {
            config: bert::config(head).map_err(fault)?,
            head: None,
            names: Names::Encoder {
                headed: bert::is_headed(head),
            },
        });
    }
    let Some((_, kind, class)) = ARCHITECTURES.iter().find(|(known, ..)| *known == named) else {
        return Ok(Model {
            config: json!({"model_type": named}),
            head: None,
            names: Names::Dense,
        });
    };
    let key = |key: &str| format!("{named}.{key}");
    let maybe = |name: &str| about.count(&key(name)).filter(|count| *count > 0);
    let need = |name: &str| about.needed(named, name).map_err(fault);
    let (hidden, heads) = (need("embedding_length")?, need("attention.head_count")?);
    let width = maybe("attention.key_length").unwrap_or(hidden / heads.max(1));
    if width == 0 || width > u64::from(limits::MAX_HEAD_DIM) {
        return Err(fault(format!(
            "expected heads of 1 to {} rows, got {width}",
            limits::MAX_HEAD_DIM
        )));
    }
    if let Some(turned) = maybe("rope.dimension_count").filter(|turned| *turned != width) {
        return Err(fault(format!(
            "rotary embedding of {turned} of {width} rows of a head is not supported; expected all of them"
        )));
    }
    let embedding = head.tensors.iter().find(|info| info.name == "token_embd.weight");
    let rows = embedding.and_then(|info| info.shape.first().copied());
    let vocabulary =
        rows.ok_or_else(|| fault("token_embd.weight is missing; expected a model".to_owned()))?;
    let epsilon = about.number(&key("attention.layer_norm_rms_epsilon"));
    let mut config = json!({
        "architectures": [class],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": maybe("attention.head_count_kv").unwrap_or(heads),
        "head_dim": width,
        "max_position_embeddings": need("context_length")?,
        "rms_norm_eps": epsilon.unwrap_or(1e-6),
        "rope_theta": about.number(&key("rope.freq_base")).unwrap_or(10_000.0),
        "vocab_size": vocabulary,
        "tie_word_embeddings": !head.tensors.iter().any(|info| info.name == "output.weight"),
        "use_sliding_window": false,
    });
    if let Some(object) = config.as_object_mut() {
        scaling(path, head, &key, object)?;
        ends(about, object);
        if named == experts::ARCHITECTURE {
            experts::fields(about, object).map_err(fault)?;
        }
    }
    let count = config.get("moe_num_experts").and_then(Json::as_u64);
    let names = match count.and_then(|count| usize::try_from(count).ok()) {
        Some(count) => Names::Experts(count),
        None => Names::Dense,
    };
    let paired = (named == "llama").then_some(usize::try_from(width).unwrap_or(0));
    Ok(Model {
        config,
        head: paired,
        names,
    })
}

/// How rotary frequencies are scaled.
fn scaling(
    path: &Path,
    head: &Head,
    key: &dyn Fn(&str) -> String,
    config: &mut Map<String, Json>,
) -> Result<()> {
    let about = &head.metadata;
    let kind = about
        .text(&key("rope.scaling.type"))
        .filter(|kind| *kind != "none");
    if let Some(kind) = kind {
        let factor = about.number(&key("rope.scaling.factor")).unwrap_or(1.0);
        config.insert(
            "rope_scaling".to_owned(),
            json!({"rope_type": kind, "factor": factor}),
        );
    }
    let Some(info) = head.tensors.iter().find(|info| info.name == ROPE_FACTORS) else {
        return Ok(());
    };
    if info.kind != Type::Float(FloatDtype::F32) || info.shape.len() != 1 || kind.is_some() {
        return Err(FormatError::TensorEntry {
            path: path.to_owned(),
            tensor: ROPE_FACTORS.to_owned(),
            reason: "expected F32 of one dimension, and no other scaling of rotary frequencies".to_owned(),
        });
    }
    let bytes = head.factors.as_slice();
    config.insert(
        "rope_scaling".to_owned(),
        json!({"rope_type": "divided", "divisors": FloatDtype::F32.widen(bytes)}),
    );
    Ok(())
}

/// Tokens that begin and end texts.
fn ends(about: &Metadata, config: &mut Map<String, Json>) {
    let id = |name: &str| about.count(&format!("tokenizer.ggml.{name}_token_id"));
    let mut ends: Vec<u64> = ["eos", "eot", "eom"].iter().filter_map(|name| id(name)).collect();
    ends.dedup();
    if !ends.is_empty() {
        config.insert("eos_token_id".to_owned(), json!(ends));
    }
    if let Some(begin) = id("bos") {
        config.insert("bos_token_id".to_owned(), json!(begin));
    }
}

/// Name in a checkpoint of a tensor of a language model's file, but for those of experts.
pub fn checkpoint_name(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => "model.embed_tokens.weight",
        "output_norm.weight" => "model.norm.weight",
        "output.weight" => "lm_head.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return Some(whole.to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (block, ending) = rest.rsplit_once('.')?;
    let module = match block {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    ["weight", "bias"]
        .contains(&ending)
        .then(|| format!("model.layers.{layer}.{module}.{ending}"))
}

/// Rows of whole heads in the checkpoint's order again: rows 2i and 2i + 1 of a head become rows i and `d/2 + i`. `row` is
/// the bytes of one row.
pub fn halves(rows: &[u8], row: usize, head: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len());
    for rows in rows.chunks((row * head).max(1)) {
        for j in 0..2 {
            for i in 0..head / 2 {
                let at = (2 * i + j) * row;
                out.extend_from_slice(rows.get(at..at + row).unwrap_or_default());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::gguf::model::{pair_rows, tensor_name};

    #[test]
    fn pairs_become_halves_again() {
        let rows: Vec<u8> = (0..32).collect();
        assert_eq!(halves(&[0, 2, 1, 3], 1, 4), [0, 1, 2, 3]);
        for (row, head) in [(1, 4), (2, 8), (4, 2)] {
            assert_eq!(halves(&pair_rows(&rows, row, head), row, head), rows);
        }
    }

    #[test]
    fn names_are_those_of_the_checkpoint_again() {
        let modules = [
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "self_attn.q_norm",
            "self_attn.k_norm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ];
        let layers = modules.iter().map(|m| format!("model.layers.11.{m}.weight"));
        let whole = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"];
        let mut checked = 0;
        for name in layers.chain(whole.map(str::to_owned)) {
            let theirs = tensor_name(&name).unwrap();
            assert_eq!(checkpoint_name(&theirs), Some(name));
            checked += 1;
        }
        assert_eq!(checked, 14);
        assert_eq!(checkpoint_name("blk.1.ffn_gate_exps.weight"), None);
    }
}
