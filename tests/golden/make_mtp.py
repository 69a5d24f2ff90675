"""Make the golden of multi-token prediction: `kimi-like` with a module that predicts one token more, in float64.

    python tests/golden/make_mtp.py

No class of `transformers` trains the module, so the model is the one of reference64.py, differentiated by autograd. The
loss that is stored is the model's own; gradients, norms and steps are those of the sum. README.md says what each file holds.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import reference64
from make_models import BETAS, CLIP, DECAY, EPS, HERE, IGNORE, LR, STEPS, dump

FROM, NAME, WEIGHT = "kimi-like", "mtp-like", 0.3


def main():
    torch.set_num_threads(1)
    folder = HERE / NAME
    folder.mkdir(exist_ok=True)
    config = json.loads((HERE / FROM / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "batch.json").write_text((HERE / FROM / "batch.json").read_text())
    batches = json.loads((folder / "batch.json").read_text())
    batches = [{k: torch.tensor(v) for k, v in b.items()} for b in batches]

    stored = {**load_file(HERE / FROM / "model.safetensors"), **module(config)}
    save_file({k: t.contiguous() for k, t in sorted(stored.items())}, folder / "model.safetensors")
    fixed = {k: t.double() for k, t in stored.items() if k.endswith("correction_bias")}
    copies = (".3.embed_tokens.weight", ".3.shared_head.head.weight")
    weights = {k: t.double().requires_grad_() for k, t in stored.items() if k not in fixed and not k.endswith(copies)}
    losses = lambda batch: both(config, {**weights, **fixed}, batch)

    initial = []
    for i, batch in enumerate(batches):
        own, more = losses(batch)
        grads = torch.autograd.grad(own + WEIGHT * more, list(weights.values()))
        initial.append(own.item())
        print(f"batch {i}: loss {own.item():.6f}, of one token more {more.item():.6f}")
        if i < 2:
            name = ["grads", "grads_masked"][i]
            save_file({k: g.float().contiguous() for k, g in zip(weights, grads)}, folder / f"{name}.safetensors")
    train = {
        "optimiser": dict(kind="adamw", lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, clip=CLIP),
        "mtp_weight": WEIGHT,
        "initial_losses": {"float64": initial},
        "float64": run_steps(losses, weights, batches),
    }
    (folder / "train.json").write_text(dump(train))
    save_file({k: p.detach().float() for k, p in weights.items()}, folder / "after10.safetensors")


def module(config):
    """Random weights of the layer behind the model's own, by the names of DeepSeek-V3's files."""
    rng = torch.Generator().manual_seed(2000)
    stored, hidden = load_file(HERE / FROM / "model.safetensors"), config["hidden_size"]
    last, at = f"model.layers.{config['num_hidden_layers'] - 1}.", f"model.layers.{config['num_hidden_layers']}."
    shapes = {at + k[len(last):]: t.shape for k, t in sorted(stored.items()) if k.startswith(last)}
    shapes |= {at + f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes[at + "eh_proj.weight"] = (hidden, 2 * hidden)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=rng)
        norm = len(shape) == 1 and name.endswith("weight")
        weights[name] = 1 + 0.2 * noise if norm else (0.1 if name.endswith("correction_bias") else 0.2) * noise
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
    return weights | {at + f"{name}.weight": stored[of + ".weight"].clone() for name, of in copies.items()}


def both(config, weights, batch):
    """The cross-entropy of the next token, and that of the one behind it as a share of as many."""
    targets = batch["targets"]
    further = torch.cat((targets[:, 1:], torch.full_like(targets[:, :1], IGNORE)), 1)
    valid = (targets != IGNORE).sum()
    of = lambda logits, ids: F.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=IGNORE, reduction="sum") / valid
    own, more = reference64.deepseek_ahead(config, weights, batch["tokens"], targets)
    return of(own, targets), of(more, further)


def run_steps(losses, weights, batches):
    groups = [
        {"params": [p for p in weights.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in weights.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False)
    own_losses, norms = [], []
    for step in range(STEPS):
        optimiser.zero_grad()
        own, more = losses(batches[step % len(batches)])
        (own + WEIGHT * more).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), CLIP, foreach=False).item())
        own_losses.append(own.item())
        optimiser.step()
    return {"losses": own_losses, "grad_norms": norms}


if __name__ == "__main__":
    main()
