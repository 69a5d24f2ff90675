"""Writes megatron_order.json: sample orders and a dataset made by Megatron-LM's own code.

    python megatron_order.py PATH_TO_MEGATRON_LM > megatron_order.json

Last written with Megatron-LM d98e8a64 and numpy 2.4.6. Needs numpy, pybind11 and g++. Megatron's modules import torch, which none of the code used here touches, so
everything outside the dataset modules is replaced by a stand-in.
"""

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys
import sysconfig
import tempfile
import types
from unittest.mock import MagicMock

import numpy
import pybind11

ROOT = pathlib.Path(sys.argv[1])
DATASETS = ROOT / "megatron/core/datasets"
WORK = pathlib.Path(tempfile.mkdtemp())


class StandIn(types.ModuleType):
    """A module in which every name exists."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = MagicMock() if name[0].islower() else type(name, (), {"__init__": lambda self, *a, **k: None})
        setattr(self, name, value)
        return value


def stand_in(name):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = StandIn(path)
            module.__path__ = []
            sys.modules[path] = module
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    return sys.modules[name]


def load(name, path):
    """Loads one real module; whatever it imports and is not loaded becomes a stand-in."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for imported in names:
            if imported and imported.split(".")[0] in ("torch", "megatron") and imported not in sys.modules:
                stand_in(imported)
    stand_in(name.rsplit(".", 1)[0])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(sys.modules[name.rsplit(".", 1)[0]], name.rsplit(".", 1)[1], module)
    spec.loader.exec_module(module)
    return module


def compile_helpers():
    out = WORK / ("helpers_cpp" + sysconfig.get_config_var("EXT_SUFFIX"))
    includes = ["-I" + pybind11.get_include(), "-I" + sysconfig.get_paths()["include"]]
    command = ["g++", "-O2", "-shared", "-std=c++17", "-fPIC", *includes, DATASETS / "helpers.cpp", "-o", out]
    subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location("helpers_cpp", out)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stand_in("torch").distributed.is_initialized.return_value = False
P = "megatron.core.datasets."
stand_in(P[:-1])
stand_in("megatron.core.utils")
cpp = compile_helpers()
sys.modules[P + "helpers_cpp"] = cpp
utils = load(P + "utils", DATASETS / "utils.py")
helpers = load(P + "helpers", DATASETS / "helpers.py")
config_module = load(P + "blended_megatron_dataset_config", DATASETS / "blended_megatron_dataset_config.py")
indexed = load(P + "indexed_dataset", DATASETS / "indexed_dataset.py")
indexed.maybe_msc = types.SimpleNamespace(open=open)
gpt = load(P + "gpt_dataset", DATASETS / "gpt_dataset.py")
builder = load(P + "blended_megatron_dataset_builder", DATASETS / "blended_megatron_dataset_builder.py")


def order(lengths, first, last, sequence, samples, seed):
    """The three indices of one split, by GPTDataset's own method."""
    dataset = gpt.GPTDataset.__new__(gpt.GPTDataset)
    dataset.config = MagicMock(
        sequence_length=sequence, random_seed=seed, add_extra_token_to_sequence=1, path_to_cache=None, mock=True,
        drop_last_partial_validation_sequence=True, fast_cache_load=False, defer_npy_index_mmap=False,
    )
    dataset.dataset = types.SimpleNamespace(sequence_lengths=numpy.array(lengths, dtype=numpy.int32))
    dataset.indices = numpy.arange(first, last, dtype=numpy.int32)
    dataset.num_samples = samples
    dataset.index_split = utils.Split.train
    return dataset._build_document_sample_shuffle_indices()


def checksum(values):
    values = numpy.asarray(values).reshape(-1).astype(object)
    return int(sum((i + 1) * int(v) for i, v in enumerate(values)) % (2**61 - 1))


