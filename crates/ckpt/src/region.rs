use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A part of a tensor.
///
/// Boxes see a tensor as a matrix: `shape[0]` rows by the product of the other dims; a vector has one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Region {
    /// A run of the flattened row-major tensor.
    Range {
        /// First element.
        start: usize,
        /// Elements.
        len: usize,
    },
    /// A rectangle of the matrix.
    Box {
        /// First row.
        row0: usize,
        /// Rows.
        rows: usize,
        /// First column.
        col0: usize,
        /// Columns.
        cols: usize,
    },
}

impl Region {
    /// A run of the flattened tensor.
    pub fn range(start: usize, len: usize) -> Self {
        Region::Range { start, len }
    }

    /// A rectangle of the tensor seen as a matrix.
    pub fn rect(row0: usize, rows: usize, col0: usize, cols: usize) -> Self {
        Region::Box { row0, rows, col0, cols }
    }

    /// All of a tensor of this shape.
    pub fn whole(shape: &[usize]) -> Self {
        Region::range(0, shape.iter().product())
    }

    /// Elements inside. Saturates, so that a nonsense region from a damaged file is out of bounds and not a panic.
    pub fn len(&self) -> usize {
        match *self {
            Region::Range { len, .. } => len,
            Region::Box { rows, cols, .. } => rows.saturating_mul(cols),
        }
    }

    /// Whether nothing is inside.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The regions of a matrix with `matrix_cols` columns that hold elements `start..start + len` of a box of it, in
    /// order.
    ///
    /// This is what a rank owns when it shards the flattened local part of a tensor (ZeRO over tensor parallelism).
    ///
    /// ```
    /// use ckpt::Region;
    /// // Of a 4-column matrix a rank holds columns 2..4 of rows 0..3, and owns elements 1..5 of those six.
    /// let owned = Region::of_local_range(4, (0, 3, 2, 2), 1, 4);
    /// assert_eq!(owned, [Region::rect(0, 1, 3, 1), Region::rect(1, 1, 2, 2), Region::rect(2, 1, 2, 1)]);
    /// ```
    pub fn of_local_range(
        matrix_cols: usize,
        (row0, rows, col0, cols): (usize, usize, usize, usize),
        start: usize,
        len: usize,
    ) -> Vec<Region> {
        debug_assert!(start + len <= rows * cols, "the range ends inside the box");
        if col0 == 0 && cols == matrix_cols {
            let start = row0 * matrix_cols + start;
            return if len == 0 { Vec::new() } else { vec![Region::range(start, len)] };
        }
        split_range(start, len, cols)
            .into_iter()
            .map(|(r, n, c, w)| Region::rect(row0 + r, n, col0 + c, w))
            .collect()
    }

    /// Whether it lies inside a `rows` by `cols` matrix.
    pub(crate) fn fits(&self, rows: usize, cols: usize) -> bool {
        let within = |first: usize, count: usize, total: usize| {
            first.checked_add(count).is_some_and(|end| end <= total)
        };
        match *self {
            Region::Range { start, len } => within(start, len, rows * cols),
            Region::Box { row0, rows: r, col0, cols: c } => within(row0, r, rows) && within(col0, c, cols),
        }
    }

    /// The region as at most three rectangles of a matrix with `matrix_cols` columns. Empty ones are left out.
    pub(crate) fn rects(&self, matrix_cols: usize) -> Vec<Rect> {
        match *self {
            Region::Range { start, len } => split_range(start, len, matrix_cols)
                .into_iter()
                .map(|(row0, rows, col0, cols)| {
                    let base = row0 * matrix_cols + col0 - start;
                    Rect { row0, rows, col0, cols, base, stride: matrix_cols }
                })
                .collect(),
            Region::Box { rows, cols, .. } if rows == 0 || cols == 0 => Vec::new(),
            Region::Box { row0, rows, col0, cols } => {
                vec![Rect { row0, rows, col0, cols, base: 0, stride: cols }]
            }
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Region::Range { start, len } => write!(f, "elements {start}..{}", start.saturating_add(len)),
            Region::Box { row0, rows, col0, cols } => write!(
                f,
                "rows {row0}..{} of columns {col0}..{}",
                row0.saturating_add(rows),
                col0.saturating_add(cols)
            ),
        }
    }
}

/// Elements `start..start + len` of a row-major matrix as (row0, rows, col0, cols): the tail of a row, whole rows, the
/// head of a row.
fn split_range(start: usize, len: usize, cols: usize) -> Vec<(usize, usize, usize, usize)> {
    let mut parts = Vec::with_capacity(3);
    let (mut at, end) = (start, start + len);
    while at < end {
        let (row, col) = (at / cols, at % cols);
        let whole_rows = (end - at) / cols;
        if col == 0 && whole_rows > 0 {
            parts.push((row, whole_rows, 0, cols));
            at += whole_rows * cols;
        } else {
            let width = (cols - col).min(end - at);
            parts.push((row, 1, col, width));
            at += width;
        }
    }
    parts
}

