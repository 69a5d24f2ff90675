"""A training step of PyTorch on one GPU, timed: the peer of `phalanx bench step`.

    python bench/gpu/train_peer.py llama-1.1b --mode compile --batch 4
    python bench/gpu/train_peer.py reference-13.8m --mode graphs --batch 8 --resident

Trains from scratch on random tokens: float32 masters, activations in bf16, AdamW(fused=True), gradients clipped at
norm 1. Modes: `eager`; `compile` (torch.compile of the whole model); `graphs` (mode="reduce-overhead"); `capture` (the
compiled model, clipping and optimiser captured as one CUDA graph and replayed). Prints one line of JSON. A step ends
when its loss was read, as ours does (`step_s`); the same step with losses read only at the end is `free_step_s`.
With --resident it answers every line `step` on its input with a line of seconds, so that it can take turns with another
program, and prints its line of JSON when its input ends.
"""

import argparse
import json
import statistics
import sys
import time

import torch

import models

PEAK = 989.4e12  # dense bf16 of an H100 or H200 SXM, NVIDIA's data sheet
REACHED = 790e12  # what its best large matrix products reach
MODES = ("eager", "compile", "graphs", "capture")


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    if args.device == "cuda" and device.type != "cuda":
        sys.exit("no GPU that PyTorch can use; --device cpu rehearses")
    if device.type == "cpu" and args.mode in ("graphs", "capture"):
        print(json.dumps({"model": args.model, "mode": args.mode, "skipped": "CUDA graphs need a GPU"}))
        return
    torch.manual_seed(0)
    choose_attention(args.attention)
    trainer = Trainer(args, device)
    if args.resident:
        seconds, free = serve(trainer), trainer.free(args.steps)
    else:
        for _ in range(args.warmup):
            trainer.timed_step()
        seconds, free = [trainer.timed_step() for _ in range(args.steps)], trainer.free(args.steps)
    print(json.dumps(report(args, trainer, seconds, free)), flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.SHAPES)
    parser.add_argument("--mode", choices=MODES, default="compile")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5, help="steps that do not count")
    parser.add_argument("--attention", choices=("any", "flash", "cudnn"), default="flash")
    parser.add_argument("--precision", choices=("bf16", "f32"), default="bf16")
    parser.add_argument("--no-read-loss", dest="read_loss", action="store_false",
                        help="a step ends when the GPU is done, its loss unread")
    parser.add_argument("--fullgraph", action="store_true", help="refuse graph breaks in the compiled model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="shrink the model, to rehearse")
    parser.add_argument("--resident", action="store_true", help="a step for each line `step` of standard input")
    args = parser.parse_args()
    if min(args.batch, args.accumulation, args.steps) < 1 or args.warmup < 0:
        parser.error("--batch, --accumulation and --steps start at 1, --warmup at 0")
    return args


def choose_attention(backend):
    if backend != "any" and torch.cuda.is_available():
        torch.backends.cuda.enable_flash_sdp(backend == "flash")
        torch.backends.cuda.enable_cudnn_sdp(backend == "cudnn")
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)


class Trainer:
    def __init__(self, args, device):
        self.args, self.device = args, device
        self.shape = (models.TINY if args.tiny else models.SHAPES)[args.model]
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        with device:
            self.model = models.Model(self.shape, dtype)
            ids = torch.randint(0, self.shape.vocab, (args.accumulation, args.batch, self.shape.sequence + 1))
            self.tokens, self.targets = ids[..., :-1].contiguous(), ids[..., 1:].contiguous()
        self.optimiser = torch.optim.AdamW(groups(self.model), lr=3e-4, betas=(0.9, 0.999), eps=1e-8, fused=True,
                                           **({"capturable": True} if args.mode == "capture" else {}))
        compiled = {"eager": None, "compile": {}, "capture": {}, "graphs": {"mode": "reduce-overhead"}}[args.mode]
        self.run = self.model if compiled is None else torch.compile(self.model, fullgraph=args.fullgraph, **compiled)
        # Gradients that replayed graphs accumulate into have to stay where they are.
        self.drop_grads = args.mode != "graphs" or args.accumulation == 1
        self.launch = self.capture() if args.mode == "capture" else self.step

    def tokens_per_step(self):
        return self.tokens.numel()

    def step(self):
        """Queues one optimiser step; its loss is still on the device."""
        total = 0
        self.optimiser.zero_grad(set_to_none=self.drop_grads)
        for tokens, targets in zip(self.tokens, self.targets):
            if self.args.mode == "graphs":
                torch.compiler.cudagraph_mark_step_begin()
            loss = self.run(tokens, targets) / self.args.accumulation
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return total

    def capture(self):
        """The step as one graph: warmed up on a stream of its own, then recorded."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimiser.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay():
            graph.replay()
            return loss

        return replay

    def timed_step(self):
        start = time.perf_counter()
        loss = self.launch()
        if self.args.read_loss:
            self.loss = loss.item()
        elif self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def free(self, steps):
        """Seconds of steps queued one after another, by the device's own clock; the losses stay unread."""
        if self.device.type != "cuda":
            return []
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            self.launch()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]


def groups(model):
    """Decay on matrices, none on norms and biases."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]


def serve(trainer):
    seconds = []
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        if line.strip() != "step":
            sys.exit(f"expected `step`, found {line.strip()!r}")
        seconds.append(trainer.timed_step())
        print(f"{seconds[-1]:.9f}", flush=True)
    return seconds[trainer.args.warmup:] or seconds or [float("nan")]


def report(args, trainer, seconds, free):
    cuda = trainer.device.type == "cuda"
    middle, tokens = statistics.median(seconds), trainer.tokens_per_step()
    flops = models.flops_per_token(trainer.model, trainer.shape)
    rate = flops * tokens / middle
    return {
        "model": args.model, "mode": args.mode, "precision": args.precision, "tiny": args.tiny,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "sequence": trainer.shape.sequence, "batch": args.batch, "accumulation": args.accumulation,
        "steps": len(seconds), "step_s": middle, "best_step_s": min(seconds), "tokens_per_s": tokens / middle,
        "free_step_s": statistics.median(free) if free else None,
        "free_tokens_per_s": tokens / statistics.median(free) if free else None,
        "flops_per_token": flops, "tflops": rate / 1e12, "mfu": rate / PEAK, "share_of_790": rate / REACHED,
        "max_memory_reserved": torch.cuda.max_memory_reserved() if cuda else None,
        "max_memory_allocated": torch.cuda.max_memory_allocated() if cuda else None,
        "attention": args.attention if cuda else "cpu", "loss": getattr(trainer, "loss", None),
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


if __name__ == "__main__":
    main()
