//! The answer to a question: a curve over concurrency with its knee, memory, price, and what was assumed.

use plan::shape::Shape;
use serde::Serialize;
use spec::{Cluster, Error, Result};

use crate::format::{Cache, Weights};
use crate::memory::Memory;
use crate::pass::{Engine, PassTime};
use crate::serve::{Point, Traffic, point};
use crate::stack::Stack;

/// What is served, where, and how.
#[derive(Clone, Debug)]
pub struct Question {
    /// The model.
    pub shape: Shape,
    /// The machine: all of its accelerators serve, as replicas of `tp`.
    pub cluster: Cluster,
    /// Tensor-parallel accelerators of a replica.
    pub tp: usize,
    /// Format of weights.
    pub weights: Weights,
    /// Format of the cache; the stack's usual one if absent.
    pub cache: Option<Cache>,
    /// The serving stack.
    pub stack: Stack,
    /// Tokens of each request.
    pub traffic: Traffic,
    /// Clients, over all replicas.
    pub concurrency: Vec<usize>,
    /// Requests that do not fit wait; otherwise they are refused.
    pub queue: bool,
    /// What an accelerator costs.
    pub price: Option<Price>,
}

/// What an accelerator costs an hour.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Price {
    /// US dollars.
    pub usd_per_accelerator_hour: f64,
    /// Where the figure is from, and of when.
    pub source: String,
}

/// One concurrency over all replicas.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Load {
    /// Clients.
    pub concurrency: usize,
    /// The fullest replica.
    pub replica: Point,
    /// Time to the first token in milliseconds, on the fullest replica.
    pub ttft_ms: f64,
    /// Time between tokens in milliseconds, on the fullest replica.
    pub itl_ms: f64,
    /// Start to end in seconds, on the fullest replica.
    pub latency_s: f64,
    /// Tokens generated per second on all replicas.
    pub tokens_per_s: f64,
    /// The same for each accelerator.
    pub tokens_per_s_per_accelerator: f64,
    /// US dollars for a million generated tokens, prompts included in the price.
    pub usd_per_million_tokens: Option<f64>,
    /// What a decoding pass spends most on.
    pub bound: &'static str,
}

/// The answer.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// The model's name.
    pub model: String,
    /// All parameters.
    pub params: f64,
    /// Accelerators.
    pub accelerator: String,
    /// How many serve.
    pub accelerators: usize,
    /// Tensor-parallel accelerators of a replica.
    pub tp: usize,
    /// Replicas.
    pub replicas: usize,
    /// Format of weights.
    pub weights: Weights,
    /// Format of the cache.
    pub cache: Cache,
    /// The serving stack's name.
    pub stack: String,
    /// Tokens of each request.
    pub traffic: Traffic,
    /// Memory of each accelerator.
    pub memory: Memory,
    /// Requests that fit at once on all replicas.
    pub requests_max: usize,
    /// One request alone: its prompt's pass.
    pub prefill: PassTime,
    /// What was asked for.
    pub loads: Vec<Load>,
    /// From one client to as many as fit.
    pub curve: Vec<Load>,
    /// The concurrency with the most throughput for its latency (Kleinrock's power).
    pub knee: usize,
    /// The price, if one is known.
    pub price: Option<Price>,
    /// What was assumed.
    pub assumptions: Vec<String>,
}

/// Seconds of an hour.
const HOUR_S: f64 = 3600.0;
/// More clients than any server has.
const CONCURRENCY_MAX: usize = 1_000_000;
/// Longer requests than any model takes.
const TOKENS_MAX: usize = 1 << 24;
/// Dollars an hour beyond any accelerator's.
const PRICE_MAX: f64 = 1e6;

