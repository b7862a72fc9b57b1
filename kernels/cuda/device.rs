//! Is there a GPU that can be used? Owns the order of the questions, so that asking never panics, and the sentence that
//! answers each. [`Device`] holds the context, its one stream, and the kernels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use cudarc::driver::sys::{CUdevice_attribute, CUresult};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, result};
use thiserror::Error;

use super::arena::Arena;
use super::launch::{order_by_hand, shared_limit};
use super::library::{Library, NoLibrary};
use super::residency::Residency;
use super::sent::Sent;
use super::warpgroup::{NoWarpgroups, Warpgroups};
use super::{attention, gemv, gram, tensor};

/// Least driver, as `cuDriverGetVersion` counts: CUDA 12.0, which the bindings are made for.
const LEAST_DRIVER: i32 = 12_000;
/// Least compute capability: the PTX is made for sm_80 (Ampere).
const LEAST_CAPABILITY: (i32, i32) = (8, 0);

/// Bytes left to the driver at least.
const RESERVE: usize = 256 << 20;

/// The kernels: a PTX page and the names it holds.
const KERNELS: &[(&str, &[&str])] = &[
    (
        include_str!("ptx/matmul.ptx"),
        &[
            "gemv",
            "decode",
            "exact_any",
            "exact_f32",
            "exact_bf16",
            "exact_int8",
            "exact_int4",
            "exact_wint2",
            "exact_nf4",
        ],
    ),
    (
        include_str!("ptx/attention.ptx"),
        &[
            "attention_64",
            "attention_96",
            "attention_128",
            "attention_256",
            "attention_less_128",
            "attention_less_256",
            "attention_few_64",
            "attention_few_96",
            "attention_few_128",
            "attention_few_256",
        ],
    ),
    (include_str!("ptx/attention_any.ptx"), &["attention_any"]),
    (include_str!("ptx/norm.ptx"), &["rms_norm", "layer_norm"]),
    (
        include_str!("ptx/elementwise.ptx"),
        &["add", "activate", "gate", "rope"],
    ),
    (
        include_str!("ptx/rows.ptx"),
        &["gather", "scatter_add", "scatter_apart", "place"],
    ),
    (
        include_str!("ptx/gemv.ptx"),
        &[
            "gemv_bf16_4",
            "gemv_bf16_8",
            "gemv_bf16_16",
            "gemv_int8_4",
            "gemv_int8_8",
            "gemv_int8_16",
            "gemv_int4_4",
            "gemv_int4_8",
            "gemv_int4_16",
            "gemv_int4_128_4",
            "gemv_int4_128_8",
            "gemv_int4_128_16",
            "gemv_int4_64_4",
            "gemv_int4_64_8",
            "gemv_int4_64_16",
            "gemv_int4_32_4",
            "gemv_int4_32_8",
            "gemv_int4_32_16",
            "gemv_wint2_4",
            "gemv_wint2_8",
            "gemv_wint2_16",
            "gemv_nf4_4",
            "gemv_nf4_8",
            "gemv_nf4_16",
        ],
    ),
    (
        include_str!("ptx/tensor_gemm.ptx"),
        &[
            "narrow",
            "gemm_any",
            "gemm_bf16",
            "gemm_int8",
            "gemm_int4",
            "gemm_wint2",
            "gemm_nf4",
        ],
    ),
    (
        include_str!("ptx/tensor_grouped.ptx"),
        &[
            "grouped_any",
            "grouped_bf16",
            "grouped_int8",
            "grouped_int4",
            "grouped_wint2",
            "grouped_nf4",
        ],
    ),
    (
        include_str!("ptx/moe.ptx"),
        &["route", "count_entries", "group_entries", "combine"],
    ),
    (
        include_str!("ptx/exact_low.ptx"),
        &[
            "exact_low_any",
            "exact_low_f32",
            "exact_low_bf16",
            "exact_low_int8",
            "exact_low_int4",
            "exact_low_wint2",
            "exact_low_nf4",
        ],
    ),
    (
        include_str!("ptx/exact_grouped.ptx"),
        &[
            "exact_grouped_any",
            "exact_grouped_f32",
            "exact_grouped_bf16",
            "exact_grouped_int8",
            "exact_grouped_int4",
            "exact_grouped_wint2",
            "exact_grouped_nf4",
        ],
    ),
    (include_str!("ptx/gram.ptx"), &["gram", "split", "gram_split"]),
    (include_str!("ptx/sums.ptx"), &["watch_columns", "mirror"]),
    (include_str!("ptx/scores.ptx"), &["log_p", "divergence"]),
    (include_str!("ptx/encode_affine.ptx"), &["encode_affine"]),
    (
        include_str!("ptx/encode_wint2.ptx"),
        &["encode_wint2", "encode_wint2_weighted"],
    ),
];

