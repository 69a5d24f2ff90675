//! A chosen layout as arguments of other training stacks.

use spec::{Error, PipelineSchedule, Recompute, Result, Zero};

use crate::mesh::{Mesh, Order};
use crate::price::Problem;

/// Stacks that arguments can be written for.
pub const STACKS: [&str; 4] = ["megatron", "torchtitan", "deepspeed", "maxtext"];

/// The layout as arguments (or a configuration file) of `stack`.
///
/// # Errors
/// If the stack is unknown, or cannot express the layout: the message says which part.
pub fn emit(stack: &str, problem: &Problem, mesh: &Mesh) -> Result<String> {
    match stack {
        "megatron" => Ok(megatron(problem, mesh)),
        "torchtitan" => torchtitan(problem, mesh),
        "deepspeed" => deepspeed(problem, mesh),
        "maxtext" => maxtext(problem, mesh),
        other => {
            Err(Error::user(format!("unknown stack \"{other}\""))
                .hint(format!("one of {}", STACKS.join(", "))))
        }
    }
}

/// Ranks of the first replica by stage, as lines: which accelerator of which node holds what.
pub fn rank_map(problem: &Problem, mesh: &Mesh) -> String {
    let l = &mesh.layout;
    let per_node = problem.cluster.per_node.max(1);
    let mut out = String::from("rank node local tp cp dp pp\n");
    for rank in 0..mesh.world() {
        let (tp, rest) = (rank % l.tp, rank / l.tp);
        let (cp, rest) = (rest % mesh.cp, rest / mesh.cp);
        let (dp, pp) = match mesh.order {
            Order::TpCpDpPp => (rest % l.dp, rest / l.dp),
            Order::TpCpPpDp => (rest / l.pp, rest % l.pp),
        };
        out.push_str(&format!("{rank} {} {} {tp} {cp} {dp} {pp}\n", rank / per_node, rank % per_node));
    }
    out
}

fn megatron(p: &Problem, mesh: &Mesh) -> String {
    let l = &mesh.layout;
    let m = &p.shape.model;
    let mut args = vec![
        format!("--num-layers {}", m.layers),
        format!("--hidden-size {}", m.hidden),
        format!("--ffn-hidden-size {}", m.ffn),
        format!("--num-attention-heads {}", m.heads),
        format!("--kv-channels {}", m.head_dim),
        format!("--seq-length {}", p.sequence),
        format!("--micro-batch-size {}", l.micro_batch),
        format!("--global-batch-size {}", p.sequences),
        format!("--tensor-model-parallel-size {}", l.tp),
        format!("--pipeline-model-parallel-size {}", l.pp),
    ];
    if m.kv_heads != m.heads {
        args.push(format!("--group-query-attention --num-query-groups {}", m.kv_heads));
    }
    if m.activation.gated() {
        args.push(
            "--swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope".into(),
        );
    }
    if !m.tied_embeddings {
        args.push("--untie-embeddings-and-output-weights".into());
    }
    if mesh.cp > 1 {
        args.push(format!("--context-parallel-size {}", mesh.cp));
    }
    if let Some(e) = p.shape.experts {
        args.push(format!(
            "--num-experts {} --moe-router-topk {} --moe-ffn-hidden-size {}",
            e.count, e.top_k, e.ffn
        ));
        args.push(format!("--expert-model-parallel-size {} --moe-grouped-gemm", mesh.ep));
    }
    if l.chunks > 1 {
        args.push(format!("--num-virtual-stages-per-pipeline-rank {}", l.chunks));
    }
    if l.sequence_parallel {
        args.push("--sequence-parallel".into());
    }
    match l.zero {
        Zero::Off => {}
        Zero::Optimizer => {
            args.push("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".into())
        }
        Zero::Gradients => {
            args.push("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads".into())
        }
        Zero::Parameters => {
            args.push("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params".into())
        }
    }
    match l.recompute {
        Recompute::None => {}
        Recompute::Selective => {
            args.push("--recompute-granularity selective --recompute-modules layernorm mlp".into());
        }
        Recompute::Full => {
            args.push(
                "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".into(),
            );
        }
    }
    if mesh.order == Order::TpCpPpDp {
        args.push("--use-tp-pp-dp-mapping".into());
    }
    args.push(match mesh.format {
        spec::NumberFormat::Fp8 => "--bf16 --fp8-format hybrid".into(),
        spec::NumberFormat::Fp16 => "--fp16".into(),
        _ => "--bf16".into(),
    });
    args.join(" \\\n") + "\n"
}

/// Replicas that hold all state, and ranks that share it.
fn shards(mesh: &Mesh) -> (usize, usize) {
    match mesh.layout.zero {
        Zero::Off => (mesh.layout.dp, 1),
        _ => ((mesh.layout.dp * mesh.cp / mesh.shard.max(1)).max(1), mesh.shard.min(mesh.layout.dp)),
    }
}

