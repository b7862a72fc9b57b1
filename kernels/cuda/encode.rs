//! Codes chosen on a GPU: rounding, clip search and the WINT2 encoder, with the bytes that the CPU's encoders give. Owns the
//! launches and what goes there and back; which scales are tried and what is made of the codes is `calib`'s business.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{DriverError, LaunchArgs, PushKernelArg};
use qtool_formats::FloatDtype;

use super::device::{Device, words};
use super::launch::run;
pub use super::rows::Rows;
use super::temporary::Temporary;
use super::turns::Turns;
use super::weight::dense;
use crate::backend::Fault;

/// Threads of a block for a group, at most.
const GROUP_THREADS: usize = 256;
/// Threads of a block of the WINT2 encoder, which its kernel counts on.
const ROW_THREADS: u32 = 256;
/// Rows of WINT2 that are at work at a time: each has memory of its own on the device.
const ROWS_AT_WORK: usize = 1024;
/// Codewords of a codebook, and pairs of a list.
const CODEWORDS: usize = 256;
/// Weights of a group of WINT2.
const GROUP: usize = 64;
/// Most super scales that are fitted for a pair.
const MOST_SUPERS: usize = 8;
/// Bytes of weights, as numbers, that are encoded together: no less than what the processor takes at a time, and few enough
/// that several threads have some, of which one copies while the device works for another.
const TOGETHER: std::ops::RangeInclusive<usize> = 512 << 10..=16 << 20;

/// How scales of affine codes are chosen.
#[derive(Debug, Clone, Copy)]
pub struct AffineJob<'a> {
    /// Columns that share a scale; divides K.
    pub group: usize,
    /// Smallest and largest code.
    pub range: (u8, u8),
    /// The fixed zero point; `None` when one a group is chosen.
    pub zero: Option<u8>,
    /// Type scales are stored in.
    pub scale: FloatDtype,
    /// Steps between zero and the largest magnitude, on a symmetric grid.
    pub steps: f32,
    /// Factors of the spanning scale, tried in order; none for plain rounding.
    pub coarse: &'a [f32],
    /// Factors of the winner's scale, tried after it.
    pub fine: &'a [f32],
    /// Zero points tried to both sides of the centring one, in the first sweep and in the second.
    pub reach: [i32; 2],
    /// How much each column counts in the search, (K), above zero; `None` when all count the same.
    pub importance: Option<&'a [f32]>,
}

/// What [`Encoder::affine`] chose.
#[derive(Debug, Clone, PartialEq)]
pub struct AffineCodes {
    /// (N, K); unspecified in groups that are not finite or whose scale is not.
    pub codes: Vec<u8>,
    /// (N, G), values of their stored type; infinite where it is exceeded.
    pub scales: Vec<f32>,
    /// (N, G): zero points as codes.
    pub zeros: Vec<u8>,
    /// (N, G): largest magnitudes; not finite exactly where a weight is not.
    pub extents: Vec<f32>,
    /// (N, G): the squared error that the search found for its choice, bit for bit as
    /// [`clip_errors`](crate::clip_errors) sums it; zero where nothing was searched.
    pub errors: Vec<f32>,
}

/// Codebooks on the device.
#[derive(Debug)]
pub struct Books {
    words: Vec<i32>,
    there: Temporary<i32>,
}

/// One heat of the race between pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heat {
    /// Pairs that enter.
    pub pairs: usize,
    /// One over the part of the groups that judges them.
    pub part: usize,
    /// How many of [`Wint2Job::factors`] are tried.
    pub tried: usize,
}

/// How WINT2 rows are encoded.
#[derive(Debug, Clone, Copy)]
pub struct Wint2Job<'a> {
    /// The codebooks of the list of pairs, see [`Encoder::books`].
    pub books: &'a Books,
    /// Whether the groups' scales are searched before the race.
    pub refine: bool,
    /// The race; at most three.
    pub heats: &'a [Heat],
    /// Scales tried in a heat, relative to the group's own.
    pub factors: [f32; 3],
    /// Pairs that are fitted completely.
    pub finalists: usize,
    /// Super scales fitted for each finalist.
    pub supers: usize,
    /// Rounds of least squares at most.
    pub rounds: usize,
    /// For G groups, the step in which they are visited.
    pub stride: fn(usize) -> usize,
    /// How much columns count; `None` when all count the same.
    pub importance: Option<Importance<'a>>,
}

