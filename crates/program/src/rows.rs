use std::fmt;

use serde::{Serialize, Serializer};

/// A function of rows that a program brings along, with its derivative: each row of `y` depends on the same row of `x`
/// alone, so that no layout changes a bit of it.
///
/// Where tp cuts a row, each rank gives it the columns that it holds: it should then treat columns alike.
#[derive(Clone, Copy)]
pub struct RowFn {
    /// Tells it from others; shown in plans and timelines.
    pub name: &'static str,
    /// `(x [in], y [out])`: writes all of `y`.
    pub forward: fn(&[f32], &mut [f32]),
    /// `(dy [out], x [in], dx [in])`: writes all of `dx`, the gradient of `x` where `dy` is that of `y`.
    pub backward: fn(&[f32], &[f32], &mut [f32]),
}

impl PartialEq for RowFn {
    fn eq(&self, other: &RowFn) -> bool {
        self.name == other.name
    }
}

impl fmt::Debug for RowFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Serialize for RowFn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}
