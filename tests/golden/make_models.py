"""Make the model goldens: tiny random models, their logits, gradients and first AdamW steps.

    python tests/golden/make_models.py [name ...]

Float32 results come from `transformers` and torch.optim.AdamW, float64 ones from reference64.py.
README.md says what each file holds and with which versions they were made.
"""

import json
import pathlib
import re
import sys

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import reference64

HERE = pathlib.Path(__file__).parent
SEQUENCES, TIME, STEPS, IGNORE = 4, 24, 10, -100
LR, BETAS, EPS, DECAY, CLIP = 1e-2, (0.9, 0.95), 1e-8, 0.1, 1.0


def models():
    """Name -> (model class, config). Sizes differ between models so that swapped dims cannot hide.

    Mixtures are made with transformers 4, whose parameters go by the names of the files: 5 packs experts.
    """
    hf = transformers
    llama = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=8, intermediate_size=56, rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False)
    llama3_rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                       original_max_position_embeddings=64)
    return {
        "llama-gqa": (hf.LlamaForCausalLM, hf.LlamaConfig(
            **llama, rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
        "llama3-rope": (hf.LlamaForCausalLM, hf.LlamaConfig(
            **{**llama, "max_position_embeddings": 512}, rope_parameters=llama3_rope)),
        "qwen2-like": (hf.Qwen2ForCausalLM, hf.Qwen2Config(
            vocab_size=53, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
            intermediate_size=40, rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6))),
        "qwen3-like": (hf.Qwen3ForCausalLM, hf.Qwen3Config(
            vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=10, intermediate_size=44, rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1e6))),
        "mixtral-like": (hf.MixtralForCausalLM, hf.MixtralConfig(
            vocab_size=59, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=20, num_local_experts=6, num_experts_per_tok=2, rms_norm_eps=1e-5,
            max_position_embeddings=64, tie_word_embeddings=False, rope_theta=1e4)),
        "qwen3-moe-like": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=10, intermediate_size=36, moe_intermediate_size=12, num_experts=8, num_experts_per_tok=3,
            norm_topk_prob=False, mlp_only_layers=[0], rms_norm_eps=1e-6, max_position_embeddings=64,
            tie_word_embeddings=True, rope_theta=1e4)),
        "deepseek-v2-like": (hf.DeepseekV2ForCausalLM, hf.DeepseekV2Config(
            vocab_size=57, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=36, moe_intermediate_size=12, n_routed_experts=6, n_shared_experts=2,
            num_experts_per_tok=2, first_k_dense_replace=1, routed_scaling_factor=1.5, topk_method="greedy",
            q_lora_rank=None, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, head_dim=4,
            rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=1e4)),
        "deepseek-v3-like": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(
            vocab_size=59, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=36, moe_intermediate_size=12, n_routed_experts=8, n_shared_experts=1,
            num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=2.5, n_group=4, topk_group=2,
            norm_topk_prob=True, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=7,
            rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=1e4)),
        "kimi-like": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config(
            vocab_size=61, hidden_size=20, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            intermediate_size=28, moe_intermediate_size=10, n_routed_experts=5, n_shared_experts=1,
            num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=2.827, n_group=1, topk_group=1,
            norm_topk_prob=True, q_lora_rank=12, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=8, v_head_dim=6,
            rms_norm_eps=1e-5, max_position_embeddings=8192, tie_word_embeddings=False, rope_theta=1e4,
            rope_scaling=dict(type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, mscale=1.2, mscale_all_dim=0.8,
                              original_max_position_embeddings=2048))),
        "mistral-like": (hf.MistralForCausalLM, hf.MistralConfig(
            **{**llama, "vocab_size": 63, "intermediate_size": 52}, sliding_window=7, rope_theta=1e4)),
        "gpt-oss-like": (hf.GptOssForCausalLM, hf.GptOssConfig(
            vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=10, intermediate_size=14, num_local_experts=6, num_experts_per_tok=3, sliding_window=5,
            rms_norm_eps=1e-5, max_position_embeddings=64, tie_word_embeddings=False, rope_theta=150000.0,
            rope_scaling=dict(rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=1.0, truncate=False,
                              original_max_position_embeddings=16))),
        "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config(
            vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=32, activation_function="gelu_new",
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)),
    }


def main(names):
    torch.set_num_threads(1)
    seeds = ["llama-gqa", "llama3-rope", "qwen2-like", "qwen3-like", "gpt2", "mixtral-like", "qwen3-moe-like",
             "deepseek-v2-like", "deepseek-v3-like", "mistral-like", "gpt-oss-like", "kimi-like"]
    packed = transformers.__version__ >= "5"
    for name, (cls, config) in models().items():
        if name in names or not names and packed != (name in seeds[5:]):
            make(HERE / name, cls, config, seeds.index(name))


