use std::fmt::Write;

use plan::estimate::Problem;
use plan::placement::{Order, Placement};
use spec::{
    Activation, ModelSpec, NormKind, NumberFormat, PipelineSchedule, Position, Recompute, Result,
    RopeScaling, Yarn, Zero,
};

use crate::traits::{beyond_positions, llama31, unsaid};
use crate::{Emitted, lacks, schedule_name};

const NAME: &str = "MaxText";

pub(crate) fn emit(p: &Problem, placement: &Placement) -> Result<Emitted> {
    let l = &placement.layout;
    let micro_batches = p.sequences / (l.dp * l.micro_batch).max(1);
    let axes = axes(p, placement, micro_batches)?;
    let mut out = String::from("base_config: \"base.yml\"\n");
    let domain = p.cluster.scale_up.domain.min(l.world());
    lay(axes, domain, &mut out)?;
    // With stages one pass takes the whole batch; without them the gradient is accumulated over passes.
    let (passes, batch) = if l.pp > 1 { (1, p.sequences) } else { (micro_batches, l.dp * l.micro_batch) };
    let per_device = batch as f64 / l.world() as f64;
    let _ = writeln!(out, "per_device_batch_size: {per_device:?}");
    let _ = writeln!(out, "gradient_accumulation_steps: {passes}");
    let _ = writeln!(out, "max_target_length: {}", p.sequence);
    if l.pp > 1 {
        let _ = writeln!(out, "num_pipeline_microbatches: {micro_batches}");
        let _ = writeln!(out, "num_layers_per_pipeline_stage: {}", p.shape.model.layers / l.pp);
    }
    let _ = writeln!(out, "shard_optimizer_over_data: {}", l.zero == Zero::Optimizer);
    let policy = match l.recompute {
        Recompute::None => "none",
        Recompute::Selective => "minimal_with_context",
        Recompute::Full => "full",
    };
    let _ = writeln!(out, "remat_policy: \"{policy}\"");
    let _ = writeln!(out, "dtype: \"bfloat16\"");
    match placement.format {
        NumberFormat::Bf16 => {}
        NumberFormat::Fp8 => out += "quantization: \"fp8\"\n",
        NumberFormat::Int8 => out += "quantization: \"int8\"\n",
        other => {
            return Err(lacks(NAME, format!("{other} training"), "plan with --format bf16, fp8 or int8"));
        }
    }
    let block = block(p);
    model(p, block, &mut out);
    let mut notes =
        vec![format!("one slice is {domain} accelerators; train with this file as the configuration")];
    numbers(&p.shape.model, block, &mut out, &mut notes);
    notes.extend(beyond_positions(p));
    Ok(Emitted { text: out, notes })
}

/// Its axes, innermost first.
fn axes(p: &Problem, placement: &Placement, micro_batches: usize) -> Result<Vec<(&'static str, usize)>> {
    let l = &placement.layout;
    let refuse = |what: String, instead: &str| Err(lacks(NAME, what, instead));
    if l.zero == Zero::Gradients {
        return refuse("ZeRO 2".into(), "plan with zero=1 (shard_optimizer_over_data) or zero=3 (fsdp)");
    }
    if l.pp > 1 && l.schedule != PipelineSchedule::Gpipe {
        return refuse(
            format!("{} schedule: its pipeline runs all forward passes first", schedule_name(l.schedule)),
            "plan with pp=1, or price --layout ...,schedule=gpipe",
        );
    }
    if l.pp > 1 && !(micro_batches.is_multiple_of(l.pp) && p.shape.model.layers.is_multiple_of(l.pp)) {
        return refuse(
            format!("{micro_batches} micro-batches of {} layers over {} stages", p.shape.model.layers, l.pp),
            "plan with a pp that divides both",
        );
    }
    if l.deals_heads() {
        return refuse("all-to-all over heads".into(), "plan with context=ring");
    }
    let replicas = l.dp;
    if l.zero == Zero::Optimizer && l.shard_dp() < l.dp {
        return refuse(
            "ZeRO 1 over a part of the replicas: shard_optimizer_over_data takes all".into(),
            "leave shard out of the layout, or plan with zero=3 (fsdp beside data)",
        );
    }
    let fsdp = if l.zero == Zero::Parameters { l.shard_dp() } else { 1 };
    let sharded = if l.zero == Zero::Parameters { fsdp } else { replicas };
    if !sharded.is_multiple_of(l.ep) {
        return refuse(
            format!("ep={} beside {sharded} replicas: its expert axis is a part of them", l.ep),
            "plan with an ep that divides dp",
        );
    }
    // The expert axis takes its ranks from the axis that shards, or else from plain replicas.
    let (data, fsdp) = match l.zero {
        Zero::Parameters => (replicas / fsdp, fsdp / l.ep),
        _ => (replicas / l.ep, 1),
    };
    let tensor = if l.sequence_parallel { "tensor_sequence" } else { "tensor" };
    let mut axes = vec![(tensor, l.tp), ("context", l.cp)];
    let near = [("expert", l.ep), ("fsdp", fsdp), ("data", data)];
    match placement.order {
        Order::TpCpDpPp => {
            axes.extend(near);
            axes.push(("pipeline", l.pp));
        }
        Order::TpCpPpDp => {
            axes.push(("pipeline", l.pp));
            axes.extend(near);
        }
    }
    Ok(axes)
}

