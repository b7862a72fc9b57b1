//! `--kv-cache`: the types of a quantized key-value cache, as typed.

use clap::ValueEnum;
use qtool_formats::export::fastdeploy::kv_cache::KvCache;

/// What was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// INT8, a scale per channel
    Int8,
    /// float8_e4m3fn, a scale per head
    Fp8,
}

impl Cache {
    /// What it means.
    pub fn meaning(self) -> KvCache {
        match self {
            Self::Int8 => KvCache::Int8,
            Self::Fp8 => KvCache::Fp8,
        }
    }
}
