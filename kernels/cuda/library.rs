//! NVIDIA's library of matrix products (cuBLASLt) for plain BF16 weights, where it is installed beside the driver. Owns the
//! question whether it is there, the call's layouts, and the way back to our own kernel when it is not, or declines.
//!
//! Nothing is linked: the library is looked for when it could first be used, and asked for its version before anything else.
//!
//! ```text
//! y (M, N), x (M, padded), w (N, K), all row-major, are to the library, which counts by columns,
//! D (N, M), B (padded, M), A (K, N), each with the row's length as its leading dimension:    D = A^T B
//! ```
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cudarc::cublaslt::{result, sys};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use thiserror::Error;

use super::backend::CudaBackend;
use super::device::Device;
use super::weight::DeviceWeight;

/// Least version, as `cublasLtGetVersion` counts: 12.0, which the bindings are made for.
const LEAST_VERSION: usize = 120_000;
/// Bytes that a product may use besides its matrices, as NVIDIA advises for Hopper, and at most this part of the budget.
const WORKSPACE: usize = 32 << 20;
const WORKSPACE_PART: usize = 64;
/// Where matrices begin: at a multiple of this.
const ALIGNMENT: u32 = 16;

/// Why our own kernel is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NoLibrary {
    /// Nothing of its name.
    #[error("no cuBLASLt 12 is installed (libcublasLt.so was not found)")]
    Absent,
    /// One that is older than the bindings.
    #[error("the cuBLASLt that is installed is too old: expected 12.0 or later")]
    Old,
    /// It would not start.
    #[error("the cuBLASLt that is installed does not start")]
    Unusable,
}

/// The library, ready.
#[derive(Debug)]
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    version: usize,
    /// How it does products of these sizes (M, N, K); `None` for those it declines.
    plans: Mutex<HashMap<[usize; 3], Option<sys::cublasLtMatmulAlgo_t>>>,
    products: AtomicU64,
}

