//! Routed experts on the device: no token's choice comes back to the processor. Owns the order of the launches.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::{CudaBackend, DeviceTensor, function};
use super::launch::run;
use super::weight::{DeviceWeight, WeightArgs};
use crate::backend::{Activation, ExpertWeights, Routing};

/// Most experts that `route` holds.
const MOST_EXPERTS: usize = 1024;
/// Entries and outputs of a tile of `gemm_grouped`.
const TILE: usize = 64;
/// Threads of a block where nothing else is said.
const THREADS: u32 = 256;

/// Entries (a token with one of its experts) grouped by expert.
struct Groups {
    grouped: CudaSlice<i32>,
    place: CudaSlice<i32>,
    starts: CudaSlice<i32>,
    /// Pairs of an expert and a first entry.
    tiles: CudaSlice<i32>,
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
        let bytes = |weights: &[&DeviceWeight]| weights.iter().map(|w| w.bytes()).sum::<usize>();
        let largest = bytes(&experts.gate)
            .max(bytes(&experts.up))
            .max(bytes(&experts.down));
        // All experts' weights of a kind are there at once; where they do not fit, one expert at a time does.
        if largest > self.device().memory().budget / 4
            || count > MOST_EXPERTS
            || !same(&experts.gate, width, k as i32)
            || !same(&experts.up, width, k as i32)
            || !same(&experts.down, k as i32, width)
        {
            return None;
        }
        Some(self.made("send tokens to experts", (m, k), |out| {
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
        let (stream, entries) = (self.stream(), m * routing.top);
        let bias = match routing.bias {
            Some(bias) => stream.clone_htod(bias)?,
            None => stream.alloc_zeros::<f32>(count)?,
        };
        let mut chosen = stream.alloc_zeros::<i32>(entries)?;
        let mut weights = stream.alloc_zeros::<f32>(entries)?;
        let (all, top) = (count as i32, routing.top as i32);
        let mut call = self.kernel("route");
        call.arg(&mut chosen).arg(&mut weights).arg(logits).arg(&bias);
        call.arg(&all).arg(&top).arg(&routing.least_sum);
        run(call, (m as u32, 1), 32)?;
        let groups = self.group(&chosen, entries, count)?;
        let (gate, up) = (
            self.grouped(x, &experts.gate, &groups, entries, width, top)?,
            self.grouped(x, &experts.up, &groups, entries, width, top)?,
        );
        let (mut hidden, length, f) = (gate, (entries * width) as i64, function(f));
        let mut call = self.kernel("gate");
        call.arg(&mut hidden).arg(&up).arg(&length).arg(&f);
        let blocks = (entries * width).div_ceil(THREADS as usize) as u32;
        run(call, (blocks, 1), THREADS)?;
        let y = self.grouped(&hidden, &experts.down, &groups, entries, k, 0)?;
        let columns = k as i32;
        let mut call = self.kernel("combine");
        call.arg(into).arg(&y).arg(&groups.place).arg(&weights);
        call.arg(&top).arg(&columns);
        run(call, (m as u32, 1), THREADS)
    }

    fn group(&self, chosen: &CudaSlice<i32>, entries: usize, experts: usize) -> Result<Groups, DriverError> {
        let stream = self.stream();
        // No expert leaves more than one tile that is not full.
        let count = entries / TILE + experts.min(entries);
        let mut groups = Groups {
            grouped: stream.alloc_zeros(entries)?,
            place: stream.alloc_zeros(entries)?,
            starts: stream.alloc_zeros(experts + 1)?,
            tiles: stream.alloc_zeros(2 * count)?,
            count,
        };
        let (number, all, tiles) = (entries as i32, experts as i32, count as i32);
        let mut call = self.kernel("group_entries");
        call.arg(&mut groups.grouped)
            .arg(&mut groups.place)
            .arg(&mut groups.starts)
            .arg(&mut groups.tiles);
        call.arg(chosen).arg(&number).arg(&all).arg(&tiles);
        run(call, (1, 1), THREADS)?;
        Ok(groups)
    }

    /// Entries times their experts' weights; `top` as in the kernel.
    fn grouped(
        &self,
        x: &CudaSlice<f32>,
        weights: &[&DeviceWeight],
        groups: &Groups,
        entries: usize,
        n: usize,
        top: i32,
    ) -> Result<CudaSlice<f32>, DriverError> {
        let stream = self.stream();
        let mut y = stream.alloc_zeros::<f32>(entries * n)?;
        let args: Vec<WeightArgs> = DeviceWeight::resident(self.device(), weights)?;
        let args = stream.clone_htod(&args)?;
        let mut call = self.kernel("gemm_grouped");
        call.arg(&mut y).arg(x).arg(&args).arg(&groups.tiles);
        call.arg(&groups.starts).arg(&groups.grouped).arg(&top);
        run(call, (n.div_ceil(TILE) as u32, groups.count as u32), THREADS)?;
        Ok(y)
    }
}
