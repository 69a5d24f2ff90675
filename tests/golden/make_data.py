"""Make data.json: shuffles and sampler outputs that the data crate must reproduce number for number.

    python tests/golden/make_data.py

torch.randperm, DistributedSampler and numpy's RandomState are called. The Megatron-style indices are made by the
functions below, written from the contract (what is shuffled, in which order, by one RandomState), not from its code.
"""

import hashlib
import json
import math
import pathlib
import re

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler

# A permutation longer than this is stored as its first values and a SHA-256 of the whole.
WHOLE = 64


def main():
    data = {
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "hash": "sha256 over the values as little-endian i64",
        "randperm": [randperm(seed, n) for seed, n in RANDPERM],
        "distributed_sampler": [sampler(*case) for case in SAMPLER],
        "random_state_shuffle": [shuffles(seed, n) for seed, n in SHUFFLE],
        "megatron_index": [megatron_index(*case) for case in INDEX],
        "blend": [blend(weights, size) for weights, size in BLEND],
    }
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    (pathlib.Path(__file__).parent / "data.json").write_text(text + "\n")


# 623..625 and 1248, 1249 straddle the generator's refill of 624 words; 2^32 + 5 shows which seed bits count.
RANDPERM = [(0, 10), (0, 1), (0, 2), (1, 10), (42, 17), (1234, 64), (0, 623), (0, 624), (0, 625), (7, 1249),
            (2**31, 33), (2**32 - 1, 33), (5, 20), (2**32 + 5, 20), (3, 100_000)]
SHUFFLE = [(1234, 10), (0, 1), (0, 2), (0, 3), (0, 10), (1, 64), (42, 255), (42, 256), (42, 257), (7, 1000),
           (2**32 - 1, 31), (3, 100_000)]
# length, replicas, shuffle, drop_last, seed, epochs
SAMPLER = [(10, 4, True, False, 0, [0, 1]), (10, 4, True, True, 0, [0, 1]), (10, 4, False, False, 0, [0]),
           (10, 4, False, True, 0, [0]), (12, 4, True, False, 3, [0, 5]), (12, 4, True, True, 3, [5]),
           (3, 8, True, False, 0, [0]), (3, 8, False, False, 0, [0]), (1, 3, True, False, 9, [2]),
           (7, 1, True, False, 11, [0]), (101, 8, True, False, 1234, [7]), (101, 8, True, True, 1234, [7]),
           (2, 5, True, True, 0, [0])]
# lengths, sequence, samples asked for, seed
INDEX = [([5, 3, 7, 2, 6], 4, 5, 1234), ([5, 3, 7, 2, 6], 4, 6, 1234), ([5, 3, 7, 2, 6], 4, 9, 1234),
         ([5, 3, 7, 2, 6], 4, 11, 1234), ([5, 3, 7, 2, 6], 4, 37, 7), ([1, 1, 1, 1, 1, 1, 1], 3, 8, 0),
         ([40], 8, 12, 5), ([9, 1, 30, 4, 4, 17, 2, 25], 16, 20, 99), ([3, 3, 3], 9, 4, 2)]
BLEND = [([0.3, 0.7], 10), ([0.5, 0.5], 9), ([0.2, 0.3, 0.5], 20), ([1.0], 4), ([0.01, 0.99], 120),
         ([1 / 3, 1 / 3, 1 / 3], 10), ([0.6, 0.25, 0.1, 0.05], 40)]


def values(a):
    a = np.asarray(a, dtype="<i8")
    if len(a) <= WHOLE:
        return {"values": a.tolist()}
    return {"first": a[:16].tolist(), "last": a[-4:].tolist(), "sha256": hashlib.sha256(a.tobytes()).hexdigest()}


def randperm(seed, n):
    return {"seed": seed, "n": n, **values(torch.randperm(n, generator=torch.Generator().manual_seed(seed)))}


def shuffles(seed, n):
    """The same array shuffled twice by one RandomState: the second shows the draws that the first consumed."""
    state, a = np.random.RandomState(seed), np.arange(n)
    out = []
    for _ in range(2):
        state.shuffle(a)
        out.append(values(a.copy()))
    return {"seed": seed, "n": n, "shuffles": out}


def sampler(length, replicas, shuffle, drop_last, seed, epochs):
    ranks = []
    for rank in range(replicas):
        s = DistributedSampler(range(length), replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        per_epoch = []
        for epoch in epochs:
            s.set_epoch(epoch)
            per_epoch.append(list(s))
        ranks.append(per_epoch)
    return {"length": length, "replicas": replicas, "shuffle": shuffle, "drop_last": drop_last, "seed": seed,
            "epochs": epochs, "indices_by_rank_then_epoch": ranks}


def megatron_index(lengths, sequence, samples, seed):
    """Document, sample and shuffle index of one source of `lengths` tokens per document."""
    tokens, docs = sum(lengths), len(lengths)
    epochs = -(-(samples * sequence + 1) // tokens)
    per_epoch = (tokens - 1) // sequence
    sans_final = ((epochs - 1) * tokens - 1) // sequence if epochs > 1 else 0
    separate = epochs > 1 and samples - sans_final < int(0.80 * per_epoch)
    state = np.random.RandomState(seed)
    parts = [epochs - 1, 1] if separate else [epochs]
    documents = np.concatenate([shuffled(state, np.tile(np.arange(docs), e)) for e in parts])
    rows = sample_rows([lengths[d] for d in documents], sequence)
    total = len(rows) - 1
    cut = sans_final if separate else total
    shuffle = np.concatenate([shuffled(state, np.arange(0, cut)), shuffled(state, np.arange(cut, total))])
    return {"lengths": lengths, "sequence": sequence, "samples": samples, "seed": seed, "epochs": epochs,
            "separate_final_epoch": separate, "document_index": documents.tolist(), "sample_index": rows,
            "shuffle_index": shuffle.tolist()}


def shuffled(state, a):
    state.shuffle(a)
    return a


def sample_rows(lengths, sequence):
    """(position in the document order, token offset) where each sample starts, and where the last one ends.

    A sample is `sequence + 1` tokens and shares its last one with the next. A row never points past a document's
    end: the shared token is the last that the sample reads, so it always lies inside a document.
    """
    starts = np.cumsum([0] + lengths)
    rows = []
    for i in range((int(starts[-1]) - 1) // sequence + 1):
        doc = int(np.searchsorted(starts, i * sequence, side="right")) - 1
        rows.append([doc, i * sequence - int(starts[doc])])
    return rows


def blend(weights, size):
    """Greedy: each draw goes to the source that lags its share most, the first of equals."""
    counts, dataset, sample = [0] * len(weights), [], []
    total = sum(weights)
    for i in range(size):
        lag = [w / total * max(i, 1) - c for w, c in zip(weights, counts)]
        k = lag.index(max(lag))
        dataset.append(k)
        sample.append(counts[k])
        counts[k] += 1
    asked = [math.ceil(math.ceil(size * w / total) * 1.005) for w in weights]
    return {"weights": weights, "size": size, "dataset_index": dataset, "dataset_sample_index": sample,
            "samples_asked": asked}


if __name__ == "__main__":
    main()
