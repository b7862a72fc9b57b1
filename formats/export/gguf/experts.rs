//! Routed experts of ERNIE-4.5 in GGUF: their dimensions, the names of their tensors, and the tensors that hold all experts of
//! a layer one after the other, (E, N, K).
//!
//! Source: `conversion/ernie.py` and `src/models/ernie4-5.cpp` of llama.cpp.

use std::collections::HashMap;

use serde_json::Value as Json;

use super::Planned;
use super::file::Value;

/// Keys about experts for a model of `layers`, or why llama.cpp cannot run it.
pub(super) fn keys(config: &Json, layers: u32) -> Result<Vec<(&'static str, Value)>, String> {
    let number = |key: &str| config.get(key).and_then(Json::as_i64);
    let need = |key: &str| {
        number(key)
            .and_then(|v| u32::try_from(v).ok())
            .ok_or_else(|| format!("config.json: expected a number {key}"))
    };
    let last = number("moe_layer_end_index").unwrap_or(-1);
    let interval = number("moe_layer_interval").unwrap_or(1);
    if interval != 1 || (last >= 0 && last + 1 != i64::from(layers)) {
        return Err(
            "the config has dense layers behind or between those with experts, which llama.cpp has only before them; export --to bf16"
                .to_owned(),
        );
    }
    let shared = number("moe_num_shared_experts").unwrap_or(0).max(0) as u32;
    let width = need("moe_intermediate_size")?;
    Ok(vec![
        ("expert_count", Value::U32(need("moe_num_experts")?)),
        (
            "expert_used_count",
            Value::U32(number("moe_k").unwrap_or(2).max(0) as u32),
        ),
        ("expert_shared_count", Value::U32(shared)),
        ("expert_feed_forward_length", Value::U32(width)),
        (
            "expert_shared_feed_forward_length",
            Value::U32(shared.saturating_mul(width)),
        ),
        ("interleave_moe_layer_step", Value::U32(1)),
        (
            "leading_dense_block_count",
            Value::U32(number("moe_layer_start_index").unwrap_or(1).max(0) as u32),
        ),
    ])
}

/// Name in GGUF of a tensor of the layer `layer` whose name goes on with `rest`; that of an expert is the name of all.
pub(super) fn tensor_name(layer: u32, rest: &str) -> Option<String> {
    let block = match rest {
        "mlp.gate.weight" => "ffn_gate_inp.weight",
        "mlp.moe_statics.e_score_correction_bias" => "exp_probs_b.bias",
        "mlp.shared_experts.gate_proj.weight" => "ffn_gate_shexp.weight",
        "mlp.shared_experts.up_proj.weight" => "ffn_up_shexp.weight",
        "mlp.shared_experts.down_proj.weight" => "ffn_down_shexp.weight",
        _ => match rest.strip_prefix("mlp.experts.")?.split_once('.')?.1 {
            "gate_proj.weight" => "ffn_gate_exps.weight",
            "up_proj.weight" => "ffn_up_exps.weight",
            "down_proj.weight" => "ffn_down_exps.weight",
            _ => return None,
        },
    };
    Some(format!("blk.{layer}.{block}"))
}

/// The number of the expert a tensor belongs to.
fn number(name: &str) -> Option<usize> {
    name.split_once(".mlp.experts.")?
        .1
        .split_once('.')?
        .0
        .parse()
        .ok()
}

/// Puts the experts of a layer together, in the order of their numbers. Fails when some are missing, or are of another type
/// or shape than the others.
pub(super) fn together<'a>(tensors: Vec<Planned<'a>>, experts: usize) -> Result<Vec<Planned<'a>>, String> {
    let mut whole: Vec<Planned<'a>> = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for mut planned in tensors {
        let is_expert = planned
            .parts
            .first()
            .is_some_and(|(record, _)| number(record.name).is_some());
        if !is_expert {
            whole.push(planned);
            continue;
        }
        match places
            .get(&planned.entry.name)
            .and_then(|place| whole.get_mut(*place))
        {
            None => {
                places.insert(planned.entry.name.clone(), whole.len());
                planned.entry.shape.insert(0, 1);
                whole.push(planned);
            }
            Some(all) => {
                let same = all.entry.kind == planned.entry.kind
                    && all.entry.shape.get(1..) == Some(&planned.entry.shape[..]);
                if !same {
                    let name = planned.parts.first().map_or("", |(record, _)| record.name);
                    return Err(format!(
                        "{name}: experts of a layer lie in one tensor of gguf, and this one is of another type or shape than those before it; quantize all of them alike"
                    ));
                }
                all.entry.bytes += planned.entry.bytes;
                all.parts.append(&mut planned.parts);
                if let Some(count) = all.entry.shape.first_mut() {
                    *count += 1;
                }
            }
        }
    }
    for place in places.into_values() {
        let Some(all) = whole.get_mut(place) else { continue };
        all.parts
            .sort_by_key(|(record, _)| number(record.name).unwrap_or(0));
        let in_order = all
            .parts
            .iter()
            .enumerate()
            .all(|(i, (record, _))| number(record.name) == Some(i));
        if !in_order || all.parts.len() != experts {
            return Err(format!(
                "{}: expected experts 0 to {} of the layer, got {} of them",
                all.entry.name,
                experts.saturating_sub(1),
                all.parts.len()
            ));
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_and_dimensions() {
        let name = |rest: &str| tensor_name(2, rest).unwrap_or_default();
        assert_eq!(name("mlp.experts.11.up_proj.weight"), "blk.2.ffn_up_exps.weight");
        assert_eq!(name("mlp.gate.weight"), "blk.2.ffn_gate_inp.weight");
        assert_eq!(name("mlp.experts.11.bias"), "");
        assert_eq!(number("model.layers.2.mlp.experts.11.up_proj.weight"), Some(11));
        let config = json!({"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 256,
            "moe_layer_start_index": 1, "moe_layer_end_index": 3});
        let found = keys(&config, 4).unwrap();
        assert!(found.contains(&("expert_shared_feed_forward_length", Value::U32(512))));
        assert!(keys(&config, 5).unwrap_err().contains("dense layers"));
        let mut damaged = config;
        damaged["moe_num_experts"] = json!("many");
        assert!(keys(&damaged, 4).unwrap_err().contains("moe_num_experts"));
    }
}
