//! Figures derived a second time, by a path that shares nothing with the writer's: codes taken from
//! the stored bytes by each layout's formula, one at a time, values and sums in plain `f64`.

use std::cell::RefCell;
use std::ops::Range;

use qtool_formats::artifact::figures::ErrorMoments;
use qtool_formats::artifact::manifest::{PartRecord, QuantizedRecord};
use qtool_formats::artifact::{Artifact, Figures, PieceRecord, TensorRecord};
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::piece::Piece;
use qtool_formats::scheme::{KQuant, Role};
use qtool_formats::{FloatDtype, FormatError, Scheme};

use crate::transform::folding::Folding;
use crate::transform::second::Second;

/// Decodes a weight code by code and sums in `f64`. Without a source, error sums stay zero.
pub(crate) fn rederive(
    artifact: &Artifact,
    q: &QuantizedRecord,
    source: Option<&SourceValues<'_>>,
) -> Result<Figures, FormatError> {
    // The library's own decoder checks code ranges and scales; this one then goes its own way.
    let stride = ((1 << 22) / q.columns.max(1)).next_multiple_of(16);
    for from in (0..q.rows).step_by(stride) {
        artifact.weight_rows(q, from, stride)?;
    }
    match q.scheme {
        Scheme::Ccq => return rederive_wint2(artifact, q, source),
        Scheme::Ccq25 => return rederive_wint25(artifact, q, source),
        Scheme::K(kind) => return rederive_k(artifact, q, kind, source),
        Scheme::Affine(_) | Scheme::Nf4 | Scheme::Nf4Double => {}
    }
    let part = |role: Role| q.parts.iter().find(|p| p.role == role);
    let bytes = |role: Role| {
        part(role)
            .map(|p| artifact.stored(&p.tensor).map(|t| t.bytes()))
            .transpose()
    };
    let spelled = &artifact.manifest().schemes[&q.scheme.to_string()];
    let group = if spelled.group == 0 {
        q.columns
    } else {
        spelled.group
    };
    let groups = q.columns / group.max(1);
    let codes = bytes(Role::Codes)?.unwrap_or_default();
    let layout = part(Role::Codes).map_or("", |p| p.layout.as_str());
    let zero_points = bytes(Role::ZeroPoints)?;
    let scale_type = FloatDtype::from_dtype(spelled.scale_dtype).unwrap_or(FloatDtype::F32);
    let scales = match q.scheme {
        Scheme::Nf4Double => nested_scales(
            bytes(Role::Scales)?.unwrap_or_default(),
            bytes(Role::NestedScales)?.unwrap_or_default(),
            bytes(Role::Offset)?.unwrap_or_default(),
        ),
        _ => scale_type.widen(bytes(Role::Scales)?.unwrap_or_default()),
    };
    let (code_row, zero_row) = (row_bytes(q, Role::Codes), row_bytes(q, Role::ZeroPoints));
    let mut histogram = [0u64; 256];
    let mut moments = ErrorMoments::default();
    for n in 0..q.rows {
        for k in 0..q.columns {
            let code = match layout {
                "paddle-int8" => paddle_int8(codes, q.columns, n, k),
                "paddle-int4" => paddle_int4(codes, q.columns, n, k),
                _ => bits_at(codes, n * code_row, k, spelled.bits),
            };
            let zero = match (&spelled.zero_point, zero_points) {
                (Some(zero), _) => *zero,
                (None, Some(bytes)) => bits_at(bytes, n * zero_row, k / group, spelled.bits),
                (None, None) => 0,
            };
            histogram[usize::from(code)] += 1;
            if let Some(source) = source {
                let scale = f64::from(scales[n * groups + k / group]);
                let decoded = match q.scheme {
                    Scheme::Nf4 | Scheme::Nf4Double => nf4(code) * scale,
                    _ => (f64::from(code) - f64::from(zero)) * scale,
                };
                add_error(&mut moments, source.at(n, k), decoded);
            }
        }
    }
    Ok(figures(q, &moments, &histogram, spelled.code_range))
}

