//! How codes become bytes. One file per layout; each opens with its picture and index formula.
//!
//! A layout is pure: it neither rounds nor knows what a code means.

pub mod ggml;
pub mod high_nibbles;
pub mod lsb_rows;
pub mod paddle_int4;
pub mod paddle_int8;
pub mod wint2;
pub mod wint25;
pub mod words;

use crate::{FormatError, Result};

pub use high_nibbles::HIGH_NIBBLES;
pub use lsb_rows::LSB_ROWS;
pub use paddle_int4::PADDLE_INT4;
pub use paddle_int8::PADDLE_INT8;

/// One byte layout of a matrix of codes, row by row.
pub trait Packing: Sync {
    /// Name in manifests.
    fn name(&self) -> &'static str;

    /// Where the code of (row n, column k) lies, as one line a reader can execute.
    fn formula(&self) -> &'static str;

    /// Bytes of one row of `k` codes of `bits` bits.
    fn row_bytes(&self, bits: u8, k: usize) -> usize;

    /// Rows that lie interleaved: only whole runs of this many can be packed and unpacked.
    fn row_multiple(&self) -> usize {
        1
    }

    /// Appends the bytes of `codes`, rows of `k`. Every code must fit `bits`; higher bits are
    /// dropped. Fails when the codes are no whole number of rows.
    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()>;

    /// Appends the codes behind `bytes`, rows of `k`. Fails when the bytes are no whole number of
    /// rows.
    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()>;
}

/// Every layout an artifact may use.
pub const PACKINGS: &[&dyn Packing] = &[&LSB_ROWS, &HIGH_NIBBLES, &PADDLE_INT8, &PADDLE_INT4];

/// Layout of plain elements, row by row.
pub const ROWS: &str = "rows";
/// Layout of plain elements, column by column: the transpose lies in the file.
pub const COLUMNS: &str = "columns";
/// Layout of plain elements that belong to the weight as a whole, one after the other.
pub const WHOLE: &str = "whole";
/// [`HIGH_NIBBLES`], its bytes column by column.
pub const COLUMNS_HIGH_NIBBLES: &str = "columns-high-nibbles";

/// The index formula of every layout an artifact may use, or `None` for an unknown name.
pub fn formula(layout: &str) -> Option<&'static str> {
    match layout {
        ROWS => Some("element [n][g] is element n*shape[1] + g of the tensor"),
        WHOLE => Some("element [i] is element i of the tensor, whatever the row"),
        COLUMNS => Some("element [n][j] is element j*N + n of the tensor"),
        COLUMNS_HIGH_NIBBLES => Some("value[n][k] is (byte (k/2)*N + n >> (4 if k % 2 == 0 else 0)) & 15"),
        _ => find(layout).map(Packing::formula),
    }
}

/// The layout of this name.
pub fn find(name: &str) -> Option<&'static dyn Packing> {
    PACKINGS.iter().copied().find(|p| p.name() == name)
}

/// Fails unless a layout of tiles gets its own code width, rows of whole tiles of columns, and a
/// whole number of interleaved rows of `row` items. Pairs are (expected, got).
fn check_tiles(
    layout: &dyn Packing,
    bits: (u8, u8),
    columns: (usize, usize),
    items: usize,
    row: usize,
) -> Result<()> {
    let fault = |what, expected: String, got: String| Err(FormatError::Weight { what, expected, got });
    let (name, rows) = (layout.name(), layout.row_multiple());
    if bits.0 != bits.1 {
        return fault(
            "bits of a code",
            format!("{} for {name}", bits.0),
            bits.1.to_string(),
        );
    }
    if columns.1 == 0 || !columns.1.is_multiple_of(columns.0) {
        return fault(
            "input columns",
            format!("a multiple of {} for {name}", columns.0),
            columns.1.to_string(),
        );
    }
    if !items.is_multiple_of(rows * row) {
        return fault(
            "rows",
            format!("a multiple of {rows} for {name}"),
            format!("{items} bytes"),
        );
    }
    Ok(())
}
