//! Products on tensor cores by warpgroups, which compute capability 9.0 alone has. Owns when they can be used, the check that they are
//! right, and the shape of their launches.
//!
//! Only they reach the full rate of these tensor cores: `mma.sync` is said to get about 62 % of it on an H100 (Luo et al., Benchmarking and
//! Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499). They are off unless asked for, as no GPU has run them. When
//! they are first used, they multiply small whole numbers, whose product has one right answer, and are used no more if they miss it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::{CudaFunction, CudaSlice, DriverError, LaunchArgs, PushKernelArg};
use half::bf16;
use qtool_formats::FloatDtype;
use thiserror::Error;

use super::backend::CudaBackend;
use super::device::{Device, words};
use super::launch::{run, run_with_shared, shared_limit};
use super::temporary::Temporary;
use super::tensor::Precision;
use super::weight::{DeviceWeight, WeightArgs};
use crate::backend::{Form, HostWeight};

/// The one compute capability whose code for warpgroups is here.
const CAPABILITY: (i32, i32) = (9, 0);
const PRODUCTS: &str = include_str!("ptx/warpgroup_gemm.ptx");
const MOMENTS: &str = include_str!("ptx/warpgroup_gram.ptx");
/// Output columns of a block.
const COLUMNS: usize = 128;
/// Rows of x of a block.
const ROWS: [usize; 2] = [128, 256];
/// Input columns of two slices, which come in pairs.
const PAIR: usize = 128;
/// Slices of x in shared memory.
const STAGES: usize = 4;
/// Threads of a block.
const THREADS: u32 = 256;
/// Orders the columns of x.
const NARROW: &str = "narrow_turned";

/// Turns x over for [`GRAM`]: rows of a tile, and the rows of x and columns that a block takes.
const SPLIT: &str = "split_turned";
const GRAM: &str = "gram_wide";
/// Moments of a block on each side.
const SIDE: usize = 128;
/// Rows and columns of x that a block of [`SPLIT`] takes.
const TURNED: (usize, usize) = (64, 32);
/// Shared memory of [`GRAM`]: three slices of 64 rows of x, two tiles wide, in two halves of bf16.
const GRAM_SHARED: usize = 3 * 4 * 64 * SIDE * 2 + 1024;

/// The kernels of a form, one for each of [`ROWS`].
type Pair = [&'static str; 2];

const BF16: Pair = ["wide_bf16_128", "wide_bf16_256"];
const INT8: Pair = ["wide_int8_128", "wide_int8_256"];
const INT4: Pair = ["wide_int4_128", "wide_int4_256"];
const WINT2: Pair = ["wide_wint2_128", "wide_wint2_256"];
const NF4: Pair = ["wide_nf4_128", "wide_nf4_256"];

/// Why products of warpgroups cannot be used.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum NoWarpgroups {
    /// Another device.
    #[error("compute capability {}.{} has none, only 9.0 does", .0.0, .0.1)]
    Capability((i32, i32)),
    /// The driver does not take the kernels.
    #[error("the driver does not take their kernels: {0}")]
    Driver(String),
    /// They do not multiply as they should.
    #[error("value {at} of a product of whole numbers is {got}, expected {expected}")]
    Wrong {
        /// Number of the value.
        at: usize,
        /// What came out.
        got: f32,
        /// The one right answer.
        expected: f32,
    },
}

/// The kernels, by name.
#[derive(Debug)]
pub(super) struct Warpgroups {
    functions: HashMap<&'static str, CudaFunction>,
    done: AtomicU64,
}

/// Shared memory of a block for so many rows of x, in bytes; slices begin at a multiple of 1024.
fn shared_bytes(rows: usize) -> usize {
    STAGES * rows * PAIR + 1024
}

/// The kernels for this weight, if it lies as they need it: 16 weights of a row in whole words, and under one scale.
fn pair_for(w: &WeightArgs) -> Option<Pair> {
    let (k, group) = (w.k as u64, w.group as u64);
    let whole = k % 16 == 0 && group % 16 == 0 && k * group < 1 << 32;
    match (w.form, w.bits) {
        (1, _) if k % 16 == 0 => Some(BF16),
        (3, 8) if whole => Some(INT8),
        (3, 4) if whole => Some(INT4),
        (4, _) => Some(WINT2),
        (6, _) => Some(NF4),
        _ => None,
    }
}

/// Which of [`ROWS`]: the larger, unless it leaves more rows unused.
fn choice(m: usize) -> usize {
    usize::from(m.next_multiple_of(ROWS[1]) <= m.next_multiple_of(ROWS[0]).max(m + m / 8))
}