/// Answers a question.
///
/// # Errors
/// If the model cannot be cut or does not fit, numbers make no sense, or more requests are asked for than fit.
pub fn answer(question: &Question) -> Result<Answer> {
    let q = question;
    check(q)?;
    let cache = q.cache.unwrap_or(usual_cache(q.weights, &q.stack));
    let engine = Engine::new(&q.shape, &q.cluster, q.tp, q.weights, cache, &q.stack)?;
    let accelerator = &q.cluster.accelerator;
    let (input, output) = (q.traffic.input as f64, q.traffic.output as f64);
    let memory = Memory::of(&engine, accelerator, q.shape.tied_embeddings, input, output)?;
    let replicas = q.cluster.accelerators / q.tp;
    let fit = memory.requests_max.min(q.stack.requests_max as usize);
    if let Some(most) = q.concurrency.iter().find(|c| c.div_ceil(replicas) > fit)
        && !q.queue
    {
        return Err(refused(q, &memory, *most, fit * replicas));
    }
    let load = |concurrency| load(&engine, &memory, q, concurrency, replicas);
    let curve: Vec<Load> = steps(fit * replicas).into_iter().map(load).collect();
    let power = |l: &Load| l.tokens_per_s / l.latency_s;
    let knee = curve.iter().max_by(|a, b| power(a).total_cmp(&power(b))).map_or(1, |l| l.concurrency);
    let prefill = engine.time(&crate::pass::Batch::prefill(1.0, input));
    Ok(Answer {
        model: q.shape.model.name.clone(),
        params: q.shape.params(),
        accelerator: accelerator.name.clone(),
        accelerators: replicas * q.tp,
        tp: q.tp,
        replicas,
        weights: q.weights,
        cache,
        stack: q.stack.name.clone(),
        traffic: q.traffic,
        memory,
        requests_max: fit * replicas,
        prefill,
        loads: q.concurrency.iter().map(|c| load(*c)).collect(),
        curve,
        knee,
        price: q.price.clone(),
        assumptions: assumptions(q, &engine),
    })
}

/// The cache's format where nobody says: 8 bit if weights are and the stack does so, else 16.
pub fn usual_cache(weights: Weights, stack: &Stack) -> Cache {
    match weights {
        Weights::Fp8 | Weights::Fp4 if stack.narrow_cache => Cache::Fp8,
        _ => Cache::Bf16,
    }
}

fn check(q: &Question) -> Result<()> {
    let within = |name: &str, n: usize, max: usize| {
        if (1..=max).contains(&n) {
            return Ok(());
        }
        Err(Error::user(format!("{name} {n}, expected 1 to {max}"))
            .hint(format!("give {name} a number in that range")))
    };
    within("--input", q.traffic.input, TOKENS_MAX)?;
    within("--output", q.traffic.output, TOKENS_MAX)?;
    within("--tp", q.tp, q.cluster.accelerators)?;
    for c in &q.concurrency {
        within("--concurrency", *c, CONCURRENCY_MAX)?;
    }
    if !q.cluster.accelerators.is_multiple_of(q.tp) {
        let what = format!("--tp {} does not divide {} accelerators", q.tp, q.cluster.accelerators);
        return Err(Error::user(what).hint("a replica takes --tp accelerators: give a multiple"));
    }
    if !q.shape.heads.is_multiple_of(q.tp) {
        let what = format!("--tp {} for the {} heads of {}", q.tp, q.shape.heads, q.shape.model.name);
        return Err(Error::user(what)
            .hint("ranks share the heads equally: take a divisor of their number, add replicas instead"));
    }
    let longest = q.shape.max_positions();
    if q.traffic.input + q.traffic.output > longest {
        let what = format!(
            "requests of {} + {} tokens, {} takes {longest}",
            q.traffic.input, q.traffic.output, q.shape.model.name
        );
        return Err(Error::user(what).hint("shorten --input or --output"));
    }
    match &q.price {
        Some(p) if !(p.usd_per_accelerator_hour > 0.0 && p.usd_per_accelerator_hour <= PRICE_MAX) => {
            let what = format!(
                "--price {}, expected dollars above 0, up to {PRICE_MAX}",
                p.usd_per_accelerator_hour
            );
            Err(Error::user(what).hint("give US dollars for one accelerator and hour, as 2.5"))
        }
        _ => Ok(()),
    }
}