/// The same for WINT2: a byte to four columns, its windows by shift and mask.
fn rederive_wint2(
    artifact: &Artifact,
    q: &QuantizedRecord,
    source: Option<&SourceValues<'_>>,
) -> Result<Figures, FormatError> {
    // Element `column` of row `n` of a part, by rows or by columns as its layout says.
    let element = |role: Role| {
        let part = q.parts.iter().find(|p| p.role == role);
        let bytes = part
            .map(|p| artifact.stored(&p.tensor).map(|t| t.bytes()))
            .transpose()?;
        let (bytes, width) = (
            bytes.unwrap_or_default(),
            part.map_or(1, |p| p.dtype.bitsize() / 8),
        );
        let across = part.is_some_and(|p| p.layout.starts_with("columns"));
        let columns = part.map_or(0, |p| p.row_bytes) / width;
        let rows = q.rows;
        Ok::<_, FormatError>(move |n: usize, column: usize| {
            let at = if across {
                column * rows + n
            } else {
                n * columns + column
            };
            bytes.get(at * width..(at + 1) * width).unwrap_or_default()
        })
    };
    let (codes, locals) = (element(Role::Codes)?, element(Role::LocalScales)?);
    let (supers, slopes, offsets) = (
        element(Role::SuperScales)?,
        element(Role::CodeScales)?,
        element(Role::CodeZeroPoints)?,
    );
    let float = |dtype: FloatDtype, bytes: &[u8]| dtype.widen(bytes).first().copied().unwrap_or(0.0);
    let byte = |bytes: &[u8]| bytes.first().copied().unwrap_or(0);
    let mut histogram = [0u64; 256];
    let mut moments = ErrorMoments::default();
    for n in 0..q.rows {
        let scale = f64::from(float(FloatDtype::Bf16, supers(n, 0)));
        let slope = float(FloatDtype::F32, slopes(n, 0));
        let offset = float(FloatDtype::F32, offsets(n, 0));
        for k in 0..q.columns {
            let stored = byte(codes(n, k / 4));
            if k % 4 == 0 {
                histogram[usize::from(stored)] += 1;
            }
            if let Some(source) = source {
                let code = (f32::from(stored) * slope + offset + 0.5).floor() as i32;
                let window = ((code >> (9 - 3 * (k % 4))) & 63) - 32;
                let pair = byte(locals(n, k / 128));
                let local = if (k / 64) % 2 == 0 { pair >> 4 } else { pair & 15 };
                let decoded = f64::from(window) * f64::from(local) * scale;
                add_error(&mut moments, source.at(n, k), decoded);
            }
        }
    }
    Ok(figures(q, &moments, &histogram, (0, u8::MAX)))
}

/// The same for WINT2.5: ten words to 64 columns, the last with a window and the local scale.
fn rederive_wint25(
    artifact: &Artifact,
    q: &QuantizedRecord,
    source: Option<&SourceValues<'_>>,
) -> Result<Figures, FormatError> {
    let bytes = |role: Role| {
        let part = q.parts.iter().find(|p| p.role == role);
        let stored = part.map(|p| artifact.stored(&p.tensor).map(|t| t.bytes()));
        stored.transpose().map(Option::unwrap_or_default)
    };
    let (words, supers) = (bytes(Role::Codes)?, bytes(Role::SuperScales)?);
    let half = |bytes: &[u8], at: usize| {
        let pair = bytes.get(2 * at..2 * at + 2);
        pair.map_or(0, |pair| u32::from(pair[0]) | u32::from(pair[1]) << 8)
    };
    let mut histogram = [0u64; 256];
    let mut moments = ErrorMoments::default();
    for n in 0..q.rows {
        let scale = f64::from(f32::from_bits(half(supers, n) << 16));
        for k in 0..q.columns {
            let first = (n * (q.columns / 64) + k / 64) * 10;
            let last = half(words, first + 9);
            // Bits 15..13, 13..11, 11..9 | 8..6, 6..4, 4..2, 2..0: neighbours share one, but not across the bar.
            let (word, place) = (half(words, first + (k % 64) / 7), (k % 64) % 7);
            let shift = if place < 3 { 13 - 2 * place } else { 12 - 2 * place };
            let window = if k % 64 == 63 {
                last >> 13
            } else {
                (word >> shift) & 7
            };
            histogram[window as usize] += 1;
            if let Some(source) = source {
                let decoded = (f64::from(window) - 4.0) * f64::from(last & 0x1FFF) * scale;
                add_error(&mut moments, source.at(n, k), decoded);
            }
        }
    }
    Ok(figures(q, &moments, &histogram, (0, 7)))
}