impl Warpgroups {
    fn open(device: &Device) -> Result<Self, NoWarpgroups> {
        if device.capability != CAPABILITY {
            return Err(NoWarpgroups::Capability(device.capability));
        }
        let refused = |error: DriverError| NoWarpgroups::Driver(words(error));
        let load = |page: &str| {
            let module = device.stream.context().load_module(page.into());
            module.map_err(refused)
        };
        let module = load(PRODUCTS)?;
        let mut functions = HashMap::new();
        functions.insert(NARROW, module.load_function(NARROW).map_err(refused)?);
        for pair in [BF16, INT8, INT4, WINT2, NF4] {
            for (name, rows) in pair.into_iter().zip(ROWS) {
                let function = module.load_function(name).map_err(refused)?;
                shared_limit(&function, shared_bytes(rows)).map_err(refused)?;
                functions.insert(name, function);
            }
        }
        let module = load(MOMENTS)?;
        for name in [SPLIT, GRAM] {
            functions.insert(name, module.load_function(name).map_err(refused)?);
        }
        shared_limit(&functions[GRAM], GRAM_SHARED).map_err(refused)?;
        Ok(Self {
            functions,
            done: AtomicU64::new(0),
        })
    }
}

impl CudaBackend {
    /// Whether products of warpgroups can be used here; looks and checks at the first question.
    pub fn warpgroups(&self) -> Result<(), NoWarpgroups> {
        self.found_warpgroups().map(|_| ())
    }

    /// Products and sums of second moments that they have done, those of the check among them.
    pub fn warpgroup_products(&self) -> u64 {
        let found = self.found_warpgroups();
        found.map_or(0, |kernels| kernels.done.load(Ordering::Relaxed))
    }

    /// The kernels, once they were found to be right.
    fn found_warpgroups(&self) -> Result<&Warpgroups, NoWarpgroups> {
        let open = || {
            let kernels = Warpgroups::open(self.device())?;
            kernels.check(&self.shared_device())?;
            Ok(kernels)
        };
        self.device()
            .warpgroups
            .get_or_init(open)
            .as_ref()
            .map_err(Clone::clone)
    }

    /// y (M, N) = x (M, K) times the transpose of `w` by warpgroups; `false` when that is not asked for, or cannot be done.
    pub(super) fn by_warpgroups(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &DeviceWeight,
        m: usize,
    ) -> Result<bool, DriverError> {
        let Some(pair) = pair_for(&w.args).filter(|_| self.precision() == Precision::Bf16Warpgroups) else {
            return Ok(false);
        };
        let Ok(kernels) = self.found_warpgroups() else {
            return Ok(false);
        };
        kernels.multiply(self.device(), (y, x, w, m), pair).map(|()| true)
    }
}

impl CudaBackend {
    /// Adds the upper triangle of x^T x (K, K) for x (M, K) by warpgroups; `false` when that is not asked for, or cannot be done.
    pub(super) fn moments_by_warpgroups(
        &self,
        out: &mut CudaSlice<f64>,
        x: &CudaSlice<f32>,
        size: (usize, usize),
    ) -> Result<bool, DriverError> {
        if self.precision() != Precision::Bf16Warpgroups {
            return Ok(false);
        }
        let Ok(kernels) = self.found_warpgroups() else {
            return Ok(false);
        };
        kernels.moments(self.device(), out, x, size).map(|()| true)
    }
}

impl Warpgroups {
    fn call<'a>(&'a self, device: &'a Device, name: &str) -> LaunchArgs<'a> {
        device.stream.launch_builder(&self.functions[name])
    }

    /// x in bf16 as the kernels want it, and the width of its rows.
    fn turned(
        &self,
        device: &Device,
        x: &CudaSlice<f32>,
        m: usize,
        k: usize,
    ) -> Result<(Temporary<u32>, i32), DriverError> {
        let padded = k.next_multiple_of(PAIR);
        let pairs = m * padded / 2;
        let mut turned = device.room::<u32>(pairs)?;
        let (count, columns, width) = (pairs as i64, k as i32, padded as i32);
        let mut call = self.call(device, NARROW);
        call.arg(&mut *turned)
            .arg(x)
            .arg(&count)
            .arg(&columns)
            .arg(&width);
        run(call, (pairs.div_ceil(THREADS as usize) as u32, 1), THREADS)?;
        Ok((turned, width))
    }

    fn multiply(
        &self,
        device: &Device,
        (y, x, w, m): (&mut CudaSlice<f32>, &CudaSlice<f32>, &DeviceWeight, usize),
        pair: Pair,
    ) -> Result<(), DriverError> {
        self.done.fetch_add(1, Ordering::Relaxed);
        let which = choice(m);
        let (turned, width) = self.turned(device, x, m, w.args.k as usize)?;
        let args = DeviceWeight::resident(device, &[w])?.swap_remove(0);
        let rows = m as i32;
        let mut call = self.call(device, pair[which]);
        call.arg(y).arg(&*turned).arg(&args).arg(&rows).arg(&width);
        let blocks = ((args.n as usize).div_ceil(COLUMNS), m.div_ceil(ROWS[which]));
        run_with_shared(
            call,
            (blocks.0 as u32, blocks.1 as u32),
            THREADS,
            shared_bytes(ROWS[which]),
        )
    }

