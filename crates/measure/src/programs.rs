//! The programs that a calibration runs.

use spec::{Context, Result, RunSpec};

/// Models of the Llama family in steps of about two, small enough that a step takes half a second at most: hidden, ffn,
/// heads, key and value heads, vocabulary, layers, tokens of a sequence, sequences at once, micro-batches.
const SHAPES: [[usize; 9]; 13] = [
    [64, 176, 2, 2, 320, 2, 64, 4, 2],
    [64, 176, 2, 1, 1024, 2, 32, 1, 2],
    [128, 344, 4, 2, 1024, 2, 128, 1, 2],
    [128, 344, 4, 4, 4096, 2, 256, 4, 1],
    [192, 512, 3, 3, 2048, 2, 256, 1, 2],
    [256, 688, 4, 2, 2048, 1, 256, 8, 1],
    [256, 688, 8, 4, 8192, 1, 512, 1, 1],
    [384, 1024, 6, 6, 4096, 2, 256, 1, 2],
    [384, 1024, 6, 6, 4096, 1, 256, 4, 1],
    [512, 1376, 8, 4, 4096, 1, 256, 2, 1],
    [512, 1376, 8, 8, 2048, 1, 1024, 1, 1],
    [768, 2048, 12, 12, 8192, 1, 256, 1, 1],
    [1024, 2816, 16, 4, 8192, 1, 128, 1, 1],
];
/// Those that a quick calibration measures, and those that are measured in bf16 too.
const QUICK: [usize; 5] = [0, 2, 5, 7, 9];
const BF16: [usize; 5] = [0, 3, 5, 7, 9];

/// Keys of models with the kinds of op that the shapes above lack.
const OTHERS: [&str; 6] = [
    "model.hidden=128 model.ffn=512 model.heads=4 model.kv_heads=4 model.head_dim=32 model.vocab=1024 model.norm=layer \
     model.position=learned model.max_positions=128 model.activation=gelu_tanh model.qkv_bias=true \
     model.attn_out_bias=true model.mlp_bias=true model.tied_embeddings=true batch.sequence=128 batch.sequences=4",
    "model.hidden=512 model.ffn=2048 model.heads=8 model.kv_heads=8 model.head_dim=64 model.vocab=4096 model.norm=layer \
     model.position=learned model.max_positions=256 model.activation=gelu model.qkv_bias=true \
     model.attn_out_bias=true model.mlp_bias=true model.tied_embeddings=true batch.sequence=256 batch.sequences=2",
    "model.hidden=256 model.ffn=688 model.heads=8 model.kv_heads=4 model.head_dim=32 model.vocab=2048 \
     model.qk_norm=true batch.sequence=256 batch.sequences=4",
    // Mixtures: softmax scores that are renormalised, and sigmoid scores in groups beside an expert for all.
    "model.hidden=128 model.ffn=344 model.heads=4 model.kv_heads=2 model.head_dim=32 model.vocab=1024 \
     model.experts.count=8 model.experts.top_k=2 model.experts.ffn=128 batch.sequence=128 batch.sequences=4",
    "model.hidden=384 model.ffn=1024 model.heads=6 model.kv_heads=6 model.head_dim=64 model.vocab=1024 \
     model.experts.count=16 model.experts.top_k=4 model.experts.ffn=256 model.experts.shared_ffn=256 \
     model.experts.score=sigmoid batch.sequence=256 batch.sequences=2",
    // Latent attention.
    "model.hidden=256 model.ffn=688 model.heads=4 model.kv_heads=4 model.vocab=1024 model.latent.kv_rank=64 \
     model.latent.query_rank=96 model.latent.nope_dim=32 model.latent.rope_dim=16 model.latent.value_dim=32 \
     batch.sequence=256 batch.sequences=2",
];

/// The smaller mixture, and latent attention.
const MIXTURE: usize = 3;
const LATENT: usize = 5;

/// Programs of one rank.
pub(crate) fn alone(quick: bool) -> Result<Vec<RunSpec>> {
    let all: Vec<usize> = if quick { QUICK.to_vec() } else { (0..SHAPES.len()).collect() };
    let f32s = all.iter().map(|i| llama(SHAPES[*i], "f32"));
    let bf16s = BF16.iter().filter(|_| !quick).map(|i| llama(SHAPES[*i], "bf16"));
    let others = OTHERS.iter().map(|keys| load(&format!("{keys} model.layers=1")));
    f32s.chain(others).chain(bf16s).collect()
}

/// Programs of two ranks with the kinds of op that only groups run: of split vocabularies, added biases, sharded gradients,
/// rows that tensor-parallel ranks route, and heads that context-parallel ranks deal.
pub(crate) fn split() -> Result<Vec<RunSpec>> {
    let (llama, gpt) = ("model.hidden=384 model.ffn=1024 model.heads=6 model.kv_heads=6", OTHERS[0]);
    let small =
        "model.hidden=128 model.ffn=344 model.heads=4 model.kv_heads=4 model.head_dim=32 model.vocab=1024";
    [
        format!("{llama} model.layers=1 batch.sequence=256 batch.sequences=2 layout.tp=2"),
        format!("{small} model.layers=2 batch.sequence=64 batch.sequences=2 layout.tp=2"),
        format!("{gpt} model.layers=1 layout.tp=2"),
        format!("{} model.layers=1 layout.tp=2", OTHERS[MIXTURE]),
        format!("{} model.layers=1 layout.tp=2", OTHERS[LATENT]),
        format!("{llama} model.layers=1 batch.sequence=256 batch.sequences=4 layout.dp=2 layout.zero=2"),
        format!("{small} model.layers=2 batch.sequence=64 batch.sequences=4 layout.dp=2 layout.zero=2"),
        format!(
            "{llama} model.layers=1 batch.sequence=512 batch.sequences=2 layout.cp=2 layout.context=heads"
        ),
        format!(
            "{small} model.layers=2 batch.sequence=64 batch.sequences=2 layout.cp=2 layout.context=heads"
        ),
    ]
    .iter()
    .map(|keys| load(keys))
    .collect()
}

/// A program short enough that many ranks of it crowd the cores without filling the memory.
pub(crate) fn crowd() -> Result<RunSpec> {
    load(
        "model.hidden=256 model.ffn=688 model.heads=4 model.kv_heads=4 model.head_dim=64 model.vocab=1024 \
         model.layers=1 batch.sequence=128 batch.sequences=2",
    )
}

fn llama(columns: [usize; 9], precision: &str) -> Result<RunSpec> {
    let [hidden, ffn, heads, kv_heads, vocab, layers, sequence, micro_batch, micro_batches] = columns;
    let (head_dim, sequences) = (hidden / heads, micro_batches * micro_batch);
    load(&format!(
        "model.hidden={hidden} model.ffn={ffn} model.heads={heads} model.kv_heads={kv_heads} model.head_dim={head_dim} \
         model.vocab={vocab} model.layers={layers} batch.sequence={sequence} batch.sequences={sequences} \
         layout.micro_batch={micro_batch} train.precision={precision}"
    ))
}

fn load(keys: &str) -> Result<RunSpec> {
    let mut set: Vec<String> = keys.split_whitespace().map(str::to_owned).collect();
    let vocab =
        set.iter().find_map(|k| k.strip_prefix("model.vocab=")?.parse::<usize>().ok()).unwrap_or(4096);
    set.push(format!("data.vocab_size={}", vocab.min(4096)));
    RunSpec::load(None, &set, &RunSpec::no_files).context("a program of the calibration")
}