/// A rectangle, and where its elements lie in the data of the region that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rect {
    pub(crate) row0: usize,
    pub(crate) rows: usize,
    pub(crate) col0: usize,
    pub(crate) cols: usize,
    /// Offset of the first element in the region's data.
    base: usize,
    /// Elements from one row to the next in the region's data.
    stride: usize,
}

impl Rect {
    fn row_end(&self) -> usize {
        self.row0 + self.rows
    }

    fn col_end(&self) -> usize {
        self.col0 + self.cols
    }

    fn at(&self, row: usize, col: usize) -> usize {
        self.base + (row - self.row0) * self.stride + (col - self.col0)
    }
}

/// One contiguous copy between the data of two regions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First element in the data of the region that is copied from.
    pub from: usize,
    /// First element in the data of the region that is copied to.
    pub to: usize,
    /// Elements.
    pub len: usize,
}

/// Calls `copy` for every contiguous run that `from` and `to` have in common; rows that follow each other in both
/// are one run. `matrix_cols` are the columns of the tensor seen as a matrix.
///
/// # Errors
/// Those of `copy`.
pub fn for_each_copy<E>(
    from: &Region,
    to: &Region,
    matrix_cols: usize,
    mut copy: impl FnMut(Run) -> Result<(), E>,
) -> Result<(), E> {
    let targets = to.rects(matrix_cols);
    for a in from.rects(matrix_cols) {
        for b in &targets {
            let (row0, row_end) = (a.row0.max(b.row0), a.row_end().min(b.row_end()));
            let (col0, col_end) = (a.col0.max(b.col0), a.col_end().min(b.col_end()));
            if row0 >= row_end || col0 >= col_end {
                continue;
            }
            let (rows, cols) = (row_end - row0, col_end - col0);
            let (from, to) = (a.at(row0, col0), b.at(row0, col0));
            if a.stride == cols && b.stride == cols {
                copy(Run { from, to, len: rows * cols })?;
                continue;
            }
            for r in 0..rows {
                copy(Run { from: from + r * a.stride, to: to + r * b.stride, len: cols })?;
            }
        }
    }
    Ok(())
}

/// How a set of regions fails to write every element of a matrix exactly once.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gap {
    /// Region `.0` reaches outside.
    Outside(usize),
    /// Regions `.0` and `.1` overlap.
    Twice(usize, usize),
    /// This many elements are in no region.
    Missing(usize),
}

/// Checks that `regions` cover a `rows` by `cols` matrix exactly once, in O(n log n).
pub(crate) fn check_cover(rows: usize, cols: usize, regions: &[Region]) -> Result<(), Gap> {
    if let Some(i) = regions.iter().position(|r| !r.fits(rows, cols)) {
        return Err(Gap::Outside(i));
    }
    let mut rects: Vec<(Rect, usize)> = Vec::with_capacity(regions.len());
    for (i, region) in regions.iter().enumerate() {
        rects.extend(region.rects(cols).into_iter().map(|rect| (rect, i)));
    }
    // Sweep down the rows; `open` holds the rectangles of the current row by first column. Ends come before starts.
    let mut events: Vec<(usize, bool, usize)> = Vec::with_capacity(2 * rects.len());
    for (k, (rect, _)) in rects.iter().enumerate() {
        events.push((rect.row0, true, k));
        events.push((rect.row_end(), false, k));
    }
    events.sort_unstable();
    let mut open: BTreeMap<usize, usize> = BTreeMap::new();
    for (_, starts, k) in events {
        let (rect, owner) = rects[k];
        if !starts {
            open.remove(&rect.col0);
            continue;
        }
        let before = open.range(..=rect.col0).next_back();
        let after = open.range(rect.col0..rect.col_end()).next();
        let clash = before.filter(|(_, o)| rects[**o].0.col_end() > rect.col0).or(after);
        if let Some((_, other)) = clash {
            let other = rects[*other].1;
            return Err(Gap::Twice(other.min(owner), other.max(owner)));
        }
        open.insert(rect.col0, k);
    }
    let covered: usize = rects.iter().map(|(r, _)| r.rows * r.cols).sum();
    if covered < rows * cols {
        return Err(Gap::Missing(rows * cols - covered));
    }
    Ok(())
}

