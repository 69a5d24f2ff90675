use serde::{Deserialize, Serialize};

/// The element type of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// Token ids and targets.
    U32,
    /// IEEE binary64, for sums that must not lose bits.
    F64,
}

impl DType {
    /// Bytes of one element.
    ///
    /// ```
    /// use spec::DType;
    /// assert_eq!([DType::F32, DType::Bf16, DType::U32, DType::F64].map(DType::bytes), [4, 2, 4, 8]);
    /// ```
    pub const fn bytes(self) -> usize {
        match self {
            DType::Bf16 => 2,
            DType::F32 | DType::U32 => 4,
            DType::F64 => 8,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
            DType::F64 => "f64",
        })
    }
}
