"""The reference model under torchrun: data parallel over gloo, a checkpoint every so many steps, from which a restart goes on.

recovery.py starts and kills it; reference_step.py has the model. Prints `step N` when a step is done.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn as nn

from reference_step import SEQUENCES, TIME, VOCAB, Model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Model(rotary=True)
    replica = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    done = 0
    if os.path.exists(args.checkpoint):
        saved = torch.load(args.checkpoint)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        done = saved["step"]
    while True:
        batch = torch.Generator().manual_seed(done)
        ids = torch.randint(0, VOCAB, (SEQUENCES, TIME + 1), generator=batch)[rank::world]
        optimiser.zero_grad()
        replica(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        optimiser.step()
        done += 1
        if rank == 0:
            print(f"step {done}", flush=True)
            if done % args.every == 0:
                torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done},
                           args.checkpoint + ".new")
                os.replace(args.checkpoint + ".new", args.checkpoint)


if __name__ == "__main__":
    main()
