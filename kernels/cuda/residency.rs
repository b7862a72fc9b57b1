//! Which weights lie on the device. Owns the choice when not all of them fit, and their way there.
//!
//! Weights stay where they are as long as three quarters of the budget hold them. Those beyond are brought in when they
//! are used, in place of others that were brought in before, and the one that followed last time is copied meanwhile: a
//! model runs its weights in the same order every time, so of `n` weights that take turns in a space for two, each is on
//! its way while the one before it works. When activations need more room, weights that stayed lose their place.
//!
//! ```text
//! host memory (mapped) --memcpy--> pinned buffers, in turns --copy stream--> device --event--> compute stream
//! ```
//!
//! A block of memory is handed from the compute stream to the copy stream behind an event, and back behind another.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError, PinnedHostSlice};

use super::arena::Arena;
use super::launch::{out_of_memory, pinned};
use super::weight::PARTS;
use crate::backend::{Form, HostWeight, Storage};

/// Bytes of each pinned buffer.
const BUFFER: usize = 8 << 20;
/// Pinned buffers: one is filled while another is on its way.
const BUFFERS: usize = 2;

/// A weight and where it lies.
#[derive(Debug)]
pub(super) struct Slot {
    number: u64,
    parts: Vec<Bytes>,
    bytes: usize,
    place: Mutex<Place>,
}

/// Bytes on the host, without a word for debugging.
struct Bytes(Arc<dyn Storage>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.bytes().len())
    }
}

#[derive(Debug, Default)]
struct Place {
    /// On the device, one for each part; empty when it is not there.
    blocks: Vec<CudaSlice<u8>>,
    /// When they have arrived; `None` once the compute stream was told to wait for that.
    ready: Option<CudaEvent>,
    /// Which weight was used after this one last time.
    next: Option<u64>,
}

impl Slot {
    /// Bytes of all parts.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Residency {
    arena: Arc<Arena>,
    compute: Arc<CudaStream>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    copies: Option<Copies>,
    slots: BTreeMap<u64, Weak<Slot>>,
    /// Weights that stay, the last to come last.
    staying: Vec<u64>,
    /// Weights that were brought in, the next to go first.
    passing: VecDeque<u64>,
    last: Option<u64>,
    numbers: u64,
    /// Weights brought in when they were used, and those that were on their way by then.
    fetched: (u64, u64),
}

/// The copy stream and its pinned buffers.
#[derive(Debug)]
struct Copies {
    stream: Arc<CudaStream>,
    buffers: Vec<(PinnedHostSlice<u8>, CudaEvent)>,
    turn: usize,
}

impl Copies {
    fn new(compute: &Arc<CudaStream>) -> Result<Self, DriverError> {
        let context = compute.context();
        let buffer = |_| Ok((pinned(context, BUFFER)?, context.new_event(None)?));
        Ok(Self {
            stream: context.new_stream()?,
            buffers: (0..BUFFERS).map(buffer).collect::<Result<_, DriverError>>()?,
            turn: 0,
        })
    }

    /// Starts a copy; `from` may change once this returns.
    fn copy(&mut self, from: &[u8], to: &mut CudaSlice<u8>) -> Result<(), DriverError> {
        let mut at = 0;
        for piece in from.chunks(BUFFER) {
            let (buffer, sent) = &mut self.buffers[self.turn];
            self.turn = (self.turn + 1) % BUFFERS;
            sent.synchronize()?;
            let filled = &mut buffer.as_mut_slice()?[..piece.len()];
            filled.copy_from_slice(piece);
            self.stream
                .memcpy_htod(filled, &mut to.slice_mut(at..at + piece.len()))?;
            sent.record(&self.stream)?;
            at += piece.len();
        }
        Ok(())
    }
}