/// A tensor as a matrix: (rows, columns). `None` when the number of elements overflows.
pub(crate) fn matrix(shape: &[usize]) -> Option<(usize, usize)> {
    let product = |dims: &[usize]| dims.iter().try_fold(1usize, |a, d| a.checked_mul(*d));
    let (rows, cols) = match shape {
        [] => (1, 1),
        [n] => (1, *n),
        [rows, rest @ ..] => (*rows, product(rest)?),
    };
    rows.checked_mul(cols)?.checked_mul(size_of::<f32>())?;
    Some((rows, cols))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn region(rows: usize, cols: usize) -> impl Strategy<Value = Region> {
        let n = rows * cols;
        prop_oneof![
            (0..=n, 0..=n).prop_map(move |(a, b)| Region::range(a.min(b), a.max(b) - a.min(b))),
            (0..=rows, 0..=rows, 0..=cols, 0..=cols).prop_map(|(a, b, c, d)| {
                Region::rect(a.min(b), a.max(b) - a.min(b), c.min(d), c.max(d) - c.min(d))
            }),
        ]
    }

    /// Flat indices of a region's elements, in the order of its data.
    fn elements(region: &Region, cols: usize) -> Vec<usize> {
        match *region {
            Region::Range { start, len } => (start..start + len).collect(),
            Region::Box { row0, rows, col0, cols: w } => {
                (row0..row0 + rows).flat_map(|r| (col0..col0 + w).map(move |c| r * cols + c)).collect()
            }
        }
    }

    fn matrix_and<const N: usize>() -> impl Strategy<Value = (usize, usize, [Region; N])> {
        (1usize..7, 1usize..7).prop_flat_map(|(r, c)| {
            (Just(r), Just(c), proptest::collection::vec(region(r, c), N))
                .prop_map(|(r, c, v)| (r, c, <[Region; N]>::try_from(v).expect("N regions")))
        })
    }

    proptest! {
        #[test]
        fn copies_move_exactly_the_common_elements((_, cols, [from, to]) in matrix_and::<2>()) {
            let (source, target) = (elements(&from, cols), elements(&to, cols));
            let mut moved = vec![None; target.len()];
            for_each_copy(&from, &to, cols, |c| {
                for i in 0..c.len {
                    assert_eq!(moved[c.to + i].replace(source[c.from + i]), None, "written once");
                }
                Ok::<(), ()>(())
            }).unwrap();
            for (element, got) in target.iter().zip(moved) {
                prop_assert_eq!(got, source.contains(element).then_some(*element));
            }
        }

        #[test]
        fn cover_agrees_with_counting((rows, cols, regions) in matrix_and::<3>()) {
            let mut count = vec![0; rows * cols];
            for e in regions.iter().flat_map(|r| elements(r, cols)) {
                count[e] += 1;
            }
            let missing = count.iter().filter(|c| **c == 0).count();
            match check_cover(rows, cols, &regions) {
                Ok(()) => prop_assert!(count.iter().all(|c| *c == 1)),
                Err(Gap::Missing(n)) => prop_assert_eq!(n, missing),
                Err(Gap::Twice(a, b)) => {
                    let (a, b) = (elements(&regions[a], cols), elements(&regions[b], cols));
                    prop_assert!(a.iter().any(|e| b.contains(e)));
                }
                Err(Gap::Outside(_)) => prop_assert!(false, "all regions are inside"),
            }
        }

        #[test]
        fn local_ranges_cover_their_box((rows, cols, [b]) in matrix_and::<1>(), cuts in proptest::collection::vec(0usize..50, 0..4)) {
            let Region::Box { row0, rows: r, col0, cols: c } = b else { return Ok(()) };
            let mut cuts: Vec<usize> = cuts.into_iter().map(|x| x.min(r * c)).chain([0, r * c]).collect();
            cuts.sort_unstable();
            let got: Vec<usize> = cuts
                .windows(2)
                .flat_map(|w| Region::of_local_range(cols, (row0, r, col0, c), w[0], w[1] - w[0]))
                .inspect(|part| assert!(part.fits(rows, cols)))
                .flat_map(|part| elements(&part, cols))
                .collect();
            prop_assert_eq!(got, elements(&b, cols));
        }
    }

    #[test]
    fn nonsense_is_outside() {
        for region in
            [Region::range(usize::MAX, 2), Region::rect(1, usize::MAX, 0, 1), Region::rect(0, 3, 0, 1)]
        {
            assert_eq!(check_cover(2, 2, &[region]), Err(Gap::Outside(0)));
        }
        assert_eq!(matrix(&[usize::MAX, 2]), None);
        assert_eq!(matrix(&[4]), Some((1, 4)));
        assert_eq!(matrix(&[2, 3, 4]), Some((2, 12)));
    }
}
