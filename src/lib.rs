//! qtool: offline quantization of large language models.
//!
//! The library face of the program. A *pipeline page* tells one command's whole story; the pages
//! under `cli` hold what was typed, and nothing below them prints.
//!
//! | Page | Story |
//! |---|---|
//! | [`plan`] | checkpoint and recipe to what will be done, with every refusal at once |
//! | [`fastdeploy`] | the plan of a folder that FastDeploy loads |
//! | [`quantize`] | checkpoint to artifact |
//! | [`verify`] | artifact to findings |
//! | [`inspect`] | what is in a folder |
//! | [`export`] | artifact to an ecosystem's folder |
//! | [`validate`] | models and data to a report |
#![forbid(unsafe_code)]

mod block_work;
pub mod blocks;
pub mod calibrate;
pub mod classes;
pub mod cli;
pub mod device;
pub mod error;
pub mod estimate;
pub mod export;
pub mod fastdeploy;
pub mod foreign;
pub mod informed;
pub mod inspect;
pub mod interrupt;
pub mod kv_scales;
pub mod model;
pub mod plan;
pub mod progress;
pub mod quantize;
pub mod record;
pub mod report;
pub mod resources;
pub mod scan;
pub mod scorer;
pub mod scoring;
mod second_decode;
pub mod source;
pub mod statistics;
mod survey;
pub mod table;
pub mod tasks;
pub mod tokenizer;
pub mod transform;
pub mod validate;
pub mod verdict;
pub mod verify;
mod writing;

pub use error::Error;

/// Result of the pipelines.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Name and version as written into manifests.
pub const TOOL: &str = concat!("qtool ", env!("CARGO_PKG_VERSION"));
