//! Which tensors get which options, and which stay as they are.
//!
//! For each tensor, in this order: what cannot be quantized is kept (no matrix, no float); a
//! `--skip` that matches keeps it; the first `--rule` that matches decides; parts of a model that
//! lose more than they save are kept by default (embeddings, norms, poolers and output heads, routers, biases);
//! the rest gets the default options, or what [`crate::allocation`] assigned to each of them.

use std::collections::HashMap;
use std::sync::LazyLock;

use qtool_formats::{Dtype, FloatDtype};
use regex::Regex;

use crate::options::{PartialOptions, TensorOptions};
use crate::{CalibError, Result};

/// What happens to one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Byte for byte as it is, for this reason.
    Keep(String),
    /// Quantized.
    Quantize(TensorOptions),
}

/// Ordered rules. See the module's text.
#[derive(Debug, Clone)]
pub struct Recipe {
    default: TensorOptions,
    skips: Vec<Regex>,
    rules: Vec<Rule>,
    /// Tensors that would get the default, with what they get in its place; `None` keeps one.
    assigned: HashMap<String, Option<TensorOptions>>,
}

#[derive(Debug, Clone)]
struct Rule {
    pattern: Regex,
    /// `None` keeps the tensor.
    options: Option<TensorOptions>,
}

/// Parts kept by default: a pattern over names and why.
const KEPT: [(&str, &str); 8] = [
    (
        r"(^|[._])(embed_tokens|embed_positions|embed_in|word_embeddings|position_embeddings|token_type_embeddings|task_type_embeddings|wte|wpe|tok_embeddings|embeddings?|shared)\.weight$",
        "embedding",
    ),
    (
        r"(^|[._])(lm_head|embed_out|output_embeddings|score|(pre_)?classifier(\.dense|\.out_proj)?|cls\..*)\.weight$|^output\.weight$",
        "output head",
    ),
    (r"(^|\.)pooler\.dense\.weight$", "pooler"),
    (r"norm|(^|\.)ln_[a-z0-9]+\.|LayerNorm", "norm"),
    (
        r"(^|\.)(gate|router|gate_inp|shared_expert_gate|router\.layer|switch)\.weight$",
        "router",
    ),
    (r"(^|\.)moe_statics\.|e_score_correction_bias", "router"),
    (r"(^|[._])(bias|pos_bias_[uv]|b_[a-z0-9]+)$", "bias"),
    (
        r"^(ernie\.|model\.)?mtp_|(^|\.)mtp(_block|_emb_norm|_hidden_norm|_linear_proj)?\.",
        "multi-token prediction block",
    ),
];

impl Recipe {
    /// A recipe of `default` options, `--skip` patterns and `--rule` texts (`REGEX=OPTIONS` or
    /// `REGEX=keep`). Options a rule leaves out are those of the command line when it keeps the code
    /// width, else the defaults of the width it names.
    pub fn new(default: TensorOptions, skips: &[String], rules: &[String]) -> Result<Self> {
        let skips = skips.iter().map(|s| regex(s)).collect::<Result<_>>()?;
        let rules = rules
            .iter()
            .map(|r| Rule::parse(r, default))
            .collect::<Result<_>>()?;
        Ok(Self {
            default,
            skips,
            rules,
            assigned: HashMap::new(),
        })
    }

    /// The same recipe with options of their own (`None`: kept) for tensors that would get the default.
    pub fn assign(&self, assigned: HashMap<String, Option<TensorOptions>>) -> Self {
        Self {
            assigned,
            ..self.clone()
        }
    }

    /// Whether the tensor gets the default options: no rule speaks of it.
    pub fn leaves_open(&self, name: &str, dtype: Dtype, shape: &[usize]) -> bool {
        let by_rule = self.rules.iter().any(|rule| rule.pattern.is_match(name));
        !by_rule && matches!(self.decide(name, dtype, shape), Decision::Quantize(_))
    }

    /// The options of tensors no rule speaks of.
    pub fn default_options(&self) -> TensorOptions {
        self.default
    }

