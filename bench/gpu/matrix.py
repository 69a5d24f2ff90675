"""What accept.sh runs: the runs that must agree, the steps that are timed, and the goals they are held to."""

import dataclasses

PRECISIONS = ("f32", "bf16")

# The model of the runs that are compared: grouped queries, wide enough for every kernel's fast path.
COMPARED = ["model.preset=llama-tiny-ref", "model.layers=4", "model.hidden=256", "model.heads=4", "model.kv_heads=2",
            "model.head_dim=64", "model.ffn=704", "model.vocab=1024", "data.vocab_size=1024", "data.split=1,0,0",
            "batch.sequence=256", "batch.sequences=8", "train.steps=6", "train.eval_every=0", "train.sample_tokens=0",
            "optim.lr=1e-2", "schedule.warmup_steps=1", "checkpoint.every=0"]
COMPARED_TINY = ["model.hidden=64", "model.head_dim=16", "model.ffn=96", "batch.sequence=32", "run.threads=1"]
COMPARED_TOKENS, COMPARED_VOCAB, COMPARED_STEPS, STOPPED_AT = 60_000, 1024, 6, 3


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the invariance matrix: keys beyond COMPARED, and how close it must come to the first."""

    name: str
    keys: tuple = ()
    ranks: int = 1
    same_bits: bool = True
    # The run that it is held to, and in which precisions.
    of: str = "alone"
    precisions: tuple = PRECISIONS
    # It wants so many cards, one for each rank.
    cards: int = 1


RUNS = [
    Run("alone", ("layout.micro_batch=8",)),
    Run("again", ("layout.micro_batch=8",)),
    Run("micro-batch 1", ("layout.micro_batch=1",)),
    Run("micro-batch 2", ("layout.micro_batch=2",)),
    Run("micro-batch 4", ("layout.micro_batch=4",)),
    Run("recompute selective", ("layout.recompute=selective", "layout.micro_batch=4")),
    Run("recompute full", ("layout.recompute=full", "layout.micro_batch=2")),
    Run("dp 2", ("layout.dp=2", "layout.micro_batch=4"), 2),
    Run("dp 4", ("layout.dp=4", "layout.micro_batch=1"), 4),
    Run("dp 2, zero 1", ("layout.dp=2", "layout.zero=1", "layout.micro_batch=2"), 2),
    Run("dp 2, zero 2", ("layout.dp=2", "layout.zero=2", "layout.micro_batch=2"), 2),
    Run("dp 4, zero 3", ("layout.dp=4", "layout.zero=3", "layout.micro_batch=2"), 4),
    Run("pp 2", ("layout.pp=2", "layout.micro_batch=2"), 2),
    Run("pp 2, gpipe", ("layout.pp=2", "layout.schedule=gpipe", "layout.micro_batch=1"), 2),
    Run("pp 2, interleaved", ("layout.pp=2", "layout.schedule=interleaved", "layout.chunks=2", "layout.micro_batch=1"), 2),
    Run("pp 4, zero-bubble", ("layout.pp=4", "layout.schedule=zero-bubble", "layout.micro_batch=1"), 4),
    Run("dp 2, pp 2, zero 1", ("layout.dp=2", "layout.pp=2", "layout.zero=1", "layout.micro_batch=1"), 4),
    Run("tp 2", ("layout.tp=2", "layout.micro_batch=4"), 2, same_bits=False),
    Run("cp 2", ("layout.cp=2", "layout.micro_batch=4"), 2, same_bits=False),
    Run("cp 2, heads dealt", ("layout.cp=2", "layout.context=heads", "layout.micro_batch=4"), 2, same_bits=False),
]
# Ranks with a card each, through NCCL. Tensor-parallel ranks are held to the same ranks over the host.
_nccl = ("run.messages=nccl",)
RUNS += [
    Run("dp 2, nccl", (*_nccl, "layout.dp=2", "layout.micro_batch=4"), 2, cards=2),
    Run("dp 2, zero 1, nccl", (*_nccl, "layout.dp=2", "layout.zero=1", "layout.micro_batch=2"), 2, cards=2),
    Run("dp 2, zero 2, nccl", (*_nccl, "layout.dp=2", "layout.zero=2", "layout.micro_batch=2"), 2, cards=2),
    Run("dp 2, zero 3, nccl", (*_nccl, "layout.dp=2", "layout.zero=3", "layout.micro_batch=2"), 2, cards=2),
    Run("pp 2, nccl", (*_nccl, "layout.pp=2", "layout.micro_batch=2"), 2, cards=2),
    Run("pp 2, interleaved, nccl", (*_nccl, "layout.pp=2", "layout.schedule=interleaved", "layout.chunks=2", "layout.micro_batch=1"), 2, cards=2),
    Run("tp 2, host", ("run.messages=host", "layout.tp=2", "layout.micro_batch=4"), 2, of="tp 2, host", cards=2),
    Run("tp 2, nccl", (*_nccl, "layout.tp=2", "layout.micro_batch=4"), 2, of="tp 2, host", cards=2),
    Run("dp 2, pp 2, zero 1, nccl", (*_nccl, "layout.dp=2", "layout.pp=2", "layout.zero=1", "layout.micro_batch=1"), 4, cards=4),
    Run("dp 4, zero 3, nccl", (*_nccl, "layout.dp=4", "layout.zero=3", "layout.micro_batch=2"), 4, cards=4),
]
# Recipes and models with other ops, each held to itself under other splits and layouts.
OTHERS = {
    "losses, dropout, average": ("train.z_loss=1e-3", "model.logit_softcap=30", "train.dropout=0.1", "train.attention_dropout=0.1", "train.ema=0.9"),
    "windows, sinks, documents": ("model.window.tokens=24", "model.window.full_every=2", "model.sinks=true", "data.attend=documents"),
    "muon, bounded scores": ("optim.kind=muon", "optim.qk_clip=2"),
    "a batch that grows": ("batch.ramp=[4,4,12]",),
    "mixture": ("model.experts.count=6", "model.experts.top_k=2", "model.experts.ffn=136", "model.experts.dense_layers=1", "model.experts.balance_loss=0.01",
                "model.experts.score=sigmoid", "model.experts.expert_bias=true", "model.experts.bias_rate=0.01"),
    "mixture with biases and bounds": ("model.experts.count=8", "model.experts.top_k=3", "model.experts.ffn=96", "model.experts.router_bias=true",
                                       "model.mlp_bias=true", "model.activation=swiglu_clamped", "optim.kind=muon"),
    "latents, experts, bounded scores": ("model.kv_heads=4", "model.latent.query_rank=96", "model.latent.kv_rank=64", "model.latent.nope_dim=128",
                                         "model.latent.rope_dim=64", "model.latent.value_dim=128", "model.experts.count=6", "model.experts.top_k=2",
                                         "model.experts.ffn=136", "optim.qk_clip=2"),
}
for _name, _keys in OTHERS.items():
    RUNS += [
        Run(_name, (*_keys, "layout.micro_batch=4"), of=_name, precisions=("bf16",)),
        Run(f"{_name}: split", (*_keys, "layout.recompute=full", "layout.micro_batch=2"), of=_name, precisions=("bf16",)),
        Run(f"{_name}: dp 2, zero 1", (*_keys, "layout.dp=2", "layout.zero=1", "layout.micro_batch=2"), 2, of=_name, precisions=("bf16",)),
    ]
# Experts of whole chunks of the norm, which ranks of them ask for.
EXPERTS = ("model.experts.count=8", "model.experts.top_k=2", "model.experts.ffn=128", "model.experts.balance_loss=0.01")
RUNS += [
    Run("experts", (*EXPERTS, "layout.micro_batch=4"), of="experts"),
    Run("experts: ep 2", (*EXPERTS, "layout.dp=2", "layout.ep=2", "layout.micro_batch=2"), 2, of="experts"),
    Run("experts: ep 2, zero 1", (*EXPERTS, "layout.dp=4", "layout.ep=2", "layout.zero=1", "layout.micro_batch=1"), 4, of="experts"),
]
# Relative distance of a step's loss where bits may differ: tensor parallelism, and a checkpoint that changes device.
CLOSE = {"f32": 1e-4, "bf16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that is timed on both sides: ours by keys, the peer by the name that models.py has."""

    model: str
    batch: int
    keys: tuple
    # mode of the peer (and its attention): the least ratio of its seconds to ours, None where none is promised
    peers: dict
    sequence: int
    # Sequences that ours takes through the model at once; the peer takes all.
    at_once: int
    mfu: float | None = None
    # Both sides fit side by side on a card of so many GiB; a smaller one runs one after the other.
    together_gib: int = 0


