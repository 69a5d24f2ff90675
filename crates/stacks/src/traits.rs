//! What makes a model the model that it is. Each trait is written for a stack, or named as what the stack cannot say.

use plan::estimate::Problem;
use spec::{ModelSpec, NormKind, Position, RopeScaling, Yarn};

/// Every trait beside sizes that a stack asks for anyway, by name and value.
pub(crate) fn traits(m: &ModelSpec) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("vocab", m.vocab.to_string()),
        ("layers", m.layers.to_string()),
        ("hidden", m.hidden.to_string()),
        ("ffn", m.ffn.to_string()),
        ("heads", m.heads.to_string()),
    ];
    if m.latent.is_none() {
        all.push(("kv_heads", m.kv_heads.to_string()));
        all.push(("head_dim", m.head_dim.to_string()));
    }
    all.extend([
        ("norm", if m.norm == NormKind::Rms { "rms" } else { "layer" }.to_owned()),
        ("norm_eps", m.norm_eps.to_string()),
        ("activation", format!("{:?}", m.activation).to_lowercase()),
        ("qkv_bias", m.qkv_bias.to_string()),
        ("attn_out_bias", m.attn_out_bias.to_string()),
        ("mlp_bias", m.mlp_bias.to_string()),
        ("qk_norm", m.qk_norm.to_string()),
        ("tied_embeddings", m.tied_embeddings.to_string()),
        ("init_std", m.init_std.to_string()),
        ("dropout", "0".to_owned()),
    ]);
    if let Some(w) = m.window {
        let runs = format!("{} tokens, full_layers {}, full_every {}", w.tokens, w.full_layers, w.full_every);
        all.push(("window", runs));
    }
    if m.sinks {
        all.push(("sinks", "true".to_owned()));
    }
    if let Some(mtp) = m.mtp {
        all.push(("mtp", format!("one token more, its loss times {}", mtp.weight)));
    }
    match &m.position {
        Position::Learned { max_positions } => all.push(("learned_positions", max_positions.to_string())),
        Position::Rope(rope) => {
            all.push(("rope_theta", rope.theta.to_string()));
            all.push(("rope_scaling", scaling(&rope.scaling)));
        }
    }
    all
}

fn scaling(scaling: &RopeScaling) -> String {
    match scaling {
        RopeScaling::Default => "default".into(),
        RopeScaling::Linear { factor } => format!("linear by {factor}"),
        RopeScaling::Dynamic { factor } => format!("dynamic by {factor}"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            format!(
                "llama3 by {factor} from {original_max_positions}, {low_freq_factor} to {high_freq_factor}"
            )
        }
        RopeScaling::Yarn(y @ Yarn { factor, beta_fast, beta_slow, original_max_positions, .. }) => {
            let scale = y.attention_factor.map_or(String::new(), |a| format!(", scaled by {a}"));
            let scale = if y.truncate { scale } else { format!("{scale}, not rounded") };
            let scale = match y.mscale_all_dim {
                0.0 => scale,
                m => format!("{scale}, scores by mscale_all_dim {m}"),
            };
            format!("yarn by {factor} from {original_max_positions}, {beta_fast} to {beta_slow}{scale}")
        }
    }
}

/// One sentence that names the traits that `stack` has no words for; `None` when it has them all.
pub(crate) fn unsaid(stack: &str, m: &ModelSpec, names: &[&str]) -> Option<String> {
    // What no stack is told of.
    let never = ["window", "sinks"];
    let named = traits(m).into_iter().filter(|(name, _)| names.contains(name) || never.contains(name));
    let list: Vec<String> = named.map(|(name, value)| format!("{name} = {value}")).collect();
    (!list.is_empty()).then(|| format!("{stack} has no argument for: {}; change its code", list.join("; ")))
}

/// The same where a file says nothing of the model at all.
pub(crate) fn all_unsaid(m: &ModelSpec) -> String {
    let list: Vec<String> = traits(m).into_iter().map(|(name, value)| format!("{name} = {value}")).collect();
    format!("the model is set in its code, not by this file: {}", list.join("; "))
}

/// What to know where sequences are longer than the model was made for.
pub(crate) fn beyond_positions(p: &Problem) -> Option<String> {
    let (sequence, most) = (p.sequence, p.shape.model.max_positions());
    (sequence > most).then(|| format!("sequences of {sequence} are longer than the model's {most} positions"))
}

/// Scaling as Llama 3.1 has it, with constants that other stacks hold fixed; gives the stretch.
pub(crate) fn llama31(scaling: &RopeScaling) -> Option<f64> {
    match *scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let fixed = low_freq_factor == 1.0 && high_freq_factor == 4.0 && original_max_positions == 8192;
            fixed.then_some(factor)
        }
        _ => None,
    }
}

/// A number that an argument of whole numbers takes.
pub(crate) fn whole(x: f64) -> bool {
    x.fract() == 0.0
}
