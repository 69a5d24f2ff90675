use plan::estimate::Problem;
use plan::placement::{Order, Placement};
use spec::{Layout, NumberFormat, PipelineSchedule, Recompute, Result, Zero};

use crate::{Emitted, lacks, schedule_name};

const NAME: &str = "torchtitan";

pub(crate) fn emit(p: &Problem, placement: &Placement) -> Result<Emitted> {
    let l = &placement.layout;
    let shard = shard(placement)?;
    let mut notes = vec![
        "for torchtitan 0.2.2, the last release with TOML; add [model] name and flavor of this model"
            .to_owned(),
        crate::traits::all_unsaid(&p.shape.model),
    ];
    let mut out = String::new();
    if placement.format != NumberFormat::Bf16 {
        if placement.format != NumberFormat::Fp8 {
            return Err(lacks(
                NAME,
                format!("{} training", placement.format),
                "plan with --format bf16 or fp8",
            ));
        }
        out += "[model]\nconverters = [\"quantize.linear.float8\"]\n\n[quantize.linear.float8]\n\
                enable_fsdp_float8_all_gather = true\nprecompute_float8_dynamic_scale_for_fsdp = true\n\n";
    }
    // Without stages one forward pass takes the local batch, and the global batch is reached by accumulation.
    let local = if l.pp > 1 { p.sequences / l.dp.max(1) } else { l.micro_batch };
    out += &format!(
        "[training]\nlocal_batch_size = {local}\nglobal_batch_size = {}\nseq_len = {}\n\
         mixed_precision_param = \"bfloat16\"\nmixed_precision_reduce = \"float32\"\n\n\
         [parallelism]\ndata_parallel_replicate_degree = {}\ndata_parallel_shard_degree = {shard}\n\
         fsdp_reshard_after_forward = \"{}\"\ntensor_parallel_degree = {}\ncontext_parallel_degree = {}\n",
        p.sequences,
        p.sequence,
        l.dp / shard.max(1),
        if l.zero == Zero::Gradients { "never" } else { "always" },
        l.tp,
        l.cp,
    );
    if p.shape.experts.is_some() {
        out += &format!("expert_parallel_degree = {}\nexpert_tensor_parallel_degree = 1\n", l.ep);
    }
    out += &format!("pipeline_parallel_degree = {}\n", l.pp);
    if l.pp > 1 {
        out += &pipeline(l, p.shape.model.layers)?;
    }
    let mode = match l.recompute {
        Recompute::None => "mode = \"none\"",
        Recompute::Selective => {
            notes.push("selective recompute by op keeps products and attention, as priced".to_owned());
            "mode = \"selective\"\nselective_ac_option = \"op\""
        }
        Recompute::Full => "mode = \"full\"",
    };
    out += &format!("\n[activation_checkpoint]\n{mode}\n");
    Ok(Emitted { text: out, notes })
}

/// Ranks over which it shards parameters.
fn shard(placement: &Placement) -> Result<usize> {
    let l = &placement.layout;
    let refuse = |what: String, instead: &str| Err(lacks(NAME, what, instead));
    if l.zero == Zero::Optimizer {
        return refuse(
            "ZeRO 1: it shards parameters and gathers them for forward only (2), for both passes (3), or shards nothing"
                .into(),
            "plan with --software torchtitan, or --layout ...,zero=3",
        );
    }
    if l.zero == Zero::Off && l.cp > 1 {
        return refuse("replicas beside context parallelism: it shards over cp".into(), "plan with zero=3");
    }
    if l.deals_heads() {
        return refuse("all-to-all over heads".into(), "plan with context=ring");
    }
    if l.tp > 1 && !l.sequence_parallel {
        return refuse(
            "tensor parallelism without sequence parallelism".into(),
            "plan with sequence_parallel=true",
        );
    }
    if placement.order != Order::TpCpDpPp {
        return refuse(
            "order in which stages lie nearer than replicas".into(),
            "plan with order=tp-cp-dp-pp",
        );
    }
    Ok(if l.zero == Zero::Off { 1 } else { l.shard_dp() })
}

/// The schedule's keys.
fn pipeline(l: &Layout, layers: usize) -> Result<String> {
    let refuse = |what: String, instead: &str| Err(lacks(NAME, what, instead));
    let (name, virtuals) = match l.schedule {
        PipelineSchedule::Gpipe => ("GPipe", l.pp),
        PipelineSchedule::OneFOneB => ("1F1B", l.pp),
        PipelineSchedule::Interleaved => ("Interleaved1F1B", l.pp * l.chunks),
        PipelineSchedule::ZeroBubble => {
            return refuse(
                format!("{} schedule with one chunk a stage", schedule_name(l.schedule)),
                "it runs GPipe, 1F1B and interleaved 1F1B: plan with --layout ...,schedule=1f1b",
            );
        }
    };
    // It counts virtual stages as (layers + what the ends weigh) / layers a stage, rounded up.
    let ends = if layers.is_multiple_of(virtuals) { 0 } else { 1 };
    let per_stage = (layers + 2 * ends).div_ceil(virtuals);
    if (layers + 2 * ends).div_ceil(per_stage) != virtuals {
        return refuse(
            format!("split of {layers} layers into {virtuals} stages"),
            "plan with a pp x chunks that divides the layers, or the layers and two",
        );
    }
    Ok(format!(
        "pipeline_parallel_schedule = \"{name}\"\npipeline_parallel_microbatch_size = {}\n\
         pipeline_parallel_layers_per_stage = {per_stage}\n\
         pipeline_parallel_first_stage_less_layers = {ends}\n\
         pipeline_parallel_last_stage_less_layers = {ends}\n",
        l.micro_batch,
    ))
}
