//! Constants that turn a roofline into what stacks reach: a handful for each accelerator family, numeric recipe and
//! software generation.

use serde::{Deserialize, Serialize};

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
}

impl Constants {
    /// Names of the constants, in the order of [`Constants::get`].
    pub const NAMES: [&'static str; 6] = ["gemm", "attention", "stream", "network", "host_s", "step_s"];

    /// All constants in order.
    pub fn get(&self) -> [f64; 6] {
        [self.gemm, self.attention, self.stream, self.network, self.host_s, self.step_s]
    }

    /// Constants from their values in order.
    pub fn from_values(v: [f64; 6]) -> Self {
        Constants { gemm: v[0], attention: v[1], stream: v[2], network: v[3], host_s: v[4], step_s: v[5] }
    }
}

/// What is assumed where nothing was fitted: mid-range figures of well-kept stacks.
pub const PRIOR: Constants =
    Constants { gemm: 0.88, attention: 0.45, stream: 0.6, network: 0.8, host_s: 6e-6, step_s: 0.02 };