    /// What happens to the tensor of this name, dtype and shape.
    pub fn decide(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Decision {
        let keep = |reason: &str| Decision::Keep(reason.to_owned());
        if FloatDtype::from_dtype(dtype).is_none() {
            return Decision::Keep(format!("{dtype} is not a float weight"));
        }
        if shape.len() < 2 {
            return keep(kept_by_default(name).unwrap_or("not a matrix"));
        }
        if shape.contains(&0) {
            return keep("empty");
        }
        if self.skips.iter().any(|skip| skip.is_match(name)) {
            return keep("--skip");
        }
        if let Some(rule) = self.rules.iter().find(|rule| rule.pattern.is_match(name)) {
            return rule.options.map_or_else(|| keep("--rule"), Decision::Quantize);
        }
        if let Some(why) = kept_by_default(name) {
            return keep(why);
        }
        if shape.len() > 2 && !name.contains("expert") {
            return keep("not a matrix");
        }
        if let Some(options) = self.assigned.get(name) {
            return options.map_or_else(|| keep("--target-bpw"), Decision::Quantize);
        }
        Decision::Quantize(self.default)
    }

    /// Rules that matched none of `names`, as typed: most likely misspelt.
    pub fn unmatched(&self, names: &[&str]) -> Vec<String> {
        let patterns = self
            .skips
            .iter()
            .chain(self.rules.iter().map(|rule| &rule.pattern));
        patterns
            .filter(|p| !names.iter().any(|n| p.is_match(n)))
            .map(ToString::to_string)
            .collect()
    }

    /// Every rule in words, in the order tried.
    pub fn describe(&self) -> Vec<String> {
        let skips = self.skips.iter().map(|s| format!("{s}=keep"));
        let rules = self.rules.iter().map(|rule| match &rule.options {
            Some(options) => format!("{}={options}", rule.pattern),
            None => format!("{}=keep", rule.pattern),
        });
        let kept = KEPT.iter().map(|(pattern, _)| format!("{pattern}=keep"));
        skips
            .chain(rules)
            .chain(kept)
            .chain([format!(".*={}", self.default)])
            .collect()
    }
}

impl Rule {
    fn parse(text: &str, default: TensorOptions) -> Result<Self> {
        let Some((pattern, options)) = text.rsplit_once('=') else {
            return Err(CalibError::Option {
                what: format!("--rule {text:?}"),
                reason: "expected REGEX=OPTIONS, such as 'down_proj=bits:8' or 'experts=bits:4,group:64'"
                    .to_owned(),
            });
        };
        let options = match options.trim() {
            "keep" => None,
            options => {
                let partial = PartialOptions::parse(options)?;
                let same_width = partial.bits.is_none_or(|bits| bits == default.bits);
                Some(if same_width {
                    partial.over(default)?
                } else {
                    PartialOptions {
                        calibrated: default.calibrated,
                        ..partial
                    }
                    .complete(default.bits)?
                })
            }
        };
        Ok(Self {
            pattern: regex(pattern)?,
            options,
        })
    }
}

fn regex(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| CalibError::Option {
        what: format!("pattern {pattern:?}"),
        reason: format!(
            "not a regular expression: {}",
            e.to_string().lines().last().unwrap_or_default().trim()
        ),
    })
}

