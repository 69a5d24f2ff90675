"""The same models written out once more, in float64, straight from their checkpoints.

`transformers` rounds norms, rotary angles and attention weights to float32 whatever the dtype of the
weights, so a model moved to float64 does not give float64 results. These functions do. They take a
dict of tensors under the checkpoint's own names and the parsed `config.json`, and return logits.
"""

import math

import torch
import torch.nn.functional as F


def logits(config, weights, tokens):
    """Logits [batch, time, vocab] of any model in this folder; `tokens` is [batch, time]."""
    forward = gpt2 if config["model_type"] == "gpt2" else llama
    if "kv_lora_rank" in config:
        forward = deepseek
    return forward(config, weights, tokens)


def llama(config, w, tokens):
    """Llama, Qwen 2, Qwen 3, Mixtral and Qwen 3 MoE: what differs shows in which tensors the checkpoint has."""
    eps = config["rms_norm_eps"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    batch, time = tokens.shape
    angles = torch.arange(time, dtype=torch.float64)[:, None] * rope_frequencies(config, head_dim)
    scaling = config.get("rope_scaling") or {}
    amplitude = 0.1 * math.log(scaling["factor"]) + 1 if scaling.get("rope_type") == "yarn" else 1.0
    x = F.embedding(tokens, w["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."

        def project(name, h):
            return F.linear(h, w[at + name + ".weight"], w.get(at + name + ".bias"))

        def split(name, h, count):
            y = project(f"self_attn.{name}_proj", h).view(batch, time, count, head_dim)
            scale = w.get(at + f"self_attn.{name}_norm.weight")
            return (y if scale is None else rms_norm(y, scale, eps)).transpose(1, 2)

        h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
        q = rotate(split("q", h, heads), angles, amplitude)
        k = rotate(split("k", h, kv_heads), angles, amplitude)
        v = split("v", h, kv_heads)
        group = heads // kv_heads
        y = attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), window(config, layer),
                      w.get(at + "self_attn.sinks"))
        x = x + project("self_attn.o_proj", y.transpose(1, 2).reshape(batch, time, heads * head_dim))
        h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
        if config["model_type"] == "gpt_oss":
            x = x + gpt_oss_mixture(config, w, at + "mlp.", h)
        elif at + "mlp.gate_proj.weight" in w:
            x = x + project("mlp.down_proj", F.silu(project("mlp.gate_proj", h)) * project("mlp.up_proj", h))
        else:
            x = x + mixture(config, w, at, h)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return F.linear(rms_norm(x, w["model.norm.weight"], eps), head)


def mixture(config, w, at, h):
    """The weighted sum of each token's best experts, all experts computed for all tokens."""
    if config["model_type"] == "mixtral":
        at, names, renormalise = at + "block_sparse_moe.", ("w1", "w3", "w2"), True
    else:
        at, names, renormalise = at + "mlp.", ("gate_proj", "up_proj", "down_proj"), config["norm_topk_prob"]
    scores = F.linear(h, w[at + "gate.weight"]).softmax(-1)
    best, chosen = scores.topk(config["num_experts_per_tok"], -1)
    if renormalise:
        best = best / best.sum(-1, keepdim=True)
    weights = torch.zeros_like(scores).scatter(-1, chosen, best)
    y = torch.zeros_like(h)
    for expert in range(scores.shape[-1]):
        gate, up, down = (w[f"{at}experts.{expert}.{name}.weight"] for name in names)
        y = y + weights[..., expert, None] * F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)
    return y


def gpt_oss_mixture(config, w, at, h):
    """Experts with biases, gates and ups by turns in one tensor, both with bounds; logits of the best, then a softmax."""
    best, chosen = F.linear(h, w[at + "router.weight"], w[at + "router.bias"]).topk(config["num_experts_per_tok"], -1)
    weights = torch.zeros(*h.shape[:-1], config["num_local_experts"], dtype=h.dtype)
    weights = weights.scatter(-1, chosen, best.softmax(-1))
    y = torch.zeros_like(h)
    for expert in range(config["num_local_experts"]):
        of = lambda name: w[at + "experts." + name][expert]
        gate, up = (h @ of("gate_up_proj") + of("gate_up_proj_bias")).unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        out = ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ of("down_proj") + of("down_proj_bias")
        y = y + weights[..., expert, None] * out
    return y


