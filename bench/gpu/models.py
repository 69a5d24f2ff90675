"""The models of the GPU benches in PyTorch, and the FLOPs of a token as Phalanx counts them.

Written as tightly as the stock library allows: one product for queries, keys and values, one for gate and up, fused
attention, fused norms, rotary positions on queries and keys at once. Parameters are float32 masters; each use casts
them to the type of the activations, which is what autocast does, without its detour of norms and residuals through
float32. Gradients of the masters are float32. In float32 nothing is cast.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    hidden: int
    vocab: int
    sequence: int
    llama: bool  # RMSNorm, rotary, SwiGLU, untied; else GPT-2: LayerNorm, learned positions, GELU, biases, tied


SHAPES = {
    "llama-1.1b": Shape(22, 2048, 32, 4, 64, 5632, 32000, 4096, True),
    "gpt2-124m": Shape(12, 768, 12, 12, 64, 3072, 50304, 1024, False),
    "reference-13.8m": Shape(6, 384, 6, 6, 64, 1024, 4096, 256, True),
}
# The same kinds, small enough for any machine: to rehearse, never to quote.
TINY = {
    "llama-1.1b": Shape(2, 64, 4, 2, 16, 96, 512, 64, True),
    "gpt2-124m": Shape(2, 64, 4, 4, 16, 128, 512, 64, False),
    "reference-13.8m": Shape(2, 64, 4, 4, 16, 96, 512, 64, True),
}


def flops_per_token(model, shape):
    """Forward and backward: `6 N + 6 L T H h` (ModelSpec::flops_per_token in crates/spec/src/model_count.rs).

    N counts every parameter that a token meets in a product or a norm, a tied table once, looked-up tables not at
    all; attention is halved for being causal; recomputing never counts.
    """
    looked_up = model.positions.weight.numel() if not shape.llama else model.embedding.weight.numel()
    active = sum(p.numel() for p in model.parameters()) - looked_up
    return 6 * active + 6 * shape.layers * shape.sequence * shape.heads * shape.head


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Norm(nn.Module):
    def __init__(self, width, llama):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = None if llama else nn.Parameter(torch.zeros(width))

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, 1e-5)
        return F.layer_norm(x, weight.shape, weight, self.bias.to(x.dtype), 1e-5)


class Layer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s, bias = s, not s.llama
        self.attention_norm, self.mlp_norm = Norm(s.width, s.llama), Norm(s.width, s.llama)
        self.qkv = Linear(s.width, (s.heads + 2 * s.kv_heads) * s.head, bias=bias)
        self.out = Linear(s.heads * s.head, s.width, bias=bias)
        self.up = Linear(s.width, (2 if s.llama else 1) * s.hidden, bias=bias)
        self.down = Linear(s.hidden, s.width, bias=bias)

    def forward(self, x, turn):
        s = self.s
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, s.head))
        if turn is not None:
            rotated, v = heads.split((s.heads + s.kv_heads, s.kv_heads), 2)
            q, k = rotate(rotated, turn).split((s.heads, s.kv_heads), 2)
        else:
            q, k, v = heads.split((s.heads, s.kv_heads, s.kv_heads), 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True,
                                           enable_gqa=s.kv_heads != s.heads)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.up(self.mlp_norm(x))
        if s.llama:
            gate, up = h.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(h, approximate="tanh"))


class Model(nn.Module):
    """Loss of a batch; parameters and activations live where and as what the caller says."""

    def __init__(self, s, dtype):
        super().__init__()
        self.s, self.dtype = s, dtype
        self.embedding = nn.Embedding(s.vocab, s.width)
        self.positions = None if s.llama else nn.Embedding(s.sequence, s.width)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = Norm(s.width, s.llama)
        self.head = Linear(s.width, s.vocab, bias=False)
        if not s.llama:
            self.head.weight = self.embedding.weight
        self.register_buffer("turn", turns(s, dtype) if s.llama else None)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = x.to(self.dtype)
        for layer in self.layers:
            x = layer(x, self.turn)
        logits = self.head(self.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten())


def turns(s, dtype):
    """Cosines and sines, [2, sequence, 1, head / 2]."""
    half = s.head // 2
    angles = torch.arange(s.sequence)[:, None, None] * 10000.0 ** (-torch.arange(half) / half)
    return torch.stack((angles.cos(), angles.sin())).to(dtype)


def rotate(x, turn):
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