/// How much columns count.
#[derive(Debug, Clone, Copy)]
pub struct Importance<'a> {
    /// (K), above zero.
    pub columns: &'a [f32],
    /// (K/64): their sums over each group.
    pub masses: &'a [f64],
}

/// What [`Encoder::wint2`] chose.
#[derive(Debug, Clone, PartialEq)]
pub struct Wint2Codes {
    /// (N, K/4)
    pub codes: Vec<u8>,
    /// (N, K/64), not packed.
    pub locals: Vec<u8>,
    /// (N): bits of bf16.
    pub supers: Vec<u16>,
    /// (N): numbers in the list of pairs.
    pub pairs: Vec<i32>,
    /// (N): 0 where a weight is not finite.
    pub finite: Vec<i32>,
    /// (N): the error of the chosen encoding in units of the row's power of two squared, as the search adds it up; zero for a row of zeros.
    pub errors: Vec<f64>,
    /// (N): the super scale that least squares asked for last, before it was rounded; zero where it was not asked.
    pub asked: Vec<f32>,
}

/// `struct AffineJob` of encode_affine.cu, field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AffineArgs {
    groups: i32,
    len: i32,
    low: i32,
    high: i32,
    zero: i32,
    scale: i32,
    coarse: i32,
    fine: i32,
    reach: i32,
    near: i32,
    steps: f32,
    form: i32,
    weighted: i32,
}

/// `struct Wint2Job` of encode_wint2.cu, field by field.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Wint2Args {
    n: i32,
    k: i32,
    form: i32,
    step: i32,
    refine: i32,
    finalists: i32,
    supers: i32,
    rounds: i32,
    heats: i32,
    pairs: [i32; 3],
    parts: [i32; 3],
    tried: [i32; 3],
    factors: [f32; 3],
    cells: i32,
}

const _: () = assert!(size_of::<AffineArgs>() == 13 * 4 && size_of::<Wint2Args>() == 22 * 4);

/// Chooses codes on a GPU. Cheap to clone; may be used by several threads.
#[derive(Debug, Clone)]
pub struct Encoder {
    device: Arc<Device>,
    turns: Arc<Turns>,
    /// Those that were copied last.
    books: Arc<Mutex<Option<Arc<Books>>>>,
}

impl Encoder {
    /// On this device.
    pub fn new(device: Arc<Device>) -> Self {
        let turns = Arc::new(Turns::new(device.memory().budget / 2));
        Self {
            device,
            turns,
            books: Arc::default(),
        }
    }

    /// Rows of `k` weights that are best encoded together, of what the budget has room for: any number gives the same codes.
    pub fn rows_together(&self, k: usize) -> usize {
        let bytes = (self.device.memory().budget / 32).clamp(*TOGETHER.start(), *TOGETHER.end());
        (bytes / 4 / k.max(1)).max(1)
    }