/// The same for GGML's K types: every number taken from its bits.
fn rederive_k(
    artifact: &Artifact,
    q: &QuantizedRecord,
    kind: KQuant,
    source: Option<&SourceValues<'_>>,
) -> Result<Figures, FormatError> {
    let bytes = |role: Role| {
        let part = q.parts.iter().find(|p| p.role == role);
        let stored = part.map(|p| artifact.stored(&p.tensor).map(|t| t.bytes()));
        stored.transpose().map(Option::unwrap_or_default)
    };
    let (codes, scales, mins) = (
        bytes(Role::Codes)?,
        bytes(Role::LocalScales)?,
        bytes(Role::LocalMins)?,
    );
    let (d, dmin) = (bytes(Role::SuperScales)?, bytes(Role::SuperMins)?);
    // Code width, columns of a group, bits of its numbers: 4, 32, 6 or 2, 16, 4.
    let (bits, group, small) = match kind {
        KQuant::Q4 => (4u8, 32, 6u8),
        KQuant::Q2 => (2, 16, 4),
    };
    let half = |all: &[u8], at: usize| {
        let pair = all.get(2 * at..2 * at + 2).unwrap_or_default();
        FloatDtype::F16
            .widen(pair)
            .first()
            .map_or(f64::NAN, |v| f64::from(*v))
    };
    let (code_row, small_row) = (row_bytes(q, Role::Codes), row_bytes(q, Role::LocalScales));
    let mut histogram = [0u64; 256];
    let mut moments = ErrorMoments::default();
    for n in 0..q.rows {
        for k in 0..q.columns {
            let code = bits_at(codes, n * code_row, k, bits);
            histogram[usize::from(code)] += 1;
            if let Some(source) = source {
                let number = |all| f64::from(bits_at(all, n * small_row, k / group, small));
                let block = n * (q.columns / 256) + k / 256;
                let decoded =
                    half(d, block) * number(scales) * f64::from(code) - half(dmin, block) * number(mins);
                add_error(&mut moments, source.at(n, k), decoded);
            }
        }
    }
    Ok(figures(q, &moments, &histogram, (0, (1 << bits) - 1)))
}

/// The scales of NF4 under double quantization, in f64 throughout: 8-bit floats of one sign, which bitsandbytes makes of
/// an exponent of ten and as many bits of fraction as it leaves, times the scale of their block of 256, plus the offset.
fn nested_scales(codes: &[u8], nested: &[u8], offset: &[u8]) -> Vec<f32> {
    let float = |bytes: &[u8], at: usize| {
        let four = bytes.get(4 * at..4 * at + 4).and_then(|b| b.try_into().ok());
        four.map_or(f64::NAN, |b| f64::from(f32::from_le_bytes(b)))
    };
    // Zero is code 127; behind it lie 1, 2, 4 ... 64 means of equal steps between a tenth of 10^(e-6) and it, and one.
    let above = |place: u32| match place {
        0 => 0.0,
        128 => 1.0,
        _ => {
            let exponent = place.ilog2();
            let steps = f64::from(1 << exponent);
            let middle = 0.1 + 0.9 * (f64::from(place) - steps + 0.5) / steps;
            middle * 10f64.powi(exponent as i32 - 6)
        }
    };
    let level = |code: u8| match code {
        0..127 => -above(127 - u32::from(code)),
        _ => above(u32::from(code) - 127),
    };
    let scale = |(i, code): (usize, &u8)| (level(*code) * float(nested, i / 256) + float(offset, 0)) as f32;
    codes.iter().enumerate().map(scale).collect()
}

