//! Our artifact: a folder in the Hugging Face habit that explains itself.
//!
//! ```text
//! OUT/config.json                     the model's, with a quantization_config that names qtool
//! OUT/model.safetensors               or shards model-00001-of-000NN.safetensors and their index
//! OUT/tokenizer.json ...              side files, copied
//! OUT/qtool.json                      the manifest, written last: no manifest, no artifact
//! ```
//!
//! A quantized weight `W` is stored as `W.codes`, `W.scales` and, where its grid asks for them,
//! `W.zero_points`; in a folder of another [`Family`](crate::scheme::Family), under that family's names and
//! in its layouts. Everything needed to decode it (layout, index formula, widths, shapes, value
//! formula) stands in the manifest; `docs/artifact.md` is the byte-level text and `docs/decode.py`
//! a reader that has only the folder.

pub mod figures;
pub mod manifest;
pub mod ranks;
pub mod reader;
pub mod sources;
pub mod transform;

pub use figures::Figures;
pub use manifest::{FileRecord, Manifest, PartRecord, SchemeRecord, SourceRecord, Stored, TensorRecord};
pub use ranks::RankIndex;
pub use reader::Artifact;
pub use sources::PieceRecord;

/// File name of the manifest.
pub const MANIFEST_FILE: &str = "qtool.json";
/// Value of the manifest's `format` key.
pub const FORMAT: &str = "qtool";
/// Version of the folder's layout. A reader refuses a newer one; a change of meaning raises it.
pub const FORMAT_VERSION: u32 = 1;
