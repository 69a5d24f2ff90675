use plan::estimate::Problem;
use plan::placement::{Order, Placement};
use serde_json::json;
use spec::{ModelSpec, NumberFormat, PipelineSchedule, Position, Recompute, Result, RopeScaling, Zero};

use crate::megatron::{activation, padded_vocab};
use crate::traits::{all_unsaid, beyond_positions, unsaid, whole};
use crate::{Emitted, arguments, lacks, schedule_name};

/// A DeepSpeed configuration: for models whose stages and checkpoints are set in code.
pub(crate) fn config(p: &Problem, placement: &Placement) -> Result<Emitted> {
    let l = &placement.layout;
    common("DeepSpeed", placement)?;
    let refuse = |what: String, instead: &str| Err(lacks("DeepSpeed", what, instead));
    if l.sequence_parallel {
        return refuse(
            "sequence parallelism beside automatic tensor parallelism".into(),
            "plan with sequence_parallel=false, or --emit megatron-deepspeed",
        );
    }
    if l.schedule == PipelineSchedule::ZeroBubble {
        return refuse(
            "zero-bubble schedule".into(),
            "plan with schedule=1f1b, or --emit megatron-deepspeed",
        );
    }
    if l.ep > 1 {
        return refuse(
            "expert parallelism by configuration alone".into(),
            "plan with ep=1, or --emit megatron-deepspeed",
        );
    }
    let mut file = base(p, placement);
    if l.tp > 1 {
        file["tensor_parallel"] = json!({ "autotp_size": l.tp });
    }
    let mut notes = vec![all_unsaid(&p.shape.model)];
    if l.cp > 1 {
        file["sequence_parallel_size"] = json!(l.cp);
        file["data_parallel_size"] = json!(l.dp);
        notes.push(
            "in the model: attention inside DistributedAttention, and each rank's part of a sequence".into(),
        );
    }
    if l.pp > 1 {
        notes.push(format!("in the model: PipelineModule(..., num_stages={})", l.pp));
    }
    match l.recompute {
        Recompute::None => {}
        Recompute::Selective => notes.push("in the model: checkpoint norms and activations".into()),
        Recompute::Full => notes.push("in the model: checkpoint every layer".into()),
    }
    Ok(Emitted { text: format!("{file:#}\n"), notes })
}

const MEGATRON: &str = "Megatron-DeepSpeed";

/// Arguments of Megatron-DeepSpeed; its configuration file goes to the notes.
pub(crate) fn megatron(p: &Problem, placement: &Placement) -> Result<Emitted> {
    let l = &placement.layout;
    let m = &p.shape.model;
    common(MEGATRON, placement)?;
    if p.shape.latent.is_some() {
        return Err(lacks(MEGATRON, "latent attention", "emit for megatron"));
    }
    let mut args = vec![
        format!("--num-layers {}", m.layers),
        format!("--hidden-size {}", m.hidden),
        format!("--ffn-hidden-size {}", m.ffn),
        format!("--num-attention-heads {}", m.heads),
        format!("--kv-channels {}", m.head_dim),
        format!("--seq-length {}", p.sequence),
        format!("--max-position-embeddings {}", m.max_positions().max(p.sequence)),
        format!("--micro-batch-size {}", l.micro_batch),
        format!("--global-batch-size {}", p.sequences),
        format!("--tensor-model-parallel-size {}", l.tp),
        format!("--pipeline-model-parallel-size {}", l.pp),
    ];
    if l.pp == 1 {
        args.push("--no-pipeline-parallel".into());
    }
    if l.cp > 1 {
        args.push(format!("--ds-sequence-parallel-size {}", l.cp));
    }
    if l.schedule == PipelineSchedule::ZeroBubble && l.pp > 1 {
        args.push("--enable-zbh1-pipeline".into());
    }
    if m.kv_heads != m.heads {
        args.push(format!("--num-key-value-heads {}", m.kv_heads));
    }
    let mut notes = vec![format!("ds_config.json: {}", base(p, placement))];
    args.extend(numbers(MEGATRON, m, l.tp, &mut notes));
    notes.extend(beyond_positions(p));
    args.extend(experts(p, l.ep)?);
    if l.sequence_parallel {
        args.push("--sequence-parallel".into());
    }
    args.push(if placement.format == NumberFormat::Fp16 { "--fp16".into() } else { "--bf16".into() });
    match l.recompute {
        Recompute::None => {}
        Recompute::Selective => args.push("--recompute-granularity selective".into()),
        Recompute::Full => {
            args.push("--recompute-granularity full --recompute-method uniform".into());
            args.push("--recompute-num-layers 1 --deepspeed-activation-checkpointing".into());
        }
    }
    args.push(format!("--zero-stage {}", u8::from(l.zero)));
    args.push("--deepspeed --deepspeed_config ds_config.json".into());
    Ok(Emitted { text: arguments(&args), notes })
}

