//! RoBERTa and XLM-RoBERTa: BERT's layers, a head of their own, and positions that are counted from one past the
//! id of the padding token.
//! Source: `modeling_roberta.py` in Hugging Face transformers.

use serde_json::Value;

use super::EncoderArchitecture;
use crate::Result;
use crate::model::decoder::Fields;
use crate::model::encoder::shape::{HeadForm, Shape};
use crate::source::WeightSource;

/// The registry entry.
pub const ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    model_types: &["roberta", "xlm-roberta", "camembert"],
    summary: "RoBERTa, XLM-RoBERTa and CamemBERT",
    read,
};

fn read(fields: &Fields<'_>, source: &dyn WeightSource) -> Result<Shape> {
    let mut shape = fields.encoder(source, "roberta.", HeadForm::Own)?;
    let padding = fields.config.get("pad_token_id").and_then(Value::as_u64);
    let first = padding.unwrap_or(1) as usize + 1;
    if first >= shape.context {
        return Err(fields.fault(format!(
            "positions begin after \"pad_token_id\" {}, but there are only {} of them",
            first - 1,
            shape.context
        )));
    }
    shape.context -= first;
    shape.first_position = first;
    Ok(shape)
}
