//! ERNIE 1.0 to 3.0: BERT with a table of task types that is added to the embeddings where `use_task_id` is set.
//! Source: `modeling_ernie.py` in Hugging Face transformers.

use super::EncoderArchitecture;
use crate::Result;
use crate::model::decoder::Fields;
use crate::model::encoder::shape::{HeadForm, Shape};
use crate::source::WeightSource;

/// The registry entry.
pub const ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    model_types: &["ernie"],
    summary: "ERNIE 1.0 to 3.0, with or without task types",
    read,
};

fn read(fields: &Fields<'_>, source: &dyn WeightSource) -> Result<Shape> {
    let mut shape = fields.encoder(source, "ernie.", HeadForm::Pooler)?;
    if fields.flag("use_task_id", false) {
        shape.tasks = fields.maybe("task_type_vocab_size")?.unwrap_or(3);
    }
    Ok(shape)
}
