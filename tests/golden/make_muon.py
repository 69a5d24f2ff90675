"""Make the Muon goldens beside those of AdamW: ten steps of torch.optim.Muon and torch.optim.AdamW in float64.

    python tests/golden/make_muon.py

torch.optim.Muon orthogonalises in bfloat16; here in float64, so that what is compared is the formula and not the
rounding. The models are those of reference64.py. README.md says with which versions the files were made.
"""

import json

import torch
from safetensors.torch import load_file, save_file

import reference64
from make_models import BETAS, CLIP, DECAY, EPS, HERE, IGNORE, LR, STEPS, dump, mean_loss

MODELS = ["llama-gqa", "deepseek-v3-like"]
MOMENTUM = 0.95
# Matrices inside layers: whatever else has two dims is an embedding, the output projection or a router.
HIDDEN = ("proj.weight", "proj_with_mqa.weight", "_a_proj.weight", "_b_proj.weight")


def main():
    torch.set_num_threads(1)
    torch.Tensor.bfloat16 = lambda tensor: tensor
    for name in MODELS:
        folder = HERE / name
        config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors").items()
        weights = {k: t.double().requires_grad_() for k, t in stored if "correction_bias" not in k}
        fixed = {k: t.double() for k, t in stored if "correction_bias" in k}
        batches = json.loads((folder / "batch.json").read_text())
        batches = [{k: torch.tensor(v) for k, v in b.items()} for b in batches]
        train = run_steps(lambda tokens: reference64.logits(config, {**weights, **fixed}, tokens), weights, batches)
        about = dict(kind="muon", lr=LR, momentum=MOMENTUM, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY,
                     clip=CLIP)
        (folder / "muon.json").write_text(dump({"optimiser": about, "float64": train}))
        save_file({k: p.detach().float() for k, p in weights.items()}, folder / "muon10_from64.safetensors")
        print(name, train["losses"][0], train["losses"][-1])


def run_steps(forward, weights, batches):
    hidden = {k for k, p in weights.items() if p.dim() == 2 and k.endswith(HIDDEN)}
    of = lambda names: [p for k, p in weights.items() if k in names]
    rest = [k for k in weights if k not in hidden]
    groups = [
        {"params": of([k for k in rest if weights[k].dim() > 1]), "weight_decay": DECAY},
        {"params": of([k for k in rest if weights[k].dim() == 1]), "weight_decay": 0.0},
    ]
    optimisers = [
        torch.optim.Muon(of(hidden), lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False),
    ]
    losses, norms = [], []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        for p in weights.values():
            p.grad = None
        loss = mean_loss(forward(batch["tokens"]), batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), CLIP, foreach=False).item())
        losses.append(loss.item())
        for optimiser in optimisers:
            optimiser.step()
    return {"losses": losses, "grad_norms": norms}


if __name__ == "__main__":
    assert IGNORE == -100
    main()
