"""The reference model under torchft: a lighthouse and so many replicas of one rank each, started again when they die.

recovery.py starts it and kills replicas. Prints `step N (R replicas)` when a step is first done by any of them. Those that
are left go on at once without the lost one and its samples; it takes the state from one of them when it is back.
"""

import argparse
import os
import subprocess
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from reference_step import SEQUENCES, TIME, VOCAB, Model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=4)
    args = parser.parse_args()
    if "REPLICA" in os.environ:
        return train(int(os.environ["REPLICA"]), args.replicas)
    from torchft.coordination import LighthouseServer

    # Heartbeats every 100 ms: a replica is missed after ten of them.
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=1000, heartbeat_timeout_ms=1000)
    told = Told()
    keepers = [threading.Thread(target=keep, args=(i, lighthouse.address(), told)) for i in range(args.replicas)]
    for keeper in keepers:
        keeper.start()
    for keeper in keepers:
        keeper.join()


class Told:
    """The newest step that was told of, by whichever replica."""

    def __init__(self):
        self.lock, self.step = threading.Lock(), 0

    def line(self, line):
        with self.lock:
            word, step, *rest = line.split(maxsplit=2)
            if word == "step" and int(step) > self.step:
                self.step = int(step)
                print(line, end="", flush=True)


def keep(replica, lighthouse, told):
    env = dict(os.environ, REPLICA=str(replica), TORCHFT_LIGHTHOUSE=lighthouse)
    while True:
        child = subprocess.Popen([sys.executable] + sys.argv, env=env, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            told.line(line)
        if child.wait() == 0:
            return


def train(replica, replicas):
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model(rotary=True)
    plain = torch.optim.AdamW(model.parameters(), lr=3e-4)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def load(state):
        model.load_state_dict(state["model"])
        plain.load_state_dict(state["optimiser"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimiser": plain.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"replica-{replica}",
        timeout=timedelta(seconds=10),
    )
    ddp, optimiser = DistributedDataParallel(manager, model), Optimizer(manager, plain)
    while True:
        done = manager.current_step()
        batch = torch.Generator().manual_seed(done)
        ids = torch.randint(0, VOCAB, (SEQUENCES, TIME + 1), generator=batch)[replica::replicas]
        optimiser.zero_grad()
        ddp(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        optimiser.step()
        if manager.current_step() > done:
            print(f"step {manager.current_step()} ({manager.num_participants()} replicas)", flush=True)


if __name__ == "__main__":
    main()
