//! Every cap on foreign input, each with its reason. A number read from a file reaches the
//! allocator or an index only after it passed one of these.

/// Longest safetensors header we parse. The reference implementation refuses above 100 MB, so no
/// valid file is larger.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Longest tensor name, in bytes. Real names stay under 200; names become keys of the manifest and
/// parts of messages.
pub const MAX_NAME_BYTES: usize = 1024;

/// Most dimensions a tensor may have. Convolutions have 5; NumPy itself stops at 64.
pub const MAX_DIMS: usize = 16;

/// Largest JSON side file we parse (`config.json`, index, manifest). A manifest takes about 1.5 kB
/// per tensor, so this allows for some 300 000 tensors.
pub const MAX_JSON_BYTES: u64 = 512_000_000;

/// Widest attention head that is written to GGUF, where the config's number decides how many rotary factors there
/// are. Real heads have 64 to 256 rows.
pub const MAX_HEAD_DIM: u32 = 65_536;

/// Most shard files one index may name. The largest published checkpoints have a few hundred.
pub const MAX_SHARDS: usize = 100_000;

/// Longest JSON that bitsandbytes keeps of one weight. Real ones have some 200 bytes.
pub const MAX_STATE_BYTES: u64 = 65_536;

/// Most experts of a layer that are read from GGUF, where each becomes a tensor of its own. Real models have up to 512.
pub const MAX_EXPERTS: u64 = 65_536;

/// Most dimensions of a tensor of GGUF, by its specification.
pub const MAX_GGUF_DIMS: u32 = 4;

/// Largest alignment of tensors in a GGUF file. Writers use 32; a page is the most that has a use.
pub const MAX_GGUF_ALIGNMENT: usize = 65_536;
