//! One tensor as it lies in a mapped file: name, dtype, shape and borrowed bytes, with the length
//! proven at construction. Owns no arithmetic and copies nothing.

use std::ops::Range;
use std::path::Path;

use crate::dtype::{Dtype, FloatDtype};
use crate::{FormatError, Result};

/// A borrowed tensor. `bytes` holds exactly the product of `shape` elements of `dtype`,
/// little-endian, row-major; it may have any alignment.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: &'a [usize],
    bytes: &'a [u8],
}

/// Bytes of a tensor of this dtype and shape, or `None` when the product overflows or the last
/// byte would be shared (dtypes under 8 bits).
///
/// Zeros do not excuse the other dimensions: `[0, usize::MAX]` overflows too (as in NumPy), so the
/// bits of any row or block of rows can be counted without another check.
pub fn byte_len(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape
        .iter()
        .filter(|&&dim| dim != 0)
        .try_fold(dtype.bitsize(), |product, &dim| product.checked_mul(dim))?;
    if shape.contains(&0) {
        return Some(0);
    }
    bits.is_multiple_of(8).then_some(bits / 8)
}

impl<'a> TensorView<'a> {
    /// A view over `bytes`. Fails when their number is not what dtype and shape ask for.
    pub fn new(
        path: &Path,
        name: &'a str,
        dtype: Dtype,
        shape: &'a [usize],
        bytes: &'a [u8],
    ) -> Result<Self> {
        match byte_len(dtype, shape) {
            Some(expected) if expected == bytes.len() => Ok(Self {
                name,
                dtype,
                shape,
                bytes,
            }),
            expected => Err(FormatError::TensorSize {
                path: path.to_owned(),
                tensor: name.to_owned(),
                expected: expected.map_or_else(
                    || format!("{dtype} {shape:?}, which overflows"),
                    |n| format!("{n} bytes for {dtype} {shape:?}"),
                ),
                got: bytes.len() as u64,
            }),
        }
    }

    /// Name as stored.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// All bytes, little-endian, row-major.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The float type of the elements, or `None` for other dtypes.
    pub fn float_dtype(&self) -> Option<FloatDtype> {
        FloatDtype::from_dtype(self.dtype)
    }

    /// The tensor seen as a matrix: all leading dimensions folded into rows, the last one columns.
    /// A stack of experts (E, N, K) is E*N rows of K. Scalars and vectors have one row.
    pub fn matrix_dims(&self) -> (usize, usize) {
        match self.shape.split_last() {
            Some((&cols, rows)) => (rows.iter().product(), cols),
            None => (1, 1),
        }
    }

    /// Bytes of the given rows of [`matrix_dims`](Self::matrix_dims); empty when out of range.
    pub fn row_bytes(&self, rows: Range<usize>) -> &'a [u8] {
        let (_, cols) = self.matrix_dims();
        let row = cols * self.dtype.bitsize() / 8;
        self.bytes
            .get(rows.start * row..rows.end * row)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn length_is_proven_at_construction() {
        let bytes = [0u8; 12];
        let view = TensorView::new(Path::new("f"), "t", Dtype::BF16, &[1, 2, 3], &bytes).unwrap();
        assert_eq!(view.matrix_dims(), (2, 3));
        assert_eq!(view.row_bytes(1..2).len(), 6);
        assert_eq!(view.row_bytes(1..3).len(), 0);
        let error = TensorView::new(Path::new("f"), "t", Dtype::F32, &[2, 3], &bytes).unwrap_err();
        assert!(error.to_string().contains("24 bytes"), "{error}");
        for shape in [[usize::MAX, 3], [usize::MAX, 0], [0, usize::MAX]] {
            assert!(TensorView::new(Path::new("f"), "t", Dtype::F32, &shape, &bytes[..0]).is_err());
        }
    }
}