fn refused(q: &Question, memory: &Memory, asked: usize, fit: usize) -> Error {
    let by_memory = memory.requests_max <= q.stack.requests_max as usize;
    let why = if by_memory {
        let left = memory.room_bytes - memory.weights_bytes - memory.working_bytes;
        format!(
            "each takes {:.2} GB of cache, and {:.1} GB of {} are left beside the weights",
            memory.cache_request_bytes / 1e9,
            left / 1e9,
            q.cluster.accelerator.name
        )
    } else {
        format!("{} runs {} at once", q.stack.name, q.stack.requests_max)
    };
    Error::user(format!("--concurrency {asked}: {fit} requests fit at once; {why}"))
        .hint(format!("give at most --concurrency {fit}, or --queue to let the others wait"))
}

fn load(engine: &Engine, memory: &Memory, q: &Question, concurrency: usize, replicas: usize) -> Load {
    // Replicas share evenly: some have one client more.
    let (each, more) = (concurrency / replicas, concurrency % replicas);
    let at = |clients: usize| point(engine, memory, q.traffic, clients);
    let fullest = at(concurrency.div_ceil(replicas));
    let even = if more == 0 || each == 0 { None } else { Some(at(each)) };
    let full = if more == 0 { replicas } else { more };
    let rest = even.map_or(0.0, |p| p.tokens_per_s * (replicas - more) as f64);
    let tokens_per_s = fullest.tokens_per_s * full as f64 + rest;
    let accelerators = (replicas * q.tp) as f64;
    let usd_per_s = q.price.as_ref().map(|p| p.usd_per_accelerator_hour * accelerators / HOUR_S);
    Load {
        concurrency,
        ttft_ms: fullest.ttft_s * 1e3,
        itl_ms: fullest.itl_s * 1e3,
        latency_s: fullest.latency_s,
        tokens_per_s,
        tokens_per_s_per_accelerator: tokens_per_s / accelerators,
        usd_per_million_tokens: usd_per_s.map(|usd| usd / tokens_per_s * 1e6),
        bound: fullest.decode.bound(),
        replica: fullest,
    }
}

/// One, two, four, ... and the most.
fn steps(most: usize) -> Vec<usize> {
    let mut steps: Vec<usize> =
        std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(|n| *n < most).collect();
    steps.push(most.max(1));
    steps
}

fn assumptions(q: &Question, engine: &Engine) -> Vec<String> {
    let mut out = vec![
        format!("stack {}: {}, {}", q.stack.name, q.stack.source, q.stack.date),
        "clients send requests of one length, each the next when its last one ends".to_owned(),
        "no speculative decoding, no prefix reuse, attention over the whole context".to_owned(),
    ];
    let family = &q.cluster.accelerator.family.name;
    if !["ampere", "hopper"].contains(&family.as_str()) {
        out.push(format!("serving constants were fitted on Ampere and Hopper, not on {family}"));
    }
    if q.weights.widened(&q.cluster.accelerator) {
        out.push(format!("{} weights are widened to 16 bit before each product", q.weights));
    }
    if let Some(e) = q.shape.experts {
        out.push(format!(
            "a token's {} of {} experts are as good as random: one token meets {}, all are met from some {} tokens",
            e.top_k,
            e.count,
            e.top_k,
            (4.0 * e.count as f64 / e.top_k as f64).round()
        ));
    }
    if q.shape.latent.is_none() && q.tp > q.shape.kv_heads {
        out.push(format!("{} heads of keys and values are copied to {} ranks", q.shape.kv_heads, q.tp));
    }
    if engine.tp > q.cluster.scale_up.domain {
        out.push(format!(
            "tensor parallelism leaves the domain of {} accelerators",
            q.cluster.scale_up.domain
        ));
    }
    out
}
