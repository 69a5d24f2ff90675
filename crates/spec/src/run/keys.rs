//! Every key of a run file: its type, default and meaning, from which parsing, help and documentation are made.

use crate::layout_check::MAX_WORLD;
use crate::model_check::MAX_POSITIONS;
use crate::run::{Attend, DeviceChoice, MessageChoice, OnCorruption, OnNan, OnSpike, Optimizer};
use crate::{
    Activation, ContextMode, ExpertRows, NormKind, PipelineSchedule, Recompute, Reduce, ScheduleKind, Score,
};

/// Most threads of a process: more than any machine has cores, and few enough that every system starts them.
pub const THREADS_MAX: usize = 1024;
/// Fewest entries of a tokenizer that is trained: the bytes, and the end of a document.
pub(super) const VOCAB_MIN: usize = 257;
/// Longest run: steps times the largest batch still count tokens in 63 bits.
pub(super) const MAX_STEPS: usize = 1 << 30;
/// Most tokens of a global batch, so that tokens times any width of a model stay far inside 64 bits.
pub(super) const MAX_BATCH_TOKENS: usize = 1 << 32;

/// One key of a run file.
#[derive(Debug)]
pub struct Key {
    /// Section and name: `train.steps`.
    pub path: &'static str,
    /// What may be written.
    pub kind: KeyKind,
    /// The default as written in TOML; empty when there is none.
    pub default: &'static str,
    /// One line on what it means.
    pub doc: &'static str,
}

/// What may be written for a key.
#[derive(Debug)]
pub enum KeyKind {
    /// A whole number in a range.
    Count {
        /// Least.
        min: usize,
        /// Most.
        max: usize,
    },
    /// A whole number, or 0 for off.
    CountOrOff {
        /// Most.
        max: usize,
        /// What 0 stands for.
        zero: &'static str,
    },
    /// A finite number.
    Number {
        /// The range in words.
        expected: &'static str,
        /// Whether a number is in it.
        ok: fn(f64) -> bool,
    },
    /// `true` or `false`.
    Flag,
    /// Text.
    Text,
    /// A file or folder, relative to the working directory.
    Path,
    /// One path or a list of them.
    Paths,
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A list of whole numbers.
    Counts,
    /// A list of `{ prefix = "path", weight = 0.5 }`.
    Blend,
}

impl Key {
    /// The type in a word or two, or the words to choose from.
    pub fn type_text(&self) -> String {
        match &self.kind {
            KeyKind::Count { .. } => "count".to_owned(),
            KeyKind::CountOrOff { zero, .. } => format!("count, 0 = {zero}"),
            KeyKind::Number { .. } => "number".to_owned(),
            KeyKind::Flag => "true | false".to_owned(),
            KeyKind::Text => "text".to_owned(),
            KeyKind::Path => "path".to_owned(),
            KeyKind::Paths => "path or list".to_owned(),
            KeyKind::Choice(words) => words.join(" | "),
            KeyKind::Counts => "list of counts".to_owned(),
            KeyKind::Blend => "list of { prefix, weight }".to_owned(),
        }
    }

    /// The default for people: without quotes, `-` when there is none.
    pub fn default_text(&self) -> &'static str {
        match self.default.trim_matches('"') {
            "" if self.default.is_empty() => "-",
            "" => "\"\"",
            text => text,
        }
    }

    /// The part before the first dot.
    pub fn section(&self) -> &'static str {
        self.path.split('.').next().unwrap_or_default()
    }
}

const fn count(min: usize, max: usize) -> KeyKind {
    KeyKind::Count { min, max }
}

const fn off(max: usize) -> KeyKind {
    or_zero(max, "off")
}

const fn or_zero(max: usize, zero: &'static str) -> KeyKind {
    KeyKind::CountOrOff { max, zero }
}

const ABOVE_ZERO: KeyKind =
    KeyKind::Number { expected: "above 0 and at most 1e6", ok: |x| x > 0.0 && x <= 1e6 };