def order_cases():
    draw = numpy.random.RandomState(99)
    plans = [
        ([5, 3, 7, 2, 6], 0, 5, 4, None, 1234), ([5, 3, 7, 2, 6], 0, 5, 4, 5, 1234), ([5, 3, 7, 2, 6], 1, 4, 3, 40, 7),
        ([1, 1, 1, 1], 0, 4, 3, 2, 1), ([0, 9, 0, 0, 4, 0], 0, 6, 4, 17, 3), ([100], 0, 1, 7, 90, 0),
    ]
    for documents, longest, sequence, samples, seed in [
        (40, 30, 8, None, 1), (40, 30, 8, 100, 2), (40, 30, 8, 170, 3), (40, 30, 16, 230, 4), (300, 5, 64, 50, 2**32 - 1),
        (7, 900, 5, 1000, 11),
    ]:
        plans.append((draw.randint(0, longest, documents).tolist(), 0, documents, sequence, samples, seed))
    plans.append((draw.randint(1, 500, 3000).tolist(), 30, 2900, 128, 20000, 77))
    for lengths, first, last, sequence, samples, seed in plans:
        document, sample, shuffle = order(lengths, first, last, sequence, samples, seed)
        case = {"lengths": lengths, "first": first, "last": last, "sequence": sequence, "samples": samples, "seed": seed}
        small = len(shuffle) < 300
        yield case | {
            "rows": len(shuffle),
            "document_index": document.tolist() if small else None,
            "sample_index": sample.tolist() if small else None,
            "shuffle_index": shuffle.tolist() if small else None,
            "checksums": [checksum(document), checksum(sample), checksum(shuffle)],
        }


def blend_cases():
    draw = numpy.random.RandomState(5)
    lists = [[0.3, 0.7], [1, 1, 1], [3.0, 7.0], [0.1] * 10, draw.rand(13).tolist(), draw.rand(300).tolist()]
    for weights in lists:
        for target in (10, 1000):
            once = utils.normalize(weights)
            plain = builder._get_size_per_split_per_dataset(once, [target])
            surplus = builder._get_size_per_split_per_dataset(once, [target], surplus=0.005)
            size = sum(p[0] for p in plain)
            twice = utils.normalize(once)
            ids = numpy.zeros(size, dtype=numpy.int16)
            samples = numpy.zeros(size, dtype=numpy.int64)
            cpp.build_blending_indices(ids, samples, numpy.array(twice), len(twice), size, False)
            yield {
                "weights": weights, "target": target, "parts": [p[0] for p in surplus], "size": size,
                "first_ids": ids[:32].tolist(), "checksums": [checksum(ids), checksum(samples)],
            }


def split_cases():
    for text in ["969,30,1", "99,1,0", "1,1,1", "100,0,0", "8,2", "1", "90,5,5", "0,1,0", "33.3,33.3,33.4"]:
        matrix = config_module.convert_split_vector_to_split_matrix(config_module.parse_and_normalize_split(text))
        for n in (1, 5, 10, 1000, 12345):
            ranges = [
                [0, 0] if part is None else [int(round(part[0] * float(n))), int(round(part[1] * float(n)))]
                for part in matrix
            ]
            yield {"split": text, "sequences": n, "ranges": ranges}


def written_dataset():
    """A small dataset in the bytes that Megatron's writer gives it."""
    prefix = str(WORK / "written")
    out = indexed.IndexedDatasetBuilder(prefix + ".bin", dtype=numpy.uint16)
    documents = [[1, 2, 3], [], [65535], [7, 8]]
    for tokens in documents:
        out.add_document(numpy.array(tokens, dtype=numpy.uint16), [len(tokens)])
    out.finalize(prefix + ".idx")
    read = lambda suffix: (WORK / f"written{suffix}").read_bytes().hex()
    return {"documents": documents, "bin": read(".bin"), "idx": read(".idx")}


def shuffle_cases():
    for seed, n in [(0, 2), (1, 1000), (1234, 10), (2**32 - 1, 65537), (42, 100003)]:
        state = numpy.random.RandomState(seed)
        first, second = numpy.arange(n), numpy.arange(n)
        state.shuffle(first)
        state.shuffle(second)
        yield {"seed": seed, "n": n, "checksums": [checksum(first), checksum(second)]}


json.dump(
    {
        "numpy": numpy.__version__,
        "orders": list(order_cases()),
        "blends": list(blend_cases()),
        "splits": list(split_cases()),
        "shuffles": list(shuffle_cases()),
        "written": written_dataset(),
    },
    sys.stdout,
    separators=(",", ":"),
)
print()