// SAFETY: NVIDIA documents the handle as usable by several threads at a time; it is only read here.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made by `open`, and nobody has it any more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Library {
    /// Looks for it and starts it on the device whose context is current.
    pub(super) fn open() -> Result<Self, NoLibrary> {
        // SAFETY: loading a library runs its initialisers, as for any program that uses it.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoLibrary::Absent);
        }
        // SAFETY: a function without arguments that every version has.
        let version = unsafe { sys::cublasLtGetVersion() };
        if version < LEAST_VERSION {
            return Err(NoLibrary::Old);
        }
        Ok(Self {
            handle: result::create_handle().map_err(|_| NoLibrary::Unusable)?,
            version,
            plans: Mutex::default(),
            products: AtomicU64::new(0),
        })
    }

    /// `cuBLASLt 12.8.4`.
    pub(super) fn name(&self) -> String {
        let v = self.version;
        format!("cuBLASLt {}.{}.{}", v / 10_000, v / 100 % 100, v % 100)
    }

    /// Products so far.
    pub(super) fn products(&self) -> u64 {
        self.products.load(Ordering::Relaxed)
    }

    /// See the module's text; `sizes` is M, N, K, padded. `false` when it was not done.
    fn multiply(
        &self,
        stream: &CudaStream,
        (y, x, w): (u64, u64, u64),
        [m, n, k, padded]: [usize; 4],
        (workspace, bytes): (u64, usize),
    ) -> Result<bool, result::CublasError> {
        let (bf16, f32) = (sys::cudaDataType::CUDA_R_16BF, sys::cudaDataType::CUDA_R_32F);
        let (a, b) = (Layout::new(bf16, k, n, k)?, Layout::new(bf16, k, m, padded)?);
        let d = Layout::new(f32, n, m, n)?;
        let what = Description::new()?;
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plans.entry([m, n, k]).or_insert_with(|| {
            let wishes = Preference::new(bytes).ok()?;
            // SAFETY: all of these live until it returns.
            let found = unsafe {
                result::get_matmul_algo_heuristic(self.handle, what.0, a.0, b.0, d.0, d.0, wishes.0)
            };
            found.ok().map(|found| found.algo)
        });
        let Some(plan) = *plan else { return Ok(false) };
        drop(plans);
        let (one, zero) = (1f32, 0f32);
        let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        // SAFETY: the matrices are on the device, as large as the layouts say, and not used elsewhere before what is in the stream
        // is done; the layouts live until it returns.
        unsafe {
            result::matmul(
                self.handle,
                what.0,
                number(&one),
                number(&zero),
                w as *const c_void,
                a.0,
                x as *const c_void,
                b.0,
                y as *const c_void,
                d.0,
                y as *mut c_void,
                d.0,
                &plan,
                workspace as *mut c_void,
                bytes,
                stream.cu_stream().cast(),
            )?;
        }
        self.products.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

/// A matrix of columns.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        of: sys::cudaDataType,
        rows: usize,
        columns: usize,
        leading: usize,
    ) -> Result<Self, result::CublasError> {
        result::create_matrix_layout(of, rows as u64, columns as u64, leading as i64).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has it any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// The transpose of A times B, summed in f32.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self, result::CublasError> {
        let (compute, scale) = (
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        );
        let this = Self(result::create_matmul_desc(compute, scale)?);
        // `CUBLAS_OP_T` of cublas_api.h.
        let transpose = 1u32;
        let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: the attribute is an integer of 32 bits, which lives until it returns.
        unsafe {
            let value = std::ptr::from_ref(&transpose).cast();
            result::set_matmul_desc_attribute(this.0, which, value, size_of::<u32>())?;
        }
        Ok(this)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has it any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(workspace: usize) -> Result<Self, result::CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Wish;
        let this = Self(result::create_matmul_pref()?);
        let alignments = [
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Wish::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ];
        // SAFETY: the attributes are of these types; the values live until the calls return.
        unsafe {
            let (most, bytes) = (Wish::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, workspace as u64);
            let value = std::ptr::from_ref(&bytes).cast();
            result::set_matmul_pref_attribute(this.0, most, value, size_of::<u64>())?;
            for which in alignments {
                let value = std::ptr::from_ref(&ALIGNMENT).cast();
                result::set_matmul_pref_attribute(this.0, which, value, size_of::<u32>())?;
            }
        }
        Ok(this)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has it any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Device {
    /// NVIDIA's library, looked for once.
    pub(super) fn library(&self) -> Result<&Library, NoLibrary> {
        let found = self.library.get_or_init(|| {
            self.stream
                .context()
                .bind_to_thread()
                .map_err(|_| NoLibrary::Unusable)?;
            Library::open()
        });
        found.as_ref().map_err(|why| *why)
    }
}

impl CudaBackend {
    /// The same, with our own kernel where the library could be used.
    pub fn without_library(mut self) -> Self {
        self.library = false;
        self
    }

    /// What multiplies by plain BF16 weights on tensor cores: the library's name and version, or why it is our own kernel.
    pub fn library(&self) -> Result<String, NoLibrary> {
        self.device().library().map(Library::name)
    }

    /// Products that the library has done.
    pub fn library_products(&self) -> u64 {
        self.device().library().map_or(0, Library::products)
    }

    /// y (M, N) = x (M, K) in bf16 times the transpose of `w` by the library; `sizes` is M, N, K and the width of a row of x.
    /// `false` when it is not there, not wanted, or declines, and y means nothing.
    pub(super) fn by_library(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<u32>,
        w: &DeviceWeight,
        sizes: [usize; 4],
    ) -> Result<bool, DriverError> {
        let Some(library) = self.library.then(|| self.device().library().ok()).flatten() else {
            return Ok(false);
        };
        let stream = self.stream();
        let bytes = WORKSPACE.min(self.device().memory().budget / WORKSPACE_PART);
        let mut workspace = self.device().room::<u8>(bytes)?;
        let args = self.resident(w)?;
        let ((y, _wrote), (x, _read)) = (y.device_ptr_mut(stream), x.device_ptr(stream));
        let (room, _used) = workspace.device_ptr_mut(stream);
        if [y, x, args.parts[0], room]
            .iter()
            .any(|at| at % u64::from(ALIGNMENT) != 0)
        {
            return Ok(false);
        }
        stream.context().bind_to_thread()?;
        let done = library.multiply(stream, (y, x, args.parts[0]), sizes, (room, bytes));
        // What stopped it stops our own kernel, too, and that says so.
        Ok(done.unwrap_or(false))
    }
}