def make(folder, cls, config, seed):
    folder.mkdir(exist_ok=True)
    config._attn_implementation = "eager"
    rng = torch.Generator().manual_seed(1000 + seed)
    model = cls(config).float().train()
    randomise(model, rng)
    if folder.name == "kimi-like":
        # Wide enough to choose other experts than the scores would, and not so wide that one is never chosen.
        biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for bias in biases:
            bias.copy_(0.08 * torch.randn(bias.shape, generator=rng))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    batches = make_batches(config.vocab_size, rng)
    (folder / "batch.json").write_text(dump([{k: t.tolist() for k, t in b.items()} for b in batches]))

    config64 = json.loads((folder / "config.json").read_text())
    parameters = dict(model.named_parameters())
    buffers = [k for k, _ in model.named_buffers()]
    stored = load_file(folder / "model.safetensors").items()
    weights64 = {k: t.double().requires_grad_() for k, t in stored if k not in buffers}
    fixed = {k: t.double() for k, t in stored if k in buffers}
    assert parameters.keys() == weights64.keys(), parameters.keys() ^ weights64.keys()
    forward = lambda tokens: model(input_ids=tokens, use_cache=False).logits
    forward64 = lambda tokens: reference64.logits(config64, {**weights64, **fixed}, tokens)

    save_file({"logits": forward(batches[0]["tokens"]).detach()}, folder / "logits.safetensors")
    initial = {"float32": [], "float64": []}
    for i, batch in enumerate(batches):
        loss, grads = gradients(forward, parameters, batch)
        loss64, grads64 = gradients(forward64, weights64, batch)
        initial["float32"].append(loss)
        initial["float64"].append(loss64)
        report(f"{folder.name} batch {i}", loss, loss64, grads, grads64)
        if i == 0:
            save_file(grads, folder / "grads.safetensors")
            save_file(grads64, folder / "grads64.safetensors")
        if i == 1:
            save_file(grads, folder / "grads_masked.safetensors")

    train = {
        "optimiser": dict(kind="adamw", lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, clip=CLIP),
        "initial_losses": initial,
        "float32": run_steps(forward, parameters, batches),
        "float64": run_steps(forward64, weights64, batches),
    }
    (folder / "train.json").write_text(dump(train))
    save_file({k: p.detach().contiguous() for k, p in parameters.items()}, folder / "after10.safetensors")
    # Rounded to float32 on disk: the distance to the float32 run is hundreds of times that rounding.
    save_file({k: p.detach().float() for k, p in weights64.items()}, folder / "after10_from64.safetensors")
    worst = max((rel(parameters[k], p), k) for k, p in weights64.items())
    print(f"{folder.name} after {STEPS}: worst {worst[0]:.1e} {worst[1]}, norms {train['float32']['grad_norms'][:3]}")


def randomise(model, rng):
    """Large weights, norms away from 1 and biases away from 0: no gradient tensor is near zero by accident."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=rng)
            norm = p.dim() == 1 and name.endswith("weight")
            # Wide enough that some gates meet their bounds.
            deviation = 1.0 if name.endswith("experts.gate_up_proj") else 0.2 if p.dim() > 1 else 0.1
            p.copy_(1 + 0.2 * noise if norm else deviation * noise)


def make_batches(vocab, rng):
    """Three batches of inputs and next-token targets; the second ignores targets, unevenly over its sequences."""
    batches = []
    for _ in range(3):
        ids = torch.randint(0, vocab, (SEQUENCES, TIME + 1), generator=rng)
        batches.append({"tokens": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()})
    masked = batches[1]["targets"]
    masked[1, :13] = IGNORE  # a prompt
    masked[2, :-3] = IGNORE  # almost nothing left
    masked[3, :] = IGNORE  # nothing left
    return batches


def mean_loss(logits, batch):
    """Mean over the valid targets of the whole batch."""
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)


def gradients(forward, parameters, batch):
    loss = mean_loss(forward(batch["tokens"]), batch)
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return loss.item(), {k: g.contiguous() for k, g in zip(parameters, grads)}


def run_steps(forward, parameters, batches):
    """Ten steps of AdamW at a constant rate, in place; matrices decay (embeddings too), vectors do not, stacked or alone."""
    vector = lambda name, p: p.dim() == 1 or name.endswith("_proj_bias")
    groups = [
        {"params": [p for k, p in parameters.items() if not vector(k, p)], "weight_decay": DECAY},
        {"params": [p for k, p in parameters.items() if vector(k, p)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False)
    losses, norms = [], []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        optimiser.zero_grad()
        loss = mean_loss(forward(batch["tokens"]), batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP, foreach=False).item())
        losses.append(loss.item())
        optimiser.step()
    return {"losses": losses, "grad_norms": norms}


def rel(a, b):
    """Distance as a share of the reference's own norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def report(label, loss, loss64, grads, grads64):
    worst = sorted((rel(grads[k], grads64[k]), k) for k in grads)[-1]
    smallest = min((g.norm().item(), k) for k, g in grads64.items())
    print(f"{label}: loss {loss:.6f} ({loss - loss64:+.1e}), worst gradient {worst[0]:.1e} {worst[1]}, "
          f"smallest {smallest[0]:.1e} {smallest[1]}")


def dump(value):
    """JSON with lists of numbers on one line each, so that diffs stay readable."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