def window(config, layer):
    """How many tokens a layer looks back over, its own among them."""
    types = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return config.get("sliding_window") if types[layer] == "sliding_attention" else None


def deepseek(config, w, tokens):
    """DeepSeek-V2 and V3: latent attention, and a mixture with an expert that all tokens meet."""
    return F.linear(deepseek_hidden(config, w, tokens), w["lm_head.weight"])


def deepseek_hidden(config, w, tokens):
    """What the output projection reads."""
    x = F.embedding(tokens, w["model.embed_tokens.weight"])
    for layer in range(config["num_hidden_layers"]):
        x = deepseek_layer(config, w, layer, x)
    return rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])


def deepseek_ahead(config, w, tokens, targets):
    """Logits of the next token, and of the one behind it (DeepSeek-V3, arXiv 2412.19437, section 2.2)."""
    eps, at = config["rms_norm_eps"], f"model.layers.{config['num_hidden_layers']}."
    x = deepseek_hidden(config, w, tokens)
    following = torch.cat((tokens[:, 1:], targets[:, -1:]), 1)
    known = (following >= 0)[..., None]
    e = F.embedding(following.clamp(min=0), w["model.embed_tokens.weight"]) * known
    both = torch.cat((rms_norm(e, w[at + "enorm.weight"], eps), rms_norm(x, w[at + "hnorm.weight"], eps)), -1)
    y = deepseek_layer(config, w, config["num_hidden_layers"], F.linear(both, w[at + "eh_proj.weight"]))
    y = rms_norm(y, w[at + "shared_head.norm.weight"], eps)
    return F.linear(x, w["lm_head.weight"]), F.linear(y, w["lm_head.weight"])


