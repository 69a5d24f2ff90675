"""Make the Muon goldens beside those of AdamW: ten steps of torch.optim.Muon and torch.optim.AdamW in float64.

    python tests/golden/make_muon.py

What torch.optim.Muon orthogonalises by a quintic in bfloat16 goes through a singular value decomposition in float64 here, and
polynomials of the singular values. Queries, keys and values of each head are parameters of their own. The models are those
of reference64.py. README.md says with which versions the files were made.
"""

import json

import torch
from safetensors.torch import load_file, save_file

import reference64
from make_models import BETAS, CLIP, DECAY, EPS, HERE, IGNORE, STEPS, dump, mean_loss

MODELS = ["llama-gqa", "deepseek-v3-like"]
MOMENTUM = 0.95
# Less than AdamW's goldens have: at 1e-2 a token goes to another expert in step 9 for a rounding.
LR = 3e-3
# Matrices inside layers: whatever else has two dims is an embedding, the output projection or a router.
HIDDEN = ("proj.weight", "proj_with_mqa.weight", "_a_proj.weight", "_b_proj.weight")


def main():
    torch.set_num_threads(1)
    torch.optim._muon._zeropower_via_newtonschulz = lambda update, *_: orthogonal(update)
    for name in MODELS:
        folder = HERE / name
        config = json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors").items()
        weights = {
            k: [part.clone().requires_grad_() for part in t.double().split(rows_of_matrices(config, k, t))]
            for k, t in stored if "correction_bias" not in k
        }
        whole = lambda: {k: torch.cat(parts) for k, parts in weights.items()}
        fixed = {k: t.double() for k, t in stored if "correction_bias" in k}
        batches = json.loads((folder / "batch.json").read_text())
        batches = [{k: torch.tensor(v) for k, v in b.items()} for b in batches]
        train = run_steps(lambda tokens: reference64.logits(config, {**whole(), **fixed}, tokens), weights, batches)
        about = dict(kind="muon", lr=LR, momentum=MOMENTUM, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY,
                     clip=CLIP)
        (folder / "muon.json").write_text(dump({"optimiser": about, "float64": train}))
        save_file({k: p.detach().float() for k, p in whole().items()}, folder / "muon10_from64.safetensors")
        print(name, train["losses"][0], train["losses"][-1])


def rows_of_matrices(config, name, tensor):
    """Rows of the matrices that make up a parameter: of each head its queries, keys or values."""
    part = name.split(".")[-2]
    heads = {"q_proj": "num_attention_heads", "q_b_proj": "num_attention_heads", "kv_b_proj": "num_attention_heads",
             "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
    if tensor.dim() != 2 or part not in heads:
        return [tensor.shape[0]]
    count = config[heads[part]]
    if part == "kv_b_proj":
        return [config["qk_nope_head_dim"], config["v_head_dim"]] * count
    return [tensor.shape[0] // count] * count


# Centre and coefficients of each step: crates/kernels/src/muon.rs says where they come from.
STEPS_OF_MUON = [
    (0.5, [0.7154521, -14.169038, 72.842, 279.35568, -990.9901, -1202.1936, 3424.4993]),
    (1.75, [0.6386149, -0.95656586, 1.1224777, 1.3635035, -1.2414598, -0.5261116, 0.38515016]),
]


def orthogonal(update):
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    s = s / s.pow(4).sum().clamp(min=1e-28).pow(0.25)
    for centre, coefficients in STEPS_OF_MUON:
        h = s * s - centre
        s = s * sum(c * h**i for i, c in enumerate(coefficients))
    return (u * s) @ v


def run_steps(forward, weights, batches):
    hidden = {k for k, (p, *_) in weights.items() if p.dim() == 2 and k.endswith(HIDDEN)}
    of = lambda names: [p for k, parts in weights.items() if k in names for p in parts]
    rest = [k for k in weights if k not in hidden]
    groups = [
        {"params": of([k for k in rest if weights[k][0].dim() > 1]), "weight_decay": DECAY},
        {"params": of([k for k in rest if weights[k][0].dim() == 1]), "weight_decay": 0.0},
    ]
    optimisers = [
        torch.optim.Muon(of(hidden), lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False),
    ]
    losses, norms = [], []
    for step in range(STEPS):
        batch = batches[step % len(batches)]
        for p in of(weights):
            p.grad = None
        loss = mean_loss(forward(batch["tokens"]), batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(of(weights), CLIP, foreach=False).item())
        losses.append(loss.item())
        for optimiser in optimisers:
            optimiser.step()
    return {"losses": losses, "grad_norms": norms}


if __name__ == "__main__":
    assert IGNORE == -100
    main()
