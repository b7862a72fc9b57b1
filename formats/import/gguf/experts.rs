//! ERNIE-4.5 with routed experts in GGUF: the tensor that holds all experts of a layer, (E, N, K), as the E tensors of a
//! checkpoint; the router's names; and the fields of a config about them. The reverse of [`crate::export::gguf`]'s page of
//! the same name.
//!
//! An expert's stored tensor gets the name of all of them with its number behind, `blk.1.ffn_up_exps.weight[3]`, and its
//! share of their bytes: expert e of E lies in the e-th part of E.
//!
//! Source: `conversion/ernie.py` and `src/models/ernie4-5.cpp` of llama.cpp.

use serde_json::{Map, Value as Json, json};

use super::header::{Info, Metadata};
use crate::limits;

/// GGUF's name of the architecture.
pub(super) const ARCHITECTURE: &str = "ernie4_5-moe";

/// What stands between the layer's number and an expert's own, in GGUF and in a checkpoint.
const STACKS: [(&str, &str); 3] = [
    ("ffn_gate_exps.weight", "gate_proj.weight"),
    ("ffn_up_exps.weight", "up_proj.weight"),
    ("ffn_down_exps.weight", "down_proj.weight"),
];

/// The router's correction, which a checkpoint keeps as a row.
const CORRECTION: &str = "exp_probs_b.bias";

/// Name of the layer's part of a tensor's name, and the layer's number.
fn in_layer(name: &str) -> Option<(u32, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest))
}

/// Puts the fields about experts into a config, or says what is wrong with the file's keys.
pub(super) fn fields(about: &Metadata, config: &mut Map<String, Json>) -> Result<(), String> {
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    let need = |name: &str| about.needed(ARCHITECTURE, name);
    let step = about.count(&key("interleave_moe_layer_step")).unwrap_or(1);
    if step != 1 {
        return Err(format!(
            "{} is {step}; expected experts in every layer behind the leading dense ones (1)",
            key("interleave_moe_layer_step")
        ));
    }
    let (experts, used) = (need("expert_count")?, need("expert_used_count")?);
    if experts > limits::MAX_EXPERTS || used > experts {
        return Err(format!(
            "expected at most {} experts and no more used than there are, got {used} of {experts}",
            limits::MAX_EXPERTS
        ));
    }
    let first = about.count(&key("leading_dense_block_count")).unwrap_or(0);
    for (name, value) in [
        ("moe_num_experts", json!(experts)),
        ("moe_k", json!(used)),
        (
            "moe_intermediate_size",
            json!(need("expert_feed_forward_length")?),
        ),
        (
            "moe_num_shared_experts",
            json!(about.count(&key("expert_shared_count")).unwrap_or(0)),
        ),
        ("moe_layer_start_index", json!(first)),
        ("moe_layer_end_index", json!(need("block_count")? - 1)),
        ("moe_layer_interval", json!(1)),
    ] {
        config.insert(name.to_owned(), value);
    }
    Ok(())
}

/// Name in a checkpoint of a tensor of a file that only this architecture has.
pub(super) fn checkpoint_name(name: &str) -> Option<String> {
    let (layer, rest) = in_layer(name)?;
    let module = match rest {
        "ffn_gate_inp.weight" => "gate.weight",
        CORRECTION => "moe_statics.e_score_correction_bias",
        "ffn_gate_shexp.weight" => "shared_experts.gate_proj.weight",
        "ffn_up_shexp.weight" => "shared_experts.up_proj.weight",
        "ffn_down_shexp.weight" => "shared_experts.down_proj.weight",
        _ => {
            let (stack, number) = rest.strip_suffix(']')?.split_once('[')?;
            let (_, module) = STACKS.iter().find(|(known, _)| *known == stack)?;
            let number: u64 = number.parse().ok()?;
            return Some(format!("model.layers.{layer}.mlp.experts.{number}.{module}"));
        }
    };
    Some(format!("model.layers.{layer}.mlp.{module}"))
}

