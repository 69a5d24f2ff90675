"""Loads what `phalanx ckpt export CHECKPOINT OUT --format dcp` wrote with torch.distributed.checkpoint, and compares it,
bit by bit, with the files of a checkpoint of one rank.

    python tests/golden/dcp_check.py OUT CHECKPOINT            # torch 2.11.0 and safetensors
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

out, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
stored = {}
for path in checkpoint.glob("*.safetensors"):
    stored |= load_file(path)

state, moments = {}, ("exp_avg", "exp_avg_sq")
for key, tensor in stored.items():
    kind, _, name = key.partition(".")
    name = f"optim.state.{name}.{kind}" if kind in moments else f"model.{key}"
    state[name] = torch.full_like(tensor, float("nan"))
dcp.load(state, checkpoint_id=out, no_dist=True)
for key, tensor in stored.items():
    kind, _, name = key.partition(".")
    name = f"optim.state.{name}.{kind}" if kind in moments else f"model.{key}"
    assert torch.equal(state[name].view(torch.int32), tensor.view(torch.int32)), name

dcp_to_torch_save(out, "/tmp/dcp_check.pt")
whole = torch.load("/tmp/dcp_check.pt", weights_only=True)
assert len(whole["model"]) == sum(1 for key in stored if key.partition(".")[0] not in moments)
assert set(next(iter(whole["optim"]["state"].values()))) == {*moments, "step"}
print(len(stored), "tensors equal,", json.loads(bytes(whole["phalanx"]["meta"].tolist()).decode())["step"], "steps")
