//! BERT, and the MiniLM models distilled from it: word, type and position tables, post-norm layers, a pooler.
//! Source: `modeling_bert.py` in Hugging Face transformers.

use super::EncoderArchitecture;
use crate::model::encoder::shape::HeadForm;

/// The registry entry.
pub const ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    model_types: &["bert"],
    summary: "BERT and models of its form, such as MiniLM",
    read: |fields, source| fields.encoder(source, "bert.", HeadForm::Pooler),
};
