//! What answers the questions of `crate::scorer`.
//!
//! | Page | Idea |
//! |---|---|
//! | [`local`] | a causal model run here |
//! | [`endpoint`] | a served model |
//! | [`border`] | where a prompt ends and an answer begins, in tokens; what is cut when both are too long |
//! | [`sharing`] | which prompts share a prefix, and which run in one batch |
//! | [`likelihood`] | ln p of answers and of windows |
//! | [`greedy`] | replies, many at a time, perhaps only some allowed |
//! | [`softmax`] | ln p of one token in a row of logits |

pub mod border;
pub mod endpoint;
pub mod greedy;
pub mod likelihood;
pub mod local;
pub mod sharing;
pub mod softmax;
