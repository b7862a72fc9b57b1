//! Rectangles of row-major matrices. Owns [`ViewMut`], which hands disjoint columns or rows of one matrix to
//! several threads: what slices cannot do, since the columns of a tile do not lie next to each other.

use std::marker::PhantomData;

/// A readable (rows, columns) rectangle; row r begins at `data[r * stride]`.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    data: &'a [f32],
    stride: usize,
    rows: usize,
    columns: usize,
}

impl<'a> View<'a> {
    /// The rectangle that begins at the first number of `data`.
    ///
    /// # Panics
    ///
    /// If `data` ends before the rectangle does, or rows overlap.
    pub(crate) fn new(data: &'a [f32], stride: usize, rows: usize, columns: usize) -> Self {
        assert!(columns <= stride, "rows of {columns} every {stride}");
        assert!(
            rows == 0 || (rows - 1) * stride + columns <= data.len(),
            "{rows} rows of {columns} every {stride} in {}",
            data.len()
        );
        Self {
            data,
            stride,
            rows,
            columns,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Row r.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &'a [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        &self.data[r * self.stride..][..self.columns]
    }

    /// Row r without a look at their number.
    ///
    /// # Safety
    ///
    /// r is below the number of rows.
    #[inline(always)]
    pub(super) unsafe fn row_unchecked(&self, r: usize) -> &'a [f32] {
        debug_assert!(r < self.rows);
        // SAFETY: `new` has seen that `data` reaches to the end of the last row, and r is below their number.
        unsafe {
            self.data
                .get_unchecked(r * self.stride..r * self.stride + self.columns)
        }
    }

    /// Columns `from..from + columns` of rows `top..top + rows`.
    pub(crate) fn part(&self, top: usize, rows: usize, from: usize, columns: usize) -> View<'a> {
        assert!(
            top + rows <= self.rows && from + columns <= self.columns,
            "inside"
        );
        if rows == 0 || columns == 0 {
            return View::new(&[], self.stride, 0, columns);
        }
        View::new(&self.data[top * self.stride + from..], self.stride, rows, columns)
    }
}

/// A writable (rows, columns) rectangle that nobody else can see.
pub(crate) struct ViewMut<'a> {
    at: *mut f32,
    stride: usize,
    rows: usize,
    columns: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `ViewMut` stands for exclusive access to its rectangle of f32, like `&mut [f32]`, which is `Send`.
unsafe impl Send for ViewMut<'_> {}

impl<'a> ViewMut<'a> {
    /// All of `data`, row-major.
    pub(crate) fn new(data: &'a mut [f32], columns: usize) -> Self {
        let rows = data.len().checked_div(columns).unwrap_or(0);
        assert_eq!(rows * columns, data.len(), "whole rows");
        Self {
            at: data.as_mut_ptr(),
            stride: columns,
            rows,
            columns,
            owner: PhantomData,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Row r.
    #[inline(always)]
    pub(crate) fn row(&mut self, r: usize) -> &mut [f32] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: the row lies inside the rectangle, which this value alone may touch; the result borrows it.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(r * self.stride), self.columns) }
    }

    /// Rows `top..top + rows`, columns `from..from + columns`, as long as nobody uses the whole.
    pub(crate) fn part(&mut self, top: usize, rows: usize, from: usize, columns: usize) -> ViewMut<'_> {
        let whole = ViewMut {
            owner: PhantomData,
            ..*self
        };
        let (_, below) = whole.split_rows(top);
        let (band, _) = below.split_rows(rows);
        let (_, right) = band.split_columns(from);
        right.split_columns(columns).0
    }

    /// The first `columns` columns, and the others.
    pub(crate) fn split_columns(self, columns: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(columns <= self.columns, "column {columns} of {}", self.columns);
        let (left, right) = (columns, self.columns - columns);
        let at = if right == 0 {
            self.at
        } else {
            // SAFETY: the first of the remaining columns exists, so the address is inside the matrix.
            unsafe { self.at.add(left) }
        };
        let part = |at, columns| ViewMut { at, columns, ..self };
        (part(self.at, left), part(at, right))
    }

    /// The first `rows` rows, and the others.
    pub(crate) fn split_rows(self, rows: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(rows <= self.rows, "row {rows} of {}", self.rows);
        let (top, bottom) = (rows, self.rows - rows);
        let at = if bottom == 0 {
            self.at
        } else {
            // SAFETY: the first of the remaining rows exists, so the address is inside the matrix.
            unsafe { self.at.add(top * self.stride) }
        };
        let part = |at, rows| ViewMut { at, rows, ..self };
        (part(self.at, top), part(at, bottom))
    }

    /// Runs of `columns` columns, the last one perhaps narrower.
    pub(crate) fn column_tiles(self, columns: usize) -> Vec<ViewMut<'a>> {
        let mut tiles = Vec::with_capacity(self.columns.div_ceil(columns));
        let mut rest = self;
        while rest.columns > columns {
            let (tile, others) = rest.split_columns(columns);
            tiles.push(tile);
            rest = others;
        }
        tiles.push(rest);
        tiles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_the_matrix() {
        let mut data: Vec<f32> = vec![0.0; 5 * 7];
        let (top, bottom) = ViewMut::new(&mut data, 7).split_rows(2);
        let mut seen = 0;
        for (part, half) in [top, bottom].into_iter().enumerate() {
            for (tile, mut view) in half.column_tiles(3).into_iter().enumerate() {
                for r in 0..view.rows() {
                    assert_eq!(view.columns(), [3, 3, 1][tile]);
                    for x in view.row(r) {
                        *x += (100 * part + 10 * tile + r) as f32;
                        seen += 1;
                    }
                }
            }
        }
        assert_eq!(seen, 35);
        let view = View::new(&data, 7, 5, 7);
        assert_eq!(view.row(1), [1.0, 1.0, 1.0, 11.0, 11.0, 11.0, 21.0]);
        assert_eq!(view.part(2, 3, 2, 2).row(2), [102.0, 112.0]);
    }

    #[test]
    #[should_panic(expected = "rows of 4")]
    fn a_view_ends_where_its_data_ends() {
        View::new(&[0.0; 10], 5, 3, 4);
    }
}
