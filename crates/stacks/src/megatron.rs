use plan::estimate::{Problem, virtual_layers};
use plan::placement::{Order, Placement};
use plan::software::AttentionKernel;
use spec::{
    Activation, Layout, ModelSpec, NumberFormat, PipelineSchedule, Position, Recompute, Result, RopeScaling,
    Zero,
};

use crate::traits::{beyond_positions, llama31, unsaid, whole};
use crate::{Emitted, arguments, lacks, schedule_name};

const NAME: &str = "Megatron-LM";

pub(crate) fn emit(p: &Problem, placement: &Placement) -> Result<Emitted> {
    let l = &placement.layout;
    let mut args = model(p);
    let mut notes = Vec::new();
    args.extend(numbers(&p.shape.model, l.tp, &mut notes));
    notes.extend(beyond_positions(p));
    args.push(format!("--seq-length {}", p.sequence));
    args.push(format!("--max-position-embeddings {}", p.shape.model.max_positions().max(p.sequence)));
    args.push(format!("--micro-batch-size {}", l.micro_batch));
    args.push(format!("--global-batch-size {}", p.sequences));
    args.push(format!("--tensor-model-parallel-size {}", l.tp));
    args.push(format!("--pipeline-model-parallel-size {}", l.pp));
    args.push(format!("--context-parallel-size {}", l.cp));
    args.extend(heads(p, l)?);
    if p.shape.experts.is_some() {
        args.push(format!("--expert-model-parallel-size {}", l.ep));
        args.push("--expert-tensor-parallel-size 1".into());
    }
    if l.sequence_parallel {
        args.push("--sequence-parallel".into());
        if p.software.overlap_tp {
            args.push("--tp-comm-overlap".into());
        }
    }
    args.extend(stages(p, placement)?);
    if l.pp > 1 && l.chunks > 1 && !p.software.overlap_p2p {
        args.push("--no-overlap-p2p-communication".into());
    }
    args.extend(replicas(p, placement)?);
    args.extend(recompute(p, placement, &mut notes));
    args.extend(match placement.format {
        NumberFormat::Fp16 => vec!["--fp16".to_owned()],
        NumberFormat::Fp8 => vec!["--bf16".to_owned(), "--fp8-format hybrid".to_owned()],
        NumberFormat::Fp4 => vec!["--bf16".to_owned(), "--fp4-format e2m1".to_owned()],
        NumberFormat::Bf16 => vec!["--bf16".to_owned()],
        other => return Err(lacks(NAME, format!("{other} training"), "plan with --format bf16 or fp8")),
    });
    if placement.order == Order::TpCpPpDp {
        args.push("--use-tp-pp-dp-mapping".into());
    }
    let fsdp = l.zero >= Zero::Gradients;
    if fsdp {
        notes.push("leave CUDA_DEVICE_MAX_CONNECTIONS unset: Megatron-FSDP refuses 1".into());
    } else if l.tp > 1 || l.cp > 1 {
        notes.push("set CUDA_DEVICE_MAX_CONNECTIONS=1 before Blackwell".into());
    }
    Ok(Emitted { text: arguments(&args), notes })
}

/// All-to-all over heads, by Transformer Engine, which cuts sequences as its ring does and copies no heads.
fn heads(p: &Problem, l: &Layout) -> Result<Option<String>> {
    if !l.deals_heads() {
        return Ok(None);
    }
    let kv = if p.shape.latent.is_some() { p.shape.model.heads } else { p.shape.model.kv_heads };
    if !kv.is_multiple_of(l.tp * l.cp) {
        let what = format!("copies of {kv} key and value heads for cp={} by heads", l.cp);
        return Err(lacks(NAME, what, "plan with context=ring, or a smaller cp"));
    }
    if !p.sequence.is_multiple_of(2 * l.cp) {
        let what = format!("{} halves of a sequence of {} tokens for cp={}", 2 * l.cp, p.sequence, l.cp);
        return Err(lacks(NAME, what, "plan with a sequence that twice cp divides"));
    }
    Ok(Some("--cp-comm-type a2a".to_owned()))
}

