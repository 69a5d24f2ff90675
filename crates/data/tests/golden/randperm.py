"""Writes randperm.json: torch's CPU permutations and its DistributedSampler's indices.

    python randperm.py > randperm.json

Last written with torch 2.15.0. Large permutations are kept as `sum((i + 1) * v[i]) mod (2^61 - 1)`.
"""

import json
import sys

import torch
from torch.utils.data import DistributedSampler


def checksum(values):
    return sum((i + 1) * v for i, v in enumerate(values)) % (2**61 - 1)


def permutations():
    for n, seed in [(1, 0), (2, 1), (10, 0), (10, 1234), (1000, 7), (99991, 2**31), (10, 2**32 + 5), (300000, 2**40 + 3)]:
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        yield {"n": n, "seed": seed, "first": order[:16], "checksum": checksum(order)}


def samplers():
    for n, replicas, epoch, seed in [(10, 4, 0, 0), (10, 4, 3, 0), (7, 3, 1, 11), (2, 5, 0, 0), (1000, 8, 2, 5), (12, 4, 0, 0)]:
        for shuffle in (True, False):
            for drop_last in (True, False):
                if drop_last and n < replicas:
                    continue
                indices = []
                for rank in range(replicas):
                    sampler = DistributedSampler(range(n), replicas, rank, shuffle, seed, drop_last)
                    sampler.set_epoch(epoch)
                    indices.append(list(sampler))
                case = {"n": n, "replicas": replicas, "epoch": epoch, "seed": seed, "shuffle": shuffle, "drop_last": drop_last}
                yield case | {"indices": [i[:8] for i in indices], "checksums": [checksum(i) for i in indices]}


json.dump(
    {"torch": torch.__version__, "permutations": list(permutations()), "samplers": list(samplers())},
    sys.stdout,
    separators=(",", ":"),
)
print()
