#!/usr/bin/env python3
"""PyTorch's distributed checkpoints: what `async_save` of a model's state costs, and how long it takes.

The state has as many bytes as that of `phalanx bench checkpoint` (three float32 tensors for each of the reference model's
13.8M parameters, or --parameters), in as many tensors. Prints JSON: seconds that the caller waits for `async_save` to return
(its stall), seconds until the future is done, and the rate; medians over rounds, each to a new directory, synced at the end.

    python bench/peers/dcp_save.py --dir DIR [--parameters 13765248] [--tensors 57] [--rounds 5]
"""

import argparse
import json
import os
import shutil
import statistics
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp


def state(parameters, tensors):
    size = parameters // tensors
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return {f"{kind}.{i}": torch.randn(size) for kind in kinds for i in range(tensors)}


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--dir", required=True)
    args.add_argument("--parameters", type=int, default=13_765_248)
    args.add_argument("--tensors", type=int, default=57)
    args.add_argument("--rounds", type=int, default=5)
    args = args.parse_args()
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29517", rank=0, world_size=1)
    held = state(args.parameters, args.tensors)
    total = sum(t.numel() * 4 for t in held.values())
    stalls, wholes, syncs = [], [], []
    for n in range(args.rounds + 1):
        path = os.path.join(args.dir, f"dcp-{n}")
        begin = time.perf_counter()
        future = dcp.async_save(held, storage_writer=dcp.FileSystemWriter(path, sync_files=True))
        stall = time.perf_counter() - begin
        future.result()
        whole = time.perf_counter() - begin
        begin = time.perf_counter()
        dcp.save(held, storage_writer=dcp.FileSystemWriter(path + "-sync", sync_files=True))
        sync = time.perf_counter() - begin
        shutil.rmtree(path)
        shutil.rmtree(path + "-sync")
        if n > 0:  # The first one makes buffers and processes.
            stalls.append(stall)
            wholes.append(whole)
            syncs.append(sync)
    print(json.dumps({
        "bytes": total,
        "rounds": args.rounds,
        "load_average": os.getloadavg()[0],
        "stall_s": statistics.median(stalls),
        "background_save_s": statistics.median(wholes),
        "save_mb_per_s": total / 1e6 / statistics.median(syncs),
    }))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