const ZERO_UP: KeyKind = KeyKind::Number { expected: "from 0 to 1e6", ok: |x| (0.0..=1e6).contains(&x) };
const BELOW_ONE: KeyKind =
    KeyKind::Number { expected: "at least 0 and below 1", ok: |x| (0.0..1.0).contains(&x) };
/// Kept in single precision, where it must be below 1 as well.
const LEFT_OUT: KeyKind =
    KeyKind::Number { expected: "at least 0 and below 1", ok: |x| x >= 0.0 && (x as f32) < 1.0 };
const SHARE: KeyKind = KeyKind::Number { expected: "from 0 to 1", ok: |x| (0.0..=1.0).contains(&x) };
const PART: KeyKind = KeyKind::Number { expected: "above 0 and at most 1", ok: |x| x > 0.0 && x <= 1.0 };
/// Model keys: `ModelSpec::validate` knows their range.
const SIZE: KeyKind = count(1, 1 << 26);
const ANY: KeyKind = KeyKind::Number { expected: "that is finite", ok: |_| true };

const fn key(path: &'static str, kind: KeyKind, default: &'static str, doc: &'static str) -> Key {
    Key { path, kind, default, doc }
}

/// The keys in the order of a run file. The defaults are the default recipe: a few minutes on two CPU cores.
pub(crate) static KEYS: &[Key] = &[
    key("model.preset", KeyKind::Text, "\"llama-tiny-ref\"", "model of the catalogue to start from"),
    key("model.config", KeyKind::Path, "", "Hugging Face config.json to start from, instead of a preset"),
    key("model.name", KeyKind::Text, "", "what people call the model"),
    key("model.vocab", SIZE, "", "vocabulary size"),
    key("model.layers", SIZE, "", "transformer layers"),
    key("model.hidden", SIZE, "", "residual width"),
    key("model.ffn", SIZE, "", "width of the feed-forward layer (of each half when gated)"),
    key("model.heads", SIZE, "", "query heads"),
    key("model.kv_heads", SIZE, "", "key and value heads; as many as heads unless the preset groups them"),
    key("model.head_dim", SIZE, "", "width of one head; hidden / heads unless the preset differs"),
    key("model.norm", KeyKind::Choice(NormKind::WORDS), "", "normalisation"),
    key("model.norm_eps", ANY, "", "added to the variance in every norm"),
    key("model.position", KeyKind::Choice(&["rope", "learned"]), "", "how positions enter"),
    key("model.max_positions", SIZE, "", "longest sequence the model takes, in tokens"),
    key("model.rope_theta", ANY, "", "base of the rotary frequencies"),
    key(
        "model.rope_scaling.type",
        KeyKind::Choice(&["default", "linear", "dynamic", "llama3", "yarn"]),
        "",
        "how rotary frequencies are stretched",
    ),
    key("model.rope_scaling.factor", ANY, "", "how far"),
    key("model.rope_scaling.low_freq_factor", ANY, "", "llama3: longer wavelengths are stretched fully"),
    key("model.rope_scaling.high_freq_factor", ANY, "", "llama3: shorter wavelengths are kept"),
    key("model.rope_scaling.beta_fast", ANY, "", "yarn: rotations above which a dim is kept"),
    key("model.rope_scaling.beta_slow", ANY, "", "yarn: rotations below which a dim is stretched fully"),
    key(
        "model.rope_scaling.original_max_positions",
        SIZE,
        "",
        "llama3, yarn: context before stretching, in tokens",
    ),
    key(
        "model.rope_scaling.attention_factor",
        ANY,
        "",
        "yarn: scale of cos and sin; 0.1 ln(factor) + 1 if absent",
    ),
    key(
        "model.rope_scaling.truncate",
        KeyKind::Number { expected: "0 or 1", ok: |x| x == 0.0 || x == 1.0 },
        "",
        "yarn: 1 = bounds of the blended dims are whole, 0 = as they are",
    ),
    key(
        "model.rope_scaling.mscale_all_dim",
        ANY,
        "",
        "yarn: latent attention's scores are scaled by (0.1 m ln(factor) + 1)^2; 0 = not",
    ),
    key("model.activation", KeyKind::Choice(Activation::WORDS), "", "feed-forward non-linearity"),
    key("model.qkv_bias", KeyKind::Flag, "", "biases on query, key and value projections"),
    key("model.attn_out_bias", KeyKind::Flag, "", "bias on the attention output projection"),
    key("model.mlp_bias", KeyKind::Flag, "", "biases in the feed-forward layer"),
    key("model.qk_norm", KeyKind::Flag, "", "RMSNorm on query and key heads"),
    key("model.tied_embeddings", KeyKind::Flag, "", "the output projection is the embedding table"),
    key("model.init_std", ANY, "", "standard deviation of initial weights"),
    key("model.logit_softcap", ANY, "", "logits are squeezed into so much on both sides; 0 = none"),
    key("model.experts.count", off(1 << 16), "", "routed experts of a layer; 0 = none"),
    key("model.experts.top_k", SIZE, "", "experts that each token goes to"),
    key("model.experts.ffn", SIZE, "", "width of one expert (of each half when gated)"),
    key("model.experts.shared_ffn", off(1 << 22), "", "width of all shared experts together; 0 = none"),
    key("model.experts.dense_layers", off(1 << 14), "", "first layers without experts"),
    key("model.experts.every", SIZE, "", "every how many layers one has experts"),
    key(
        "model.experts.score",
        KeyKind::Choice(Score::WORDS),
        "",
        "scores of experts: a softmax over all, or a sigmoid of each logit",
    ),
    key("model.experts.renormalise", KeyKind::Flag, "", "a token's weights are divided by their sum"),
    key("model.experts.scale", ANY, "", "factor of all weights"),
    key("model.experts.groups", SIZE, "", "equal runs of experts of which the best are searched; 1 = all"),
    key("model.experts.top_groups", SIZE, "", "how many of those groups are searched"),
    key(
        "model.experts.balance_loss",
        ANY,
        "",
        "factor of the loss of uneven choices in a sequence; 0 = none",
    ),
    key("model.experts.router_bias", KeyKind::Flag, "", "biases on the router's logits"),
    key("model.experts.expert_bias", KeyKind::Flag, "", "experts are chosen by their scores plus biases"),
    key(
        "model.experts.bias_rate",
        ANY,
        "",
        "how far those biases move after each step, towards an even load; 0 = not",
    ),
    key("model.experts.z_loss", ANY, "", "factor of the mean squared log-sum-exp of the router; 0 = none"),
    key("model.latent.kv_rank", off(1 << 20), "", "rank of the latent of keys and values; 0 = none"),
    key("model.latent.query_rank", off(1 << 20), "", "rank of the latent of queries; 0 = queries have none"),
    key("model.latent.nope_dim", SIZE, "", "width of a head's unrotated part"),
    key("model.latent.rope_dim", SIZE, "", "width of a head's rotated part"),
    key("model.latent.value_dim", SIZE, "", "width of a head's values"),
    key(
        "model.window.tokens",
        or_zero(MAX_POSITIONS, "all"),
        "",
        "tokens that attention looks back over, its own among them",
    ),
    key("model.window.full_layers", off(1 << 14), "", "first layers that attend to all"),
    key("model.window.full_every", off(1 << 14), "", "after those, every how many layers one attends to all"),
    key("model.sinks", KeyKind::Flag, "", "a learned score for each head in the sum of every softmax"),
    key("model.mtp.depth", off(1), "", "tokens after the next that a module learns to predict; 0 = none"),
    key("model.mtp.weight", ANY, "0.3", "factor of that module's loss"),
    key("data.text", KeyKind::Paths, "", "files, folders or globs of text to train on"),
    key("data.prefix", KeyKind::Path, "", "tokenised dataset PREFIX.bin and PREFIX.idx, instead of text"),
    key("data.blend", KeyKind::Blend, "", "tokenised datasets and their weights, instead of text"),
    key("data.tokenizer", KeyKind::Path, "", "tokenizer.json; trained from the text if absent"),
    key(
        "data.vocab_size",
        count(VOCAB_MIN, 1 << 24),
        "4096",
        "vocabulary of the tokenizer that is trained; at most the model's",
    ),
    key("data.field", KeyKind::Text, "", "field of JSON documents that holds the text; text if absent"),
    key(
        "data.skip_bad",
        KeyKind::Flag,
        "false",
        "leave out JSON documents that cannot be read, and count them",
    ),
    key("data.eod", KeyKind::Text, "", "token that ends a document; the tokenizer's own if absent"),
    key(
        "data.attend",
        KeyKind::Choice(Attend::WORDS),
        "\"all\"",
        "what attention sees of a sequence: all before a token, or its own document alone",
    ),
    key("data.split", KeyKind::Text, "\"99,1,0\"", "weights of the train, validation and test splits"),
    key("data.cache_dir", KeyKind::Path, "", "where prepared data is kept"),
    key("batch.sequence", count(1, MAX_POSITIONS), "256", "tokens of a sequence"),
    key("batch.sequences", count(1, MAX_WORLD), "8", "global batch in sequences"),
    key("batch.tokens", count(1, MAX_BATCH_TOKENS), "", "global batch in tokens, instead of sequences"),
    key(
        "batch.ramp",
        KeyKind::Counts,
        "[]",
        "[START, INCREMENT, SAMPLES]: steps begin with START sequences and grow by INCREMENT to the full batch over SAMPLES",
    ),
    key(
        "optim.kind",
        KeyKind::Choice(Optimizer::WORDS),
        "\"adamw\"",
        "muon orthogonalises the momentum of matrices inside layers; the rest is AdamW's",
    ),
    key("optim.lr", ABOVE_ZERO, "1e-3", "peak learning rate"),
    key("optim.beta1", BELOW_ONE, "0.9", "decay of the first moment"),
    key("optim.beta2", BELOW_ONE, "0.95", "decay of the second moment"),
    key(
        "optim.eps",
        KeyKind::Number { expected: "above 0 and below 1", ok: |x| x > 0.0 && x < 1.0 },
        "1e-8",
        "added to the root of the second moment",
    ),
    key("optim.weight_decay", ZERO_UP, "0.1", "decoupled decay, not on norms and biases"),
    key("optim.grad_clip", ZERO_UP, "1.0", "largest global gradient norm; 0 = off"),
    key("optim.momentum", BELOW_ONE, "0.95", "muon: decay of the momentum (Nesterov's)"),
    key(
        "optim.qk_clip",
        ZERO_UP,
        "0",
        "heads with a greater score of attention in a step get queries and keys that make it this; 0 = none",
    ),
    key(
        "schedule.kind",
        KeyKind::Choice(ScheduleKind::WORDS),
        "\"cosine\"",
        "course of the learning rate after warmup",
    ),
    key(
        "schedule.warmup_steps",
        count(0, MAX_STEPS),
        "",
        "steps of linear warmup; a tenth of the steps, at most 100, if absent",
    ),
    key(
        "schedule.decay_steps",
        count(1, MAX_STEPS),
        "",
        "wsd: steps of the final decay; a fifth of the steps if absent",
    ),
    key("schedule.min_lr", ZERO_UP, "", "learning rate at the end"),
    key("schedule.min_lr_ratio", SHARE, "0.1", "learning rate at the end over the peak, instead of min_lr"),
    key("train.steps", count(1, MAX_STEPS), "180", "optimiser steps"),
    key(
        "train.precision",
        KeyKind::Choice(&["f32", "bf16"]),
        "\"f32\"",
        "storage of parameters and activations; bf16 keeps f32 master weights",
    ),
    key(
        "train.z_loss",
        SHARE,
        "0",
        "factor of the mean squared log-sum-exp of the logits, beside the loss; 0 = none",
    ),
    key(
        "train.dropout",
        LEFT_OUT,
        "0",
        "share of embeddings, and of what layers add to the residual stream, left out at random in training; 0 = none",
    ),
    key(
        "train.attention_dropout",
        LEFT_OUT,
        "0",
        "share of the probabilities of attention left out at random in training; 0 = none",
    ),
    key(
        "train.ema",
        BELOW_ONE,
        "0",
        "decay of an average of the weights over steps, which is evaluated beside them; 0 = none",
    ),
    key("train.seed", count(0, i64::MAX as usize), "42", "seed of weights and data order"),
    key(
        "train.eval_every",
        off(MAX_STEPS),
        "100",
        "steps between evaluations on the validation split; the last step is always evaluated",
    ),
    key("train.eval_batches", count(1, MAX_STEPS), "8", "global batches of one evaluation"),
    key("train.log_every", count(1, MAX_STEPS), "1", "steps between printed lines"),
    key(
        "train.sample_tokens",
        count(0, MAX_POSITIONS),
        "64",
        "tokens sampled from the model when training ends; 0 = none",
    ),
    key(
        "layout.auto",
        KeyKind::Flag,
        "false",
        "let train choose the layout for this machine; also written layout = \"auto\"",
    ),
    key("layout.dp", count(1, MAX_WORLD), "1", "data-parallel ranks"),
    key("layout.tp", count(1, MAX_WORLD), "1", "tensor-parallel ranks"),
    key("layout.pp", count(1, MAX_WORLD), "1", "pipeline stages"),
    key("layout.cp", count(1, MAX_WORLD), "1", "context-parallel ranks: each holds a part of every sequence"),
    key(
        "layout.context",
        KeyKind::Choice(ContextMode::WORDS),
        "\"ring\"",
        "with cp, attention by keys and values that walk around its ranks, or by an exchange of rows for heads",
    ),
    key(
        "layout.ep",
        count(1, MAX_WORLD),
        "1",
        "ranks of a stage that experts are spread over; no factor of the ranks",
    ),
    key(
        "layout.expert_rows",
        KeyKind::Choice(ExpertRows::WORDS),
        "\"all\"",
        "with ep, room for all rows that can come to a rank's experts, or for an even share (to plan)",
    ),
    key(
        "layout.sequence_parallel",
        KeyKind::Flag,
        "false",
        "split activations along the sequence between tensor-parallel regions",
    ),
    key(
        "layout.zero",
        count(0, 3),
        "0",
        "shard over dp: 1 optimiser state, 2 and gradients, 3 and parameters",
    ),
    key(
        "layout.shard",
        off(MAX_WORLD),
        "0",
        "neighbours among dp that ZeRO shards over, with replicas of these groups; 0 = all of dp",
    ),
    key(
        "layout.schedule",
        KeyKind::Choice(PipelineSchedule::WORDS),
        "\"1f1b\"",
        "order of forward and backward work on the stages",
    ),
    key("layout.chunks", count(1, MAX_WORLD), "1", "model chunks per stage (interleaved)"),
    key(
        "layout.stage_layers",
        KeyKind::Counts,
        "[]",
        "layers of each stage (times chunks); as even as possible if empty",
    ),
    key(
        "layout.micro_batch",
        count(1, MAX_WORLD),
        "1",
        "sequences executed at once; never changes the numbers; train picks up to 8 if it is not set",
    ),
    key(
        "layout.recompute",
        KeyKind::Choice(Recompute::WORDS),
        "\"none\"",
        "activations recomputed in backward",
    ),
    key(
        "layout.reduce",
        KeyKind::Choice(Reduce::WORDS),
        "\"tree\"",
        "gradient sums: tree is bit-identical for every layout",
    ),
    key(
        "checkpoint.dir",
        KeyKind::Path,
        "",
        "where checkpoints go: a directory, or s3://, gs:// or az://BUCKET/PREFIX; into run.dir if absent",
    ),
    key("checkpoint.every", off(MAX_STEPS), "200", "steps between checkpoints"),
    key(
        "checkpoint.background",
        KeyKind::Flag,
        "true",
        "write checkpoints while training goes on, from a copy of weights and moments in memory",
    ),
    key("checkpoint.keep", or_zero(MAX_STEPS, "all"), "2", "newest checkpoints kept; 0 = all"),
    key(
        "checkpoint.keep_every",
        off(MAX_STEPS),
        "0",
        "checkpoints of steps that this divides are never removed; 0 = none",
    ),
    key(
        "checkpoint.memory_every",
        off(MAX_STEPS),
        "1",
        "steps between copies of weights and moments in another rank's memory, under --max-restarts; 0 = none",
    ),
    key(
        "run.dir",
        KeyKind::Path,
        "\"runs/default\"",
        "where journal, checkpoints and the resolved run file go",
    ),
    key(
        "run.threads",
        or_zero(THREADS_MAX, "all"),
        "0",
        "threads of a rank; 0 = its share of the machine's cores",
    ),
    key(
        "run.device",
        KeyKind::Choice(DeviceChoice::WORDS),
        "\"auto\"",
        "what ranks compute on: auto takes a GPU if one can be used (see phalanx devices)",
    ),
    key(
        "run.messages",
        KeyKind::Choice(MessageChoice::WORDS),
        "\"auto\"",
        "what carries messages between GPUs: auto takes NCCL where each rank of a group has a card of its own",
    ),
    key(
        "run.timeout_s",
        count(1, 86_400),
        "60",
        "a rank that says nothing for so long is lost; longer than the slowest step and save",
    ),
    key(
        "run.verify_every",
        off(MAX_STEPS),
        "0",
        "steps between comparisons of weights and moments that several ranks hold alike; also --verify-every",
    ),
    key(
        "run.straggler_window",
        off(1 << 20),
        "20",
        "steps whose waits are put together to find the rank or link that others wait for; 0 = none",
    ),
    key(
        "trouble.on_nan",
        KeyKind::Choice(OnNan::WORDS),
        "\"stop\"",
        "what a loss or gradient norm that is not finite does: rollback goes back to a checkpoint and leaves samples out",
    ),
    key(
        "trouble.on_spike",
        KeyKind::Choice(OnSpike::WORDS),
        "\"ignore\"",
        "what a loss or gradient norm far above those of the last steps does",
    ),
    key(
        "trouble.spike_factor",
        ABOVE_ZERO,
        "10.0",
        "how far: so many times 1.4826 MAD, or 2 % of the median if that is more, above the median",
    ),
    key(
        "trouble.window",
        count(4, 4096),
        "64",
        "of so many good steps; nothing is a spike before half of them are done",
    ),
    key(
        "trouble.back_steps",
        off(MAX_STEPS),
        "0",
        "a rollback goes back to a checkpoint of at least so many steps before the last good one",
    ),
    key("trouble.skip_steps", off(MAX_STEPS), "0", "batches that a rollback leaves out beyond the bad one"),
    key(
        "trouble.most",
        count(1, 1 << 20),
        "8",
        "bad steps within trouble.window steps; one more ends the run",
    ),
    key(
        "trouble.on_corruption",
        KeyKind::Choice(OnCorruption::WORDS),
        "\"stop\"",
        "what run.verify_every does about what it finds: restore takes it from ranks that agree, else as rollback",
    ),
    key("sample.prompt", KeyKind::Text, "\"\"", "text to continue"),
    key("sample.tokens", count(1, MAX_POSITIONS), "128", "tokens to generate"),
    key(
        "sample.temperature",
        KeyKind::Number { expected: "from 0 to 100", ok: |x| (0.0..=100.0).contains(&x) },
        "0.8",
        "0 takes the likeliest token",
    ),
    key("sample.top_k", or_zero(1 << 24, "all"), "50", "sample among this many likeliest tokens"),
    key("sample.top_p", PART, "1.0", "sample among the likeliest tokens that hold this share"),
];

/// What a model file of the catalogue says about itself, besides the model keys.
pub(crate) static ORIGIN_KEYS: &[Key] = &[
    key("model.source", KeyKind::Text, "", "where the numbers come from"),
    key("model.date", KeyKind::Text, "", "when they were published or read"),
];
