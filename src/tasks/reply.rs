//! Replies read as JSON `{"result": ..}`. What is no such thing is unparsable: counted and shown, never a label.

use serde_json::{Value, json};

/// The reply that names a label.
pub fn written(result: &Value) -> String {
    format!("{{\"result\": {result}}}")
}

/// Index of the label that a reply names: that of the first JSON object in it with a `result` that equals one of
/// `results`, as the same JSON value or as the same text. `None` when there is none.
pub fn parse(reply: &str, results: &[Value]) -> Option<usize> {
    let result = reply.match_indices('{').find_map(|(start, _)| {
        let mut values = serde_json::Deserializer::from_str(&reply[start..]).into_iter::<Value>();
        values.next()?.ok()?.get("result").cloned()
    })?;
    let plain = |v: &Value| v.as_str().map_or_else(|| v.to_string(), |t| t.trim().to_owned());
    results
        .iter()
        .position(|r| *r == result || plain(r) == plain(&result))
}

/// JSON schema of such replies.
pub fn schema(results: &[Value]) -> Value {
    json!({
        "type": "object",
        "properties": {"result": {"enum": results}},
        "required": ["result"],
        "additionalProperties": false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_by_hand() {
        let labels = [json!(0), json!(1)];
        for (reply, expected) in [
            (r#"{"result": 0}"#, Some(0)),
            (r#"{"result":"1"}"#, Some(1)),
            ("```json\n{\"result\": 1}\n```", Some(1)),
            (r#"Sure: {"result": 1} because {"result": 0}"#, Some(1)),
            (r#"{x} {"answer": 0} {"result": 1}"#, Some(1)),
            (r#"{"result": 2}"#, None),
            (r#"{"result": null}"#, None),
            (r#"{"result": "#, None),
            ("0", None),
            ("", None),
        ] {
            assert_eq!(parse(reply, &labels), expected, "{reply}");
        }
        let names = [json!("news_car"), json!("体育")];
        assert_eq!(parse(r#"{"result": "体育 "}"#, &names), Some(1));
    }

    #[test]
    fn what_is_written_is_read() {
        let labels = [json!(0), json!("a\": b"), json!("体育")];
        for (i, label) in labels.iter().enumerate() {
            assert_eq!(parse(&written(label), &labels), Some(i), "{}", written(label));
        }
        assert_eq!(written(&json!(0)), r#"{"result": 0}"#);
    }
}
