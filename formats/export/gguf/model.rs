//! What llama.cpp must know of a model besides its weights, from `config.json`: the architecture's name, its
//! dimensions, the names of its tensors, and which rows lie in another order.
//!
//! Only the Llama architecture reorders: Hugging Face turns the two halves of a head by the rotary embedding,
//! llama.cpp neighbouring rows, so rows `j * d/2 + i` of a head become rows `2 * i + j` (j 0 or 1). Qwen keeps the
//! halves in llama.cpp too, ERNIE-4.5 neighbours in Hugging Face too.
//!
//! Source: `convert_hf_to_gguf.py` and `gguf/constants.py` of llama.cpp, whose keys and names these are.

use serde_json::Value as Json;

use super::bert;
use super::experts;
use super::file::Value;
use crate::limits;

/// A model of a known architecture.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Name of the architecture in GGUF.
    pub architecture: &'static str,
    /// Rows of one attention head.
    pub head_dim: usize,
    /// Keys about dimensions.
    pub keys: Vec<(String, Value)>,
    /// Factors of rotary frequencies, which are a tensor of their own; empty when there are none.
    pub rope_factors: Vec<f32>,
    /// Tokens there are embeddings for.
    pub vocabulary: usize,
    /// Routed experts of a layer.
    pub experts: usize,
}

