"""Causal attention of PyTorch (SDPA) in bf16, forward and backward, by backend: one line of JSON each.

    python bench/gpu/attention_peer.py [--backends flash,cudnn] [--steps 20]

TFLOP/s counts the causal half: forward 2 B H S S D, backward two and a half times that. `same_bits` says whether five
backward passes over the same values gave the same gradients. Queries, keys and values lie as a fused projection leaves
them, [batch, sequence, heads, width].
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# batch, sequence, heads, kv heads, width of a head
CASES = [(4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128), (4, 4096, 32, 32, 64), (4, 4096, 32, 4, 64)]
TINY = [(1, 64, 2, 2, 16), (1, 64, 4, 2, 16)]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}


def main():
    args = parse_args()
    cuda = torch.cuda.is_available() and not args.tiny
    backends = args.backends.split(",") if cuda else ["math"]
    for case in CASES if cuda else TINY:
        for backend in backends:
            try:
                for row in measure(case, backend, args.steps, "cuda" if cuda else "cpu"):
                    print(json.dumps(row), flush=True)
            except RuntimeError as e:  # a backend without a kernel for the case is an answer too
                print(json.dumps(named(case) | {"backend": backend, "failed": str(e).splitlines()[0][:200]}), flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="flash,cudnn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, to rehearse")
    args = parser.parse_args()
    if unknown := set(args.backends.split(",")) - BACKENDS.keys():
        parser.error(f"unknown backend {', '.join(unknown)}; known: {', '.join(BACKENDS)}")
    return args


def measure(case, backend, steps, device):
    batch, sequence, heads, kv_heads, width = case
    torch.manual_seed(0)
    draw = lambda h: torch.randn(batch, sequence, h, width, device=device, dtype=torch.bfloat16).transpose(1, 2)
    q, k, v = (draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads))
    d_out = draw(heads)

    def forward():
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)

    def backward(out):
        return torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)

    out = forward()
    first = backward(out)
    same = all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, backward(out)))
    runs = {"forward": forward, "backward": lambda: backward(out), "both": lambda: backward(forward())}
    flops = 2.0 * batch * heads * sequence * sequence * width
    for name, run in runs.items():
        seconds = median_seconds(run, steps, device)
        row = named(case) | {"backend": backend, "pass": name, "seconds": seconds,
                             "tflops": PASSES[name] * flops / seconds / 1e12}
        yield row if name == "forward" else row | {"same_bits": same}


def named(case):
    return dict(zip(("batch", "sequence", "heads", "kv_heads", "width"), case))


def median_seconds(run, steps, device):
    """Between events on the device; on a CPU by the clock, which tells nothing."""
    if device == "cpu":
        run()
        return 1e-3
    for _ in range(5):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) / 1e3


if __name__ == "__main__":
    main()