/// A level of NF4: eight not above zero, eight above, as bitsandbytes prints them.
fn nf4(code: u8) -> f64 {
    const BELOW: [f64; 8] = [
        1.0,
        0.696_192_800_998_688,
        0.525_073_051_452_637,
        0.394_917_488_098_145,
        0.284_441_381_692_886,
        0.184_773_430_228_233,
        0.091_050_036_251_545,
        0.0,
    ];
    const ABOVE: [f64; 8] = [
        0.079_580_299_556_255,
        0.160_930_201_411_247,
        0.246_112_301_945_686,
        0.337_915_241_718_292,
        0.440_709_829_330_444,
        0.562_617_003_917_694,
        0.722_956_836_223_602,
        1.0,
    ];
    let place = usize::from(code & 7);
    if code < 8 { -BELOW[place] } else { ABOVE[place] }
}

fn add_error(moments: &mut ErrorMoments, w: f64, decoded: f64) {
    let e = w - decoded;
    moments.sum_w2 += w * w;
    moments.sum_e2 += e * e;
    moments.sum_we += w * e;
    moments.max_abs_e = moments.max_abs_e.max(e.abs());
}

fn figures(q: &QuantizedRecord, moments: &ErrorMoments, histogram: &[u64; 256], range: (u8, u8)) -> Figures {
    let elements = |p: &PartRecord| p.shape.iter().product::<usize>() * p.dtype.bitsize();
    let stored_bits: usize = q.parts.iter().map(elements).sum();
    let bits_per_weight = stored_bits as f64 / (q.rows * q.columns).max(1) as f64;
    Figures::new(moments, histogram, range, bits_per_weight)
}

fn row_bytes(q: &QuantizedRecord, role: Role) -> usize {
    q.parts.iter().find(|p| p.role == role).map_or(0, |p| p.row_bytes)
}

/// Value `index` of a row of little-endian `bits`-bit values that begins at byte `row`: the
/// formula of `lsb-rows`, one bit at a time.
fn bits_at(bytes: &[u8], row: usize, index: usize, bits: u8) -> u8 {
    let bit = |i: usize| {
        let at = index * usize::from(bits) + i;
        bytes.get(row + at / 8).map_or(0, |byte| (byte >> (at % 8)) & 1)
    };
    (0..usize::from(bits)).map(|i| bit(i) << i).sum()
}

/// The formula of `paddle-int8`.
fn paddle_int8(bytes: &[u8], columns: usize, n: usize, k: usize) -> u8 {
    let kk = 16 * (k / 16) + (k % 8) * 2 + (k % 16) / 8;
    let at = kk % 64 + 128 * (kk / 64) + 64 * (n % 2) + 2 * columns * (n / 2);
    bytes.get(at).copied().unwrap_or(0)
}

/// The formula of `paddle-int4`.
fn paddle_int4(bytes: &[u8], columns: usize, n: usize, k: usize) -> u8 {
    let pp = 16 * (k / 32) + 4 * ((k / 2) % 4) + (k % 32) / 8;
    let p = pp % 32 + 128 * (pp / 32) + 32 * (n % 4) + 2 * columns * (n / 4);
    let nibble = 4 * (k % 2) + p % 4;
    let byte = bytes.get(4 * (p / 4) + nibble / 2).copied().unwrap_or(0);
    (byte >> (4 * (nibble % 2))) & 15
}

/// Values of the matrix a tensor was made from, by row and column, however the sources lie.
pub(crate) struct SourceValues<'a> {
    pieces: Vec<(Piece, &'a [u8])>,
    /// For each piece, what becomes of it, and the rows derived last.
    folded: Vec<Option<Folded<'a>>>,
}

/// A piece that was transformed.
struct Folded<'a> {
    folding: &'a Folding,
    second: &'a Second,
    /// Whether rows of the piece are columns of the layer, as which it was transformed.
    turned: bool,
    block: RefCell<(Range<usize>, Vec<f64>)>,
}

