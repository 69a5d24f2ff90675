"""Matrix products of PyTorch in bf16 and the rate of a copy on the device: one line of JSON each.

    python bench/gpu/gemm_peer.py [--steps 20] [--shapes 8192x8192x8192,16384x2048x6144]

A shape MxNxK is a linear layer of M tokens from K to N, in its three forms: `forward` y = x w^T, `dx` dx = dy w,
`dw` dw = dy^T x. The copy counts bytes read and bytes written. Operands rotate through sets that together do not fit the
second-level cache, as in a model, where no operand is used twice in a row.
"""

import argparse
import json
import statistics

import torch

# The linears of the benches at the tokens of their steps, after one large product.
SHAPES = [
    (8192, 8192, 8192),
    # llama-1.1b: queries, keys and values; output; gate and up; down; head
    (16384, 2560, 2048), (16384, 2048, 2048), (16384, 11264, 2048), (16384, 2048, 5632), (16384, 32000, 2048),
    # gpt2-124m
    (32768, 2304, 768), (32768, 768, 768), (32768, 3072, 768), (32768, 768, 3072), (32768, 50304, 768),
    # reference-13.8m
    (2048, 1152, 384), (2048, 384, 384), (2048, 2048, 384), (2048, 384, 1024), (2048, 4096, 384),
]
TINY = [(64, 48, 32)]
ROTATED_BYTES = 128 << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shapes", help="MxNxK, comma between")
    parser.add_argument("--tiny", action="store_true", help="one small shape on the CPU, to rehearse")
    args = parser.parse_args()
    cuda = torch.cuda.is_available() and not args.tiny
    shapes = SHAPES if cuda else TINY
    if args.shapes:
        shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")]
    device = "cuda" if cuda else "cpu"
    print(json.dumps(copy_rate(device, args.steps, 4 << 30 if cuda else 1 << 16)), flush=True)
    for shape in shapes:
        for row in products(shape, device, args.steps):
            print(json.dumps(row), flush=True)


def copy_rate(device, steps, size):
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds([lambda: target.copy_(source)], steps, device)
    return {"copy_bytes": size, "seconds": seconds, "tb_per_s": 2 * size / seconds / 1e12}


def products(shape, device, steps):
    m, n, k = shape
    draw = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16)
    sets = min(max(1, ROTATED_BYTES // (2 * (m * k + n * k + m * n))), 8)
    operands = [(draw(m, k), draw(n, k), draw(m, n)) for _ in range(sets)]
    forms = {
        "forward": [lambda x=x, w=w: x @ w.t() for x, w, _ in operands],
        "dx": [lambda w=w, dy=dy: dy @ w for _, w, dy in operands],
        "dw": [lambda x=x, dy=dy: dy.t() @ x for x, _, dy in operands],
    }
    for form, runs in forms.items():
        seconds = median_seconds(runs, steps, device)
        yield {"m": m, "n": n, "k": k, "form": form, "seconds": seconds, "tflops": 2.0 * m * n * k / seconds / 1e12}


def median_seconds(runs, steps, device):
    """One run after another, each between two events on the device; on a CPU the figure tells nothing."""
    if device == "cpu":
        for run in runs:
            run()
        return 1e-3
    for i in range(5 + len(runs)):
        runs[i % len(runs)]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for i, event in enumerate(events[1:]):
        runs[i % len(runs)]()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1e3


if __name__ == "__main__":
    main()
