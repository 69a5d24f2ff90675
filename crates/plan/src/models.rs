//! Every model by name: those that train (`catalog/models`) and those that are only estimated (`catalog/shapes.toml`).

use serde::{Deserialize, Serialize};
use spec::suggest::{self, plain};
use spec::{Error, ModelSpec, Result};

use crate::shape::Shape;

/// One model of the catalogue.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Known {
    /// Its name.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// Other names.
    pub aliases: Vec<String>,
    /// All parameters.
    pub params: f64,
    /// Those that one token uses.
    pub active_params: f64,
    /// Layers.
    pub layers: usize,
    /// Residual width.
    pub hidden: usize,
    /// Whether `phalanx train` knows it by this name.
    pub trains: bool,
    /// Where its shape is from.
    pub source: String,
    /// Of publication.
    pub date: String,
}

/// What is read of an entry here; the shape itself is read by [`Shape`] and [`ModelSpec`].
#[derive(Deserialize)]
struct About {
    name: String,
    #[serde(default)]
    title: String,
    #[serde(default)]
    aliases: Vec<String>,
    source: String,
    date: String,
}

#[derive(Deserialize)]
struct Shapes {
    model: Vec<About>,
}

/// Other names of models in `catalog/models`, whose files have none.
const ALSO: [(&str, &str); 6] = [
    ("llama3.1-8b", "llama3-8b"),
    ("llama3.1-70b", "llama3-70b"),
    ("llama3.1-405b", "llama3-405b"),
    ("mistral-7b", "mistral-7b-v0.3"),
    ("gpt2-small", "gpt2"),
    ("tinyllama", "tinyllama-1.1b"),
];

/// All models of the catalogue, by name.
///
/// # Errors
/// Only if the catalogue that ships with the program is broken.
pub fn all() -> Result<Vec<Known>> {
    let mut all = Vec::new();
    for (_, text) in ModelSpec::preset_files() {
        let about: About = toml::from_str(text).map_err(broken)?;
        let shape = Shape::from_model(ModelSpec::preset(&about.name)?);
        all.push(known(about, &shape, true));
    }
    let shapes: Shapes = toml::from_str(include_str!("../../../catalog/shapes.toml")).map_err(broken)?;
    for about in shapes.model {
        // A name in both lists is one model.
        if let Some(shape) = Shape::find(&about.name)?
            && !all.iter().any(|k| plain(&k.name, ".") == plain(&about.name, "."))
        {
            all.push(known(about, &shape, false));
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn broken(e: toml::de::Error) -> Error {
    Error::failure(format!("the catalogue's models: {}", e.message()))
}

fn known(about: About, shape: &Shape, trains: bool) -> Known {
    let mut aliases = about.aliases;
    aliases.extend(ALSO.iter().filter(|a| a.1 == about.name).map(|a| a.0.to_owned()));
    let tables = if shape.model.tied_embeddings { 1.0 } else { 2.0 };
    Known {
        title: if about.title.is_empty() { about.name.clone() } else { about.title },
        name: about.name,
        aliases,
        params: shape.params(),
        active_params: shape.layers_params().1 + tables * shape.table_params(),
        layers: shape.model.layers,
        hidden: shape.model.hidden,
        trains,
        source: about.source,
        date: about.date,
    }
}

/// The model of that name or alias; case, blanks, dashes and an owner before a slash do not matter.
///
/// ```
/// assert_eq!(plan::models::find("Qwen/Qwen3-32B")?.model.layers, 64);
/// assert_eq!(plan::models::find("Llama-3.1-405B")?.model.layers, 126);
/// let refused = plan::models::find("lama3-70b").unwrap_err();
/// assert_eq!(refused.hint_text(), Some("did you mean `llama3-70b`? `phalanx catalog list model` shows all"));
/// # Ok::<(), spec::Error>(())
/// ```
///
/// # Errors
/// If there is none, with the nearest name of either list.
pub fn find(name: &str) -> Result<Shape> {
    let bare = name.rsplit('/').next().unwrap_or(name);
    let wanted = plain(bare, ".");
    let preset = ALSO.iter().find(|a| plain(a.0, ".") == wanted).map_or(wanted.clone(), |a| plain(a.1, "."));
    if let Some(preset) = ModelSpec::preset_names().find(|n| plain(n, ".") == preset) {
        return ModelSpec::preset(preset).map(Shape::from_model);
    }
    let known = all()?;
    let named =
        |k: &&Known| plain(&k.name, ".") == wanted || k.aliases.iter().any(|a| plain(a, ".") == wanted);
    if let Some(k) = known.iter().find(named)
        && let Some(shape) = Shape::find(&k.name)?
    {
        return Ok(shape);
    }
    let names: Vec<&str> = known
        .iter()
        .flat_map(|k| std::iter::once(k.name.as_str()).chain(k.aliases.iter().map(String::as_str)))
        .collect();
    let error = Error::user(format!("no model is called `{name}`"));
    Err(match suggest::nearest(bare, names) {
        Some(near) => error.hint(format!("did you mean `{near}`? `phalanx catalog list model` shows all")),
        None => error.hint("`phalanx catalog list model` shows all; a config.json or run.toml is taken too"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_holds_every_model_once_with_its_source() {
        let all = all().unwrap();
        let names: Vec<&str> = all.iter().map(|k| k.name.as_str()).collect();
        for preset in ModelSpec::preset_names() {
            assert!(names.contains(&preset), "{preset} is not in the list");
        }
        for shape in Shape::names().unwrap() {
            assert!(names.contains(&shape.as_str()), "{shape} is not in the list");
        }
        let mut seen = std::collections::BTreeSet::new();
        for k in &all {
            assert!(!k.source.is_empty() && k.date.len() >= 4 && k.active_params <= k.params, "{k:?}");
            for name in std::iter::once(&k.name).chain(&k.aliases) {
                let unique = seen.insert(plain(name, "."))
                    || k.aliases.iter().any(|a| plain(a, ".") == plain(&k.name, "."));
                assert!(unique, "{name} stands for two models");
                find(name).unwrap();
            }
        }
    }

    #[test]
    fn published_sizes_are_reproduced() {
        let check = |name: &str, billions: f64| {
            let params = find(name).unwrap().params() / 1e9;
            assert!((params / billions - 1.0).abs() < 0.015, "{name}: {params} against {billions}");
        };
        // PaLM Table 1.
        check("palm-8b", 8.63);
        check("palm-62b", 62.50);
        check("palm-540b", 540.35);
        // Model cards.
        check("qwen1.5-110b", 111.2);
        check("qwen1.5-32b", 32.5);
        check("qwen2-72b", 72.7);
        check("qwen2.5-14b", 14.77);
        check("qwen2.5-32b", 32.76);
        check("qwen2.5-3b", 3.09);
        check("qwen3-1.7b", 1.72);
        check("qwen3-4b", 4.02);
        check("qwen3-14b", 14.77);
        check("qwen3-32b", 32.76);
        check("llama3.1-405b", 405.85);
        check("llama3.2-3b", 3.21);
        check("llama1-65b", 65.29);
        check("llama-30b", 32.53);
        check("megatron-22b", 22.0);
    }
}