/// Lays axes on slices of `domain` accelerators and on the network between them.
fn lay(axes: Vec<(&str, usize)>, domain: usize, out: &mut String) -> Result<()> {
    let mut room = domain;
    for (name, size) in axes {
        let inside = (1..=size.min(room)).rev().find(|d| size.is_multiple_of(*d) && room.is_multiple_of(*d));
        let inside = inside.unwrap_or(1);
        room /= inside;
        // Writing to a string cannot fail.
        let _ = writeln!(out, "ici_{name}_parallelism: {inside}");
        let _ = writeln!(out, "dcn_{name}_parallelism: {}", size / inside);
    }
    if room > 1 {
        return Err(lacks(
            NAME,
            format!("way to lay these axes on slices of {domain}: {room} places are left over"),
            "plan with axes whose sizes divide the slice",
        ));
    }
    Ok(())
}

/// The kind of layer that says most of the model.
fn block(p: &Problem) -> &'static str {
    let m = &p.shape.model;
    match (p.shape.latent, p.shape.experts, m.activation.gated()) {
        (Some(_), _, _) => "deepseek",
        (None, Some(_), _) if m.qk_norm => "qwen3_moe",
        (None, Some(_), _) => "mixtral",
        (None, None, true) if m.qkv_bias => "qwen2",
        (None, None, true) if m.qk_norm => "qwen3",
        (None, None, true) => "llama2",
        (None, None, false) => "gpt3",
    }
}

/// What decides the numbers of the model beside its sizes; traits that have no key go to the notes.
fn numbers(m: &ModelSpec, block: &str, out: &mut String, notes: &mut Vec<String>) {
    // Its weights start from the fan-in of each product.
    let mut unsaid_ones = vec!["init_std", "mtp"];
    let gpt3 = block == "gpt3";
    if (m.norm == NormKind::Layer) != gpt3 {
        unsaid_ones.push("norm");
    }
    if m.activation == Activation::Gelu {
        unsaid_ones.push("activation");
    }
    let qkv_bias = gpt3 || (block == "qwen2" && m.qkv_bias);
    let biases = [
        ("qkv_bias", m.qkv_bias, qkv_bias),
        ("attn_out_bias", m.attn_out_bias, gpt3),
        ("mlp_bias", m.mlp_bias, gpt3),
    ];
    unsaid_ones.extend(biases.iter().filter(|(_, own, its)| own != its).map(|(name, ..)| *name));
    let normed = m.qk_norm && ["qwen2", "qwen3", "qwen3_moe"].contains(&block);
    unsaid_ones.extend((m.qk_norm != normed).then_some("qk_norm"));
    let _ = write!(
        out,
        "normalization_layer_epsilon: {}\ndropout_rate: 0\nenable_dropout: false\nattention_bias: {}\n\
         use_qk_norm: {normed}\nnormalize_embedding_logits: false\n",
        m.norm_eps,
        block == "qwen2" && m.qkv_bias,
    );
    match &m.position {
        Position::Learned { max_positions } => {
            let _ = writeln!(out, "trainable_position_size: {max_positions}");
            if !gpt3 {
                unsaid_ones.push("learned_positions");
            }
        }
        Position::Rope(rope) => {
            let _ = writeln!(out, "rope_max_timescale: {}", rope.theta);
            let _ = match rope.scaling {
                RopeScaling::Default => writeln!(out, "rope_type: \"default\""),
                RopeScaling::Linear { factor } => {
                    writeln!(out, "rope_type: \"default\"\nrope_linear_scaling_factor: {factor}")
                }
                RopeScaling::Yarn(
                    y @ Yarn { attention_factor: None, truncate: true, mscale_all_dim: 0.0, .. },
                ) => {
                    writeln!(
                        out,
                        "rope_type: \"yarn\"\nrope_factor: {}\nbeta_fast: {}\nbeta_slow: {}\n\
                         original_max_position_embeddings: {}\n\
                         max_position_embeddings: {}\nrope_attention_scaling: true",
                        y.factor, y.beta_fast, y.beta_slow, y.original_max_positions, rope.max_positions
                    )
                }
                ref scaling if llama31(scaling) == Some(8.0) => writeln!(out, "rope_type: \"llama3.1\""),
                _ => {
                    unsaid_ones.push("rope_scaling");
                    Ok(())
                }
            };
            if gpt3 {
                unsaid_ones.extend(["rope_theta", "rope_scaling"]);
            }
        }
    }
    notes.extend(unsaid(NAME, m, &unsaid_ones));
}

fn model(p: &Problem, block: &str, out: &mut String) {
    let m = &p.shape.model;
    let _ = write!(
        out,
        "decoder_block: \"{block}\"\nbase_emb_dim: {}\nbase_num_query_heads: {}\nbase_num_kv_heads: {}\n\
         base_mlp_dim: {}\nbase_num_decoder_layers: {}\nhead_dim: {}\nvocab_size: {}\nlogits_via_embedding: {}\n\
         mlp_activations: {}\n",
        m.hidden,
        m.heads,
        m.kv_heads,
        m.ffn,
        m.layers,
        m.head_dim,
        m.vocab,
        m.tied_embeddings,
        if m.activation.gated() { "[\"silu\", \"linear\"]" } else { "[\"gelu\"]" },
    );
    if let Some(e) = p.shape.experts {
        let _ = write!(
            out,
            "num_experts: {}\nnum_experts_per_tok: {}\nbase_moe_mlp_dim: {}\nshared_experts: {}\n\
             first_num_dense_layers: {}\ninterleave_moe_layer_step: {}\n",
            e.count,
            e.top_k,
            e.ffn,
            e.shared_ffn / e.ffn.max(1),
            e.dense_layers,
            e.every,
        );
    }
    if let Some(a) = p.shape.latent {
        let _ = write!(
            out,
            "attention_type: \"mla\"\nq_lora_rank: {}\nkv_lora_rank: {}\nqk_nope_head_dim: {}\n\
             qk_rope_head_dim: {}\nv_head_dim: {}\n",
            a.query_rank.unwrap_or(0),
            a.kv_rank,
            a.nope_dim,
            a.rope_dim,
            a.value_dim,
        );
    }
}