/// Why no GPU can be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// No driver library.
    #[error("no NVIDIA driver is installed (libcuda.so.1 was not found)")]
    NoDriver,
    /// A driver older than the bindings.
    #[error(
        "the NVIDIA driver is too old: it knows CUDA {}.{}, expected 12.0 or later; install driver 525 or later",
        found / 1000,
        found % 1000 / 10
    )]
    OldDriver {
        /// As `cuDriverGetVersion` says.
        found: i32,
    },
    /// A driver and no device.
    #[error("the NVIDIA driver finds no GPU; is it visible (CUDA_VISIBLE_DEVICES)?")]
    NoDevice,
    /// Fewer devices than the number asked for.
    #[error("there is no GPU number {ordinal}: the NVIDIA driver finds {found}, counted from 0")]
    NoSuchDevice {
        /// The number.
        ordinal: usize,
        /// How many there are.
        found: usize,
    },
    /// A device older than the kernels.
    #[error(
        "the GPU {name} has compute capability {}.{}, expected 8.0 or later",
        capability.0,
        capability.1
    )]
    OldDevice {
        /// Its name.
        name: String,
        /// Major and minor.
        capability: (i32, i32),
    },
    /// The driver failed.
    #[error("the NVIDIA driver failed to {what}: {reason}")]
    Failed {
        /// What was asked of it.
        what: &'static str,
        /// Its own words.
        reason: String,
    },
}

/// What the driver says of an error.
pub(super) fn words(error: DriverError) -> String {
    let text = error.error_string().map(|s| s.to_string_lossy().into_owned());
    match (error.0, text) {
        (CUresult::CUDA_ERROR_OUT_OF_MEMORY, _) => "out of GPU memory".to_owned(),
        (code, Ok(text)) => format!("{text} ({code:?})"),
        (code, Err(_)) => format!("{code:?}"),
    }
}

fn failed(what: &'static str) -> impl Fn(DriverError) -> Unavailable {
    move |error| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => Unavailable::NoDevice,
        _ => Unavailable::Failed {
            what,
            reason: words(error),
        },
    }
}

/// A GPU, ready: context, stream, kernels.
pub struct Device {
    /// Looked for when it could first be used; ends before the context does.
    pub(super) library: OnceLock<Result<Library, NoLibrary>>,
    /// The same.
    pub(super) warpgroups: OnceLock<Result<Warpgroups, NoWarpgroups>>,
    /// Major and minor.
    pub(super) capability: (i32, i32),
    /// Most bytes of shared memory of a block.
    pub(super) shared: usize,
    name: String,
    ordinal: usize,
    pub(super) stream: Arc<CudaStream>,
    pub(super) arena: Arc<Arena>,
    pub(super) residency: Residency,
    /// Multiprocessors.
    pub(super) processors: usize,
    /// How many blocks of a product of few rows have left their sums, of each that others wait for; zeros between products.
    pub(super) arrived: CudaSlice<u32>,
    functions: HashMap<&'static str, CudaFunction>,
    /// What was sent to be read again.
    pub(super) sent: Mutex<Sent>,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("name", &self.name).finish()
    }
}

impl Device {
    /// Its name, as the driver gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number, as the driver counts.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// What its memory is used for.
    pub fn memory(&self) -> MemoryUse {
        let (used, most) = self.arena.used();
        let (fetched, foreseen) = self.residency.fetched();
        MemoryUse {
            budget: self.arena.budget(),
            used: used.saturating_sub(self.kept_for_later()),
            most,
            fetched,
            foreseen,
        }
    }