fn model(p: &Problem) -> Vec<String> {
    let m = &p.shape.model;
    let mut args = vec![
        format!("--num-layers {}", m.layers),
        format!("--hidden-size {}", m.hidden),
        format!("--ffn-hidden-size {}", m.ffn),
        format!("--num-attention-heads {}", m.heads),
    ];
    match p.shape.latent {
        Some(a) => {
            args.push("--multi-latent-attention".to_owned());
            args.extend(a.query_rank.map(|rank| format!("--q-lora-rank {rank}")));
            args.extend([
                format!("--kv-lora-rank {}", a.kv_rank),
                format!("--qk-head-dim {}", a.nope_dim),
                format!("--qk-pos-emb-head-dim {}", a.rope_dim),
                format!("--v-head-dim {}", a.value_dim),
            ]);
        }
        None => {
            args.push(format!("--kv-channels {}", m.head_dim));
            if m.kv_heads != m.heads {
                args.push(format!("--group-query-attention --num-query-groups {}", m.kv_heads));
            }
        }
    }
    if let Some(e) = p.shape.experts {
        args.push(format!("--num-experts {} --moe-router-topk {}", e.count, e.top_k));
        args.push(format!("--moe-ffn-hidden-size {}", e.ffn));
        args.push("--moe-grouped-gemm --moe-token-dispatcher-type alltoall".into());
        if e.shared_ffn > 0 {
            args.push(format!("--moe-shared-expert-intermediate-size {}", e.shared_ffn));
        }
        if p.shape.expert_layers() < m.layers {
            let pattern: Vec<&str> =
                (0..m.layers).map(|i| if p.shape.has_experts(i) { "1" } else { "0" }).collect();
            args.push(format!("--moe-layer-freq '[{}]'", pattern.join(",")));
        }
        if e.router.expert_bias {
            let rate = e.router.bias_rate;
            args.push(format!("--moe-router-enable-expert-bias --moe-router-bias-update-rate {rate}"));
        }
    }
    if let Some(mtp) = m.mtp {
        args.push(format!("--mtp-num-layers 1 --mtp-loss-scaling-factor {}", mtp.weight));
    }
    args
}

/// What decides the numbers of the model beside its sizes; traits that have no argument go to the notes.
fn numbers(m: &ModelSpec, tp: usize, notes: &mut Vec<String>) -> Vec<String> {
    let mut unsaid_ones = Vec::new();
    let padded = padded_vocab(m, tp, notes);
    let mut args = vec![
        format!("--vocab-size {} --padded-vocab-size {padded}", m.vocab),
        format!("--norm-epsilon {}", m.norm_eps),
        format!("--init-method-std {}", m.init_std),
        // Both are 0.1 where nothing is said.
        "--hidden-dropout 0 --attention-dropout 0".to_owned(),
    ];
    if m.norm == spec::NormKind::Rms {
        args.push("--normalization RMSNorm".into());
    }
    if m.qk_norm {
        args.push("--qk-layernorm".into());
    }
    if !m.tied_embeddings {
        args.push("--untie-embeddings-and-output-weights".into());
    }
    // All linears have biases, or none but queries, keys and values.
    if !m.mlp_bias {
        args.push("--disable-bias-linear".into());
        if m.qkv_bias {
            args.push("--add-qkv-bias".into());
        }
    } else if !m.qkv_bias {
        unsaid_ones.push("qkv_bias");
    }
    if m.attn_out_bias != m.mlp_bias {
        unsaid_ones.push("attn_out_bias");
    }
    args.extend(activation(m, &mut unsaid_ones));
    args.extend(positions(m, &mut unsaid_ones));
    notes.extend(unsaid(NAME, m, &unsaid_ones));
    args
}

/// Rows of an embedding that `tp` ranks share evenly; a note where they are more than ids.
pub(crate) fn padded_vocab(m: &ModelSpec, tp: usize, notes: &mut Vec<String>) -> usize {
    let padded = m.vocab.next_multiple_of(tp.max(1));
    if padded != m.vocab {
        notes
            .push(format!("the embedding has {padded} rows for {} ids, so that tp={tp} divides it", m.vocab));
    }
    padded
}

/// The argument for the activation, where it takes one.
pub(crate) fn activation(m: &ModelSpec, unsaid_ones: &mut Vec<&'static str>) -> Option<String> {
    match m.activation {
        Activation::SwiGlu => return Some("--swiglu".into()),
        Activation::Gelu => return Some("--no-bias-gelu-fusion".into()),
        // The fused kernel takes the tanh approximation, and wants a bias.
        Activation::GeluTanh if m.mlp_bias => {}
        Activation::GeluTanh | Activation::SwiGluClamped => unsaid_ones.push("activation"),
    }
    None
}

fn positions(m: &ModelSpec, unsaid_ones: &mut Vec<&'static str>) -> Vec<String> {
    let rope = match &m.position {
        Position::Learned { .. } => return vec!["--position-embedding-type learned_absolute".into()],
        Position::Rope(rope) => rope,
    };
    let latent = m.latent.is_some();
    let kind = |kind: &str| match latent {
        true => format!("--position-embedding-type rope --rope-type {kind}"),
        false => format!("--position-embedding-type {kind}"),
    };
    let mut args = Vec::new();
    if whole(rope.theta) {
        args.push(format!("--rotary-base {}", rope.theta));
    } else {
        unsaid_ones.push("rope_theta");
    }
    match rope.scaling {
        RopeScaling::Default => args.push(kind("rope")),
        RopeScaling::Linear { factor } if whole(factor) && !latent => {
            args.push(kind("rope"));
            args.push(format!("--rotary-seq-len-interpolation-factor {factor}"));
        }
        // Latent attention takes the constants of its own class.
        RopeScaling::Yarn(y)
            if y.truncate
                && (!latent || (y.beta_fast, y.beta_slow, y.original_max_positions) == (32.0, 1.0, 4096)) =>
        {
            args.push(kind("yarn"));
            let (factor, mscale, all) = (y.factor, rope.scaling.mscale(), y.mscale_all_dim);
            args.push(format!("--rotary-scaling-factor {factor} --mscale {mscale} --mscale-all-dim {all}"));
            if !latent {
                args.push(format!("--yarn-original-max-position-embeddings {}", y.original_max_positions));
                args.push(format!("--yarn-beta-fast {} --yarn-beta-slow {}", y.beta_fast, y.beta_slow));
            }
        }
        ref scaling => {
            args.push(kind("rope"));
            match llama31(scaling).filter(|_| !latent) {
                Some(factor) => args.push(format!("--use-rope-scaling --rope-scaling-factor {factor}")),
                None => unsaid_ones.push("rope_scaling"),
            }
        }
    }
    args
}