    /// Its device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn fault(&self, what: &'static str) -> impl Fn(DriverError) -> Fault {
        move |error| Fault {
            device: self.device.name().to_owned(),
            what,
            reason: self.device.arena.refusal().unwrap_or_else(|| words(error)),
        }
    }

    fn kernel(&self, name: &'static str) -> LaunchArgs<'_> {
        let function = self.device.function(name).expect("a kernel of the list");
        self.device.stream.launch_builder(function)
    }

    /// Scales, zero points and codes of `n` rows of `k` weights, as `calib`'s rounding or clip search chooses them.
    ///
    /// # Errors
    ///
    /// When the device fails.
    ///
    /// # Panics
    ///
    /// When the sizes disagree.
    pub fn affine(&self, x: Rows<'_>, n: usize, k: usize, job: &AffineJob<'_>) -> Result<AffineCodes, Fault> {
        let shorter = x.shorter();
        let x = shorter
            .as_deref()
            .map_or(x, |bytes| Rows::Stored(FloatDtype::Bf16, bytes));
        assert!(x.len() == n * k && n * k > 0, "N x K");
        assert!(k.is_multiple_of(job.group), "whole groups");
        let total = n * k / job.group;
        let args = AffineArgs {
            groups: (k / job.group) as i32,
            len: job.group as i32,
            low: i32::from(job.range.0),
            high: i32::from(job.range.1),
            zero: job.zero.map_or(-1, i32::from),
            scale: dense(job.scale),
            coarse: job.coarse.len() as i32,
            fine: job.fine.len() as i32,
            reach: job.reach[0],
            near: job.reach[1],
            steps: job.steps,
            form: x.form(),
            weighted: i32::from(job.importance.is_some()),
        };
        let importance = job.importance.unwrap_or(&[1.0]);
        assert!(job.importance.is_none_or(|d| d.len() == k), "K columns");
        // At least one factor, so that there is something to point at.
        let factors = [job.coarse, job.fine, &[1.0]].concat();
        let threads = job.group.div_ceil(2).next_multiple_of(32).min(GROUP_THREADS) as u32;
        let work = || {
            let there = x.to(&self.device)?;
            let (factors, importance) = (self.device.sent(&factors)?, self.device.sent(importance)?);
            let mut codes = self.device.zeros::<u8>(n * k)?;
            let mut scales = self.device.zeros::<f32>(total)?;
            let mut zeros = self.device.zeros::<u8>(total)?;
            let mut extents = self.device.zeros::<f32>(total)?;
            let mut errors = self.device.zeros::<f32>(total)?;
            let mut call = self.kernel("encode_affine");
            call.arg(&mut *codes).arg(&mut *scales).arg(&mut *zeros);
            call.arg(&mut *extents).arg(&mut *errors);
            there.push(&mut call);
            call.arg(&*factors).arg(&*importance).arg(&args);
            run(call, (total as u32, 1), threads)?;
            let stream = &self.device.stream;
            Ok(AffineCodes {
                codes: stream.clone_dtoh(&*codes)?,
                scales: stream.clone_dtoh(&*scales)?,
                zeros: stream.clone_dtoh(&*zeros)?,
                extents: stream.clone_dtoh(&*extents)?,
                errors: stream.clone_dtoh(&*errors)?,
            })
        };
        let _turn = self.turns.wait(n * k * 5 + total * 13);
        work().map_err(self.fault("choose codes"))
    }

    /// Copies the codebooks of a list of pairs to the device, unless they are there: of each byte the four windows.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn books(&self, books: &[[[i8; 4]; CODEWORDS]; CODEWORDS]) -> Result<Arc<Books>, Fault> {
        let words = words_of(books);
        let mut last = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = last.as_ref().filter(|books| books.words == words) {
            return Ok(Arc::clone(there));
        }
        let there = self
            .device
            .sent(&words)
            .map_err(self.fault("copy codebooks there"))?;
        let books = Arc::new(Books { words, there });
        *last = Some(Arc::clone(&books));
        Ok(books)
    }

    /// Codes and scales of `n` WINT2 rows of `k` weights, as `calib`'s encoder chooses them.
    ///
    /// # Errors
    ///
    /// When the device fails.
    ///
    /// # Panics
    ///
    /// When the sizes disagree, or the job asks for more than the kernel holds.
    pub fn wint2(&self, x: Rows<'_>, n: usize, k: usize, job: &Wint2Job<'_>) -> Result<Wint2Codes, Fault> {
        let shorter = x.shorter();
        let x = shorter
            .as_deref()
            .map_or(x, |bytes| Rows::Stored(FloatDtype::Bf16, bytes));
        assert!(x.len() == n * k && n * k > 0, "N x K");
        assert!(k.is_multiple_of(GROUP), "whole groups");
        let entered = job.heats.iter().all(|heat| (1..=CODEWORDS).contains(&heat.pairs));
        let tried = job.heats.iter().all(|heat| heat.tried == 1 || heat.tried == 3);
        assert!(job.heats.len() <= 3 && entered && tried, "heats the kernel holds");
        assert!(
            job.supers <= MOST_SUPERS && job.finalists <= CODEWORDS,
            "room for the fit"
        );
        let groups = k / GROUP;
        let cells = job.heats.iter().map(|h| h.pairs * groups.div_ceil(h.part)).max();
        let cells = cells.unwrap_or(0);
        let each = |f: &dyn Fn(&Heat) -> usize| {
            std::array::from_fn(|i| job.heats.get(i).map_or(1, |heat| f(heat) as i32))
        };
        let args = Wint2Args {
            n: n as i32,
            k: k as i32,
            form: x.form(),
            step: (job.stride)(groups) as i32,
            refine: i32::from(job.refine),
            finalists: job.finalists as i32,
            supers: job.supers as i32,
            rounds: job.rounds as i32,
            heats: job.heats.len() as i32,
            pairs: each(&|heat| heat.pairs),
            parts: each(&|heat| heat.part),
            tried: each(&|heat| heat.tried),
            factors: job.factors,
            cells: cells as i32,
        };
        let weighted = job.importance.is_some();
        let room = k * if weighted { 3 } else { 1 } + 5 * groups + cells;
        let each_row = 4 * room + 4 * 17 * groups;
        let fit = self.device.memory().budget / 8 / each_row;
        let at_work = n.min(ROWS_AT_WORK).min(fit.max(1));
        let plain = Importance {
            columns: &[1.0],
            masses: &[1.0],
        };
        let importance = job.importance.unwrap_or(plain);
        assert!(
            !weighted || (importance.columns.len(), importance.masses.len()) == (k, groups),
            "columns and groups"
        );
        let work = || {
            let there = x.to(&self.device)?;
            let columns = self.device.sent(importance.columns)?;
            let masses = self.device.sent(importance.masses)?;
            let mut floats = self.device.room::<f32>(at_work * room)?;
            let mut bytes = self.device.room::<u8>(at_work * 4 * 17 * groups)?;
            let mut codes = self.device.zeros::<u8>(n * k / 4)?;
            let mut locals = self.device.zeros::<u8>(n * groups)?;
            let mut supers = self.device.zeros::<u16>(n)?;
            let mut pairs = self.device.zeros::<i32>(n)?;
            let mut finite = self.device.zeros::<i32>(n)?;
            let mut errors = self.device.zeros::<f64>(n)?;
            let mut asked = self.device.zeros::<f32>(n)?;
            let mut call = self.kernel(if weighted {
                "encode_wint2_weighted"
            } else {
                "encode_wint2"
            });
            call.arg(&mut *codes).arg(&mut *locals).arg(&mut *supers);
            call.arg(&mut *pairs).arg(&mut *finite);
            call.arg(&mut *errors).arg(&mut *asked);
            there.push(&mut call);
            call.arg(&*columns).arg(&*masses);
            call.arg(&*job.books.there)
                .arg(&mut *floats)
                .arg(&mut *bytes)
                .arg(&args);
            run(call, (at_work as u32, 1), ROW_THREADS)?;
            let stream = &self.device.stream;
            Ok(Wint2Codes {
                codes: stream.clone_dtoh(&*codes)?,
                locals: stream.clone_dtoh(&*locals)?,
                supers: stream.clone_dtoh(&*supers)?,
                pairs: stream.clone_dtoh(&*pairs)?,
                finite: stream.clone_dtoh(&*finite)?,
                errors: stream.clone_dtoh(&*errors)?,
                asked: stream.clone_dtoh(&*asked)?,
            })
        };
        let _turn = self.turns.wait(at_work * each_row + n * k * 5 + n * 24);
        work().map_err(self.fault("choose WINT2 codes"))
    }
}

/// `struct Word` of encode_wint2.cu for every codeword: its windows as four bytes, and -32 c.c.
fn words_of(books: &[[[i8; 4]; CODEWORDS]; CODEWORDS]) -> Vec<i32> {
    let word = |c: &[i8; 4]| {
        let squares: i32 = c.iter().map(|&c| i32::from(c) * i32::from(c)).sum();
        [i32::from_le_bytes(c.map(|c| c.to_le_bytes()[0])), -32 * squares]
    };
    books.as_flattened().iter().flat_map(word).collect()
}
