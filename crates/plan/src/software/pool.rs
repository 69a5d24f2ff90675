use serde::Serialize;

/// What a stack keeps that plans no memory: each operation of Python takes its own from a caching allocator and autograd
/// frees it, so that the pool is as large as the fullest moment, and more.
///
/// Which copies there are is read from the stack's source; the last three are fitted on published runs
/// (`docs/performance.md`, "Memory calls").
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pool {
    /// The gate's activation is an operation of its own, whose output the product with the other half keeps.
    pub gate_kept: bool,
    /// Bytes of a logit at the loss: copies, each a block too large for any other's place.
    pub logit_bytes: f64,
    /// Whole activations that are never freed, for gathers into products.
    pub gather_buffers: f64,
    /// Bytes of a gradient in the buckets of replicas that shard nothing.
    pub bucket_bytes: f64,
    /// Share of the parameters that gathering them after a sharded update takes anew: they come in one piece, which what
    /// backward left behind has little room for.
    pub gathered_anew: f64,
    /// Share of activations and gradients lost between blocks of different sizes and streams.
    pub fragmentation: f64,
    /// Bytes that are there whatever the model: work spaces of libraries, small blocks.
    pub fixed_bytes: f64,
}

/// nanotron of early 2025, after its source at 0e0a27e.
pub(super) const NANOTRON: Pool = Pool {
    // `GLUActivation`: activation, then product.
    gate_kept: true,
    // The product in 16 bit, its cast to 32 bit, and the softmax that the loss keeps (`_ShardedCrossEntropy`).
    logit_bytes: 2.0 + 4.0 + 4.0,
    // `MemoryBuffer`: one for inputs, one for gradients of outputs.
    gather_buffers: 2.0,
    // DistributedDataParallel without views into its buckets.
    bucket_bytes: 2.0,
    gathered_anew: 0.5,
    fragmentation: 0.25,
    fixed_bytes: 0.5 * (1u64 << 30) as f64,
};