/// The schedule, and how layers are spread over stages and chunks.
fn stages(p: &Problem, placement: &Placement) -> Result<Vec<String>> {
    let l = &placement.layout;
    if l.pp == 1 {
        return Ok(Vec::new());
    }
    if !matches!(l.schedule, PipelineSchedule::OneFOneB | PipelineSchedule::Interleaved) {
        return Err(lacks(
            NAME,
            format!("{} schedule", schedule_name(l.schedule)),
            "it runs 1F1B and interleaved 1F1B: plan with --layout ...,schedule=1f1b; Megatron-DeepSpeed has ZB-H1 \
             (--emit megatron-deepspeed)",
        ));
    }
    let virtuals = l.pp * l.chunks;
    let mut args = Vec::new();
    let dealt = virtual_layers(p, placement);
    let last = virtuals - 1;
    // The embedding and the head counted, which is how Megatron spares the ends.
    let counted = |v: usize| dealt[v] + usize::from(v == 0) + usize::from(v == last);
    let even = dealt.iter().all(|n| *n == dealt[0]);
    if !even && (1..virtuals).all(|v| counted(v) == counted(0)) {
        args.push(
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split".to_owned(),
        );
    } else if !even {
        let of = |(v, n): (usize, &usize)| {
            let (first, end) = (if v == 0 { "E" } else { "" }, if v == last { "L" } else { "" });
            let layers = if *n == 0 { String::new() } else { format!("t*{n}") };
            format!("{first}{layers}{end}")
        };
        let text: Vec<String> = dealt.iter().enumerate().map(of).collect();
        args.push(format!("--pipeline-model-parallel-layout '{}'", text.join("|")));
        return Ok(args);
    }
    if l.chunks > 1 {
        args.push(format!(
            "--num-layers-per-virtual-pipeline-stage {}",
            if even { dealt[0] } else { counted(0) }
        ));
    }
    Ok(args)
}

fn replicas(p: &Problem, placement: &Placement) -> Result<Vec<String>> {
    let l = &placement.layout;
    let replicas = l.dp * l.cp;
    let mut args: Vec<String> = Vec::new();
    match l.zero {
        Zero::Off => {
            if p.software.overlap_grads && replicas > 1 {
                args.push("--overlap-grad-reduce".into());
            }
        }
        Zero::Optimizer => {
            args.push("--use-distributed-optimizer".into());
            if p.software.overlap_grads {
                args.push("--overlap-grad-reduce".into());
                if p.software.overlap_params {
                    args.push("--overlap-param-gather".into());
                }
            }
            if l.shard_dp() < l.dp {
                args.push(format!("--num-distributed-optimizer-instances {}", l.dp / l.shard_dp()));
            }
        }
        Zero::Gradients | Zero::Parameters => {
            if l.shard_dp() < l.dp {
                return Err(lacks(
                    NAME,
                    "ZeRO 2 or 3 over a part of the replicas",
                    "leave shard out of the layout",
                ));
            }
            let strategy = if l.zero == Zero::Gradients { "optim_grads" } else { "optim_grads_params" };
            args.push("--use-megatron-fsdp".into());
            args.push(format!("--data-parallel-sharding-strategy {strategy}"));
            args.push("--use-distributed-optimizer --ckpt-format fsdp_dtensor".into());
            args.push("--no-gradient-accumulation-fusion".into());
            args.push("--overlap-grad-reduce --overlap-param-gather".into());
        }
    }
    if p.software.grad_wire_bytes < 4.0 && l.zero < Zero::Gradients && replicas > 1 {
        args.push("--grad-reduce-in-bf16".into());
    }
    Ok(args)
}

fn recompute(p: &Problem, placement: &Placement, notes: &mut Vec<String>) -> Vec<String> {
    match placement.layout.recompute {
        Recompute::None => Vec::new(),
        Recompute::Full => vec![
            "--recompute-granularity full".into(),
            "--recompute-method uniform".into(),
            "--recompute-num-layers 1".into(),
        ],
        Recompute::Selective => {
            let modules = match (p.software.attention == AttentionKernel::Unfused, p.shape.experts) {
                (true, _) => "core_attn",
                (false, Some(_)) => "layernorm moe_act",
                (false, None) => {
                    notes.push(
                        "recompute: Megatron-LM has no recompute of the activation alone; `mlp` runs the first \
                         product of the feed-forward layer again too, which is slower than priced"
                            .into(),
                    );
                    "layernorm mlp"
                }
            };
            vec!["--recompute-granularity selective".into(), format!("--recompute-modules {modules}")]
        }
    }
}
