//! [`Backend`] on a GPU. Owns the shape of every launch, and what happens when the device fails.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream, DriverError, LaunchArgs, PushKernelArg};

use super::arena::rows_within;
use super::device::{Device, words};
use super::exact::Tiles;
use super::launch::run;
use super::sums::DeviceSums;
use super::temporary::Temporary;
use super::tensor::Precision;
use super::weight::{DeviceWeight, WeightArgs};
use crate::backend::{
    Activation, Backend, Divergence, ExpertWeights, Fault, Heads, HostWeight, InputSums, RopeStyle,
    RopeTable, Routing, Segment,
};

/// Rows up to which a product is done by `gemv`.
pub(super) const FEW_ROWS: usize = 16;
/// Threads of a block where nothing else is said.
const THREADS: u32 = 256;

/// A GPU.
#[derive(Debug, Clone)]
pub struct CudaBackend {
    device: Arc<Device>,
    fault: Arc<Mutex<Option<Fault>>>,
    precision: Precision,
    /// Whether NVIDIA's library is used where it can be.
    pub(super) library: bool,
    pub(super) tiles: Tiles,
}

/// (rows, columns) of f32 on the device, row-major; without values when it is empty or the device has failed.
#[derive(Debug)]
pub struct DeviceTensor {
    rows: usize,
    columns: usize,
    values: Option<Temporary<f32>>,
}

impl DeviceTensor {
    /// (rows, columns).
    pub(super) fn size(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Its numbers, if there are any.
    pub(super) fn values(&self) -> Option<&CudaSlice<f32>> {
        self.values.as_deref()
    }

    fn values_mut(&mut self) -> Option<&mut CudaSlice<f32>> {
        self.values.as_deref_mut()
    }
}

impl CudaBackend {
    /// On this device.
    pub fn new(device: Arc<Device>) -> Self {
        Self {
            device,
            fault: Arc::default(),
            precision: Precision::default(),
            library: true,
            tiles: Tiles::default(),
        }
    }

    /// The same, with products of many rows computed so.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// The same, with products of many rows in f32 cut so.
    pub fn with_tiles(self, tiles: Tiles) -> Self {
        Self { tiles, ..self }
    }

    /// How products of many rows are computed.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The stream everything runs on.
    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.device.stream
    }