fn torchtitan(p: &Problem, mesh: &Mesh) -> Result<String> {
    let l = &mesh.layout;
    if matches!(l.zero, Zero::Optimizer | Zero::Gradients) {
        return Err(Error::user(format!(
            "torchtitan has no ZeRO {}: it shards all state or none",
            u8::from(l.zero)
        ))
        .hint("plan with ZeRO 3 or none"));
    }
    let (replicas, shard) = shards(mesh);
    let schedule = match l.schedule {
        PipelineSchedule::Gpipe => "GPipe",
        PipelineSchedule::OneFOneB => "1F1B",
        PipelineSchedule::Interleaved => "Interleaved1F1B",
        PipelineSchedule::ZeroBubble => "InterleavedZeroBubble",
    };
    let mode = match l.recompute {
        Recompute::None => "none",
        Recompute::Selective => "selective",
        Recompute::Full => "full",
    };
    Ok(format!(
        "[training]\nlocal_batch_size = {}\nglobal_batch_size = {}\nseq_len = {}\n\n[parallelism]\n\
         data_parallel_replicate_degree = {replicas}\ndata_parallel_shard_degree = {shard}\n\
         tensor_parallel_degree = {}\npipeline_parallel_degree = {}\npipeline_parallel_schedule = \"{schedule}\"\n\
         pipeline_parallel_microbatch_size = {}\ncontext_parallel_degree = {}\nexpert_parallel_degree = {}\n\n\
         [activation_checkpoint]\nmode = \"{mode}\"\n",
        p.sequences / l.dp.max(1),
        p.sequences,
        p.sequence,
        l.tp,
        l.pp,
        l.micro_batch,
        mesh.cp,
        mesh.ep,
    ))
}

fn deepspeed(p: &Problem, mesh: &Mesh) -> Result<String> {
    let l = &mesh.layout;
    if l.zero >= Zero::Gradients && l.pp > 1 {
        return Err(Error::user(format!(
            "DeepSpeed runs no ZeRO {} with {} pipeline stages",
            u8::from(l.zero),
            l.pp
        ))
        .hint("plan with ZeRO 1 or one stage"));
    }
    if l.chunks > 1 || l.schedule == PipelineSchedule::ZeroBubble {
        return Err(Error::user("DeepSpeed runs 1F1B without chunks only").hint("plan with 1F1B"));
    }
    let steps = p.sequences / (l.dp * l.micro_batch).max(1);
    let file = serde_json::json!({
        "train_batch_size": p.sequences,
        "train_micro_batch_size_per_gpu": l.micro_batch,
        "gradient_accumulation_steps": steps,
        "zero_optimization": { "stage": u8::from(l.zero), "overlap_comm": true },
        "bf16": { "enabled": true },
        "tensor_parallel": { "autotp_size": l.tp },
        "pipeline": { "stages": l.pp },
    });
    Ok(format!("{file:#}\n"))
}

fn maxtext(p: &Problem, mesh: &Mesh) -> Result<String> {
    let l = &mesh.layout;
    if l.zero != Zero::Parameters && l.dp > 1 {
        return Err(Error::user(format!(
            "MaxText shards parameters over its fsdp axis, found ZeRO {}",
            u8::from(l.zero)
        ))
        .hint("plan with ZeRO 3"));
    }
    let (replicas, shard) = shards(mesh);
    let policy = match l.recompute {
        Recompute::None => "minimal",
        Recompute::Selective => "minimal_with_context",
        Recompute::Full => "full",
    };
    let per_device = (p.sequences as f64) / mesh.world() as f64;
    Ok(format!(
        "ici_fsdp_parallelism={shard} dcn_data_parallelism={replicas} ici_tensor_parallelism={} \
         ici_context_parallelism={} ici_expert_parallelism={} ici_pipeline_parallelism={} \
         per_device_batch_size={per_device} max_target_length={} remat_policy={policy}\n",
        l.tp, mesh.cp, mesh.ep, l.pp, p.sequence
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::PRIOR;
    use crate::shape::Shape;
    use crate::software::Software;
    use spec::{Catalog, Layout, NumberFormat};

    fn problem() -> Problem {
        let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(64)).unwrap();
        Problem {
            shape: Shape::find("gpt3-13b").unwrap().unwrap(),
            software: Software::usual(&cluster.accelerator.family),
            cluster,
            constants: PRIOR,
            sequence: 2048,
            sequences: 256,
        }
    }

    #[test]
    fn every_stack_gets_its_axes_or_a_reason() {
        let p = problem();
        let check = |layout: Layout, stack: &str, part: &str| {
            let mesh = Mesh::of(layout, NumberFormat::Bf16);
            let text = match emit(stack, &p, &mesh) {
                Ok(text) => text,
                Err(error) => format!("{error} {}", error.hint_text().unwrap_or_default()),
            };
            assert!(text.contains(part), "{stack}: {text}");
        };
        let base =
            Layout { dp: 8, tp: 4, pp: 2, micro_batch: 2, sequence_parallel: true, ..Layout::default() };
        let one = Layout { zero: Zero::Optimizer, ..base.clone() };
        let three = Layout { zero: Zero::Parameters, pp: 1, dp: 16, ..base };
        check(one.clone(), "megatron", "--tensor-model-parallel-size 4 \\\n--pipeline-model-parallel-size 2");
        check(one.clone(), "megatron", "--use-distributed-optimizer");
        check(one.clone(), "torchtitan", "no ZeRO 1");
        check(three.clone(), "torchtitan", "data_parallel_shard_degree = 16");
        check(one.clone(), "deepspeed", "\"stage\": 1");
        check(one.clone(), "maxtext", "plan with ZeRO 3");
        check(three, "maxtext", "ici_fsdp_parallelism=16 dcn_data_parallelism=1 ici_tensor_parallelism=4");
        check(one, "slurm", "one of megatron, torchtitan, deepspeed, maxtext");
    }

    #[test]
    fn every_rank_has_one_place() {
        let layout = Layout { dp: 4, tp: 8, pp: 2, ..Layout::default() };
        let text = rank_map(&problem(), &Mesh::of(layout, NumberFormat::Bf16));
        assert_eq!(text.lines().count(), 65);
        assert_eq!(text.lines().nth(9), Some("8 1 0 0 0 1 0"));
    }
}
