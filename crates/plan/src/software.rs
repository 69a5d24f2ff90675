//! What a training stack does with a program: which kernels, what it overlaps, what it keeps.

mod pool;

use serde::Serialize;
use spec::{Family, Tolerance};

pub use pool::Pool;

use crate::storage::{CHECKPOINT_BYTES_PER_PARAM, OWN_BYTES_PER_PARAM};

/// A generation of a training stack. Facts about code, not fitted constants; those are in [`crate::calibration`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Software {
    /// Its name; constants are fitted per generation.
    pub name: &'static str,
    /// What it is a generation of; constants that all generations share are fitted per lineage.
    pub lineage: &'static str,
    /// Which kernels compute attention.
    pub attention: AttentionKernel,
    /// Full recompute runs the whole layer again, also what backward does not need.
    pub recompute_whole_layers: bool,
    /// Recompute leaves a layer's last product out: PyTorch's checkpoints stop once all that backward saved is there
    /// again (`set_checkpoint_early_stop`), and compilers drop what nothing reads.
    pub recompute_stops_early: bool,
    /// Tensor-parallel gathers and scatters overlap with the matrix products beside them.
    pub overlap_tp: bool,
    /// Of these, gathers too; a rehearsal knows the difference, an estimate does not. PyTorch takes them apart from products
    /// whose scales go by rows (pytorch/pytorch issue 149990).
    pub overlap_tp_gathers: bool,
    /// Time that products lose in a rehearsal for each second of a tensor-parallel message beside them, where that is
    /// published.
    pub overlap_tp_tax: f64,
    /// Gradients are reduced while backward still runs.
    pub overlap_grads: bool,
    /// Updated or sharded parameters are gathered while compute runs.
    pub overlap_params: bool,
    /// Stage to stage messages overlap with compute.
    pub overlap_p2p: bool,
    /// Expert dispatch overlaps with compute.
    pub overlap_experts: Overlap,
    /// Bytes of a gradient element on the wire.
    pub grad_wire_bytes: f64,
    /// Activations and parameters are gathered in the format of the products (torchao's float8 all-gather).
    pub low_precision_gathers: bool,
    /// Collectives over several nodes walk one ring over all ranks, so that each byte passes the ports of a node for every
    /// rank but one, not once a node. NCCL weighs rings against trees by its tables of bandwidths (`src/graph/tuning.cc`).
    /// On A100 over two nodes rings won: DGX were measured at 192 GB/s of 200 (NVIDIA/nccl issue 812), and vTrain's runs
    /// over 16 ranks take what a ring takes, which is where this was read off. Since, trees do (NVIDIA/nccl-tests issue 196).
    pub one_ring: bool,
    /// Gradients are summed between groups that shard when all of them are there: XLA combined such messages up to
    /// gigabytes (`xla_gpu_all_reduce_combine_threshold_bytes` in MaxText's scripts for A3 machines).
    pub groups_sum_last: bool,
    /// Attention's products are in the format of the others.
    pub low_precision_attention: bool,
    /// Owners of sharded optimiser state send what they updated one after another, each around all ranks (InternEvo's
    /// `broadcast_params` in `internlm/solver/optimizer/hybrid_zero_optim.py`), where others gather once.
    pub owners_broadcast: bool,
    /// Gathers and scatters use one port of a node at a time, not all of them (DeepSpeed of 2021).
    pub flat_collectives: bool,
    /// Gradients of micro-batches are summed in a fixed tree, whose partial sums are kept.
    pub tree_sums: bool,
    /// Sharded parameters are gathered by whole units (FSDP's flat parameters), also those that a pass does not read.
    pub gathers_whole_units: bool,
    /// Kernels are launched one by one from Python, else from graphs or compiled programs.
    pub eager: bool,
    /// The host waits for each kernel to end before it launches the next (`CUDA_LAUNCH_BLOCKING=1`).
    pub blocking: bool,
    /// Ops' worth of the host's time that a collective inside layers takes for each of its members: stacks that gather
    /// and scatter through lists of tensors handle each member's on its own.
    pub ops_per_member: f64,
    /// Bytes that pass through memory for each logit beyond what a fused loss reads and writes: in 32 bit, an operation at
    /// a time (Megatron's `vocab_parallel_cross_entropy`: cast, maximum, difference, exponent, sum, quotient, and back).
    pub loss_bytes: f64,
    /// Stages of a pipeline get blocks by their products: the head counts as the layers that it costs (nanotron's
    /// `block_compute_costs`).
    pub stages_by_cost: bool,
    /// Bytes of the buckets in which replicas that shard nothing sum gradients, where it is known.
    pub bucket_bytes: Option<f64>,
    /// Dropout and its masks are in the model.
    pub dropout: bool,
    /// The residual stream is split along the sequence between tensor-parallel regions unless told otherwise.
    pub sequence_parallel: bool,
    /// Parameters are also kept sharded during compute by default ("FSDP").
    pub fsdp: bool,
    /// What it makes of layouts that the program refuses.
    pub tolerance: Tolerance,
    /// What it keeps where nothing plans memory ahead; `None` where tensors are kept as the program says.
    pub pool: Option<Pool>,
    /// Bytes that its checkpoints hold for each parameter.
    pub checkpoint_bytes_per_param: f64,
}

