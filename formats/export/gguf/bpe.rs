//! Byte-level BPE of a `tokenizer.json` as GGUF keeps it: tokens, merges, and the name by which llama.cpp knows how text
//! is split before. llama.cpp has a regular expression of its own for each family of models; which one it is follows
//! from the pre-tokenizer the file describes.

use serde_json::Value as Json;

use super::file::Value;
use super::tokens::{CONTROL, NORMAL, USER_DEFINED, Vocabulary};

/// Part of the regular expression of a split, and llama.cpp's name for the family.
const SPLITS: [(&str, &str); 2] = [
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|", "llama-bpe"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
];

/// The vocabulary of `size` tokens that `tokenizer.json` holds, or why it cannot be expressed.
pub(super) fn vocabulary(tokenizer: &Json, size: usize) -> Result<Vocabulary, String> {
    let model = tokenizer.get("model").unwrap_or(&Json::Null);
    let vocab = model
        .get("vocab")
        .and_then(Json::as_object)
        .filter(|_| model.get("type").and_then(Json::as_str) == Some("BPE"))
        .ok_or("tokenizer.json is no byte-level BPE, the kind that is written to gguf from it")?;
    let pre = pre_tokenizer(tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null))?;
    let merges = model
        .get("merges")
        .and_then(Json::as_array)
        .into_iter()
        .flatten()
        .map(|merge| match merge {
            Json::String(text) => text.clone(),
            pair => {
                let parts = pair.as_array().into_iter().flatten().filter_map(Json::as_str);
                parts.collect::<Vec<_>>().join(" ")
            }
        })
        .collect();
    let mut all = Vocabulary {
        tokens: vec![None; size],
        keys: vec![
            ("tokenizer.ggml.model", Value::Text("gpt2".to_owned())),
            ("tokenizer.ggml.pre", Value::Text(pre.to_owned())),
            ("tokenizer.ggml.merges", Value::Texts(merges)),
        ],
        begins: begins_with_special(tokenizer.get("post_processor").unwrap_or(&Json::Null)),
        scored: false,
    };
    for (text, id) in vocab {
        all.put(id.as_u64(), (text.clone(), NORMAL, 0.0))?;
    }
    let added = tokenizer.get("added_tokens").and_then(Json::as_array);
    for token in added.into_iter().flatten() {
        let text = token.get("content").and_then(Json::as_str).unwrap_or_default();
        let special = token.get("special").and_then(Json::as_bool) == Some(true);
        let kind = if special { CONTROL } else { USER_DEFINED };
        all.put(
            token.get("id").and_then(Json::as_u64),
            (text.to_owned(), kind, 0.0),
        )?;
    }
    Ok(all)
}

/// llama.cpp's name of a pre-tokenizer.
fn pre_tokenizer(about: &Json) -> Result<&'static str, String> {
    let steps: Vec<&Json> = match about.get("pretokenizers").and_then(Json::as_array) {
        Some(steps) => steps.iter().collect(),
        None => vec![about],
    };
    let kind = |step: &Json| {
        step.get("type")
            .and_then(Json::as_str)
            .unwrap_or("none")
            .to_owned()
    };
    let kinds: Vec<String> = steps.iter().map(|step| kind(step)).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let flag = |key: &str| {
        steps
            .iter()
            .any(|s| s.get(key).and_then(Json::as_bool) == Some(true))
    };
    match kinds[..] {
        ["ByteLevel"] if flag("use_regex") && !flag("add_prefix_space") => return Ok("gpt-2"),
        ["Digits", "ByteLevel"] if flag("individual_digits") && flag("use_regex") => return Ok("smollm"),
        ["Split", "ByteLevel"] => {
            let pattern = steps
                .iter()
                .find_map(|s| s.pointer("/pattern/Regex").and_then(Json::as_str))
                .unwrap_or_default();
            if let Some((_, name)) = SPLITS.iter().find(|(part, _)| pattern.contains(part)) {
                return Ok(name);
            }
        }
        _ => {}
    }
    Err(format!(
        "the tokenizer splits text by {}, which llama.cpp has no name for that is known here; expected the byte-level splits of GPT-2, SmolLM, Llama 3 or Qwen",
        kinds.join(" and ")
    ))
}

/// Whether the tokenizer puts a special token before a text.
fn begins_with_special(processor: &Json) -> bool {
    let inner = processor.get("processors").and_then(Json::as_array);
    if let Some(inner) = inner {
        return inner.iter().any(begins_with_special);
    }
    let first = processor.get("single").and_then(|s| s.get(0));
    first.is_some_and(|first| first.get("SpecialToken").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer() -> Json {
        json!({"pre_tokenizer": {"type": "ByteLevel", "use_regex": true}, "model": {"type": "BPE", "vocab": {"a": 1}}})
    }

    #[test]
    fn families_are_told_by_their_splits() {
        let split = |pattern: &str| json!({"pretokenizers": [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}]});
        let qwen = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+";
        assert_eq!(pre_tokenizer(&split(qwen)), Ok("qwen2"));
        assert_eq!(
            pre_tokenizer(&split(&qwen.replace(r"\p{N}| ", r"\p{N}{1,3}| "))),
            Ok("llama-bpe")
        );
        let digits = json!({"pretokenizers": [{"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "use_regex": true}]});
        assert_eq!(pre_tokenizer(&digits), Ok("smollm"));
        assert!(
            pre_tokenizer(&split("\\w+"))
                .unwrap_err()
                .contains("Split and ByteLevel")
        );
    }

    #[test]
    fn foreign_tokenizers_are_refused() {
        let refused = |change: &dyn Fn(&mut Json)| {
            let mut changed = tokenizer();
            change(&mut changed);
            vocabulary(&changed, 5).unwrap_err()
        };
        assert!(vocabulary(&tokenizer(), 5).is_ok());
        assert!(refused(&|t| t["model"]["type"] = json!("Unigram")).contains("BPE"));
        assert!(refused(&|t| t["pre_tokenizer"]["type"] = json!("Metaspace")).contains("Metaspace"));
        assert!(refused(&|t| t["model"]["vocab"]["z"] = json!(5)).contains("beyond"));
    }
}
