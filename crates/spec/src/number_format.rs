/// Number formats that arithmetic peaks are stated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NumberFormat {
    /// IEEE binary32.
    Fp32,
    /// TensorFloat-32.
    Tf32,
    /// IEEE binary16.
    Fp16,
    /// bfloat16.
    Bf16,
    /// 8-bit floating point.
    Fp8,
    /// 4-bit floating point.
    Fp4,
    /// 8-bit integers.
    Int8,
}

impl NumberFormat {
    pub(crate) const ALL: [(NumberFormat, &'static str); 7] = [
        (NumberFormat::Fp32, "fp32"),
        (NumberFormat::Tf32, "tf32"),
        (NumberFormat::Fp16, "fp16"),
        (NumberFormat::Bf16, "bf16"),
        (NumberFormat::Fp8, "fp8"),
        (NumberFormat::Fp4, "fp4"),
        (NumberFormat::Int8, "int8"),
    ];

    /// All formats.
    pub fn all() -> impl Iterator<Item = NumberFormat> {
        NumberFormat::ALL.iter().map(|p| p.0)
    }

    /// The key in catalogue files.
    pub fn name(self) -> &'static str {
        NumberFormat::ALL[self as usize].1
    }

    /// The precision of that name.
    pub fn parse(name: &str) -> Option<Self> {
        NumberFormat::ALL.iter().find(|p| p.1 == name).map(|p| p.0)
    }

    /// Bytes of one element.
    pub fn bytes(self) -> f64 {
        match self {
            NumberFormat::Fp32 | NumberFormat::Tf32 => 4.0,
            NumberFormat::Fp16 | NumberFormat::Bf16 => 2.0,
            NumberFormat::Fp8 | NumberFormat::Int8 => 1.0,
            NumberFormat::Fp4 => 0.5,
        }
    }
}

impl std::fmt::Display for NumberFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
