"""Makes tests/golden/dcp: checkpoints as torch.distributed.checkpoint and Megatron (torch_dist) write them.

    python tests/golden/make_dcp.py            # torch 2.11.0 on Python 3.12

Elements count from 0, scaled by what the tensor is: 1 for a parameter, 0.5 for a first, 0.25 for a second moment.
Megatron itself is not needed: its metadata class is a dataclass of this shape, under its module's name.
"""

import dataclasses
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

OUT = Path(__file__).parent / "dcp"


def counted(*shape, scale=1.0):
    n = 1
    for d in shape:
        n *= d
    return (torch.arange(n, dtype=torch.float32) * scale).reshape(shape)


def state(share=lambda t, placements: t):
    model, optim = {}, {}
    for name, shape, placements in [
        ("embed.weight", (7, 4), [Shard(0), Replicate()]),
        ("layers.0.w", (6, 5), [Shard(0), Shard(1)]),
        ("layers.0.b", (5,), [Replicate(), Shard(0)]),
        ("stack", (3, 2, 4), [Shard(1), Shard(2)]),
    ]:
        model[name] = share(counted(*shape), placements)
        optim[name] = {
            "exp_avg": share(counted(*shape, scale=0.5), placements),
            "exp_avg_sq": share(counted(*shape, scale=0.25), placements),
            "step": torch.tensor(3.0),
        }
    return {"model": model, "optim": {"state": optim}}


def single():
    s = state()
    s["model"]["turned"] = counted(3, 4).t().to(torch.bfloat16)
    s["model"]["half"] = counted(5).to(torch.float16)
    s["model"]["part_of_a_storage"] = counted(6, 6)[2:4, 1:3]
    s["model"]["scalar"] = torch.tensor(2.5)
    s["model"]["none"] = torch.zeros(0, 3)
    s["model"]["ids"] = torch.arange(4)
    s["lr"] = 0.1
    s["note"] = {"a": [1, 2]}
    dcp.save(s, checkpoint_id=OUT / "single", no_dist=True)


def sharded(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    s = state(lambda t, placements: distribute_tensor(t, mesh, placements))
    dcp.save(s, checkpoint_id=OUT / "sharded")
    dist.destroy_process_group()


def megatron():
    dir = OUT / "megatron" / "iter_0000500"
    keys = {
        "decoder.layers.mlp.linear_fc1.weight": counted(2, 4, 3),
        "embedding.word_embeddings.weight": counted(6, 3),
        "optimizer.state.exp_avg.embedding.word_embeddings.weight": counted(6, 3, scale=0.5),
    }
    dcp.save(keys, checkpoint_id=dir, no_dist=True)
    path = "megatron.core.dist_checkpointing.strategies.torch"
    for i in range(1, path.count(".") + 2):
        name = ".".join(path.split(".")[:i])
        sys.modules.setdefault(name, types.ModuleType(name))

    @dataclasses.dataclass
    class MCoreMetadata(dcp.Metadata):
        mcore_data: dict | None = None

    MCoreMetadata.__module__, MCoreMetadata.__qualname__ = path, "MCoreMetadata"
    sys.modules[path].MCoreMetadata = MCoreMetadata
    plain = pickle.loads((dir / ".metadata").read_bytes())
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    mcore = {"nd_reformulated_orig_global_shape": (2, 4, 3)}
    data = MCoreMetadata(**fields, mcore_data={"decoder.layers.mlp.linear_fc1.weight": mcore})
    (dir / ".metadata").write_bytes(pickle.dumps(data))
    (dir / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (OUT / "megatron" / "latest_checkpointed_iteration.txt").write_text("500")


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    single()
    mp.spawn(sharded, args=(29613,), nprocs=4)
    megatron()
    print("torch", torch.__version__, "python", sys.version.split()[0])
