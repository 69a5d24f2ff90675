"""Hold steps of Phalanx to steps of `transformers` on the same weights and tokens, on this machine's device.

    python bench/gpu/golden.py --phalanx target/release/phalanx --set run.device=cuda

For each family: makes a random Hugging Face model, lets Phalanx import it and train on a dataset of exactly one global batch
(so that every step takes the same samples in whatever order), does the same steps in PyTorch in float32 without TF32,
and compares each step's loss and gradient norm. Phalanx runs in float32 and in bf16. Prints one line of JSON for each;
exit status 1 if one is too far off.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

import tokens

STEPS = 5
LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1
# Relative distance of loss and of gradient norm. float32 differs by the order of its sums; bf16 by its rounding.
TOLERANCE = {"f32": (1e-5, 1e-4), "bf16": (2e-3, 2e-2)}


def main():
    args = parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for family in args.families.split(","):
            good &= check(args, pathlib.Path(folder) / family, family)
    sys.exit(0 if good else 1)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phalanx", required=True, type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[], help="a key of Phalanx's run file")
    parser.add_argument("--families", default="llama,gpt2")
    parser.add_argument("--precisions", default="f32,bf16")
    parser.add_argument("--tiny", action="store_true", help="a smaller model, to rehearse")
    return parser.parse_args()


def config(family, tiny):
    width, layers, vocab, length = (64, 2, 512, 64) if tiny else (512, 4, 8192, 512)
    heads = width // (16 if tiny else 64)
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, vocab_size=vocab, n_positions=length,
                                       attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.05)
    return transformers.LlamaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=heads // 2, intermediate_size=3 * width, vocab_size=vocab,
                                    max_position_embeddings=length, initializer_range=0.05, rms_norm_eps=1e-5)


def check(args, folder, family):
    torch.manual_seed(1)
    settings = config(family, args.tiny)
    settings._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.save_pretrained(folder / "hf")
    sequences, length = 8, settings.max_position_embeddings
    stream = tokens.made_up(settings.vocab_size, sequences * length + 1, 7)
    tokens.write(folder / "tokens", stream)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flat = torch.tensor(stream.tolist(), device=device)
    theirs = steps(model.to(device), flat[:-1].view(sequences, length), flat[1:].view(sequences, length))
    call(args.phalanx, "import", folder / "hf", folder / "imported", "--set", f"data.vocab_size={min(4096, settings.vocab_size)}")
    good = True
    for precision in args.precisions.split(","):
        run = [f"run.dir={folder / precision}", f"data.prefix={folder / 'tokens'}", "data.split=1,0,0",
               f"data.vocab_size={min(4096, settings.vocab_size)}",
               f"batch.sequence={length}", f"batch.sequences={sequences}", "layout.micro_batch=2", f"train.steps={STEPS}",
               f"train.precision={precision}", f"optim.lr={LR}", f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}",
               f"optim.eps={EPS}", f"optim.weight_decay={DECAY}", "optim.grad_clip=1.0", "schedule.kind=constant",
               "schedule.warmup_steps=0", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0"]
        out = call(args.phalanx, "train", folder / "imported" / "run.toml", "--init", folder / "imported", "--json",
                   *(x for key in [*run, *args.set] for x in ("--set", key)))
        records = [r for r in map(json.loads, out.splitlines()) if r["kind"] == "step"]
        ours = [(r["loss"], r["grad_norm"]) for r in records]
        # Losses as a share of the first: of one that training has taken away, only rounding is left to compare.
        scale = lambda i, b: abs(theirs[0][0]) if i == 0 else abs(b[i])
        apart = [max(abs(a[i] - b[i]) / scale(i, b) for a, b in zip(ours, theirs)) for i in (0, 1)]
        same = len(ours) == STEPS and all(a <= t for a, t in zip(apart, TOLERANCE[precision]))
        good &= same
        print(json.dumps({"golden": family, "precision": precision, "device": device, "ok": same, "loss_apart": apart[0],
                          "norm_apart": apart[1], "ours": ours, "theirs": theirs}), flush=True)
    return good


def steps(model, inputs, targets):
    """Loss and gradient norm of each step; decay on matrices and tables, none on vectors."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=LR, betas=BETAS, eps=EPS)
    model.train()
    seen = []
    for _ in range(STEPS):
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seen.append((loss.item(), norm.item()))
    return seen


def call(*command):
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
