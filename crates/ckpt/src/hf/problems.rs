//! How a model's weights do not fit its configuration, in one message.

use std::path::Path;

use spec::{Error, ModelSpec, Result};

use crate::input::shown;

/// Problems shown of each kind; a wrong config makes hundreds.
const SHOWN: usize = 3;

/// What does not fit.
#[derive(Debug, Default)]
pub(super) struct Problems {
    /// Tensors that are nowhere, with their shapes.
    pub(super) missing: Vec<String>,
    /// Names of tensors that belong to nothing.
    pub(super) unexpected: Vec<String>,
    /// All else, in sentences.
    pub(super) other: Vec<String>,
}

impl Problems {
    /// # Errors
    /// When there are any.
    pub(super) fn refuse(&self, dir: &Path, spec: &ModelSpec) -> Result<()> {
        let mut shown_ones: Vec<String> = self.other.iter().take(SHOWN).cloned().collect();
        shown_ones.extend(self.missing.iter().take(SHOWN).map(|t| format!("tensor {t} is missing")));
        shown_ones
            .extend(self.unexpected.iter().take(SHOWN).map(|t| format!("tensor {} is unexpected", shown(t))));
        if shown_ones.is_empty() {
            return Ok(());
        }
        let adapted = |t: &String| t.contains(".lora_") || t.contains(".base_layer.");
        let hint = if self.unexpected.iter().any(adapted) {
            "an adapter (LoRA) is not part of the model: merge it first (merge_and_unload of peft)".to_owned()
        } else {
            format!(
                "config.json describes {} layers of width {}, {} heads, vocabulary {}",
                spec.layers, spec.hidden, spec.heads, spec.vocab
            )
        };
        let all = self.missing.len() + self.unexpected.len() + self.other.len();
        let more = match all - shown_ones.len() {
            0 => String::new(),
            n => format!(
                "; and {n} more ({} missing, {} unexpected in all)",
                self.missing.len(),
                self.unexpected.len()
            ),
        };
        let shown_ones = shown_ones.join("; ");
        Err(Error::user(format!(
            "import: the weights in {} do not fit its config.json: {shown_ones}{more}",
            dir.display()
        ))
        .hint(hint))
    }
}
