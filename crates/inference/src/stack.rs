//! Serving stacks: what each adds to the hardware's own times, from `catalog/serving.toml`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use spec::suggest::{self, plain};
use spec::{Error, Result};

/// What a serving stack makes of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stack {
    /// Its name.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// Other names, also looked for in the text of a source.
    pub aliases: Vec<String>,
    /// Where the constants are from.
    pub source: String,
    /// When they were taken down.
    pub date: String,
    /// How requests share passes.
    pub batching: Batching,
    /// Before and after each kernel: launch from a graph, filling and draining the chip.
    pub kernel_us: f64,
    /// Kernels beyond the program's for each product in 8 or 4 bit: scaling and rounding of activations.
    pub quantize_kernels: f64,
    /// Kernels beyond the program's in a layer of experts: sorting, gathering and adding up what goes to them.
    pub expert_kernels: f64,
    /// A small all-reduce, whatever its ranks.
    pub all_reduce_us: f64,
    /// Added for each doubling of ranks, by accelerator family; `other` for those not named.
    pub all_reduce_step_us: BTreeMap<String, f64>,
    /// Scheduler, sampling and the host's part of each pass that nothing hides.
    pub host_us: f64,
    /// Added to it for each request in the pass.
    pub host_request_us: f64,
    /// Once a request before its first token: the server's front, tokens from text.
    pub request_ms: f64,
    /// Products, as a share of the best measured rate of large ones.
    pub products: f64,
    /// Weights and activations, as a share of rated memory throughput.
    pub memory: f64,
    /// Cached keys and values, as a share of the same.
    pub cache: f64,
    /// Factors on these three for accelerator families that reach less than Ampere and Hopper.
    pub by_family: BTreeMap<String, f64>,
    /// Share of the shorter of memory and arithmetic that hides behind the longer in a product.
    pub overlap: f64,
    /// How often a cached head is read again for each further query head that shares it: 0 once for all.
    pub reread: f64,
    /// Throughput of 8-bit integer weights that are widened, as a share of plain ones; other narrow formats too.
    pub widen8: f64,
    /// The same of 4-bit weights.
    pub widen4: f64,
    /// Most tokens of prompts in one pass.
    pub prompt_tokens_max: f64,
    /// Most requests that run at once.
    pub requests_max: f64,
    /// Share of memory that weights, cache and working space may take.
    pub memory_used: f64,
    /// Keys and values are cached in 8 bit where weights are.
    pub narrow_cache: bool,
}

/// How requests share passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Batching {
    /// All requests start and end together; a batch's prompts go through in one pass.
    Static,
    /// Requests come and go between passes; a pass of prompts holds up those that decode.
    Continuous,
    /// Requests come and go; prompts, in pieces, ride in the passes of those that decode.
    Mixed,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    stack: Vec<Stack>,
}

/// The stack that is meant where nothing says which.
pub const USUAL: &str = "trt-llm";

impl Stack {
    /// All stacks of the catalogue.
    ///
    /// # Errors
    /// If `catalog/serving.toml` is wrong, which a test rules out.
    pub fn all() -> Result<Vec<Stack>> {
        let file: File = toml::from_str(include_str!("../../../catalog/serving.toml"))
            .map_err(|e| Error::failure(format!("catalog/serving.toml: {}", e.message())))?;
        for stack in &file.stack {
            stack.check()?;
        }
        Ok(file.stack)
    }