/// `model_type` of Hugging Face and architecture of GGUF.
const ARCHITECTURES: [(&str, &str); 6] = [
    ("llama", "llama"),
    ("mistral", "llama"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("ernie4_5", "ernie4_5"),
    ("ernie4_5_moe", MOE),
];

/// GGUF's name of ERNIE-4.5 with experts.
const MOE: &str = "ernie4_5-moe";

impl Model {
    /// Reads a config, or says why it cannot be expressed. `headed` says whether there is a classification head.
    pub fn of(config: &Json, headed: bool) -> Result<Self, String> {
        let kind = config.get("model_type").and_then(Json::as_str).unwrap_or("none");
        if kind == "bert" {
            return bert::model(config, headed);
        }
        let mut known: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        known.push("bert");
        let Some((_, architecture)) = ARCHITECTURES.iter().find(|(name, _)| *name == kind) else {
            return Err(format!(
                "the config's model_type is {kind:?}, and gguf is written for {}; export --to bf16 and convert that",
                known.join(", ")
            ));
        };
        let number = |key: &str| {
            config
                .get(key)
                .and_then(Json::as_u64)
                .and_then(|v| u32::try_from(v).ok())
                .filter(|v| *v > 0)
        };
        let need = |key: &str| number(key).ok_or_else(|| format!("config.json: expected a number {key}"));
        let heads = need("num_attention_heads")?;
        let hidden = need("hidden_size")?;
        let head_dim = number("head_dim").unwrap_or(hidden / heads);
        if head_dim > limits::MAX_HEAD_DIM {
            return Err(format!(
                "config.json: expected heads of at most {} rows, got {head_dim}",
                limits::MAX_HEAD_DIM
            ));
        }
        let vocabulary = need("vocab_size")?;
        let epsilon = config.get("rms_norm_eps").and_then(Json::as_f64);
        let rope = config
            .get("rope_parameters")
            .or_else(|| config.get("rope_scaling"));
        let base = config
            .get("rope_theta")
            .or_else(|| rope.and_then(|r| r.get("rope_theta")))
            .and_then(Json::as_f64)
            .unwrap_or(10_000.0);
        if config.get("use_sliding_window").and_then(Json::as_bool) == Some(true) {
            return Err("the config asks for sliding windows, which are not written to gguf; export --to bf16 and convert that".to_owned());
        }
        // llama.cpp has no windows for this architecture: without them, texts end where the first window does.
        let window = number("sliding_window").filter(|_| kind == "mistral");
        let context = need("max_position_embeddings")?.min(window.unwrap_or(u32::MAX));
        let mut keys = vec![
            ("block_count", Value::U32(need("num_hidden_layers")?)),
            ("context_length", Value::U32(context)),
            ("embedding_length", Value::U32(hidden)),
            ("feed_forward_length", Value::U32(need("intermediate_size")?)),
            ("attention.head_count", Value::U32(heads)),
            (
                "attention.head_count_kv",
                Value::U32(number("num_key_value_heads").unwrap_or(heads)),
            ),
            (
                "attention.layer_norm_rms_epsilon",
                Value::F32(epsilon.unwrap_or(1e-6) as f32),
            ),
            ("attention.key_length", Value::U32(head_dim)),
            ("attention.value_length", Value::U32(head_dim)),
            ("rope.dimension_count", Value::U32(head_dim)),
            ("rope.freq_base", Value::F32(base as f32)),
            ("vocab_size", Value::U32(vocabulary)),
        ];
        let rope_factors = rope_scaling(rope, head_dim, base, &mut keys)?;
        let mut count = 0;
        if *architecture == MOE {
            keys.extend(experts::keys(config, need("num_hidden_layers")?)?);
            count = need("moe_num_experts")? as usize;
        }
        Ok(Self {
            architecture,
            head_dim: head_dim as usize,
            keys: keys
                .into_iter()
                .map(|(key, value)| (format!("{architecture}.{key}"), value))
                .collect(),
            rope_factors,
            vocabulary: vocabulary as usize,
            experts: count,
        })
    }

    /// Name in GGUF of a tensor of the checkpoint, if it has one.
    pub fn name_of(&self, name: &str) -> Option<String> {
        match self.architecture {
            "bert" => bert::tensor_name(name),
            MOE => tensor_name(name).or_else(|| {
                let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
                experts::tensor_name(layer.parse().ok()?, rest)
            }),
            _ => tensor_name(name),
        }
    }

    /// Whether rows of this tensor of the checkpoint lie in pairs in GGUF.
    pub fn reorders(&self, name: &str) -> bool {
        let module = name.rsplit('.').nth(1).unwrap_or_default();
        self.architecture == "llama" && ["q_proj", "k_proj"].contains(&module)
    }
}

/// Keys of a scaled rotary embedding; of Llama 3's kind, the factors of its frequencies.
fn rope_scaling(
    rope: Option<&Json>,
    head_dim: u32,
    base: f64,
    keys: &mut Vec<(&'static str, Value)>,
) -> Result<Vec<f32>, String> {
    let Some(rope) = rope.filter(|r| r.is_object()) else {
        return Ok(Vec::new());
    };
    let kind = rope
        .get("rope_type")
        .or_else(|| rope.get("type"))
        .and_then(Json::as_str)
        .unwrap_or("default");
    let need = |key: &str| {
        rope.get(key)
            .and_then(Json::as_f64)
            .filter(|v| *v > 0.0)
            .ok_or_else(|| format!("config.json: expected a number {key} of the rotary scaling {kind}"))
    };
    match kind {
        "default" => Ok(Vec::new()),
        "linear" => {
            keys.push(("rope.scaling.type", Value::Text("linear".to_owned())));
            keys.push(("rope.scaling.factor", Value::F32(need("factor")? as f32)));
            Ok(Vec::new())
        }
        "llama3" => {
            let (factor, low, high) = (
                need("factor")?,
                need("low_freq_factor")?,
                need("high_freq_factor")?,
            );
            let context = need("original_max_position_embeddings")?;
            Ok(llama3_factors(head_dim, base, factor, (low, high), context))
        }
        other => Err(format!(
            "the config's rotary scaling {other:?} is not written to gguf, expected none, linear or llama3; export --to bf16 and convert that"
        )),
    }
}

/// What Llama 3.1 and its successors divide the rotary frequencies of a head by: `factor` for waves longer than `context` over
/// `low`, nothing for those shorter than `context` over `high`, and what lies between in between.
pub fn llama3_factors(
    head_dim: u32,
    base: f64,
    factor: f64,
    (low, high): (f64, f64),
    context: f64,
) -> Vec<f32> {
    let (longest, shortest) = (context / low, context / high);
    let factor_of = |i: u32| {
        let frequency = base.powf(-f64::from(2 * i) / f64::from(head_dim));
        let wavelength = std::f64::consts::TAU / frequency;
        if wavelength < shortest {
            1.0
        } else if wavelength > longest {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..head_dim / 2).map(|i| factor_of(i) as f32).collect()
}

/// Name in GGUF of a tensor of a checkpoint.
pub fn tensor_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        _ => "",
    };
    if !whole.is_empty() {
        return Some(whole.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (module, ending) = rest.rsplit_once('.')?;
    let block = match module {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    ["weight", "bias"]
        .contains(&ending)
        .then(|| format!("blk.{layer}.{block}.{ending}"))
}

/// Rows of whole heads in llama.cpp's order: see the module's text. `row` is the bytes of one row.
pub fn pair_rows(rows: &[u8], row: usize, head_dim: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len());
    let half = head_dim / 2;
    for head in rows.chunks(row * head_dim) {
        for i in 0..half {
            for j in 0..2 {
                let at = (j * half + i) * row;
                out.extend_from_slice(head.get(at..at + row).unwrap_or_default());
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(kind: &str) -> Json {
        json!({"model_type": kind, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 96,
            "num_hidden_layers": 2, "max_position_embeddings": 128, "intermediate_size": 128})
    }

    #[test]
    fn halves_become_pairs() {
        assert_eq!(
            pair_rows(&[0, 1, 2, 3, 4, 5, 6, 7], 1, 4),
            [0, 2, 1, 3, 4, 6, 5, 7]
        );
        assert_eq!(
            pair_rows(&[0, 0, 1, 1, 2, 2, 3, 3], 2, 4),
            [0, 0, 2, 2, 1, 1, 3, 3]
        );
    }

    #[test]
    fn names_and_dimensions() {
        let name = |name: &str| tensor_name(name);
        assert_eq!(
            name("model.layers.11.self_attn.q_proj.bias").unwrap(),
            "blk.11.attn_q.bias"
        );
        assert_eq!(name("model.layers.0.mlp.experts.1.up_proj.weight"), None);
        let model = Model::of(&config("qwen3"), false).unwrap();
        assert_eq!(model.head_dim, 16);
        assert!(
            model
                .keys
                .contains(&("qwen3.block_count".to_owned(), Value::U32(2)))
        );
        assert!(!model.reorders("model.layers.0.self_attn.q_proj.weight"));
        let llama = Model::of(&config("mistral"), false).unwrap();
        assert_eq!(llama.architecture, "llama");
        assert!(llama.reorders("model.layers.0.self_attn.k_proj.bias"));
        assert!(!llama.reorders("model.layers.0.self_attn.v_proj.weight"));
    }

    #[test]
    fn what_is_unknown_is_refused() {
        assert!(Model::of(&config("mamba"), false).unwrap_err().contains("qwen2"));
        let mut damaged = config("llama");
        damaged["hidden_size"] = json!(0);
        assert!(Model::of(&damaged, false).unwrap_err().contains("hidden_size"));
        let mut scaled = config("llama");
        scaled["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0});
        assert!(Model::of(&scaled, false).unwrap_err().contains("yarn"));
        scaled["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
        let factors = Model::of(&scaled, false).unwrap().rope_factors;
        assert_eq!((factors.len(), factors[0], factors[7]), (8, 1.0, 8.0));
    }
}
