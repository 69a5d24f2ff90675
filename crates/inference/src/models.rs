//! Models by the names that people and tables write: with the maker's prefix, the tuning and the format at the end.

use plan::models;
use plan::shape::Shape;
use spec::Result;

/// What names of one shape end in: how it was tuned, packed or revised.
const ENDINGS: [&str; 22] = [
    "instruct",
    "chat",
    "it",
    "base",
    "hf",
    "fp8",
    "fp16",
    "bf16",
    "fp4",
    "nvfp4",
    "int8",
    "int4",
    "awq",
    "gptq",
    "w8a8",
    "dynamic",
    "quantized",
    "2407",
    "v0.1",
    "v0.2",
    "v0.3",
    "kv",
];
/// Revisions that keep the shape of another name.
const SAME_SHAPE: [(&str, &str); 6] = [
    ("llama3.3", "llama3"),
    ("llama3.1", "llama3"),
    ("deepseekr1", "deepseekv3"),
    ("deepseekv3.1", "deepseekv3"),
    ("mistral7b", "mistral7bv0.3"),
    ("codellama70b", "llama270b"),
];

/// The model of that name: as [`models::find`], with endings that do not change the shape left out.
///
/// ```
/// use inference::models::find;
/// for (name, layers) in [
///     ("Llama 2-7B", 32),
///     ("meta-llama/Meta-Llama-3.1-8B-Instruct", 32),
///     ("Llama-3.3-70B-Instruct-FP8", 80),
///     ("mistralai/Mixtral-8x7B-Instruct-v0.1", 32),
///     ("Llama-2-70b-chat-hf", 80),
///     ("deepseek-ai/DeepSeek-R1", 61),
/// ] {
///     assert_eq!(find(name)?.model.layers, layers, "{name}");
/// }
/// assert!(find("Llama-9-instruct").is_err());
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// If there is none, with the name nearest to the whole.
pub fn find(name: &str) -> Result<Shape> {
    let whole = models::find(name);
    if whole.is_ok() {
        return whole;
    }
    let bare = name.rsplit('/').next().unwrap_or(name).trim().to_lowercase();
    let mut parts: Vec<&str> = bare.split(['-', '_', ' ']).filter(|p| !p.is_empty()).collect();
    if parts.first() == Some(&"meta") {
        parts.remove(0);
    }
    loop {
        let joined = parts.join("-");
        if let Some(shape) = candidate(&joined) {
            return Ok(shape);
        }
        match parts.last() {
            Some(last) if parts.len() > 1 && ENDINGS.contains(last) => parts.pop(),
            _ => return whole,
        };
    }
}

fn candidate(name: &str) -> Option<Shape> {
    if let Ok(shape) = models::find(name) {
        return Some(shape);
    }
    let plain: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '.').collect();
    let same = SAME_SHAPE.iter().find_map(|(from, to)| Some(format!("{to}{}", plain.strip_prefix(from)?)));
    same.and_then(|s| models::find(&s).ok())
}
