//! `fastdeploy`: the folder PaddlePaddle FastDeploy loads without quantizing anything itself, for
//! ERNIE-4.5 text models. Fused Paddle names, INT8 and INT4 per output channel in Paddle's byte
//! layouts, BF16 scales, and everything else in BF16 but routers, which stay F32.
//!
//! ```text
//! ernie.layers.I.self_attn.qkv_proj.quant_weight   I8 [N, K] (8 bits) or [N/2, K] (4 bits)
//! ernie.layers.I.self_attn.qkv_proj.weight_scale   BF16 [N]
//! ernie.layers.I.mlp.gate.weight                   F32 [H, experts]
//! ernie.embed_tokens.weight, norms, lm_head        BF16
//! ```
//!
//! `qtool quantize --format fastdeploy` makes such a folder as an artifact of qtool;
//! `qtool export --to fastdeploy` lays out an artifact whose codes fit anew, see [`relay`]. Both take
//! names and shapes from [`ernie`], sources from [`mod@place`], and forms from [`wanted`].
//! `docs/formats/fastdeploy.md` is the page about it.

pub mod ernie;
pub mod kv_cache;
pub mod place;
pub mod relay;
pub mod wanted;

use std::path::Path;

pub use ernie::{Ernie, Kind};
pub use place::{Placed, Placement, Source, place};
pub use relay::FASTDEPLOY;
pub use wanted::{Store, Wanted};

use crate::FormatError;
use crate::dtype::FloatDtype;

/// Element type of a tensor that is not quantized.
pub fn kept_dtype(kind: Kind) -> FloatDtype {
    match kind {
        Kind::Router | Kind::RouterBias => FloatDtype::F32,
        _ => FloatDtype::Bf16,
    }
}

/// Why a tensor is not quantized.
pub fn kept_reason(kind: Kind) -> &'static str {
    match kind {
        Kind::Embedding => "embedding",
        Kind::Norm => "norm",
        Kind::Head => "output head",
        Kind::Router | Kind::RouterBias => "router",
        Kind::Linear | Kind::Expert { .. } => "linear",
    }
}

/// A model that FastDeploy's layout cannot hold.
pub(crate) fn refusal(path: &Path, reason: String) -> FormatError {
    FormatError::FastDeploy {
        path: path.to_owned(),
        reason,
    }
}