/// [`KEPT`], compiled once.
fn kept_by_default(name: &str) -> Option<&'static str> {
    static PATTERNS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
        KEPT.iter()
            .filter_map(|(pattern, why)| Some((Regex::new(pattern).ok()?, *why)))
            .collect()
    });
    PATTERNS
        .iter()
        .find(|(pattern, _)| pattern.is_match(name))
        .map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(bits: u8, skips: &[&str], rules: &[&str]) -> Result<Recipe> {
        let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        Recipe::new(
            PartialOptions::default().complete(bits).unwrap(),
            &own(skips),
            &own(rules),
        )
    }

    fn outcome(recipe: &Recipe, name: &str, shape: &[usize]) -> String {
        match recipe.decide(name, Dtype::BF16, shape) {
            Decision::Keep(why) => why,
            Decision::Quantize(options) => format!("w{}", options.bits),
        }
    }

    #[test]
    fn every_default_pattern_compiles() {
        for (pattern, _) in KEPT {
            assert!(Regex::new(pattern).is_ok(), "{pattern}");
        }
    }

    /// Names as real checkpoints have them.
    #[test]
    fn defaults_know_the_parts_of_real_models() {
        let recipe = recipe(4, &[], &[]).unwrap();
        let m = [256usize, 256];
        let table = [
            ("model.embed_tokens.weight", "embedding"),
            ("ernie.embed_tokens.weight", "embedding"),
            ("transformer.wte.weight", "embedding"),
            ("bert.embeddings.word_embeddings.weight", "embedding"),
            ("embeddings.position_embeddings.weight", "embedding"),
            ("embeddings.token_type_embeddings.weight", "embedding"),
            ("lm_head.weight", "output head"),
            ("ernie.embeddings.task_type_embeddings.weight", "embedding"),
            ("classifier.weight", "output head"),
            ("classifier.dense.weight", "output head"),
            ("classifier.out_proj.weight", "output head"),
            ("bert.pooler.dense.weight", "pooler"),
            ("pooler.dense.weight", "pooler"),
            ("model.layers.3.mlp.gate.weight", "router"),
            ("model.layers.3.block_sparse_moe.gate.weight", "router"),
            ("model.layers.3.mlp.shared_expert_gate.weight", "router"),
            ("model.layers.0.self_attn.q_norm.weight", "norm"),
            (
                "model.mtp_block.0.mlp.down_proj.weight",
                "multi-token prediction block",
            ),
            ("ernie.mtp_linear_proj.0.weight", "multi-token prediction block"),
            ("model.layers.0.self_attn.q_proj.weight", "w4"),
            ("model.layers.0.mlp.gate_proj.weight", "w4"),
            ("ernie.layers.0.mlp.up_gate_proj.weight", "w4"),
            ("model.layers.3.mlp.experts.7.down_proj.weight", "w4"),
            ("model.layers.3.mlp.shared_experts.up_proj.weight", "w4"),
            ("encoder.layer.0.attention.self.query.weight", "w4"),
            ("encoder.layer.0.output.dense.weight", "w4"),
            ("transformer.h.0.mlp.c_fc.weight", "w4"),
        ];
        for (name, want) in table {
            assert_eq!(outcome(&recipe, name, &m), want, "{name}");
        }
        assert_eq!(
            outcome(&recipe, "model.layers.0.self_attn.q_proj.bias", &[256]),
            "bias"
        );
        assert_eq!(
            outcome(&recipe, "model.layers.0.input_layernorm.weight", &[256]),
            "norm"
        );
        assert_eq!(
            outcome(&recipe, "model.layers.0.mlp.experts.gate_up_proj", &[8, 64, 64]),
            "w4"
        );
        assert_eq!(outcome(&recipe, "conv.weight", &[8, 3, 3]), "not a matrix");
        let mask = recipe.decide("model.mask.weight", Dtype::I64, &m);
        assert_eq!(mask, Decision::Keep("I64 is not a float weight".to_owned()));
    }

    #[test]
    fn skips_come_first_then_rules_in_order_then_defaults() {
        let recipe = recipe(
            8,
            &[r"layers\.0\."],
            &[
                "down_proj=bits:4,group:32",
                "proj=group:128,clip:mse",
                "embed=bits:8",
                r"o_proj=keep",
            ],
        )
        .unwrap();
        let m = [256usize, 256];
        assert_eq!(outcome(&recipe, "layers.0.down_proj.weight", &m), "--skip");
        let options = |name| match recipe.decide(name, Dtype::BF16, &m) {
            Decision::Quantize(options) => options.to_string(),
            Decision::Keep(why) => why,
        };
        assert_eq!(
            options("layers.1.down_proj.weight"),
            "bits:4,group:32,grid:sym,clip:mse,scale:bf16"
        );
        assert_eq!(
            options("layers.1.o_proj.weight"),
            "bits:8,group:128,grid:sym,clip:mse,scale:bf16"
        );
        assert_eq!(
            options("embed_tokens.weight"),
            "bits:8,group:row,grid:sym,clip:none,scale:bf16"
        );
        assert_eq!(recipe.unmatched(&["layers.0.o_proj"]), ["down_proj", "embed"]);
    }

    #[test]
    fn what_does_not_parse_says_why() {
        for (rule, want) in [
            ("no equals sign", "REGEX=OPTIONS"),
            ("(=bits:4", "regular expression"),
            ("a=bits:7", "4 and 8"),
            ("a=bits", "key:value"),
        ] {
            let message = recipe(4, &[], &[rule]).unwrap_err().to_string();
            assert!(message.contains(want), "{rule}: {message}");
        }
    }
}
