//! What lies in an accelerator's memory, and how many requests fit beside the weights.

use serde::Serialize;
use spec::{Accelerator, Error, Result};

use crate::ops::Kernel;
use crate::pass::Engine;

/// Bytes of each accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// What the stack may take.
    pub room_bytes: f64,
    /// Weights.
    pub weights_bytes: f64,
    /// Activations of the largest pass.
    pub working_bytes: f64,
    /// Cache of one token.
    pub cache_token_bytes: f64,
    /// Cache of one request at its end.
    pub cache_request_bytes: f64,
    /// Requests that fit at once.
    pub requests_max: usize,
}

/// More requests than any server runs.
const REQUESTS_MAX: f64 = 1e6;
/// Bytes of an activation and of weights that stay in 16 bit.
const WIDE_BYTES: f64 = 2.0;

impl Memory {
    /// The memory of `engine` for requests of `input + output` tokens; `tied` where the output projection is the
    /// embedding table.
    ///
    /// # Errors
    /// If the weights do not fit, or no request does beside them.
    pub fn of(
        engine: &Engine,
        accelerator: &Accelerator,
        tied: bool,
        input: f64,
        output: f64,
    ) -> Result<Self> {
        let stack = &engine.stack;
        let (layers, head) = engine.forward.weights();
        let table = if tied { 0.0 } else { engine.forward.table };
        let weights_bytes = layers * engine.weights.bytes() + (head + table) * WIDE_BYTES;
        let widest = engine.forward.parts().flat_map(|p| &p.kernels).fold(0.0f64, |w, k| match *k {
            Kernel::Product { n, k, rows, head: false, .. } => w.max(rows * (n + k)),
            _ => w,
        });
        let working_bytes = widest * WIDE_BYTES * input.min(stack.prompt_tokens_max);
        let cache_token_bytes = engine.forward.cache_elements * engine.cache.bytes();
        let cache_request_bytes = cache_token_bytes * (input + output);
        let room_bytes = accelerator.memory_bytes.value * stack.memory_used;
        let left = room_bytes - weights_bytes - working_bytes;
        let requests_max = (left / cache_request_bytes).floor().clamp(0.0, REQUESTS_MAX) as usize;
        let memory = Memory {
            room_bytes,
            weights_bytes,
            working_bytes,
            cache_token_bytes,
            cache_request_bytes,
            requests_max,
        };
        if requests_max > 0 {
            return Ok(memory);
        }
        let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
        let what = format!(
            "--tp {}: {} of weights, {} of working space and {} of cache for one request of {} tokens do not fit into {} of each {}",
            engine.tp,
            gb(weights_bytes),
            gb(working_bytes),
            gb(cache_request_bytes),
            input + output,
            gb(room_bytes),
            accelerator.name
        );
        Err(Error::user(what).hint("raise --tp, quantise with --weights fp8 or int4, or shorten the request"))
    }
}