    /// A kernel of [`KERNELS`]; `None` for another name.
    pub(super) fn function(&self, name: &str) -> Option<&CudaFunction> {
        self.functions.get(name)
    }
}

/// What a device's memory is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Most bytes that may be taken.
    pub budget: usize,
    /// Bytes taken, without copies that are let go when somebody needs their room.
    pub used: usize,
    /// Most bytes taken at any time.
    pub most: usize,
    /// Weights that were brought in when they were used, because not all fit.
    pub fetched: u64,
    /// How many of these were on their way by then.
    pub foreseen: u64,
}

/// Of memory that is free, what is left to others: a tenth, and as much as the driver's own needs for kernels.
fn budget_of(free: usize) -> usize {
    free - (free / 10).max(RESERVE).min(free / 2)
}

/// The GPU number `ordinal` with a budget made of what is free, or why there is none.
pub fn probe(ordinal: usize) -> Result<Arc<Device>, Unavailable> {
    open(ordinal, None)
}

/// The GPU number `ordinal`, or why there is none. Asks for nothing that could panic: first whether the driver library is
/// there, then for its version, for devices, for their age, for the kernels, and last for free memory, of which `budget` bytes are
/// used at most; without it, nine tenths.
pub fn open(ordinal: usize, budget: Option<usize>) -> Result<Arc<Device>, Unavailable> {
    if !super::launch::driver_is_there() {
        return Err(Unavailable::NoDriver);
    }
    result::init().map_err(failed("start"))?;
    let found = super::launch::driver_version().map_err(failed("tell its version"))?;
    if found < LEAST_DRIVER {
        return Err(Unavailable::OldDriver { found });
    }
    let count = result::device::get_count().map_err(failed("count GPUs"))?;
    match usize::try_from(count).unwrap_or(0) {
        0 => return Err(Unavailable::NoDevice),
        found if found <= ordinal => return Err(Unavailable::NoSuchDevice { ordinal, found }),
        _ => {}
    }
    let context = CudaContext::new(ordinal).map_err(failed("open the GPU"))?;
    let name = context.name().map_err(failed("name the GPU"))?;
    let capability = context
        .compute_capability()
        .map_err(failed("tell the GPU's compute capability"))?;
    if capability < LEAST_CAPABILITY {
        return Err(Unavailable::OldDevice { name, capability });
    }
    let mut functions = HashMap::new();
    for (ptx, names) in KERNELS {
        let module = context
            .load_module((*ptx).into())
            .map_err(failed("translate the kernels"))?;
        for name in *names {
            let function = module.load_function(name).map_err(failed("find a kernel"))?;
            functions.insert(*name, function);
        }
    }
    let shared = context
        .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        .map_err(failed("tell its shared memory"))? as usize;
    let large = tensor::shared_memory().chain(gemv::shared_memory());
    let large = large.chain(attention::shared_memory());
    for (name, bytes) in large.chain([gram::SPLIT_SHARED]) {
        // A kernel that asks for more is not chosen on this device.
        if bytes <= shared {
            shared_limit(&functions[name], bytes).map_err(failed("reserve shared memory"))?;
        }
    }
    order_by_hand(&context);
    let processors = context
        .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        .map_err(failed("count the GPU's multiprocessors"))?;
    let stream = context.default_stream();
    let arrived = stream
        .alloc_zeros(gemv::MOST_BLOCKS)
        .map_err(failed("reserve memory"))?;
    let (free, _) = context.mem_get_info().map_err(failed("tell its free memory"))?;
    let arena = Arc::new(Arena::new(
        Arc::clone(&stream),
        budget.unwrap_or_else(|| budget_of(free)),
    ));
    Ok(Arc::new(Device {
        name,
        ordinal,
        residency: Residency::new(Arc::clone(&arena), Arc::clone(&stream)),
        arena,
        stream,
        processors: usize::try_from(processors).unwrap_or(1),
        arrived,
        functions,
        library: OnceLock::new(),
        warpgroups: OnceLock::new(),
        capability,
        shared,
        sent: Mutex::default(),
    }))
}
