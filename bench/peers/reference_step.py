"""The reference training step in PyTorch on the CPU, one step for each line of standard input.

    python bench/peers/reference_step.py --threads 2 [--compile] [--rotary] [--experts 8 --top-k 2 --hidden 512]

Reads lines saying `step` and answers each with the seconds it took; ends with its input. Standing by like this,
it can take turns with another program, so that both see the same state of the machine (pair.py). The first
answers include warming up, and with --compile the compiling.

The model: 6 layers, width 384, 6 heads of 64, SwiGLU of 1024, RMSNorm, vocabulary 4096, head not tied; 8 sequences
of 256 tokens, float32, AdamW. The fastest standard forms are used: one product for q, k and v, fused attention, fused
AdamW. Positions are left out unless --rotary asks for them: the work they add to PyTorch is its own matter.

With --experts the MLPs are mixtures of experts, dropless: a softmax router whose weights of the chosen sum to one, tokens sorted
by expert, grouped products. Losses that keep experts in balance are left out; they cost ours a little and the peer nothing.
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
    parser.add_argument("--experts", type=int, help="experts of a layer, instead of one MLP")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width inside an MLP or an expert")
    args = parser.parse_args()
    if args.experts is not None and not 1 <= args.top_k <= args.experts:
        parser.error("--top-k is 1 to --experts")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step = trainer(args)
    for line in sys.stdin:
        if line.strip() != "step":
            sys.exit(f"expected `step`, found {line.strip()!r}")
        print(f"{step():.6f}", flush=True)


def trainer(args):
    """A function that takes one optimiser step and returns its seconds; making the batch is not counted."""
    mlp = lambda: Experts(args.experts, args.top_k, args.hidden) if args.experts else Mlp(args.hidden)
    model = Model(args.rotary, mlp)
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
    def __init__(self, rotary, mlp=lambda: Mlp(HIDDEN)):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer(mlp()) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.register_buffer("turn", turns() if rotary else None)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.turn)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Layer(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.attention_norm, self.mlp_norm, self.mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH), mlp
        self.qkv, self.out = linear(WIDTH, 3 * WIDTH), linear(WIDTH, WIDTH)

    def forward(self, x, turn):
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Mlp(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.gate, self.up, self.down = linear(WIDTH, hidden), linear(WIDTH, hidden), linear(hidden, WIDTH)

    def forward(self, h):
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Experts(nn.Module):
    def __init__(self, experts, top_k, hidden):
        super().__init__()
        self.router, self.top_k = linear(WIDTH, experts), top_k
        weights = lambda inputs, outputs: nn.Parameter(torch.randn(experts, inputs, outputs) * 0.02)
        self.gate_up, self.down = weights(WIDTH, 2 * hidden), weights(hidden, WIDTH)

    def forward(self, h):
        tokens = h.flatten(0, 1)
        chosen, expert = F.softmax(self.router(tokens), -1).topk(self.top_k)
        weight = (chosen / chosen.sum(-1, keepdim=True)).flatten()
        order = expert.flatten().argsort(stable=True)
        ends = torch.bincount(expert.flatten(), minlength=len(self.down)).cumsum(0).to(torch.int32)
        row = order // self.top_k
        gate, up = F.grouped_mm(tokens[row], self.gate_up, offs=ends).chunk(2, -1)
        y = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends) * weight[order, None]
        return torch.zeros_like(tokens).index_add(0, row, y).view_as(h)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


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