    /// Shares lie between 0 and 1 and no time is below 0: whatever else is wrong, no answer beats the hardware.
    fn check(&self) -> Result<()> {
        let shares = [
            ("products", self.products),
            ("memory", self.memory),
            ("cache", self.cache),
            ("widen8", self.widen8),
            ("widen4", self.widen4),
            ("memory_used", self.memory_used),
        ];
        let least = [
            ("kernel_us", self.kernel_us),
            ("quantize_kernels", self.quantize_kernels),
            ("expert_kernels", self.expert_kernels),
            ("all_reduce_us", self.all_reduce_us),
            ("host_us", self.host_us),
            ("host_request_us", self.host_request_us),
            ("request_ms", self.request_ms),
            ("reread", self.reread),
            ("prompt_tokens_max", self.prompt_tokens_max - 1.0),
            ("requests_max", self.requests_max - 1.0),
        ];
        let wrong = shares
            .iter()
            .find(|(_, x)| !(0.01..=1.0).contains(x))
            .or_else(|| least.iter().find(|(_, x)| !(*x >= 0.0 && x.is_finite())))
            .copied()
            .or((!(0.0..=1.0).contains(&self.overlap)).then_some(("overlap", self.overlap)))
            .or(self.by_family.values().find(|x| !(0.01..=1.0).contains(*x)).map(|x| ("by_family", *x)));
        match wrong {
            Some((key, value)) => {
                Err(Error::failure(format!("catalog/serving.toml: {}.{key} = {value}", self.name)))
            }
            None => Ok(()),
        }
    }

    /// The stack of that name or alias.
    ///
    /// # Errors
    /// An unknown name, with the nearest known one.
    ///
    /// ```
    /// use inference::stack::Stack;
    /// assert_eq!(Stack::named("TensorRT-LLM")?.name, "trt-llm");
    /// let refused = Stack::named("vlm").unwrap_err();
    /// assert_eq!(refused.hint_text(), Some("did you mean `vllm`?"));
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn named(name: &str) -> Result<Stack> {
        let wanted = plain(name, "");
        let all = Stack::all()?;
        let known: Vec<String> = all.iter().map(|s| s.name.clone()).collect();
        let named =
            |s: &Stack| plain(&s.name, "") == wanted || s.aliases.iter().any(|a| plain(a, "") == wanted);
        all.into_iter().find(named).ok_or_else(|| {
            Error::user(format!("unknown serving stack \"{name}\""))
                .hint(suggest::hint(name, known.iter().map(String::as_str)))
        })
    }

    /// The stack that the text of a source speaks of: the one with the longest name in it; [`USUAL`] if none is.
    ///
    /// # Errors
    /// As [`Stack::all`].
    pub fn of_source(source: &str) -> Result<Stack> {
        let text = plain(source, "");
        let mut best: Option<(usize, Stack)> = None;
        for stack in Stack::all()? {
            let names = stack.aliases.iter().chain(std::iter::once(&stack.name));
            let found =
                names.map(|n| plain(n, "")).filter(|n| text.contains(n.as_str())).map(|n| n.len()).max();
            if let Some(length) = found
                && best.as_ref().is_none_or(|b| b.0 < length)
            {
                best = Some((length, stack));
            }
        }
        match best {
            Some((_, stack)) => Ok(stack),
            None => Stack::named(USUAL),
        }
    }

    /// Factor on products, memory and cache for an accelerator family.
    pub(crate) fn reach(&self, family: &str) -> f64 {
        self.by_family.get(family).copied().unwrap_or(1.0)
    }

    /// What a small all-reduce over `ranks` of one domain takes.
    pub(crate) fn all_reduce_s(&self, family: &str, ranks: f64) -> f64 {
        let steps = &self.all_reduce_step_us;
        let step = steps.get(family).or_else(|| steps.get("other")).copied().unwrap_or(0.0);
        (self.all_reduce_us + step * ranks.log2()) * 1e-6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_say_which_stack_they_speak_of() {
        let check = |source: &str, name: &str| assert_eq!(Stack::of_source(source).unwrap().name, name);
        check("measured with TensorRT-LLM 1.0", "trt-llm");
        check("vLLM 0.6.1 nightly benchmark", "vllm-2024");
        check("vLLM on eight H100", "vllm");
        check("a blog", USUAL);
        check("NVIDIA Llama 2 latencies as tabulated by imec", "trt-llm-2023");
    }

    #[test]
    fn every_stack_has_a_source_and_names_of_its_own() {
        let all = Stack::all().unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for s in &all {
            assert!(s.source.len() > 20 && s.date.len() >= 7, "{}", s.name);
            for name in std::iter::once(&s.name).chain(&s.aliases) {
                assert!(seen.insert(plain(name, "")), "{name} names two stacks");
            }
        }
    }
}
