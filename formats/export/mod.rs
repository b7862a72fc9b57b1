//! Other people's folders: each exporter lays out an artifact's neutral codes in one ecosystem's
//! format. No exporter rounds codes again.
//!
//! Adding a format is one file here, one line in [`EXPORTERS`], and its page in `docs/formats`.

mod ahead;
pub mod awq;
pub mod bnb_nf4;
mod card;
mod checking;
pub mod compressed_tensors;
pub mod dense;
pub mod fastdeploy;
pub mod foreign;
pub mod gguf;
pub mod gptq;
pub mod linears;
mod shards;
mod spares;
mod syncing;

use serde_json::json;

use crate::artifact::Artifact;
use crate::checkpoint::{Checkpoint, file_name};
use crate::replace::Staging;
use crate::scheme::Scheme;
use crate::{FormatError, Result};

/// Marks a folder as an export of qtool and says of what.
pub const PROVENANCE_FILE: &str = "qtool-export.json";

/// Called with the bytes read so far, as an export goes on; returning false stops it.
pub type OnBytes<'a> = &'a dyn Fn(u64) -> bool;

/// One ecosystem format.
pub trait Exporter: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// One line for `--help`.
    fn summary(&self) -> &'static str;

    /// `None` when the format can hold this scheme, or the reason in words.
    fn refuses(&self, scheme: &Scheme) -> Option<String>;

    /// Fails when the format cannot hold this artifact for another reason than a scheme.
    fn check(&self, _artifact: &Artifact) -> Result<()> {
        Ok(())
    }

    /// Bytes of tensor data the export will write.
    fn planned_bytes(&self, artifact: &Artifact) -> u64;

    /// Writes the export into `staging`. `max_shard_bytes` bounds the tensor data of one file.
    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()>;

    /// What an export of a model that others quantized will write. Fails when the format cannot hold it.
    fn plan_foreign<'a>(&'a self, given: &'a foreign::Given<'a>) -> Result<foreign::Planned<'a>> {
        Err(given.refusal(format!(
            "{} is written from artifacts of qtool alone; export this model --to bf16, quantize that, and export the artifact",
            self.name()
        )))
    }
}

/// Every export format.
pub const EXPORTERS: &[&dyn Exporter] = &[
    &dense::DENSE_BF16,
    &dense::DENSE_BF16_GEMM,
    &dense::DENSE_F32,
    &fastdeploy::FASTDEPLOY,
    &compressed_tensors::COMPRESSED_TENSORS,
    &compressed_tensors::COMPRESSED_TENSORS_INT8,
    &gptq::GPTQ,
    &gptq::GPTQ_V2,
    &awq::AWQ,
    &bnb_nf4::BNB_NF4,
    &gguf::GGUF,
];

/// The formats among them that lay out linear weights one by one.
pub const LINEAR_FORMATS: &[&dyn linears::LinearFormat] = &[
    &compressed_tensors::COMPRESSED_TENSORS.0,
    &compressed_tensors::COMPRESSED_TENSORS_INT8.0,
    &gptq::GPTQ.0,
    &gptq::GPTQ_V2.0,
    &awq::AWQ.0,
    &bnb_nf4::BNB_NF4.0,
];

/// The exporter of this name.
pub fn find(name: &str) -> Option<&'static dyn Exporter> {
    EXPORTERS.iter().copied().find(|e| e.name() == name)
}

/// A stop asked for by [`OnBytes`], as the error every unfinished write ends in.
pub(crate) fn interrupted(staging: &Staging) -> FormatError {
    FormatError::io(staging.target(), "finish")(std::io::ErrorKind::Interrupted.into())
}

/// Writes the provenance file every export carries.
pub(crate) fn write_provenance(staging: &Staging, artifact: &Artifact, format: &str) -> Result<()> {
    let manifest = artifact.manifest();
    let text = json!({
        "format": format,
        "tool": concat!("qtool ", env!("CARGO_PKG_VERSION")),
        "artifact": { "tool": manifest.tool, "source": manifest.source, "options": manifest.options },
    });
    staging.write_file(PROVENANCE_FILE, format!("{text:#}\n").as_bytes())
}

/// An artifact that a format cannot hold, with what to do about it.
pub(crate) fn refusal(artifact: &Artifact, reason: String) -> FormatError {
    FormatError::Export {
        path: artifact.folder().to_owned(),
        reason,
    }
}

/// Copies every file of a folder that is neither weights, manifest, `config.json` nor one of `without`. The base
/// model's card makes room for the export's own.
pub(crate) fn copy_side_files(staging: &Staging, files: &Checkpoint, without: &[&str]) -> Result<()> {
    for path in files.side_files()? {
        let name = file_name(&path);
        if name == card::CARD {
            let copy = staging.copy_file(&path)?;
            std::fs::rename(&copy, copy.with_file_name(card::BASE_CARD))
                .map_err(FormatError::io(&copy, "rename"))?;
        } else if name != "config.json" && !without.contains(&name.as_str()) {
            staging.copy_file(&path)?;
        }
    }
    Ok(())
}
