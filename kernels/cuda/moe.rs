//! Routed experts on the device: no token's choice comes back to the processor. Owns the order of the launches.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::{CudaBackend, DeviceTensor, FEW_ROWS, function};
use super::exact;
use super::launch::{run, run_with_shared};
use super::temporary::Temporary;
use super::tensor::{self, TensorKernel};
use super::weight::{DeviceWeight, WeightArgs};
use crate::backend::{Activation, ExpertWeights, Routing};

/// Most experts that `route` holds.
const MOST_EXPERTS: usize = 1024;
/// Threads of a block where nothing else is said.
const THREADS: u32 = 256;

/// Entries (a token with one of its experts) grouped by expert.
struct Groups {
    grouped: Temporary<i32>,
    place: Temporary<i32>,
    starts: Temporary<i32>,
    /// Pairs of an expert and a first entry.
    tiles: Temporary<i32>,
    count: usize,
}

impl CudaBackend {
    /// See [`Backend::experts`](crate::Backend::experts).
    pub(super) fn routed(
        &self,
        x: &DeviceTensor,
        logits: &DeviceTensor,
        routing: &Routing<'_>,
        experts: &ExpertWeights<'_, DeviceWeight>,
        f: Activation,
    ) -> Option<DeviceTensor> {
        let ((m, k), (rows, count)) = (x.size(), logits.size());
        assert_eq!(rows, m, "a row of logits a token");
        assert!(
            (1..=count).contains(&routing.top),
            "at least one expert, at most all"
        );
        assert!(
            [&experts.gate, &experts.up, &experts.down]
                .iter()
                .all(|w| w.len() == count),
            "weights of every expert"
        );
        assert!(routing.bias.is_none_or(|bias| bias.len() == count), "a bias each");
        let same = |weights: &[&DeviceWeight], n: i32, k: i32| {
            weights.iter().all(|w| (w.args.n, w.args.k) == (n, k))
        };
        let width = experts.gate[0].args.n;
        if count > MOST_EXPERTS
            || !same(&experts.gate, width, k as i32)
            || !same(&experts.up, width, k as i32)
            || !same(&experts.down, k as i32, width)
        {
            return None;
        }
        Some(self.filled("send tokens to experts", (m, k), |out| {
            self.blank(out)?; // to be added to
            let (Some(x), Some(logits)) = (x.values(), logits.values()) else {
                return Ok(());
            };
            let sizes = [m, k, count, width as usize];
            self.send(out, x, logits, routing, experts, f, sizes)
        }))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one caller, and the operation has as many"
    )]
    fn send(
        &self,
        into: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        logits: &CudaSlice<f32>,
        routing: &Routing<'_>,
        experts: &ExpertWeights<'_, DeviceWeight>,
        f: Activation,
        [m, k, count, width]: [usize; 4],
    ) -> Result<(), DriverError> {
        let (device, entries) = (self.device(), m * routing.top);
        let bias = match routing.bias {
            Some(bias) => device.sent(bias)?,
            None => device.zeros::<f32>(count)?,
        };
        let mut chosen = device.room::<i32>(entries)?;
        let mut weights = device.room::<f32>(entries)?;
        let (all, top) = (count as i32, routing.top as i32);
        let mut call = self.kernel("route");
        call.arg(&mut *chosen).arg(&mut *weights).arg(logits).arg(&*bias);
        call.arg(&all).arg(&top).arg(&routing.least_sum);
        run(call, (m as u32, 1), 32)?;
        // As for other products: few rows are exact.
        let tensor = self.precision().on_tensor_cores() && m > FEW_ROWS;
        let tile = if tensor { tensor::TILE } else { exact::TILE };
        let groups = self.group(&chosen, entries, count, tile)?;
        let by = |x: &CudaSlice<f32>, rows, weights: &[&DeviceWeight], top| {
            if tensor {
                let (narrow, padded) = self.narrowed(x, rows, weights[0].args.k as usize)?;
                let kernel = TensorKernel::of_all(weights);
                self.grouped(
                    Left::Narrow(&narrow, padded, kernel),
                    weights,
                    &groups,
                    entries,
                    top,
                )
            } else {
                let kernel = exact::grouped_kernel(weights);
                self.grouped(Left::Plain(x, kernel), weights, &groups, entries, top)
            }
        };
        let (mut hidden, up) = (by(x, m, &experts.gate, top)?, by(x, m, &experts.up, top)?);
        let (length, f) = ((entries * width) as i64, function(f));
        let mut call = self.kernel("gate");
        call.arg(&mut *hidden).arg(&*up).arg(&length).arg(&f);
        let blocks = (entries * width).div_ceil(THREADS as usize) as u32;
        run(call, (blocks, 1), THREADS)?;
        drop(up);
        let y = by(&hidden, entries, &experts.down, 0)?;
        let columns = k as i32;
        let mut call = self.kernel("combine");
        call.arg(into).arg(&*y).arg(&*groups.place).arg(&*weights);
        call.arg(&top).arg(&columns);
        run(call, (m as u32, 1), THREADS)
    }

    /// Groups entries, in tiles of `size`.
    fn group(
        &self,
        chosen: &CudaSlice<i32>,
        entries: usize,
        experts: usize,
        size: usize,
    ) -> Result<Groups, DriverError> {
        let device = self.device();
        // No expert leaves more than one tile that is not full.
        let count = entries / size + experts.min(entries);
        let mut groups = Groups {
            grouped: device.room(entries)?,
            place: device.room(entries)?,
            starts: device.room(experts + 1)?,
            tiles: device.room(2 * count)?,
            count,
        };
        let (number, all, tiles, size) = (entries as i32, experts as i32, count as i32, size as i32);
        let mut counts = device.room::<i32>(experts)?;
        let mut call = self.kernel("count_entries");
        call.arg(&mut *counts).arg(chosen).arg(&number);
        run(call, (experts as u32, 1), THREADS)?;
        let mut call = self.kernel("group_entries");
        call.arg(&mut *groups.grouped)
            .arg(&mut *groups.place)
            .arg(&mut *groups.starts)
            .arg(&mut *groups.tiles);
        call.arg(chosen).arg(&*counts);
        call.arg(&number).arg(&all).arg(&tiles).arg(&size);
        run(call, (experts as u32, 1), THREADS)?;
        Ok(groups)
    }

    /// Entries times their experts' weights, as many experts at a time as a quarter of the budget holds: the sums are the same
    /// for any number. `top` as in the kernel.
    fn grouped(
        &self,
        x: Left<'_>,
        weights: &[&DeviceWeight],
        groups: &Groups,
        entries: usize,
        top: i32,
    ) -> Result<Temporary<f32>, DriverError> {
        let (device, n) = (self.device(), weights[0].args.n as usize);
        let mut y = device.room::<f32>(entries * n)?;
        let mut there = device.room::<WeightArgs>(weights.len())?;
        let most = device.memory().budget / 4;
        let mut first = 0;
        while first < weights.len() {
            let mut bytes = 0;
            let fitting = weights[first..].iter().take_while(|w| {
                bytes += w.bytes();
                bytes <= most
            });
            let last = first + fitting.count().max(1);
            let args = DeviceWeight::resident(device, &weights[first..last])?;
            self.stream().memcpy_htod(&args, &mut *there)?;
            let (from, to) = (first as i32, last as i32);
            let blocks = |tile: usize| (n.div_ceil(tile) as u32, groups.count as u32);
            match x {
                Left::Plain(x, kernel) => {
                    let mut call = self.kernel(kernel);
                    call.arg(&mut *y).arg(x).arg(&*there).arg(&*groups.tiles);
                    call.arg(&*groups.starts).arg(&*groups.grouped);
                    call.arg(&top).arg(&from).arg(&to);
                    run(call, blocks(exact::TILE), THREADS)?;
                }
                Left::Narrow(x, padded, kernel) => {
                    let width = padded as i32;
                    let mut call = self.kernel(kernel.grouped);
                    call.arg(&mut *y).arg(x).arg(&*there).arg(&*groups.tiles);
                    call.arg(&*groups.starts).arg(&*groups.grouped);
                    call.arg(&top).arg(&width).arg(&from).arg(&to);
                    run_with_shared(call, blocks(tensor::TILE), THREADS, kernel.shared_bytes())?;
                }
            }
            first = last;
        }
        Ok(y)
    }
}

/// The rows that are multiplied.
#[derive(Clone, Copy)]
enum Left<'a> {
    /// In f32, with the kernel.
    Plain(&'a CudaSlice<f32>, &'static str),
    /// In bf16 for tensor cores, with the width of a row and the kernel.
    Narrow(&'a CudaSlice<u32>, usize, TensorKernel),
}