LLAMA = ("model.preset=tinyllama-1.1b", "model.max_positions=4096")
STEPS = [
    Step("llama-1.1b", 4, LLAMA, {"compile": 1.05}, 4096, 2, mfu=0.5, together_gib=130),
    Step("gpt2-124m", 32, ("model.preset=gpt2", "model.vocab=50304"), {"compile": 1.15}, 1024, 16, together_gib=70),
    Step("reference-13.8m", 8, ("model.preset=llama-tiny-ref",), {"graphs": 1.2, "eager": 2.0, "compile": None, "capture": None}, 256, 8),
]
# With what time is left.
EXTRA = [Step("llama-1.1b", 4, LLAMA, {"compile+cudnn": None}, 4096, 2, together_gib=130)]
MEMORY_GOAL = 0.9  # ours over the peer's max_memory_reserved
ATTENTION_GOAL = 0.9  # ours over the better backend
TIMED, WARMUP, TURN = 20, 5, 5  # steps: counted, before, in a row of one side
TINY_KEYS = ("model.layers=2", "model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16", "model.ffn=96", "model.vocab=512",
             "data.vocab_size=512", "batch.sequence=64", "run.threads=1")

# Seconds that a stage may take; the whole has --minutes.
LIMITS = {"devices": 20, "kernels": 90, "sanitizer": 60, "rust": 120, "runs": 110, "checkpoints": 60, "golden": 75,
          "steps": 240, "attention": 50, "gemm": 50, "extra": 120}
# What the checks leave of the minutes to the timed steps.
KEPT_FOR_TIMING_S = 230
# Tests of kernels that the sanitizer watches with each of its tools; all others run without.
SANITIZED_TOOLS = ("memcheck", "racecheck")
