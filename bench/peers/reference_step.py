"""The reference training step in PyTorch on the CPU, one step for each line of standard input.

    python bench/peers/reference_step.py --threads 2 [--compile] [--rotary]

Reads lines saying `step` and answers each with the seconds it took; ends with its input. Standing by like this,
it can take turns with another program, so that both see the same state of the machine (pair.py). The first
answers include warming up, and with --compile the compiling.

The model: 6 layers, width 384, 6 heads of 64, SwiGLU of 1024, RMSNorm, vocabulary 4096, head not tied; 8 sequences
of 256 tokens, float32, AdamW. The fastest standard forms are used: one product for q, k and v, fused attention, fused
AdamW. Positions are left out unless --rotary asks for them: the work they add to PyTorch is its own matter.
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

LAYERS, WIDTH, HEADS, HIDDEN, VOCAB = 6, 384, 6, 1024, 4096
SEQUENCES, TIME = 8, 256


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--rotary", action="store_true", help="rotary position embedding on q and k")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = trainer(args)
    for line in sys.stdin:
        if line.strip() != "step":
            sys.exit(f"expected `step`, found {line.strip()!r}")
        print(f"{step():.6f}", flush=True)


def trainer(args):
    """A function that takes one optimiser step and returns its seconds; making the batch is not counted."""
    model = Model(args.rotary)
    run = torch.compile(model) if args.compile else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step():
        ids = torch.randint(0, VOCAB, (SEQUENCES, TIME + 1))
        tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        start = time.perf_counter()
        optimiser.zero_grad()
        run(tokens, targets).backward()
        optimiser.step()
        return time.perf_counter() - start

    return step


class Model(nn.Module):
    def __init__(self, rotary):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("turn", turns() if rotary else None)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.turn)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)
        self.gate, self.up, self.down = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH)

    def forward(self, x, turn):
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turns():
    """Cosines and sines, [2, time, head_dim / 2]."""
    half = WIDTH // HEADS // 2
    angles = torch.arange(TIME)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, turn):
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


if __name__ == "__main__":
    main()
