//! What the inputs of a layer add up to, on the device until somebody asks: a layer sees many batches, and its second moments are
//! larger than most of them. Owns where they lie.

use cudarc::driver::{DriverError, PushKernelArg};

use super::backend::{CudaBackend, DeviceTensor};
use super::launch::run;
use super::temporary::Temporary;
use crate::backend::{Backend, Fault, InputSums};

/// Threads of a block.
const THREADS: u32 = 256;
/// Columns of a block of `watch_columns`, and of a tile of `mirror` on each side.
const COLUMNS: usize = 32;
/// Bits of the magnitude of infinity, the least of what is not finite.
const INFINITE: u32 = 0x7f80_0000;

/// Sums that are being added up; nothing is on the device before the first row.
#[derive(Debug)]
pub struct DeviceSums {
    columns: usize,
    full: bool,
    rows: u64,
    there: Option<There>,
}

#[derive(Debug)]
struct There {
    /// Magnitudes' bits, (K).
    tops: Temporary<u32>,
    moment: Placed,
}

/// Where x^T x or its diagonal is added up.
#[derive(Debug)]
enum Placed {
    /// The diagonal, or the upper triangle.
    Device(Temporary<f64>),
    /// The whole, as the budget had no room for it that weights would not have had to make.
    Host(Vec<f64>),
}

impl DeviceSums {
    pub(super) fn new(columns: usize, full: bool) -> Self {
        Self {
            columns,
            full,
            rows: 0,
            there: None,
        }
    }

    fn moment_len(&self) -> usize {
        self.columns * if self.full { self.columns } else { 1 }
    }
}

impl CudaBackend {
    /// Room for the sums of a first row. A quarter of the budget stays free.
    fn room_for(&self, sums: &DeviceSums) -> Result<There, DriverError> {
        let (device, len) = (self.device(), sums.moment_len());
        let spare = device.memory().budget / 4;
        let moment = if sums.full && !device.arena.has_room(len * size_of::<f64>(), spare) {
            Placed::Host(vec![0.0; len])
        } else {
            Placed::Device(device.zeros(len)?)
        };
        Ok(There {
            tops: device.zeros(sums.columns)?,
            moment,
        })
    }

    pub(super) fn add_to(&self, sums: &mut DeviceSums, x: &DeviceTensor) {
        let (m, k) = x.size();
        assert_eq!(k, sums.columns, "columns");
        sums.rows += m as u64;
        let Some(values) = x.values() else { return };
        if sums.there.is_none() {
            sums.there = self.attempt("make room for sums", || self.room_for(sums));
        }
        let Some(There { tops, moment }) = &mut sums.there else {
            return;
        };
        let (rows, columns, squared) = (m as i32, k as i32, i32::from(!sums.full));
        self.attempt("sum up columns", || {
            let mut none = None;
            let squares = match moment {
                Placed::Device(moment) => moment,
                Placed::Host(_) => none.insert(self.device().room::<f64>(1)?), // left alone
            };
            let mut call = self.kernel("watch_columns");
            call.arg(&mut **tops).arg(&mut **squares).arg(values);
            call.arg(&rows).arg(&columns).arg(&squared);
            run(call, (k.div_ceil(COLUMNS) as u32, 1), THREADS)
        });
        match moment {
            Placed::Device(moment) if sums.full => {
                self.attempt("sum products", || self.sum_products(moment, values, m, k));
            }
            Placed::Device(_) => {}
            Placed::Host(moment) => self.gram(x, moment),
        }
    }

    pub(super) fn take_sums(&self, sums: DeviceSums) -> Result<InputSums, Fault> {
        let len = sums.moment_len();
        let mut told = InputSums {
            rows: sums.rows,
            tops: vec![0.0; sums.columns],
            moment: Vec::new(),
            finite: true,
        };
        if let Some(There { tops, moment }) = sums.there {
            let stream = self.stream();
            let bits = self.attempt("copy magnitudes back", || stream.clone_dtoh(&*tops));
            let bits = bits.unwrap_or_default();
            told.finite = bits.iter().all(|&bits| bits < INFINITE);
            told.tops = bits.into_iter().map(f32::from_bits).collect();
            told.moment = match moment {
                Placed::Host(moment) => moment,
                Placed::Device(mut moment) => {
                    let copied = self.attempt("copy sums back", || {
                        if sums.full {
                            let (columns, tiles) =
                                (sums.columns as i32, sums.columns.div_ceil(COLUMNS) as u32);
                            let mut call = self.kernel("mirror");
                            call.arg(&mut *moment).arg(&columns);
                            run(call, (tiles, tiles), THREADS)?;
                        }
                        stream.clone_dtoh(&*moment)
                    });
                    copied.unwrap_or_default()
                }
            };
        } else {
            told.moment = vec![0.0; len];
        }
        self.fault()?;
        Ok(told)
    }
}
