//! Attention that looks back over a window only.

use serde_json::Value;

use crate::Result;

use super::Config;

/// Layers whose tokens attend to themselves and those just before, not to all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Tokens of a window, the attending one among them.
    pub tokens: usize,
    /// Layers that have one; the others attend to all before.
    pub layers: usize,
}

impl Windows {
    /// Pairs of queries and keys that attention over `sequence` tokens scores in all of `layers` layers, as a share of
    /// those without windows.
    ///
    /// ```
    /// use spec::Windows;
    /// let gemma3 = Windows { tokens: 1024, layers: 40 };
    /// assert_eq!(gemma3.share(48, 1024), 1.0);
    /// assert!((gemma3.share(48, 32_768) - (8.0 + 40.0 * 0.0615) / 48.0).abs() < 1e-4);
    /// ```
    pub fn share(&self, layers: usize, sequence: usize) -> f64 {
        let causal = |n: f64| n * (n + 1.0) / 2.0;
        let (window, all) = (self.tokens.min(sequence) as f64, sequence as f64);
        // Every token beyond the first window scores a whole one.
        let clipped = (causal(window) + (all - window) * window) / causal(all);
        let with = self.layers.min(layers) as f64 / layers as f64;
        1.0 - with * (1.0 - clipped)
    }
}

impl Config<'_> {
    /// The windows of a model of this type with so many layers, as its class in transformers has them.
    pub(super) fn windows(&self, kind: &str, layers: usize) -> Result<Option<Windows>> {
        let default = match kind {
            "mistral" | "gemma2" | "gemma3_text" => Some(4096),
            "gpt_oss" => Some(128),
            "starcoder2" | "phi3" | "mixtral" => None,
            "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe" | "smollm3" => Some(4096),
            _ => return Ok(None),
        };
        // An absent key is the class's default; only a null says that there is no window.
        let tokens = match self.0.get("sliding_window") {
            Some(Value::Null) => None,
            Some(_) => Some(self.count("sliding_window")?),
            None => default,
        };
        let Some(tokens) = tokens else { return Ok(None) };
        let listed = self.get("layer_types").and_then(Value::as_array);
        let with = match (listed, kind) {
            (Some(types), _) => types.iter().filter(|t| *t == "sliding_attention").count(),
            (None, "qwen2" | "qwen3" | "qwen2_moe" | "qwen3_moe" | "smollm3") => {
                match self.flag_or("use_sliding_window", false)? {
                    true => layers.saturating_sub(self.count_or("max_window_layers", Some(28))?),
                    false => 0,
                }
            }
            (None, "gemma2" | "gpt_oss") => layers.div_ceil(2),
            (None, "gemma3_text") => layers - layers / self.count_or("sliding_window_pattern", Some(6))?,
            (None, _) => layers,
        };
        Ok((with > 0).then_some(Windows { tokens, layers: with }))
    }
}