/// When messages run beside compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// One after another.
    Never,
    /// Where the group spans nodes: recipes turn it on there (Megatron-Bridge `moe_a2a_overlap`).
    BetweenNodes,
    /// Everywhere.
    Always,
}

/// How attention is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKernel {
    /// Scores live in memory, computed for the whole square.
    Unfused,
    /// Tiles in one kernel, written for the Ampere generation (Dao 2023, arXiv 2307.08691).
    Flash2,
    /// Written for the accelerator's own generation: cuDNN, FlashAttention 3, TPU splash attention.
    Tuned,
}

/// `bucket_cap_mb` of PyTorch's DistributedDataParallel where nobody says otherwise.
const DDP_BUCKET: f64 = 25.0 * 1024.0 * 1024.0;
/// Products that pieces of messages are copied beside: of what hiding them could save, 72 % is saved where copy engines
/// move them (Agrawal et al., arXiv 2412.14335, on MI300X; PyTorch's asynchronous tensor parallelism copies so too).
const COPY_TAX: f64 = 0.28;
/// Ten passes in 32 bit.
const LOSS_BYTES: f64 = 40.0;

const MEGATRON_2021: Software = Software {
    name: "megatron-2021",
    lineage: "megatron",
    attention: AttentionKernel::Unfused,
    recompute_whole_layers: true,
    recompute_stops_early: false,
    overlap_tp: false,
    overlap_tp_gathers: true,
    overlap_tp_tax: 0.0,
    overlap_grads: false,
    overlap_params: false,
    overlap_p2p: false,
    overlap_experts: Overlap::Never,
    grad_wire_bytes: 4.0,
    low_precision_gathers: false,
    low_precision_attention: false,
    owners_broadcast: false,
    one_ring: true,
    groups_sum_last: false,
    flat_collectives: false,
    tree_sums: false,
    gathers_whole_units: true,
    eager: true,
    blocking: false,
    ops_per_member: 0.0,
    loss_bytes: LOSS_BYTES,
    stages_by_cost: false,
    bucket_bytes: None,
    dropout: true,
    sequence_parallel: false,
    fsdp: false,
    tolerance: OTHERS,
    pool: None,
    checkpoint_bytes_per_param: CHECKPOINT_BYTES_PER_PARAM,
};

const MEGATRON_CORE: Software = Software {
    name: "megatron-core-2024",
    lineage: "megatron-core",
    attention: AttentionKernel::Tuned,
    recompute_whole_layers: true,
    recompute_stops_early: false,
    overlap_tp: true,
    overlap_tp_gathers: true,
    overlap_tp_tax: 0.0,
    overlap_grads: true,
    overlap_params: true,
    overlap_p2p: true,
    overlap_experts: Overlap::Never,
    grad_wire_bytes: 4.0,
    low_precision_gathers: false,
    low_precision_attention: false,
    owners_broadcast: false,
    one_ring: false,
    groups_sum_last: false,
    flat_collectives: false,
    tree_sums: false,
    gathers_whole_units: true,
    eager: true,
    blocking: false,
    ops_per_member: 0.0,
    loss_bytes: 0.0,
    stages_by_cost: false,
    bucket_bytes: None,
    dropout: false,
    sequence_parallel: true,
    fsdp: false,
    tolerance: OTHERS,
    pool: None,
    checkpoint_bytes_per_param: CHECKPOINT_BYTES_PER_PARAM,
};

const FSDP: Software = Software {
    name: "fsdp-2023",
    lineage: "fsdp",
    attention: AttentionKernel::Flash2,
    recompute_whole_layers: true,
    recompute_stops_early: true,
    overlap_tp: false,
    overlap_tp_gathers: true,
    overlap_tp_tax: 0.0,
    overlap_grads: true,
    overlap_params: true,
    overlap_p2p: false,
    overlap_experts: Overlap::Never,
    grad_wire_bytes: 2.0,
    low_precision_gathers: false,
    low_precision_attention: false,
    owners_broadcast: false,
    one_ring: false,
    groups_sum_last: false,
    flat_collectives: false,
    tree_sums: false,
    gathers_whole_units: true,
    eager: true,
    blocking: false,
    ops_per_member: 0.0,
    loss_bytes: 0.0,
    stages_by_cost: false,
    bucket_bytes: None,
    dropout: false,
    sequence_parallel: true,
    fsdp: true,
    tolerance: OTHERS,
    pool: None,
    checkpoint_bytes_per_param: CHECKPOINT_BYTES_PER_PARAM,
};

