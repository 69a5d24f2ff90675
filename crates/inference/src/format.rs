//! Number formats in which models are served.

use serde::Serialize;
use spec::{Accelerator, Error, NumberFormat, Result, suggest};

/// Format of the weights of layers; embeddings, norms, routers and the output projection stay in 16 bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    Fp16,
    /// 8-bit floating point: products too, where the accelerator has them.
    Fp8,
    /// 8-bit integers, widened to 16 bit before each product.
    Int8,
    /// 4-bit integers in groups, widened to 16 bit before each product (GPTQ, AWQ).
    Int4,
    /// 4-bit floating point in groups: products too, where the accelerator has them.
    Fp4,
}

/// Format of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// 16 bit.
    Bf16,
    /// 8 bit.
    Fp8,
}

/// Elements of a group with a scale of its own in 4-bit formats (GPTQ's and AWQ's usual; arXiv 2210.17323 section 4).
const INT4_GROUP: f64 = 128.0;
/// Bytes of a group's scale and zero point.
const INT4_GROUP_BYTES: f64 = 2.5;
/// Elements that share a scale of one byte in NVFP4.
const FP4_GROUP: f64 = 16.0;

const NAMES: [(&str, Weights); 12] = [
    ("bf16", Weights::Bf16),
    ("fp16", Weights::Fp16),
    ("fp8", Weights::Fp8),
    ("int8", Weights::Int8),
    ("int4", Weights::Int4),
    ("fp4", Weights::Fp4),
    ("bfloat16", Weights::Bf16),
    ("float16", Weights::Fp16),
    ("nvfp4", Weights::Fp4),
    ("mxfp4", Weights::Fp4),
    ("awq", Weights::Int4),
    ("gptq", Weights::Int4),
];

impl Weights {
    /// The format of that name, as people and tables write it: `fp8`, `FP16`, `awq`.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    ///
    /// ```
    /// use inference::format::Weights;
    /// assert_eq!(Weights::parse("FP8")?, Weights::Fp8);
    /// assert!(Weights::parse("fp7").is_err());
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn parse(name: &str) -> Result<Self> {
        let wanted = name.trim().to_lowercase();
        NAMES.iter().find(|n| n.0 == wanted).map(|n| n.1).ok_or_else(|| {
            Error::user(format!("unknown format of weights \"{name}\""))
                .hint(suggest::hint(&wanted, NAMES[..6].iter().map(|n| n.0)))
        })
    }

    /// Bytes of a weight, scales included.
    pub fn bytes(self) -> f64 {
        match self {
            Weights::Bf16 | Weights::Fp16 => 2.0,
            Weights::Fp8 | Weights::Int8 => 1.0,
            Weights::Int4 => 0.5 + INT4_GROUP_BYTES / INT4_GROUP,
            Weights::Fp4 => 0.5 + 1.0 / FP4_GROUP,
        }
    }

    /// The format in which products are computed on this accelerator.
    pub fn products(self, accelerator: &Accelerator) -> NumberFormat {
        let wanted = match self {
            Weights::Fp8 => NumberFormat::Fp8,
            Weights::Fp4 => NumberFormat::Fp4,
            Weights::Fp16 => NumberFormat::Fp16,
            Weights::Bf16 | Weights::Int8 | Weights::Int4 => NumberFormat::Bf16,
        };
        if accelerator.peak(wanted).is_some() { wanted } else { accelerator.sixteen_bit() }
    }

    /// Whether weights are widened before each product on this accelerator.
    pub fn widened(self, accelerator: &Accelerator) -> bool {
        let narrow = !matches!(self, Weights::Bf16 | Weights::Fp16);
        narrow && self.products(accelerator).bytes() >= 2.0
    }
}

impl std::fmt::Display for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(NAMES.iter().find(|n| n.1 == *self).map_or("", |n| n.0))
    }
}

impl Cache {
    /// The format of that name.
    ///
    /// # Errors
    /// An unknown name.
    pub fn parse(name: &str) -> Result<Self> {
        match name.trim().to_lowercase().as_str() {
            "bf16" | "fp16" | "16" => Ok(Cache::Bf16),
            "fp8" | "int8" | "8" => Ok(Cache::Fp8),
            _ => Err(Error::user(format!("unknown format of cached keys and values \"{name}\""))
                .hint("known: bf16, fp8")),
        }
    }

    /// Bytes of an element.
    pub fn bytes(self) -> f64 {
        match self {
            Cache::Bf16 => 2.0,
            Cache::Fp8 => 1.0,
        }
    }
}

impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Cache::Bf16 => "bf16",
            Cache::Fp8 => "fp8",
        })
    }
}