    /// Its device, to be shared.
    pub fn shared_device(&self) -> Arc<Device> {
        Arc::clone(&self.device)
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Does `work` unless the device has failed; keeps the first failure.
    pub(super) fn attempt<T>(
        &self,
        what: &'static str,
        work: impl FnOnce() -> Result<T, DriverError>,
    ) -> Option<T> {
        let mut fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        if fault.is_some() {
            return None;
        }
        match work() {
            Ok(done) => Some(done),
            Err(error) => {
                *fault = Some(Fault {
                    device: self.device.name().to_owned(),
                    what,
                    reason: self.device.arena.refusal().unwrap_or_else(|| words(error)),
                });
                None
            }
        }
    }

    /// A kernel to push arguments on.
    pub(super) fn kernel(&self, name: &'static str) -> LaunchArgs<'_> {
        let function = self.device.function(name).expect("a kernel of the list");
        self.device.stream.launch_builder(function)
    }

    /// Room for a tensor, all of which `fill` writes; nothing when it is empty.
    pub(super) fn filled(
        &self,
        what: &'static str,
        (rows, columns): (usize, usize),
        fill: impl FnOnce(&mut CudaSlice<f32>) -> Result<(), DriverError>,
    ) -> DeviceTensor {
        let values = (rows * columns > 0).then(|| {
            self.attempt(what, || {
                let mut values = self.device.room(rows * columns)?;
                fill(&mut values)?;
                Ok(values)
            })
        });
        DeviceTensor {
            rows,
            columns,
            values: values.flatten(),
        }
    }

    /// What kernels are told of a weight, which is on the device then. Nothing may be allocated between this and the launch.
    pub(super) fn resident(&self, weight: &DeviceWeight) -> Result<WeightArgs, DriverError> {
        Ok(DeviceWeight::resident(&self.device, &[weight])?.swap_remove(0))
    }

    /// Zeros for a result of operands that hold nothing.
    pub(super) fn blank(&self, out: &mut CudaSlice<f32>) -> Result<(), DriverError> {
        self.device.stream.memset_zeros(out)
    }

    fn norm(
        &self,
        x: &DeviceTensor,
        gain: &DeviceTensor,
        bias: Option<&DeviceTensor>,
        eps: f32,
    ) -> DeviceTensor {
        assert_eq!(x.columns % gain.columns.max(1), 0, "whole stretches");
        self.filled("normalise", (x.rows, x.columns), |out| {
            let (Some(x_values), Some(gains)) = (x.values(), gain.values()) else {
                return self.blank(out);
            };
            let width = gain.columns as i32;
            let blocks = (x.rows * x.columns / gain.columns) as u32;
            let biases = bias.and_then(DeviceTensor::values);
            let mut call = self.kernel(if biases.is_some() {
                "layer_norm"
            } else {
                "rms_norm"
            });
            call.arg(out).arg(x_values).arg(gains);
            if let Some(biases) = biases {
                call.arg(biases);
            }
            call.arg(&width).arg(&eps);
            run(call, (blocks, 1), THREADS)
        })
    }

    /// y (M, N) = x (M, K) times the transpose of `w`, by the kernel for so many rows.
    pub(super) fn product(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &DeviceWeight,
        m: usize,
    ) -> Result<(), DriverError> {
        match self.precision {
            _ if m <= FEW_ROWS => {
                let dealt = self.deal_few_rows(&w.args, m)?;
                self.few_rows(y, x, &self.resident(w)?, m, &dealt)
            }
            Precision::Bf16 | Precision::Bf16Warpgroups => self.tensor_product(y, x, w, m),
            Precision::F32 => self.exact_product(y, x, w, m),
        }
    }

    /// Blocks of [`THREADS`] for one thread an element.
    fn each(count: usize) -> (u32, u32) {
        (count.div_ceil(THREADS as usize) as u32, 1)
    }
}

/// Whether no two of these numbers below `height` are equal.
fn all_differ(rows: &[usize], height: usize) -> bool {
    let mut met = vec![false; height];
    rows.iter().all(|&row| !std::mem::replace(&mut met[row], true))
}

pub(super) fn function(f: Activation) -> i32 {
    match f {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Tanh => 4,
    }
}

impl Backend for CudaBackend {
    type Tensor = DeviceTensor;
    type Weight = DeviceWeight;
    type Sums = DeviceSums;

    fn fault(&self) -> Result<(), Fault> {
        self.attempt("finish what was started", || self.device.stream.synchronize());
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        fault.clone().map_or(Ok(()), Err)
    }

    fn rows_together(&self, bytes: usize) -> usize {
        rows_within(self.device.memory().budget, bytes)
    }

    fn zeros(&self, rows: usize, columns: usize) -> DeviceTensor {
        self.filled("allocate a tensor", (rows, columns), |out| self.blank(out))
    }

    fn upload(&self, values: &[f32], columns: usize) -> DeviceTensor {
        assert_eq!(values.len() % columns.max(1), 0, "whole rows");
        let size = (values.len() / columns.max(1), columns);
        self.filled("copy a tensor there", size, |copy| {
            self.device.stream.memcpy_htod(values, copy)
        })
    }

    fn download(&self, x: &DeviceTensor) -> Vec<f32> {
        let values = x
            .values()
            .and_then(|values| self.attempt("copy a tensor back", || self.device.stream.clone_dtoh(values)));
        values.unwrap_or_else(|| vec![0.0; x.rows * x.columns])
    }

    fn log_probabilities(&self, logits: &DeviceTensor, wanted: &[Vec<u32>]) -> Option<Vec<Vec<f64>>> {
        Some(self.log_p(logits, wanted))
    }

    fn divergences(
        &self,
        base: &DeviceTensor,
        candidate: &DeviceTensor,
        targets: &[u32],
    ) -> Vec<Option<Divergence>> {
        self.divergence(base, candidate, targets)
    }

    fn dims(&self, x: &DeviceTensor) -> (usize, usize) {
        (x.rows, x.columns)
    }

    fn weight(&self, weight: &HostWeight) -> DeviceWeight {
        self.attempt("copy a weight there", || {
            DeviceWeight::admit(&self.device, weight)
        })
        .unwrap_or_else(|| DeviceWeight::empty(weight))
    }

    fn embed(&self, table: &DeviceWeight, ids: &[u32]) -> DeviceTensor {
        let rows = table.args.n as u32;
        assert!(ids.iter().all(|&id| id < rows), "ids within the table");
        self.filled("embed tokens", (ids.len(), table.args.k as usize), |out| {
            let rows = self.device.sent(ids)?;
            let args = self.resident(table)?;
            let mut call = self.kernel("decode");
            call.arg(out).arg(&*rows).arg(&args);
            run(call, (ids.len() as u32, 1), THREADS)
        })
    }

    fn matmul(&self, x: &DeviceTensor, w: &DeviceWeight) -> DeviceTensor {
        assert_eq!(x.columns, w.args.k as usize, "columns of x and of w");
        self.filled("multiply by a weight", (x.rows, w.args.n as usize), |out| {
            let Some(values) = x.values() else {
                return self.blank(out);
            };
            self.product(out, values, w, x.rows)
        })
    }

    fn add(&self, x: &mut DeviceTensor, y: &DeviceTensor) {
        assert_eq!(x.columns, y.columns, "columns");
        assert!(y.rows == 1 || y.rows == x.rows, "rows");
        let (count, period) = ((x.rows * x.columns) as i64, (y.rows * y.columns) as i64);
        if let (Some(x), Some(y)) = (x.values_mut(), y.values()) {
            self.attempt("add", || {
                let mut call = self.kernel("add");
                call.arg(x).arg(y).arg(&count).arg(&period);
                run(call, Self::each(count as usize), THREADS)
            });
        }
    }

    fn rms_norm(&self, x: &DeviceTensor, gain: &DeviceTensor, eps: f32) -> DeviceTensor {
        self.norm(x, gain, None, eps)
    }

    fn layer_norm(
        &self,
        x: &DeviceTensor,
        gain: &DeviceTensor,
        bias: &DeviceTensor,
        eps: f32,
    ) -> DeviceTensor {
        self.norm(x, gain, Some(bias), eps)
    }

    fn rope(&self, x: &mut DeviceTensor, positions: &[u32], table: &RopeTable) {
        assert_eq!(positions.len(), x.rows, "a position a row");
        let known = table.cos.len() / table.half.max(1);
        assert!(
            positions.iter().all(|&p| (p as usize) < known),
            "positions within the table"
        );
        let (columns, half) = (x.columns as i32, table.half as i32);
        let pairs = i32::from(table.style == RopeStyle::Pairs);
        let blocks = (x.rows as u32, (x.columns / 2).div_ceil(THREADS as usize) as u32);
        if let Some(x) = x.values_mut() {
            self.attempt("turn heads", || {
                // The same for every layer.
                let positions = self.device.sent_once(positions)?;
                let (cos, sin) = (
                    self.device.sent_once(&table.cos)?,
                    self.device.sent_once(&table.sin)?,
                );
                let mut call = self.kernel("rope");
                call.arg(x).arg(&**positions).arg(&**cos).arg(&**sin);
                call.arg(&columns).arg(&half).arg(&pairs);
                run(call, blocks, THREADS)
            });
        }
    }

    fn attention(
        &self,
        q: &DeviceTensor,
        keys: &DeviceTensor,
        values: &DeviceTensor,
        segments: &[Segment],
        heads: Heads,
    ) -> DeviceTensor {
        self.filled("attend", (q.rows, q.columns), |out| {
            let (Some(q_values), Some(keys), Some(values)) = (q.values(), keys.values(), values.values())
            else {
                return self.blank(out);
            };
            self.attend(out, [q_values, keys, values], segments, q.rows, heads)
        })
    }

    fn activate(&self, x: &mut DeviceTensor, f: Activation) {
        let (count, f) = ((x.rows * x.columns) as i64, function(f));
        if let Some(x) = x.values_mut() {
            self.attempt("apply a function", || {
                let mut call = self.kernel("activate");
                call.arg(x).arg(&count).arg(&f);
                run(call, Self::each(count as usize), THREADS)
            });
        }
    }

    fn gate(&self, gate: &mut DeviceTensor, up: &DeviceTensor, f: Activation) {
        assert_eq!((gate.rows, gate.columns), (up.rows, up.columns), "sizes");
        let (count, f) = ((gate.rows * gate.columns) as i64, function(f));
        if let (Some(x), Some(up)) = (gate.values_mut(), up.values()) {
            self.attempt("apply a gate", || {
                let mut call = self.kernel("gate");
                call.arg(x).arg(up).arg(&count).arg(&f);
                run(call, Self::each(count as usize), THREADS)
            });
        }
    }

    fn gather(&self, x: &DeviceTensor, rows: &[usize]) -> DeviceTensor {
        assert!(rows.iter().all(|&row| row < x.rows), "rows within the tensor");
        self.filled("gather rows", (rows.len(), x.columns), |out| {
            let Some(values) = x.values() else {
                return self.blank(out);
            };
            let from: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            let (from, k) = (self.device.sent(&from)?, x.columns as i32);
            let mut call = self.kernel("gather");
            call.arg(out).arg(values).arg(&*from).arg(&k);
            run(call, (rows.len() as u32, 1), THREADS)
        })
    }

    fn scatter_add(&self, into: &mut DeviceTensor, rows: &[usize], x: &DeviceTensor, weights: &[f32]) {
        assert_eq!(
            (rows.len(), rows.len()),
            (x.rows, weights.len()),
            "a row and a weight each"
        );
        assert!(rows.iter().all(|&row| row < into.rows), "rows within the tensor");
        let (count, k, height) = (x.rows as i32, x.columns as i32, into.rows);
        if let (Some(into), Some(x)) = (into.values_mut(), x.values()) {
            self.attempt("add rows", || {
                let numbers: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
                let (there, weights) = (self.device.sent(&numbers)?, self.device.sent(weights)?);
                let apart = all_differ(rows, height);
                let mut call = self.kernel(if apart { "scatter_apart" } else { "scatter_add" });
                call.arg(into).arg(x).arg(&*there).arg(&*weights);
                call.arg(&count).arg(&k);
                let blocks = if apart {
                    (count as u32, 1)
                } else {
                    Self::each(k as usize)
                };
                run(call, blocks, THREADS)
            });
        }
    }

    fn place(&self, into: &mut DeviceTensor, at: usize, x: &DeviceTensor) {
        assert_eq!(into.columns, x.columns, "columns");
        assert!(at + x.rows <= into.rows, "rows within the tensor");
        let (at, count) = ((at * x.columns) as i64, (x.rows * x.columns) as i64);
        if let (Some(into), Some(x)) = (into.values_mut(), x.values()) {
            self.attempt("place rows", || {
                let mut call = self.kernel("place");
                call.arg(into).arg(x).arg(&at).arg(&count);
                run(call, Self::each(count as usize), THREADS)
            });
        }
    }

    fn experts(
        &self,
        x: &DeviceTensor,
        logits: &DeviceTensor,
        routing: &Routing<'_>,
        experts: &ExpertWeights<'_, DeviceWeight>,
        f: Activation,
    ) -> Option<DeviceTensor> {
        self.routed(x, logits, routing, experts, f)
    }

    fn sums(&self, columns: usize, full: bool) -> DeviceSums {
        DeviceSums::new(columns, full)
    }

    fn watch(&self, x: &DeviceTensor, sums: &mut DeviceSums) {
        self.add_to(sums, x);
    }

    fn summed(&self, sums: DeviceSums) -> Result<InputSums, Fault> {
        self.take_sums(sums)
    }

    fn gram(&self, x: &DeviceTensor, moment: &mut [f64]) {
        self.add_moments(x, moment);
    }
}