impl Residency {
    pub(super) fn new(arena: Arc<Arena>, compute: Arc<CudaStream>) -> Self {
        Self {
            arena,
            compute,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Weights brought in when they were used, and how many of these were on their way by then.
    pub(super) fn fetched(&self) -> (u64, u64) {
        self.state().fetched
    }

    /// Takes a weight in. It is copied now if it may stay.
    pub(super) fn admit(&self, weight: &HostWeight) -> Result<Arc<Slot>, DriverError> {
        let parts = match &weight.form {
            Form::Dense { bytes, .. } => std::slice::from_ref(bytes),
            Form::Packed { parts, .. } => parts.as_slice(),
        };
        let mut state = self.state();
        let number = state.numbers;
        state.numbers += 1;
        let slot = Arc::new(Slot {
            number,
            parts: parts.iter().map(|part| Bytes(Arc::clone(part))).collect(),
            bytes: parts.iter().map(|part| part.bytes().len()).sum(),
            place: Mutex::default(),
        });
        state.slots.insert(number, Arc::downgrade(&slot));
        if self.arena.has_room(slot.bytes, self.arena.budget() / 4) && self.bring(&mut state, &slot)? {
            state.staying.push(number);
        }
        Ok(slot)
    }

    /// Where the parts of these weights lie, for kernels that are started before anything else is asked of this page.
    pub(super) fn use_all(&self, slots: &[&Arc<Slot>]) -> Result<Vec<[u64; PARTS]>, DriverError> {
        let mut state = self.state();
        let numbers: Vec<u64> = slots.iter().map(|slot| slot.number).collect();
        for slot in slots {
            self.call(&mut state, slot, &numbers)?;
        }
        let places = slots.iter().map(|slot| self.pointers(slot)).collect();
        if let Some(last) = numbers.last() {
            self.foresee(&mut state, *last, &numbers);
        }
        places
    }

    /// Makes sure that a weight is there, if need be in the place of others that are not among `wanted`.
    fn call(&self, state: &mut State, slot: &Arc<Slot>, wanted: &[u64]) -> Result<(), DriverError> {
        if let Some(last) = state.last.replace(slot.number)
            && let Some(before) = state.slots.get(&last).and_then(Weak::upgrade)
        {
            before.place().next = Some(slot.number);
        }
        let there = !slot.place().blocks.is_empty() || slot.bytes == 0;
        let passing = !state.staying.contains(&slot.number);
        if there {
            let coming = slot.place().ready.take();
            if let Some(coming) = coming {
                self.compute.wait(&coming)?;
                state.fetched.0 += u64::from(passing);
                state.fetched.1 += u64::from(passing);
            }
            return Ok(());
        }
        while !self.bring(state, slot)? {
            if !self.evict(state, wanted)? {
                return Err(out_of_memory());
            }
        }
        state.passing.push_back(slot.number);
        state.fetched.0 += 1;
        let coming = slot.place().ready.take();
        coming.map_or(Ok(()), |coming| self.compute.wait(&coming))
    }

    /// Starts the copy of the weight that followed last time, or else of the next in line, if it is not there and only
    /// weights that pass must go for it.
    fn foresee(&self, state: &mut State, number: u64, wanted: &[u64]) {
        let Some(slot) = state.slots.get(&number).and_then(Weak::upgrade) else {
            return;
        };
        let next = slot.place().next.unwrap_or(number + 1);
        let Some(next) = state.slots.get(&next).and_then(Weak::upgrade) else {
            return;
        };
        if wanted.contains(&next.number) || !next.place().blocks.is_empty() {
            return;
        }
        loop {
            match self.bring(state, &next) {
                Ok(true) => break,
                // A failure is met again, and told, when the weight is used.
                Err(_) => return,
                Ok(false) => {
                    let oldest = state.passing.iter().copied().find(|n| !wanted.contains(n));
                    match oldest.map(|oldest| self.send_away(state, oldest)) {
                        Some(Ok(())) => {}
                        _ => {
                            self.arena.refusal();
                            return;
                        }
                    }
                }
            }
        }
        state.passing.push_back(next.number);
    }

    /// Copies a weight in; `false` when the budget does not hold it.
    fn bring(&self, state: &mut State, slot: &Slot) -> Result<bool, DriverError> {
        let mut blocks = Vec::with_capacity(slot.parts.len());
        for part in &slot.parts {
            // An empty part still has a place in the order.
            match self.arena.take::<u8>(part.0.bytes().len().max(1)) {
                Ok(Some(block)) => blocks.push(block),
                other => {
                    blocks.into_iter().for_each(|block| self.arena.give(block));
                    return other.map(|_| false);
                }
            }
        }
        match self.send(state, slot, &mut blocks) {
            Ok(ready) => {
                let mut place = slot.place();
                place.blocks = blocks;
                place.ready = Some(ready);
                Ok(true)
            }
            Err(error) => {
                // Some parts may be on their way into these blocks. Of a device that no longer answers nothing is used again.
                let settled = state.copies.as_ref().map_or(Ok(()), |c| c.stream.synchronize());
                for block in blocks {
                    match settled {
                        Ok(()) => self.arena.give(block),
                        Err(_) => drop(block.leak()),
                    }
                }
                Err(error)
            }
        }
    }

    fn send(
        &self,
        state: &mut State,
        slot: &Slot,
        to: &mut [CudaSlice<u8>],
    ) -> Result<CudaEvent, DriverError> {
        if state.copies.is_none() {
            state.copies = Some(Copies::new(&self.compute)?);
        }
        let Some(copies) = &mut state.copies else {
            return Err(out_of_memory());
        };
        // What lay in these blocks before may still be read by kernels that were started.
        copies.stream.wait(&self.compute.record_event(None)?)?;
        for (part, to) in slot.parts.iter().zip(to) {
            copies.copy(part.0.bytes(), to)?;
        }
        copies.stream.record_event(None)
    }

    /// Takes the memory of one weight that is not among `wanted`: one that passes, or else the last that stays.
    fn evict(&self, state: &mut State, wanted: &[u64]) -> Result<bool, DriverError> {
        let passing = state.passing.iter().copied().find(|n| !wanted.contains(n));
        let staying = || state.staying.iter().rev().copied().find(|n| !wanted.contains(n));
        let Some(number) = passing.or_else(staying) else {
            return Ok(false);
        };
        self.send_away(state, number).map(|()| true)
    }

    fn send_away(&self, state: &mut State, number: u64) -> Result<(), DriverError> {
        state.passing.retain(|n| *n != number);
        state.staying.retain(|n| *n != number);
        match state.slots.get(&number).and_then(Weak::upgrade) {
            Some(slot) => self.empty(&slot),
            None => Ok(()),
        }
    }

    /// Gives a weight's memory back, behind the copy that may still be on its way.
    fn empty(&self, slot: &Slot) -> Result<(), DriverError> {
        let (blocks, coming) = {
            let mut place = slot.place();
            (std::mem::take(&mut place.blocks), place.ready.take())
        };
        let waited = coming.map_or(Ok(()), |coming| {
            let waited = self.compute.wait(&coming);
            waited.or_else(|_| coming.synchronize())
        });
        for block in blocks {
            match waited {
                Ok(()) => self.arena.give(block),
                Err(_) => drop(block.leak()),
            }
        }
        waited
    }

    fn pointers(&self, slot: &Slot) -> Result<[u64; PARTS], DriverError> {
        let mut pointers = [0; PARTS];
        let place = slot.place();
        for (pointer, block) in pointers.iter_mut().zip(&place.blocks) {
            *pointer = block.device_ptr(&self.compute).0;
        }
        Ok(pointers)
    }

    /// Forgets a weight.
    pub(super) fn dismiss(&self, slot: &Slot) {
        let mut state = self.state();
        state.passing.retain(|n| *n != slot.number);
        state.staying.retain(|n| *n != slot.number);
        state.slots.remove(&slot.number);
        // A device that failed is told so by the next operation.
        let _ = self.empty(slot);
    }

    /// Room for `len` values, if need be in the place of weights. `None` when there is none, even so.
    pub(super) fn room<T: DeviceRepr>(&self, len: usize) -> Result<Option<CudaSlice<T>>, DriverError> {
        loop {
            if let Some(block) = self.arena.take(len)? {
                return Ok(Some(block));
            }
            if !self.evict(&mut self.state(), &[])? {
                return Ok(None);
            }
        }
    }
}