/// Eager PyTorch without fused blocks: tensor parallelism in its reduce-scatter mode, gradients summed in 32 bit.
const NANOTRON: Software = Software {
    name: "nanotron-2024",
    lineage: "nanotron",
    stages_by_cost: true,
    loss_bytes: LOSS_BYTES,
    pool: Some(pool::NANOTRON),
    attention: AttentionKernel::Flash2,
    overlap_tp: false,
    overlap_params: false,
    overlap_p2p: false,
    ..MEGATRON_CORE
};

/// All generations.
pub const ALL: [Software; 22] = [
    MEGATRON_2021,
    Software { name: "megatron-2022", sequence_parallel: true, ..MEGATRON_2021 },
    Software { name: "megatron-deepspeed", ..MEGATRON_2021 },
    Software { name: "megatron-deepspeed-2023", ops_per_member: 0.2, ..MEGATRON_2021 },
    Software { name: "nemo-2022", sequence_parallel: true, ..MEGATRON_2021 },
    Software {
        name: "deepspeed-zero3",
        lineage: "deepspeed",
        overlap_params: true,
        overlap_grads: true,
        fsdp: true,
        grad_wire_bytes: 2.0,
        flat_collectives: true,
        ..MEGATRON_2021
    },
    Software {
        name: "internevo",
        lineage: "internevo",
        attention: AttentionKernel::Flash2,
        overlap_grads: true,
        overlap_params: false,
        one_ring: true,
        owners_broadcast: true,
        grad_wire_bytes: 2.0,
        ..MEGATRON_CORE
    },
    MEGATRON_CORE,
    Software { name: "megatron-core-2025", grad_wire_bytes: 2.0, ..MEGATRON_CORE },
    Software { name: "megatron-core-2025h2", grad_wire_bytes: 2.0, ..MEGATRON_CORE },
    Software {
        name: "megatron-core-2026",
        grad_wire_bytes: 2.0,
        overlap_experts: Overlap::BetweenNodes,
        ..MEGATRON_CORE
    },
    Software {
        name: "megatron-core-2026h2",
        grad_wire_bytes: 2.0,
        eager: false,
        overlap_experts: Overlap::Always,
        ..MEGATRON_CORE
    },
    // DualPipe runs the dispatch of one micro-batch beside the compute of another (DeepSeek-V3 Technical Report,
    // arXiv 2412.19437, section 3.2.1).
    Software { name: "hai-llm-2024", lineage: "hai-llm", overlap_experts: Overlap::Always, ..MEGATRON_CORE },
    FSDP,
    Software { name: "torchtitan", overlap_tp_tax: COPY_TAX, ..FSDP },
    NANOTRON,
    Software { name: "nanotron-2025", ops_per_member: 2.1, bucket_bytes: Some(DDP_BUCKET), ..NANOTRON },
    Software {
        name: "maxtext-2024",
        lineage: "maxtext",
        attention: AttentionKernel::Tuned,
        overlap_tp: true,
        eager: false,
        ..FSDP
    },
    Software {
        name: "maxtext-2025",
        lineage: "maxtext",
        attention: AttentionKernel::Tuned,
        overlap_tp: true,
        eager: false,
        ..FSDP
    },
    Software {
        name: "maxtext-gpu",
        lineage: "maxtext-gpu",
        attention: AttentionKernel::Tuned,
        overlap_tp: true,
        groups_sum_last: true,
        eager: false,
        ..FSDP
    },
    Software { name: "neuronx", lineage: "neuronx", overlap_tp: false, eager: false, ..MEGATRON_CORE },
    Software {
        name: "phalanx",
        tree_sums: true,
        gathers_whole_units: false,
        recompute_whole_layers: false,
        eager: false,
        tolerance: Tolerance::NONE,
        checkpoint_bytes_per_param: OWN_BYTES_PER_PARAM,
        ..MEGATRON_CORE
    },
];

/// What stacks other than this program are planned with: layouts beyond it are estimated where a published run had them.
const OTHERS: Tolerance = Tolerance { empty_ends: true, ..Tolerance::NONE };

impl Software {
    /// The generation of that name.
    pub fn named(name: &str) -> Option<Self> {
        ALL.iter().find(|s| s.name == name).cloned()
    }

    /// What people would use today on accelerators of this family.
    pub fn usual(family: &Family) -> Self {
        Self::named(&family.software).unwrap_or(MEGATRON_CORE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spec::{Catalog, EntryKind};

    #[test]
    fn every_family_has_a_usual_stack() {
        let catalog = Catalog::builtin().unwrap();
        let check = |family: &str, name: &str| {
            let family = catalog.family(family, &mut Vec::new()).unwrap();
            assert_eq!((family.software.as_str(), Software::usual(&family).name), (name, name));
        };
        check("volta", "megatron-2021");
        check("hopper", "megatron-core-2024");
        check("tpu-256", "maxtext-2025");
        check("trainium", "neuronx");
        check("what", "megatron-core-2026");
        for listed in catalog.list(Some(EntryKind::Family)) {
            let family = catalog.family(&listed.name, &mut Vec::new()).unwrap();
            assert_eq!(Software::usual(&family).name, family.software, "{}", listed.name);
        }
        assert!(Software::named("nothing").is_none());
    }
}
