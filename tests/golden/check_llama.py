"""Compute llama-gqa's losses, gradients and AdamW steps in numpy float64, with derivatives worked out by hand.

    python tests/golden/check_llama.py

Shares nothing with make_models.py but the files: no autograd, no torch. Fails if a golden disagrees.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

FOLDER = pathlib.Path(__file__).parent / "llama-gqa"
CONFIG = json.loads((FOLDER / "config.json").read_text())
LAYERS, HEADS, KV_HEADS, DIM = (CONFIG[k] for k in
                                ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"))
EPS, THETA = CONFIG["rms_norm_eps"], CONFIG["rope_parameters"]["rope_theta"]


def main():
    weights = {k: w.astype(np.float64) for k, w in load_file(FOLDER / "model.safetensors").items()}
    batches = [{k: np.array(v) for k, v in b.items()} for b in json.loads((FOLDER / "batch.json").read_text())]
    train = json.loads((FOLDER / "train.json").read_text())

    found = [loss_and_gradients(weights, b) for b in batches]
    close("initial losses", [loss for loss, _ in found], train["initial_losses"]["float64"], 1e-12)
    for k, g in load_file(FOLDER / "grads64.safetensors").items():
        close(f"gradient {k}", found[0][1][k], g, 1e-10)
    for k, g in load_file(FOLDER / "grads_masked.safetensors").items():
        close(f"masked gradient {k}", found[1][1][k], g, 1e-5)

    losses, norms = adamw(weights, batches, steps=len(train["float64"]["losses"]), **train["optimiser"])
    close("training losses", losses, train["float64"]["losses"], 1e-9)
    close("gradient norms", norms, train["float64"]["grad_norms"], 1e-9)
    for k, w in load_file(FOLDER / "after10_from64.safetensors").items():
        close(f"final {k}", weights[k], w, 1e-7)
    print("all of llama-gqa agrees")


def close(what, a, b, tolerance):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    off = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert off < tolerance, f"{what}: off by {off:.1e}, allowed {tolerance:.0e}"


def loss_and_gradients(w, batch):
    """Mean loss over valid targets and its gradient for every weight."""
    tokens, targets = batch["tokens"], batch["targets"]
    shape = (*tokens.shape, -1, DIM)
    x, saved = w["model.embed_tokens.weight"][tokens], []
    for layer in range(LAYERS):
        p = layer_weights(w, layer)
        h = norm(x, p["input_layernorm"])
        q, k, v = ((h @ p[f"self_attn.{n}_proj"].T).reshape(shape) for n in "qkv")
        q, k = rotate(q, 1), rotate(k, 1)
        y, probs = attend(q, k, v)
        mid = x + y @ p["self_attn.o_proj"].T
        h2 = norm(mid, p["post_attention_layernorm"])
        gate, up = h2 @ p["mlp.gate_proj"].T, h2 @ p["mlp.up_proj"].T
        sigmoid = 1 / (1 + np.exp(-gate))
        out = mid + (gate * sigmoid * up) @ p["mlp.down_proj"].T
        saved.append((x, h, q, k, v, probs, y, mid, h2, gate, up, sigmoid))
        x = out
    last = norm(x, w["model.norm.weight"])
    logits = last @ w["lm_head.weight"].T
    logits -= logits.max(-1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    valid = targets >= 0
    pick = np.where(valid, targets, 0)[..., None]
    loss = -(np.take_along_axis(log_probs, pick, -1)[..., 0] * valid).sum() / valid.sum()

    grads = {}
    d = np.exp(log_probs)
    np.put_along_axis(d, pick, np.take_along_axis(d, pick, -1) - 1, -1)
    d *= valid[..., None] / valid.sum()
    grads["lm_head.weight"] = outer(d, last)
    dx, grads["model.norm.weight"] = norm_back(d @ w["lm_head.weight"], x, w["model.norm.weight"])
    for layer in reversed(range(LAYERS)):
        p, g = layer_weights(w, layer), {}
        x, h, q, k, v, probs, y, mid, h2, gate, up, sigmoid = saved[layer]
        silu = gate * sigmoid
        d = dx @ p["mlp.down_proj"]
        dup, dgate = d * silu, d * up * (sigmoid + silu * (1 - sigmoid))
        g["mlp.down_proj"], g["mlp.gate_proj"], g["mlp.up_proj"] = outer(dx, silu * up), outer(dgate, h2), outer(dup, h2)
        d, g["post_attention_layernorm"] = norm_back(
            dgate @ p["mlp.gate_proj"] + dup @ p["mlp.up_proj"], mid, p["post_attention_layernorm"])
        dx = dx + d
        g["self_attn.o_proj"] = outer(dx, y)
        dq, dk, dv = attend_back(dx @ p["self_attn.o_proj"], q, k, v, probs)
        dh = 0
        for n, d in zip("qkv", (rotate(dq, -1), rotate(dk, -1), dv)):
            d = d.reshape(*tokens.shape, -1)
            g[f"self_attn.{n}_proj"] = outer(d, h)
            dh = dh + d @ p[f"self_attn.{n}_proj"]
        d, g["input_layernorm"] = norm_back(dh, x, p["input_layernorm"])
        dx = dx + d
        grads |= {f"model.layers.{layer}.{n}.weight": t for n, t in g.items()}
    grads["model.embed_tokens.weight"] = np.zeros_like(w["model.embed_tokens.weight"])
    np.add.at(grads["model.embed_tokens.weight"], tokens, dx)
    return loss, grads


def layer_weights(w, layer):
    at = f"model.layers.{layer}."
    return {k.removeprefix(at).removesuffix(".weight"): t for k, t in w.items() if k.startswith(at)}


def outer(d, x):
    """Gradient of W in y = x W^T."""
    return np.einsum("bto,bti->oi", d, x)


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * scale


def norm_back(d, x, scale):
    r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)
    ds = d * scale
    return r * ds - x * r**3 * (ds * x).mean(-1, keepdims=True), (d * x * r).sum((0, 1))


def rotate(x, sign):
    """Turn pairs (i, i + DIM/2) of [batch, time, head, DIM] by position times frequency; sign -1 turns back."""
    half = DIM // 2
    angle = sign * np.arange(x.shape[1])[:, None, None] * THETA ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)), -1)


def by_group(q):
    """[batch, time, head, DIM] -> [batch, time, KV head, queries of it, DIM]."""
    return q.reshape(*q.shape[:2], KV_HEADS, HEADS // KV_HEADS, DIM)


def attend(q, k, v):
    scores = np.einsum("bthgd,bshd->bhgts", by_group(q), k) / np.sqrt(DIM)
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return np.einsum("bhgts,bshd->bthgd", probs, v).reshape(*q.shape[:2], -1), probs


def attend_back(d, q, k, v, probs):
    d = by_group(d.reshape(q.shape))
    dv = np.einsum("bhgts,bthgd->bshd", probs, d)
    dp = np.einsum("bthgd,bshd->bhgts", d, v)
    ds = probs * (dp - (dp * probs).sum(-1, keepdims=True)) / np.sqrt(DIM)
    dq = np.einsum("bhgts,bshd->bthgd", ds, k).reshape(q.shape)
    return dq, np.einsum("bhgts,bthgd->bshd", ds, by_group(q)), dv


def adamw(w, batches, steps, kind, lr, beta1, beta2, eps, weight_decay, clip):
    """Train in place; returns losses and gradient norms before clipping."""
    assert kind == "adamw"
    first, second = ({k: np.zeros_like(t) for k, t in w.items()} for _ in range(2))
    losses, norms = [], []
    for step in range(1, steps + 1):
        loss, grads = loss_and_gradients(w, batches[(step - 1) % len(batches)])
        total = np.sqrt(sum((g * g).sum() for g in grads.values()))
        losses.append(loss)
        norms.append(total)
        for k, g in grads.items():
            g = g * min(1, clip / (total + 1e-6))
            first[k] += (1 - beta1) * (g - first[k])
            second[k] += (1 - beta2) * (g * g - second[k])
            if w[k].ndim > 1:
                w[k] *= 1 - lr * weight_decay
            w[k] -= lr * first[k] / (1 - beta1**step) / (np.sqrt(second[k] / (1 - beta2**step)) + eps)
    return losses, norms


if __name__ == "__main__":
    main()