def deepseek_layer(config, w, layer, x):
    eps, heads = config["rms_norm_eps"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    rank, (batch, time, _) = config["kv_lora_rank"], x.shape
    frequencies = rope_frequencies(config, rope)
    amplitude, stretch = 1.0, 1.0
    if scaling := config.get("rope_scaling"):
        of = lambda key: 0.1 * scaling[key] * math.log(scaling["factor"]) + 1
        amplitude, stretch = of("mscale") / of("mscale_all_dim"), of("mscale_all_dim") ** 2
    turn = torch.polar(torch.full((time, rope // 2), amplitude, dtype=torch.float64),
                       torch.arange(time, dtype=torch.float64)[:, None] * frequencies)
    rotate_pairs = lambda x: torch.view_as_real(torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    at = f"model.layers.{layer}."
    project = lambda name, h: F.linear(h, w[at + name + ".weight"])
    h = rms_norm(x, w[at + "input_layernorm.weight"], eps)
    if config["q_lora_rank"]:
        latent = rms_norm(project("self_attn.q_a_proj", h), w[at + "self_attn.q_a_layernorm.weight"], 1e-6)
        q = project("self_attn.q_b_proj", latent)
    else:
        q = project("self_attn.q_proj", h)
    q_nope, q_rope = q.view(batch, time, heads, nope + rope).transpose(1, 2).split([nope, rope], -1)
    latent, k_rope = project("self_attn.kv_a_proj_with_mqa", h).split([rank, rope], -1)
    latent = rms_norm(latent, w[at + "self_attn.kv_a_layernorm.weight"], 1e-6)
    kv = project("self_attn.kv_b_proj", latent).view(batch, time, heads, nope + value).transpose(1, 2)
    k_nope, v = kv.split([nope, value], -1)
    k_rope = rotate_pairs(k_rope[:, None]).expand(-1, heads, -1, -1)
    q = torch.cat((q_nope, rotate_pairs(q_rope)), -1) * stretch
    y = attention(q, torch.cat((k_nope, k_rope), -1), v)
    x = x + project("self_attn.o_proj", y.transpose(1, 2).reshape(batch, time, heads * value))
    h = rms_norm(x, w[at + "post_attention_layernorm.weight"], eps)
    gated = lambda to, h: project(to + ".down_proj", F.silu(project(to + ".gate_proj", h)) * project(to + ".up_proj", h))
    if layer < config["first_k_dense_replace"]:
        return x + gated("mlp", h)
    weights = deepseek_router(config, project("mlp.gate", h), w.get(at + "mlp.gate.e_score_correction_bias", 0.0))
    for expert in range(weights.shape[-1]):
        x = x + weights[..., expert, None] * gated(f"mlp.experts.{expert}", h)
    return x + gated("mlp.shared_experts", h)


def deepseek_router(config, logits, bias):
    """Weights of all experts, zero for those not chosen. V3 takes the best, by score and bias, of the groups whose two
    best are best."""
    v3 = config["model_type"] == "deepseek_v3"
    scores = logits.sigmoid() if v3 else logits.softmax(-1)
    choice = scores
    if v3:
        groups = (scores + bias).unflatten(-1, (config["n_group"], -1))
        best = groups.topk(2, -1)[0].sum(-1).topk(config["topk_group"], -1)[1]
        inside = torch.zeros(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
        choice = groups.masked_fill(~inside[..., None], -math.inf).flatten(-2)
    chosen = choice.topk(config["num_experts_per_tok"], -1)[1]
    best = scores.gather(-1, chosen)
    if v3 and config["norm_topk_prob"]:
        best = best / best.sum(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, chosen, best * config["routed_scaling_factor"])


def gpt2(config, w, tokens):
    """GPT-2; its linear weights are stored [in, out]."""
    eps, heads, width = config["layer_norm_epsilon"], config["n_head"], config["n_embd"]
    batch, time = tokens.shape
    x = F.embedding(tokens, w["transformer.wte.weight"]) + w["transformer.wpe.weight"][:time]
    for layer in range(config["n_layer"]):
        at = f"transformer.h.{layer}."

        def norm(name, h):
            return F.layer_norm(h, (width,), w[at + name + ".weight"], w[at + name + ".bias"], eps)

        def project(name, h):
            return h @ w[at + name + ".weight"] + w[at + name + ".bias"]

        qkv = project("attn.c_attn", norm("ln_1", x)).split(width, -1)
        q, k, v = (z.view(batch, time, heads, width // heads).transpose(1, 2) for z in qkv)
        y = attention(q, k, v).transpose(1, 2).reshape(batch, time, width)
        x = x + project("attn.c_proj", y)
        h = F.gelu(project("mlp.c_fc", norm("ln_2", x)), approximate="tanh")
        x = x + project("mlp.c_proj", h)
    x = F.layer_norm(x, (width,), w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], eps)
    return x @ w["transformer.wte.weight"].T


def rms_norm(x, scale, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def attention(q, k, v, window=None, sinks=None):
    """Causal softmax attention, over a window and with a sink for each head; all of [batch, heads, time, head_dim]."""
    batch, heads, time, _ = q.shape
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    unseen = torch.ones(time, time, dtype=torch.bool).triu(1)
    if window is not None:
        unseen |= torch.ones(time, time, dtype=torch.bool).tril(-window)
    scores = scores.masked_fill(unseen, -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, heads, 1, 1).expand(batch, heads, time, 1)), -1)
    return scores.softmax(-1)[..., :time] @ v


def rotate(x, angles, amplitude=1.0):
    """Rotary position embedding in the half-split convention: dim i pairs with dim i + head_dim/2."""
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rope_frequencies(config, head_dim):
    """Radians per position for each pair; `llama3` slows the long wavelengths by `factor`."""
    rope = config.get("rope_parameters") or dict(config.get("rope_scaling") or dict(rope_type="default"),
                                                 rope_theta=config["rope_theta"])
    f = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    if rope["rope_type"] == "default":
        return f
    if rope["rope_type"] == "yarn":
        # Between the dims that make beta_fast and beta_slow turns in a full context (Peng et al. 2023, section 3.2).
        dim = lambda turns: (head_dim * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi))
                             / (2 * math.log(rope["rope_theta"])))
        low, high = dim(rope["beta_fast"]), dim(rope["beta_slow"])
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
        return f / rope["factor"] * ramp + f * (1 - ramp)
    assert rope["rope_type"] == "llama3", rope
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return f * (keep + (1 - keep) / rope["factor"])
