//! Attention that looks back over a window only.

use serde_json::Value;

use serde_json::json;

use crate::{Error, ModelSpec, Result, Window};

use super::{Config, Family, LAYERS};

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
        let Some(tokens) = self.window_tokens(default)? else { return Ok(None) };
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

    /// An absent key is the class's default; only a null says that there is no window.
    fn window_tokens(&self, default: Option<usize>) -> Result<Option<usize>> {
        match self.0.get("sliding_window") {
            Some(Value::Null) => Ok(None),
            Some(_) => self.count("sliding_window").map(Some),
            None => Ok(default),
        }
    }

    /// The windows of a model to train. One that is never narrower than the context changes nothing.
    pub(super) fn trained_window(&self, family: &Family) -> Result<Option<Window>> {
        let uses = || self.flag_or("use_sliding_window", false);
        let default = match family.model_type {
            "mistral" => Some(4096),
            "mixtral" => None,
            "gpt_oss" => Some(128),
            "qwen2" | "qwen3" if uses()? => Some(4096),
            _ => return Ok(None),
        };
        let tokens = self.window_tokens(default)?.filter(|_| !self.every_layer_is_full());
        let longest = self.max_positions(family)?;
        let Some(tokens) = tokens.filter(|tokens| *tokens < longest) else { return Ok(None) };
        let layers = self.size(LAYERS, family.layers)?;
        let window = |full_layers, full_every| Some(Window { tokens, full_layers, full_every });
        if let Some(full) = self.full_layers() {
            let full_layers = full.iter().take_while(|full| **full).count();
            let full_every = full[full_layers..].iter().position(|full| *full).map_or(0, |i| i + 1);
            let found = Window { tokens, full_layers, full_every };
            let regular = full.iter().enumerate().all(|(i, full)| found.of(i).is_none() == *full);
            return match regular && full.len() == layers {
                true => Ok(Some(found)),
                false => Err(self.wrong("layer_types", "one for each layer").hint(
                    "what is read: some full layers first, then runs of windows that end with a full one",
                )),
            };
        }
        Ok(match family.model_type {
            "gpt_oss" => window(0, 2),
            "qwen2" | "qwen3" => {
                let full = self.count_or("max_window_layers", Some(28))?;
                window(full, 0).filter(|_| full < layers)
            }
            _ => window(0, 0),
        })
    }

    /// Which layers attend to all, where the file lists them.
    fn full_layers(&self) -> Option<Vec<bool>> {
        let types = self.get("layer_types")?.as_array()?;
        Some(types.iter().map(|t| t != "sliding_attention").collect())
    }

    fn every_layer_is_full(&self) -> bool {
        self.full_layers().is_some_and(|full| full.iter().all(|full| *full))
    }

    /// What is said of layers over windows that a family to train has not.
    pub(super) fn unknown_windows(&self, family: &Family) -> Result<Option<Error>> {
        let no_layer = |t: &Value| t != "full_attention" && t != "sliding_attention";
        let types = self.get("layer_types").and_then(Value::as_array);
        let without = format!("supported: {} without it", family.architecture);
        if let Some(other) = types.and_then(|types| types.iter().find(|t| no_layer(t))) {
            let what = format!("layer_types with {other} is not supported: full and sliding attention are");
            return Ok(Some(Error::user(what).hint(without)));
        }
        let trained = matches!(family.model_type, "mistral" | "mixtral" | "gpt_oss")
            || matches!(family.model_type, "qwen2" | "qwen3") && self.flag_or("use_sliding_window", false)?;
        if trained {
            return Ok(None);
        }
        if types.is_some() && !self.every_layer_is_full() {
            let what =
                format!("layer_types is not supported: {} has full attention alone", family.model_type);
            return Ok(Some(Error::user(what).hint(without)));
        }
        if family.model_type == "qwen3_moe" && self.flag_or("use_sliding_window", false)? {
            let window = self.window_tokens(Some(4096))?;
            if let Some(window) = window.filter(|w| self.max_positions(family).is_ok_and(|most| *w < most)) {
                return Ok(Some(
                    Error::user(format!(
                        "sliding_window = {window} is not supported: only full attention is"
                    ))
                    .hint(format!("supported: {} with \"sliding_window\": null", family.architecture)),
                ));
            }
        }
        Ok(None)
    }
}

impl ModelSpec {
    /// What a family with windows writes of them.
    pub(super) fn windows_json(&self, family: &Family, own: &mut Value) {
        let qwen = matches!(family.model_type, "qwen2" | "qwen3");
        let Some(w) = self.window else {
            match family.model_type {
                _ if qwen => own["use_sliding_window"] = json!(false),
                "mistral" | "mixtral" => own["sliding_window"] = Value::Null,
                _ => {}
            }
            return;
        };
        own["sliding_window"] = json!(w.tokens);
        if qwen {
            own["use_sliding_window"] = json!(true);
            own["max_window_layers"] = json!(w.full_layers);
        }
        if qwen || family.model_type == "gpt_oss" {
            let kind = |i| if w.of(i).is_some() { "sliding_attention" } else { "full_attention" };
            own["layer_types"] = (0..self.layers).map(kind).collect();
        }
    }
}
