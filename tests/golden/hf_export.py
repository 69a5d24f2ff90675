"""Train a tiny model of each family, export it, and hold `transformers` to Phalanx: ids, logits, and where it stops.

    python tests/golden/hf_export.py target/release/phalanx

Checked with torch 2.11.0 and transformers 4.57.6 and 5.24.0. Prints one line for each family; fails at the first
difference. An imported model's own tokenizer settings, chat template and generation config must come back as they
went in.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import tokenizers
import torch
import transformers

TEXTS = ["One two three.", "Red green  blue\n\tand  naïve ünïcode 東京 🙂.", "x = f(a, b)  # 12345 don't"]
TINY = """model.vocab=400 model.layers=1 model.hidden=32 model.heads=2 model.kv_heads=2 model.head_dim=16 model.ffn=64
batch.sequence=32 batch.sequences=4 run.threads=1 train.sample_tokens=0 train.eval_every=0 schedule.warmup_steps=1
data.vocab_size=400 train.steps=120 optim.lr=1e-2 model.max_positions=64"""
FAMILIES = {
    "llama": [],
    "qwen2": ["model.qkv_bias=true"],
    "mistral": ["model.window.tokens=9"],
    "gpt_oss": ["model.window.tokens=9", "model.window.full_every=2", "model.sinks=true", "model.qkv_bias=true",
                "model.attn_out_bias=true", "model.mlp_bias=true", "model.activation=swiglu_clamped",
                "model.experts.count=4", "model.experts.top_k=2", "model.experts.ffn=64", "model.experts.router_bias=true"],
    "qwen3": ["model.qk_norm=true", "model.tied_embeddings=true"],
    "gpt2": ["model.preset=gpt2"],
}


def main():
    phalanx = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS * 100))
        for family, extra in FAMILIES.items():
            check(phalanx, folder, corpus, family, extra)


def check(phalanx, folder, corpus, family, extra):
    run, out = folder / f"run-{family}", folder / family
    sets = [x for key in [*extra, *TINY.split(), f"run.dir={run}"] for x in ("--set", key)]
    call(phalanx, "train", "--text", corpus, *sets)
    call(phalanx, "export", run, out)
    logits = compare(phalanx, run, out, family)

    # As if it came from elsewhere: with settings, a template and two ends of its own.
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1], "temperature": 0.5, "do_sample": True}))
    again, back = folder / f"imported-{family}", folder / f"back-{family}"
    call(phalanx, "import", out, again, "--set", "data.vocab_size=400")
    call(phalanx, "export", again, back)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        assert (back / name).read_bytes() == (out / name).read_bytes(), name
    compare(phalanx, again, back, family)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Red"}], tokenize=False)
    assert chat == "Red", chat
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert model.generation_config.eos_token_id == [0, 1] and model.generation_config.temperature == 0.5
    print(f"transformers {transformers.__version__} {family}: same ids, logits within {logits:.1e}, stops, comes back")


def compare(phalanx, run, out, family):
    """Same ids and logits, and an end after each text; the largest difference of logits."""
    raw = tokenizers.Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    trusted = transformers.AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0, tokenizer
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert model.config.model_type == family, model.config.model_type
    largest = 0.0
    for text in TEXTS:
        ids = raw.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids, (tokenizer(text)["input_ids"], ids)
        assert trusted(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text, tokenizer.decode(ids)
        ours = torch.tensor(json.loads(call(phalanx, "logits", run, "--tokens", " ".join(map(str, ids)), "--json")))
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids])).logits[0]
        largest = max(largest, ((ours - theirs).abs().max() / theirs.abs().max()).item())
        assert largest < 1e-4, largest
        start = tokenizer(text[:3], return_tensors="pt")
        made = model.generate(**start, max_new_tokens=60, do_sample=False)[0].tolist()
        assert made[-1] == 0 and len(made) < 60, f"{text!r} does not stop: {tokenizer.decode(made)!r}"
    return largest


def call(*command):
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


main()