impl<'a> SourceValues<'a> {
    /// The sources of a record in `base`; `None` when one is missing or has another type or size.
    pub(crate) fn of(
        base: &'a Checkpoint,
        record: &TensorRecord,
        quantized: Option<&QuantizedRecord>,
        second: Option<&'a Second>,
    ) -> Option<Self> {
        let pieces = match (quantized, record.sources.is_empty()) {
            (Some(q), true) => {
                let dtype = FloatDtype::from_dtype(record.dtype)?;
                let dims = (q.rows, q.columns);
                vec![Piece::whole(&record.name, dtype, q.orientation, dims)]
            }
            _ => record
                .sources
                .iter()
                .map(PieceRecord::piece)
                .collect::<Option<_>>()?,
        };
        let with_bytes = |piece: Piece| {
            let view = base.tensor(&piece.tensor).ok()?;
            let fits = view.float_dtype() == Some(piece.dtype)
                && view.bytes().len() == piece.dims.0 * piece.dims.1 * piece.dtype.bytes();
            fits.then(|| (piece, view.bytes()))
        };
        let pieces = pieces
            .into_iter()
            .map(with_bytes)
            .collect::<Option<Vec<(Piece, &[u8])>>>()?;
        let folded = |piece: &Piece| {
            let second = second?;
            let matrix = base.tensor(&piece.tensor).ok()?.shape().len() == 2;
            Some(Folded {
                folding: second.folding(&record.name, &piece.tensor)?,
                second,
                turned: matrix && base.naming().orientation(&piece.tensor) != piece.orientation,
                block: RefCell::default(),
            })
        };
        let folded = pieces.iter().map(|(piece, _)| folded(piece)).collect();
        Some(Self { pieces, folded })
    }

    /// Whether its values were transformed: derived twice, they agree up to rounding.
    pub(crate) fn is_transformed(&self) -> bool {
        self.folded.iter().any(Option::is_some)
    }

    /// The value at row `n` and column `k`; NaN outside of all pieces.
    pub(crate) fn at(&self, mut n: usize, k: usize) -> f64 {
        for ((piece, bytes), folded) in self.pieces.iter().zip(&self.folded) {
            if n >= piece.rows.len() {
                n -= piece.rows.len();
                continue;
            }
            let Some(folded) = folded else {
                return stored_value(piece, bytes, n, k);
            };
            let (row, column) = (piece.rows.start + n, piece.columns.start + k);
            let mut block = folded.block.borrow_mut();
            // By rows and columns of the layer.
            let (dims, row, column) = match folded.turned {
                true => ((piece.dims.1, piece.dims.0), column, row),
                false => (piece.dims, row, column),
            };
            if !block.0.contains(&row) {
                let whole = Piece::whole(&piece.tensor, piece.dtype, piece.orientation, piece.dims);
                let read = |n, k| match folded.turned {
                    true => stored_value(&whole, bytes, k, n),
                    false => stored_value(&whole, bytes, n, k),
                };
                *block = folded
                    .second
                    .block(folded.folding, dims, row, folded.turned, &read);
            }
            // The writer rounds transformed values to f32 before it chooses codes.
            return f64::from(block.1[(row - block.0.start) * dims.1 + column] as f32);
        }
        f64::NAN
    }
}

/// The stored value at row `n` and column `k` of a piece.
fn stored_value(piece: &Piece, bytes: &[u8], n: usize, k: usize) -> f64 {
    let [major, minor] = piece.source_index(n, k);
    let stride = match piece.orientation {
        Orientation::OutIn => piece.dims.1,
        Orientation::InOut => piece.dims.0,
    };
    let width = piece.dtype.bytes();
    let at = (major * stride + minor) * width;
    let Some(element) = bytes.get(at..at + width) else {
        return f64::NAN;
    };
    let mut bits = [0u8; 4];
    // A bfloat16 is the upper half of an f32.
    let place = if piece.dtype == FloatDtype::Bf16 { 2 } else { 0 };
    bits[place..place + width].copy_from_slice(element);
    match piece.dtype {
        FloatDtype::Bf16 | FloatDtype::F32 => f64::from(f32::from_le_bytes(bits)),
        FloatDtype::F16 => f64::from(piece.dtype.widen(&bits[..2])[0]),
    }
}