/// What decides the numbers of the model beside its sizes; traits that have no argument go to the notes.
fn numbers(name: &str, m: &ModelSpec, tp: usize, notes: &mut Vec<String>) -> Vec<String> {
    let mut unsaid_ones = vec!["mtp"];
    let mut args = vec![
        format!("--vocab-size {} --make-vocab-size-divisible-by 1", m.vocab),
        format!("--layernorm-epsilon {}", m.norm_eps),
        format!("--init-method-std {}", m.init_std),
        // Both are 0.1 where nothing is said.
        "--hidden-dropout 0 --attention-dropout 0".to_owned(),
    ];
    padded_vocab(m, tp, notes);
    if let Position::Rope(rope) = &m.position {
        args.push("--use-rotary-position-embeddings".into());
        if whole(rope.theta) {
            args.push(format!("--rotary-position-embeddings-theta {}", rope.theta));
        } else {
            unsaid_ones.push("rope_theta");
        }
        if rope.scaling != RopeScaling::Default {
            unsaid_ones.push("rope_scaling");
        }
    }
    if m.norm == spec::NormKind::Rms {
        args.push("--normalization rmsnorm".into());
    }
    args.extend(activation(m, &mut unsaid_ones));
    // All linears have biases, or none.
    if !m.mlp_bias {
        args.push("--disable-bias-linear".into());
    }
    let others = [("qkv_bias", m.qkv_bias), ("attn_out_bias", m.attn_out_bias)];
    unsaid_ones.extend(others.iter().filter(|(_, has)| *has != m.mlp_bias).map(|(name, _)| *name));
    if m.qk_norm {
        unsaid_ones.push("qk_norm");
    }
    if !m.tied_embeddings {
        args.push("--untie-embeddings-and-output-weights".into());
    }
    notes.extend(unsaid(name, m, &unsaid_ones));
    args
}

fn experts(p: &Problem, ep: usize) -> Result<Option<String>> {
    let Some(e) = p.shape.experts else { return Ok(None) };
    if e.top_k > 2 || e.shared_ffn > 0 || e.ffn != p.shape.model.ffn {
        return Err(lacks(
            MEGATRON,
            "experts beyond the best two, shared ones, or of another width than the dense layers",
            "emit for megatron",
        ));
    }
    Ok(Some(format!("--num-experts {} --topk {} --moe-expert-parallel-size {ep}", e.count, e.top_k)))
}

/// What neither can express.
fn common(name: &str, placement: &Placement) -> Result<()> {
    let l = &placement.layout;
    let refuse = |what: String, instead: &str| Err(lacks(name, what, instead));
    if l.zero >= Zero::Gradients && l.pp > 1 {
        return refuse(format!("ZeRO {} with pipeline stages", u8::from(l.zero)), "plan with zero=1 or pp=1");
    }
    if l.chunks > 1 || l.schedule == PipelineSchedule::Gpipe && l.pp > 1 {
        return refuse(format!("{} schedule", schedule_name(l.schedule)), "plan with schedule=1f1b");
    }
    if l.has_ring() {
        return refuse(
            "ring of context-parallel ranks (it has all-to-all over heads)".into(),
            "plan with context=heads, or cp=1",
        );
    }
    if l.cp > 1 && l.tp * l.pp > 1 {
        return refuse(
            "all-to-all over heads beside tensor or pipeline parallelism".into(),
            "plan with tp=1 and pp=1, or emit for megatron",
        );
    }
    if l.dp > 1 && l.pp > 1 && placement.order != Order::TpCpDpPp {
        return refuse(
            "order in which stages lie nearer than replicas".into(),
            "plan with order=tp-cp-dp-pp",
        );
    }
    if !matches!(placement.format, NumberFormat::Bf16 | NumberFormat::Fp16) {
        return refuse(format!("{} training", placement.format), "plan with --format bf16");
    }
    if l.shard_dp() < l.dp && l.zero != Zero::Parameters {
        return refuse(
            format!("ZeRO {} over a part of the replicas", u8::from(l.zero)),
            "leave shard out of the layout",
        );
    }
    Ok(())
}

fn base(p: &Problem, placement: &Placement) -> serde_json::Value {
    let l = &placement.layout;
    let mut zero = json!({ "stage": u8::from(l.zero) });
    if l.zero != Zero::Off {
        zero["overlap_comm"] = json!(p.software.overlap_grads);
        zero["contiguous_gradients"] = json!(true);
    }
    if l.zero == Zero::Parameters && l.shard_dp() < l.dp {
        zero["mics_shard_size"] = json!(l.shard_dp());
    }
    let mut file = json!({
        "train_batch_size": p.sequences,
        "train_micro_batch_size_per_gpu": l.micro_batch,
        "gradient_accumulation_steps": p.sequences / (l.dp * l.micro_batch).max(1),
        "zero_optimization": zero,
    });
    file[if placement.format == NumberFormat::Fp16 { "fp16" } else { "bf16" }] = json!({ "enabled": true });
    file
}
