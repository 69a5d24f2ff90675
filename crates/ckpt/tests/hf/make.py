"""Writes tiny random models as `transformers` saves them, and beside each the same weights under Phalanx's names.

    python make.py          (made with torch 2.15.0, transformers 5.23.0, safetensors 0.8.0)
    python make.py DIR ...  compares models that Phalanx exported with `transformers`' reading of them
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

HERE = Path(__file__).parent
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=6, max_position_embeddings=16, tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=10),
}


def logical(model):
    """The weights under Phalanx's names, taken from the modules by what they compute, not by the names in files."""
    out = {"embed.weight": model.get_input_embeddings().weight}

    def linear(name, module):
        out[f"{name}.weight"] = module.weight
        if module.bias is not None:
            out[f"{name}.bias"] = module.bias

    def norm(name, module):
        out[f"{name}.weight"] = module.weight
        if getattr(module, "bias", None) is not None:
            out[f"{name}.bias"] = module.bias

    def conv(names, module):
        """A Conv1D computes x @ weight + bias: turn it into linears by feeding it the unit vectors."""
        with torch.no_grad():
            bias = module(torch.zeros(1, module.weight.shape[0]))[0]
            weight = (module(torch.eye(module.weight.shape[0])) - bias).T
            # x @ I + b - b rounds; the exact values are those of the parameter that it approximates.
            exact = module.weight.T
            assert torch.allclose(weight, exact, atol=1e-6) and torch.equal(bias, module.bias)
        for i, name in enumerate(names):
            out[f"{name}.weight"] = exact.chunk(len(names))[i]
            out[f"{name}.bias"] = bias.chunk(len(names))[i]

    body = model.base_model
    if model.config.model_type == "gpt2":
        out["pos_embed.weight"] = body.wpe.weight
        for i, block in enumerate(body.h):
            p = f"layers.{i}"
            norm(f"{p}.attn_norm", block.ln_1)
            conv([f"{p}.attn.{x}" for x in "qkv"], block.attn.c_attn)
            conv([f"{p}.attn.o"], block.attn.c_proj)
            norm(f"{p}.mlp_norm", block.ln_2)
            conv([f"{p}.mlp.up"], block.mlp.c_fc)
            conv([f"{p}.mlp.down"], block.mlp.c_proj)
        norm("final_norm", body.ln_f)
    else:
        for i, block in enumerate(body.layers):
            p, attn = f"layers.{i}", block.self_attn
            norm(f"{p}.attn_norm", block.input_layernorm)
            for x in "qkvo":
                linear(f"{p}.attn.{x}", getattr(attn, f"{x}_proj"))
            for x in "qk":
                if hasattr(attn, f"{x}_norm"):
                    norm(f"{p}.attn.{x}_norm", getattr(attn, f"{x}_norm"))
            norm(f"{p}.mlp_norm", block.post_attention_layernorm)
            for x in ("gate", "up", "down"):
                linear(f"{p}.mlp.{x}", getattr(block.mlp, f"{x}_proj"))
        norm("final_norm", body.norm)
    if not model.config.tie_word_embeddings:
        out["head.weight"] = model.get_output_embeddings().weight
    return {name: x.detach().clone().contiguous() for name, x in out.items()}


def make(name, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    save_file(logical(model), HERE / name / "expected.safetensors")


def compare(directory):
    """Loads an export of one of the models above and compares every weight to the bit."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    name = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    expected = load_file(HERE / name / "expected.safetensors")
    found = logical(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, x in expected.items():
        assert torch.equal(found[key].to(x.dtype), x), key
    print(directory, "equal,", len(expected), "tensors,", model.dtype)


if sys.argv[1:]:
    for directory in sys.argv[1:]:
        compare(directory)
else:
    for name, config in CONFIGS.items():
        make(name, config)