    /// Adds the upper triangle of x^T x (K, K) for x (M, K).
    fn moments(
        &self,
        device: &Device,
        out: &mut CudaSlice<f64>,
        x: &CudaSlice<f32>,
        (m, k): (usize, usize),
    ) -> Result<(), DriverError> {
        self.done.fetch_add(1, Ordering::Relaxed);
        let (rows, padded) = (k.next_multiple_of(SIDE), m.next_multiple_of(TURNED.0));
        let mut turned = device.room::<u32>(rows * padded)?;
        let (tall, columns) = (m as i32, k as i32);
        let (height, width) = (rows as i32, padded as i32);
        let mut call = self.call(device, SPLIT);
        call.arg(&mut *turned)
            .arg(x)
            .arg(&tall)
            .arg(&columns)
            .arg(&height)
            .arg(&width);
        run(
            call,
            ((rows / TURNED.1) as u32, (padded / TURNED.0) as u32),
            THREADS,
        )?;
        let mut call = self.call(device, GRAM);
        call.arg(out).arg(&*turned).arg(&columns).arg(&height).arg(&width);
        let tiles = rows / SIDE;
        run_with_shared(call, ((tiles * (tiles + 1) / 2) as u32, 1), THREADS, GRAM_SHARED)
    }

    /// Whether kernels of both sizes give the product of small whole numbers, which is exact in whatever order it is summed.
    fn check(&self, device: &Arc<Device>) -> Result<(), NoWarpgroups> {
        let refused = |error: DriverError| NoWarpgroups::Driver(words(error));
        let (n, k) = (COLUMNS + 8, 2 * PAIR + 16);
        let w: Vec<i32> = (0..n * k).map(whole_number).collect();
        let bytes = w.iter().flat_map(|&v| bf16::from_f32(v as f32).to_le_bytes());
        let form = Form::Dense {
            dtype: FloatDtype::Bf16,
            bytes: Arc::new(bytes.collect::<Vec<u8>>()),
        };
        let weight = DeviceWeight::admit(device, &HostWeight { n, k, form }).map_err(refused)?;
        for m in [ROWS[0] - 8, ROWS[1] + 8, 2 * ROWS[1]] {
            let x: Vec<i32> = (0..m * k).map(|i| whole_number(i + 5)).collect();
            let floats: Vec<f32> = x.iter().map(|&v| v as f32).collect();
            let product = || {
                let mut y = device.room::<f32>(m * n)?;
                self.multiply(device, (&mut y, &*device.sent(&floats)?, &weight, m), BF16)?;
                device.stream.clone_dtoh(&*y)
            };
            for (at, got) in product().map_err(refused)?.into_iter().enumerate() {
                let (row, column) = (&x[at / n * k..][..k], &w[at % n * k..][..k]);
                let expected = row.iter().zip(column).map(|(a, b)| a * b).sum::<i32>() as f32;
                if got != expected {
                    return Err(NoWarpgroups::Wrong { at, got, expected });
                }
            }
        }
        self.check_moments(device)
    }

    fn check_moments(&self, device: &Arc<Device>) -> Result<(), NoWarpgroups> {
        let refused = |error: DriverError| NoWarpgroups::Driver(words(error));
        let (m, k) = (4 * TURNED.0 + 8, SIDE + 8);
        let x: Vec<i32> = (0..m * k).map(whole_number).collect();
        let floats: Vec<f32> = x.iter().map(|&v| v as f32 * (1.0 + 1.0 / 1024.0)).collect();
        let moments = || {
            let mut out = device.zeros::<f64>(k * k)?;
            self.moments(device, &mut out, &*device.sent(&floats)?, (m, k))?;
            device.stream.clone_dtoh(&*out)
        };
        let got = moments().map_err(refused)?;
        for i in 0..k {
            for j in i..k {
                let sum = (0..m).map(|r| x[r * k + i] * x[r * k + j]).sum::<i32>();
                // Of (high + low)^2 the square of low, a millionth, is left out.
                let (at, got, expected) =
                    (i * k + j, got[i * k + j] as f32, sum as f32 * (1.0 + 1.0 / 512.0));
                if got != expected {
                    return Err(NoWarpgroups::Wrong { at, got, expected });
                }
            }
        }
        Ok(())
    }
}

/// Whole numbers of -4 to 4, in a pattern without short periods.
fn whole_number(i: usize) -> i32 {
    ((i * i % 10_007 + i) % 9) as i32 - 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_rows_are_left_unused() {
        for (m, rows) in [
            (17, 128),
            (128, 128),
            (129, 256),
            (257, 128),
            (300, 128),
            (512, 256),
            (1000, 256),
            (1100, 128),
            (5000, 256),
        ] {
            assert_eq!(ROWS[choice(m)], rows, "{m}");
        }
    }
}
