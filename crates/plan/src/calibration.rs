//! Constants that turn a roofline into what stacks reach: a handful for each accelerator family, numeric recipe and
//! software generation.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Number of constants.
const COUNT: usize = 7;

/// What a stack makes of the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constants {
    /// Matrix products, as a share of the best measured rate of large ones.
    pub gemm: f64,
    /// Fused attention forward, as a share of the 16-bit peak, FLOPs at the causal half.
    pub attention: f64,
    /// Streaming kernels, as a share of the memory throughput for the program's bytes: below one where a stack runs
    /// several kernels for what the program fuses.
    pub stream: f64,
    /// Collectives, as a share of the rate that they reach alone.
    pub network: f64,
    /// Time of the host for each op of the program, in seconds, where kernels are launched one by one.
    pub host_s: f64,
    /// Once a step: data, norms, synchronisation, in seconds.
    pub step_s: f64,
    /// Grouped products of experts, as a share of the rate of dense ones.
    pub experts: f64,
}

impl Constants {
    /// Names of the constants, in the order of [`Constants::get`].
    pub const NAMES: [&'static str; COUNT] =
        ["gemm", "attention", "stream", "network", "host_s", "step_s", "experts"];

    /// All constants in order.
    pub fn get(&self) -> [f64; COUNT] {
        [self.gemm, self.attention, self.stream, self.network, self.host_s, self.step_s, self.experts]
    }

    /// Constants from their values in order.
    pub fn from_values(v: [f64; COUNT]) -> Self {
        Constants { gemm: v[0], attention: v[1], stream: v[2], network: v[3], host_s: v[4], step_s: v[5], experts: v[6] }
    }
}

/// What is assumed where nothing was fitted: mid-range figures of well-kept stacks.
pub const PRIOR: Constants =
    Constants { gemm: 0.88, attention: 0.45, stream: 0.6, network: 0.8, host_s: 6e-6, step_s: 0.02, experts: 0.75 };

/// Bounds of each constant: outside of them it would not mean what its name says.
const BOUNDS: [(f64, f64); COUNT] =
    [(0.3, 1.1), (0.05, 0.9), (0.1, 1.2), (0.1, 1.2), (1e-7, 5e-5), (1e-4, 0.3), (0.15, 1.1)];

/// What a factor belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// An accelerator family.
    Family(String),
    /// A numeric recipe.
    Recipe(String),
    /// A software generation.
    Software(String),
}

/// Logarithms of factors on the prior, by family, recipe and software generation; what is absent is one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// By accelerator family.
    pub family: BTreeMap<String, [f64; COUNT]>,
    /// By numeric recipe.
    pub recipe: BTreeMap<String, [f64; COUNT]>,
    /// By software generation.
    pub software: BTreeMap<String, [f64; COUNT]>,
}

impl Calibration {
    /// The constants for a combination.
    pub fn constants(&self, family: &str, recipe: &str, software: &str) -> Constants {
        let mut v = PRIOR.get();
        for factors in [self.family.get(family), self.recipe.get(recipe), self.software.get(software)]
            .into_iter()
            .flatten()
        {
            for (x, f) in v.iter_mut().zip(factors) {
                *x *= f.exp();
            }
        }
        for (x, (low, high)) in v.iter_mut().zip(BOUNDS) {
            *x = x.clamp(low, high);
        }
        Constants::from_values(v)
    }

    fn slot(&mut self, effect: &Effect) -> &mut [f64; COUNT] {
        match effect {
            Effect::Family(name) => self.family.entry(name.clone()).or_default(),
            Effect::Recipe(name) => self.recipe.entry(name.clone()).or_default(),
            Effect::Software(name) => self.software.entry(name.clone()).or_default(),
        }
    }

    /// Adds to the logarithm of one factor.
    pub fn nudge(&mut self, effect: &Effect, constant: usize, by: f64) {
        self.slot(effect)[constant] += by;
    }

    /// The logarithm of one factor.
    pub fn factor(&self, effect: &Effect, constant: usize) -> f64 {
        let found = match effect {
            Effect::Family(name) => self.family.get(name),
            Effect::Recipe(name) => self.recipe.get(name),
            Effect::Software(name) => self.software.get(name),
        };
        found.map_or(0.0, |f| f[constant])
    }

    /// Keeps each factor within e to the plus or minus two.
    pub fn clamp(&mut self) {
        for table in [&mut self.family, &mut self.recipe, &mut self.software] {
            for factors in table.values_mut() {
                for f in factors {
                    *f = f.clamp(-2.0, 2.0);
                }
            }
        }
    }
}