/// The tensors of a checkpoint that a stored one is, for a model of `experts` experts; or why it cannot be those.
pub(super) fn apart(info: &Info, experts: usize) -> Result<Vec<Info>, String> {
    let rest = in_layer(&info.name).map_or("", |(_, rest)| rest);
    let wrong = |what: &str| {
        format!(
            "expected {what} of {experts} experts, as {ARCHITECTURE}.expert_count says, got a tensor of {:?}; convert the model again",
            info.shape
        )
    };
    if rest == CORRECTION {
        if info.shape.iter().product::<usize>() != experts {
            return Err(wrong("a number for each"));
        }
        return Ok(vec![Info {
            shape: vec![1, experts],
            ..info.clone()
        }]);
    }
    if !STACKS.iter().any(|(stack, _)| *stack == rest) {
        return Ok(vec![info.clone()]);
    }
    let [count, rows, columns] = info.shape[..] else {
        return Err(wrong("the matrices"));
    };
    if count != experts {
        return Err(wrong("the matrices"));
    }
    let bytes = info.range.len() / count.max(1);
    let expert = |e: usize| {
        let from = info.range.start + e * bytes;
        Info {
            name: format!("{}[{e}]", info.name),
            shape: vec![rows, columns],
            kind: info.kind,
            range: from..from + bytes,
        }
    };
    Ok((0..count).map(expert).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::FloatDtype;
    use crate::import::gguf::blocks::{Kind, Type};

    fn info(name: &str, shape: &[usize], kind: Type) -> Info {
        let bytes = kind.bytes(shape).unwrap();
        Info {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind,
            range: 64..64 + bytes,
        }
    }

    #[test]
    fn a_stack_comes_apart() {
        let stack = info("blk.2.ffn_up_exps.weight", &[4, 3, 64], Type::Blocks(Kind::Q8_0));
        let parts = apart(&stack, 4).unwrap();
        let last = &parts[3];
        assert_eq!((parts.len(), last.shape.as_slice()), (4, &[3, 64][..]));
        assert_eq!(
            last.range,
            64 + 3 * 204..64 + 4 * 204,
            "3 rows of two blocks of 34"
        );
        assert_eq!(
            checkpoint_name(&last.name).unwrap(),
            "model.layers.2.mlp.experts.3.up_proj.weight"
        );
        let bias = info("blk.2.exp_probs_b.bias", &[4], Type::Float(FloatDtype::F32));
        let bias = apart(&bias, 4).unwrap();
        assert_eq!((bias.len(), bias[0].shape.as_slice()), (1, &[1, 4][..]));
        let other = info("blk.2.ffn_up.weight", &[4, 64], Type::Float(FloatDtype::F16));
        assert_eq!(apart(&other, 4).unwrap(), std::slice::from_ref(&other));
        for (shape, name) in [
            (&[3usize, 3, 64][..], "ffn_up_exps.weight"),
            (&[12, 64], "ffn_down_exps.weight"),
            (&[5], CORRECTION),
        ] {
            let wrong = info(&format!("blk.2.{name}"), shape, Type::Float(FloatDtype::F32));
            let message = apart(&wrong, 4).unwrap_err();
            assert!(message.contains("of 4 experts") && message.contains(&format!("{shape:?}")));
        }
    }

    #[test]
    fn names_are_those_of_the_checkpoint() {
        assert_eq!(
            checkpoint_name("blk.1.ffn_gate_inp.weight").unwrap(),
            "model.layers.1.mlp.gate.weight"
        );
        for name in [
            "blk.1.ffn_up_exps.weight",
            "blk.1.ffn_up_exps.weight[x]",
            "blk.1.ffn_up.weight[0]",
            "blk.x.exp_probs_b.bias",
        ] {
            assert_eq!(checkpoint_name(name), None, "{name}");
        }
    }
}
