//! Requests that share passes: a closed loop of clients, each sending its next request when its last one ends.
//!
//! The server is never idle, so what it does between two requests of a client is the cycle: each other request's prefill
//! and a pass for each token of one's own. Requests of one length that began together stay together: prompts come in
//! groups as large as a pass takes.

use serde::Serialize;

use crate::memory::Memory;
use crate::pass::{Batch, Engine, PassTime};
use crate::stack::Batching;

/// Tokens of each request.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Traffic {
    /// Of the prompt.
    pub input: usize,
    /// Generated.
    pub output: usize,
}

/// What clients see of one replica, on average.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    /// Clients.
    pub concurrency: usize,
    /// Requests that run at once; others wait.
    pub running: usize,
    /// Time to the first token.
    pub ttft_s: f64,
    /// Of that, in the queue since memory holds no more.
    pub queue_s: f64,
    /// Time between tokens after the first.
    pub itl_s: f64,
    /// Start to end.
    pub latency_s: f64,
    /// Tokens generated per second, all clients together.
    pub tokens_per_s: f64,
    /// Requests per second.
    pub requests_per_s: f64,
    /// A pass that decodes, at half of the output.
    pub decode: PassTime,
}

/// One replica under `concurrency` clients.
pub fn point(engine: &Engine, memory: &Memory, traffic: Traffic, concurrency: usize) -> Point {
    let stack = &engine.stack;
    let running = concurrency.min(memory.requests_max).min(stack.requests_max as usize).max(1);
    let (n, input, output) = (running as f64, traffic.input as f64, traffic.output as f64);
    // The first token comes with the prompt; on average half of the others are behind it.
    let cached = input + output / 2.0;
    let decode = engine.time(&Batch::decode(n, cached));
    let decode_s = decode.total_s();
    let steps = output - 1.0;
    let group = match stack.batching {
        Batching::Static => n,
        _ => (stack.prompt_tokens_max / input).floor().clamp(1.0, n),
    };
    let groups = n / group;
    let alone_s = prefill_s(engine, group, input, 0.0, cached);
    let cycle = if groups > 1.0 {
        let others = n - group;
        let (beside_s, own_s) = match stack.batching {
            Batching::Mixed => (prefill_s(engine, group, input, others, cached), decode_s),
            _ => (alone_s, 0.0),
        };
        cycle(groups, beside_s, own_s, decode_s, steps)
    } else {
        Cycle { first_s: alone_s, whole_s: alone_s + steps * decode_s }
    };
    let request_s = stack.request_ms * 1e-3;
    // Little's law: as many requests end in a cycle as run.
    let whole_s = cycle.whole_s + request_s;
    let queue_s = (concurrency - running) as f64 / n * whole_s;
    let ttft_s = cycle.first_s + request_s + queue_s;
    let latency_s = whole_s + queue_s;
    Point {
        concurrency,
        running,
        ttft_s,
        queue_s,
        itl_s: if steps > 0.0 { (latency_s - ttft_s) / steps } else { 0.0 },
        latency_s,
        tokens_per_s: n * output / whole_s,
        requests_per_s: n / whole_s,
        decode,
    }
}

struct Cycle {
    /// From a request's start to its first token.
    first_s: f64,
    /// To its end.
    whole_s: f64,
}

/// Several groups of prompts in turn, each of which adds `prefill_s` to what the server does; others decode for `own_s`
/// in the pass of a request's own prompt.
fn cycle(groups: f64, prefill_s: f64, own_s: f64, decode_s: f64, steps: f64) -> Cycle {
    // A request arrives in the middle of a pass.
    let rest_s = decode_s / 2.0;
    let whole_s = groups * prefill_s + steps * decode_s + own_s + rest_s;
    // Other groups come at any time, one at a time: a queue with constant service (Pollaczek-Khinchine), which no more
    // wait in than there are.
    let busy = ((groups - 1.0) * prefill_s / whole_s).min(1.0);
    let wait_s = busy * prefill_s / (2.0 * (1.0 - busy)).max(f64::MIN_POSITIVE);
    let wait_s = wait_s.min((groups - 1.0) * prefill_s);
    // Where nothing follows the first token its end is the request's.
    let first_s = if steps > 0.0 { rest_s + wait_s + prefill_s + own_s } else { whole_s };
    Cycle { first_s, whole_s }
}

/// What `group` prompts add to a server where `others` decode, in as many passes as their tokens take.
fn prefill_s(engine: &Engine, group: f64, input: f64, others: f64, cached: f64) -> f64 {
    let tokens = group * input;
    let passes = (tokens / engine.stack.prompt_tokens_max).ceil().max(1.0);
    let whole = Batch::prefill(group, input);
    // All but the last pass sample nothing for these prompts; what they attend to adds up to the same.
    let batch =
        Batch { prompt_tokens: tokens / passes, prompts: group / passes, decoding: others, cached, ..whole };
    let pass_s = engine.time(&batch).total_s();
    let decode_s = if others > 0.0 { engine.time(&Batch::decode(others, cached)).total_s() } else { 0.0 };
    passes * (pass_s - decode_s)
}
