//! Rotary positions and how they are stretched, both ways.

use serde_json::{Map, Value, json};

use super::Config;
use crate::model::yarn_scale;
use crate::{Error, Result, Rope, RopeScaling, Yarn};

impl Config<'_> {
    /// `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).
    pub(super) fn rope(&self, max_positions: usize) -> Result<Rope> {
        let empty = Map::new();
        let object = |key: &str| match self.get(key) {
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(self.wrong(key, "an object of keys")),
            None => Ok(None),
        };
        let (key, map) = match (object("rope_parameters")?, object("rope_scaling")?) {
            (Some(map), _) => ("rope_parameters", map),
            (None, Some(map)) => ("rope_scaling", map),
            (None, None) => ("rope_scaling", &empty),
        };
        if let Some((name, _)) = map.iter().find(|(_, v)| v.is_object()) {
            return Err(Error::user(format!(
                "{key}.{name} is not supported: one rotary embedding for all layers is"
            )));
        }
        let fields = Config(map);
        let theta = match fields.get("rope_theta") {
            Some(_) => fields.number_or("rope_theta", None),
            None => self.number_or("rope_theta", Some(10_000.0)),
        };
        let scaling = fields.rope_scaling(max_positions).map_err(|e| e.context(key))?;
        Ok(Rope { theta: theta?, scaling, max_positions })
    }

    fn rope_scaling(&self, max_positions: usize) -> Result<RopeScaling> {
        if self.number_or("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.wrong("partial_rotary_factor", "1, all dims of a head are rotated"));
        }
        let factor = || self.number_or("factor", None);
        let original = "original_max_position_embeddings";
        let kind = match self.text("rope_type")? {
            Some(kind) => kind,
            None => self.text("type")?.unwrap_or("default"),
        };
        Ok(match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: factor()? },
            "dynamic" => {
                if self.count_or(original, Some(max_positions))? != max_positions {
                    return Err(
                        self.wrong(original, "the same as max_position_embeddings for dynamic scaling")
                    );
                }
                RopeScaling::Dynamic { factor: factor()? }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: self.number_or("low_freq_factor", None)?,
                high_freq_factor: self.number_or("high_freq_factor", None)?,
                original_max_positions: self.count(original)?,
            },
            "yarn" => self.yarn(max_positions)?,
            other => {
                return Err(Error::user(format!("rope_type = \"{other}\" is not supported"))
                    .hint("supported: default, linear, dynamic, llama3, yarn"));
            }
        })
    }

    fn yarn(&self, max_positions: usize) -> Result<RopeScaling> {
        let original_max_positions =
            self.count_or("original_max_position_embeddings", Some(max_positions))?;
        let factor = self.number_or("factor", Some(max_positions as f64 / original_max_positions as f64))?;
        // DeepSeek's two scales of the logarithm come down to one attention factor.
        let scale = |m: f64| yarn_scale(factor, m);
        let attention_factor =
            match (self.get("attention_factor"), self.get("mscale"), self.get("mscale_all_dim")) {
                (Some(_), ..) => Some(self.number_or("attention_factor", None)?),
                (None, Some(_), Some(_)) => {
                    let (one, all) =
                        (self.number_or("mscale", None)?, self.number_or("mscale_all_dim", None)?);
                    // Zero is read as absent there.
                    (one != 0.0 && all != 0.0).then(|| scale(one) / scale(all))
                }
                _ => None,
            };
        Ok(RopeScaling::Yarn(Yarn {
            factor,
            beta_fast: self.number_or("beta_fast", Some(32.0))?,
            beta_slow: self.number_or("beta_slow", Some(1.0))?,
            original_max_positions,
            attention_factor,
            truncate: self.flag_or("truncate", true)?,
            mscale_all_dim: 0.0,
        }))
    }
}

pub(super) fn scaling_json(scaling: &RopeScaling) -> Value {
    if *scaling == RopeScaling::Default {
        return Value::Null;
    }
    let mut map = Map::new();
    map.insert("rope_type".to_owned(), json!(scaling.name()));
    for (name, x) in scaling.fields() {
        match name {
            "original_max_positions" => {
                map.insert("original_max_position_embeddings".to_owned(), json!(x as u64))
            }
            "truncate" => map.insert(name.to_owned(), json!(x != 0.0)),
            "mscale_all_dim" => {
                map.insert("mscale".to_owned(), json!(scaling.mscale()));
                map.insert(name.to_owned(), json!(x))
            }
            _ => map.insert(name.to_owned(), json!(x)),
        };
    }
    Value::Object(map)
}
