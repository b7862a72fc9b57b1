//! How codes become bytes. One file per layout; each opens with its picture and index formula.
//!
//! A layout is pure: it neither rounds nor knows what a code means.

pub mod lsb_rows;
pub mod wint2;
pub mod wint25;

use crate::Result;

pub use lsb_rows::LSB_ROWS;

/// One byte layout of a matrix of codes, row by row.
pub trait Packing: Sync {
    /// Name in manifests.
    fn name(&self) -> &'static str;

    /// Where the code of (row n, column k) lies, as one line a reader can execute.
    fn formula(&self) -> &'static str;

    /// Bytes of one row of `k` codes of `bits` bits.
    fn row_bytes(&self, bits: u8, k: usize) -> usize;

    /// Appends the bytes of `codes`, rows of `k`. Every code must fit `bits`; higher bits are
    /// dropped. Fails when the codes are no whole number of rows.
    fn pack(&self, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> Result<()>;

    /// Appends the codes behind `bytes`, rows of `k`. Fails when the bytes are no whole number of
    /// rows.
    fn unpack(&self, bits: u8, k: usize, bytes: &[u8], out: &mut Vec<u8>) -> Result<()>;
}

/// Every layout an artifact may use.
pub const PACKINGS: &[&dyn Packing] = &[&LSB_ROWS];

/// The layout of this name.
pub fn find(name: &str) -> Option<&'static dyn Packing> {
    PACKINGS.iter().copied().find(|p| p.name() == name)
}
