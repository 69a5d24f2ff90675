"""The installed wheel: the program, plans, journals, data."""

import json
import math
import subprocess

import numpy
import pytest

import phalanx

TINY = [
    "model.vocab=300", "model.layers=1", "model.hidden=32", "model.heads=2", "model.kv_heads=2", "model.head_dim=16",
    "model.ffn=48", "data.vocab_size=300", "batch.sequence=32", "batch.sequences=4", "train.steps=4",
    "train.eval_every=2", "train.eval_batches=1", "train.sample_tokens=0", "run.threads=1",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text, and a run on it."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text.txt"
    text.write_text("".join(f"rank {i * i % 97} of the mesh holds stage {i % 7}.\n" for i in range(4000)))
    args = ["train", "--text", text, "--set", f"run.dir={folder}/run", "--set", f"data.cache_dir={folder}/cache"]
    for key in TINY:
        args += ["--set", key]
    phalanx.run(*args)
    return folder


def test_the_wheel_brings_the_program():
    said = subprocess.run([phalanx.path(), "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("phalanx ") and "features:" in said


def test_a_plan_is_what_the_program_answers():
    plan = phalanx.plan("llama3-8b", "dgx-h100", accelerators=8, sequences=64, keep=2)
    args = ["plan", "--model", "llama3-8b", "--cluster", "dgx-h100", "--accelerators", "8", "--sequences", "64"]
    said = json.loads(phalanx.run(*args, "--keep", "2", "--json"))
    assert plan["model"] == "Llama 3 8B" or plan["model"] == said["model"]
    assert plan["best"] == said["best"] and len(plan["best"]) == 2
    assert plan["accelerators"] == 8


def test_wrong_input_is_a_value_error_with_a_hint():
    with pytest.raises(ValueError, match="hint:"):
        phalanx.plan("llama3-8b", "dgx-h1000")
    with pytest.raises(ValueError, match="no-such-run"):
        phalanx.read_journal("no-such-run")
    with pytest.raises(ValueError, match="nothing"):
        phalanx.Dataset("nothing")


def test_a_journal_is_its_records(trained):
    records = phalanx.read_journal(trained / "run")
    lines = [json.loads(line) for line in (trained / "run" / "journal-00000.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in ("drawn", "spans")]
    assert [r["kind"] for r in records] == [line["kind"] for line in kept]
    steps = phalanx.read_journal(trained / "run", kind="step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert [s["loss"] for s in steps] == [line["loss"] for line in kept if line["kind"] == "step"]


def test_a_journal_with_damage_and_numbers_that_json_lacks(tmp_path, trained):
    lines = (trained / "run" / "journal-00000.jsonl").read_text().splitlines()
    step = json.loads(next(line for line in lines if '"kind":"step"' in line))
    step["loss"] = "NaN"
    text = [json.dumps(step, separators=(",", ":")), '{"kind":"dance","tune":3}', '{"kind":"st', '{"kind":"ste']
    (tmp_path / "journal-00000.jsonl").write_text("\n".join(text))
    with pytest.warns(UserWarning, match="1 damaged"):
        records = phalanx.read_journal(tmp_path)
    assert len(records) == 1 and math.isnan(records[0]["loss"])


def prefix(trained):
    return next(p for p in (trained / "cache").rglob("*.bin")).with_suffix("")


def test_a_dataset_is_arrays_that_lie_in_the_file(trained):
    dataset = phalanx.Dataset(prefix(trained))
    raw = numpy.fromfile(f"{prefix(trained)}.bin", dtype="<u2")
    assert dataset.tokens.dtype == numpy.uint16
    assert numpy.array_equal(dataset.tokens, raw)
    assert sum(dataset.lengths) == len(raw) and len(dataset.lengths) == len(dataset)
    joined = numpy.concatenate([dataset[i] for i in range(len(dataset))])
    assert numpy.array_equal(joined, raw)
    assert numpy.array_equal(dataset[-1], dataset[len(dataset) - 1])
    # The same memory, not copies of it; and nobody writes there.
    assert numpy.shares_memory(dataset.tokens, dataset[0])
    assert not dataset.tokens.flags.writeable
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_arrays_outlive_their_dataset(trained):
    tokens = phalanx.Dataset(prefix(trained)).tokens
    assert int(tokens[-1]) == int(numpy.fromfile(f"{prefix(trained)}.bin", dtype="<u2")[-1])


def test_a_dataset_cut_short_is_refused(tmp_path, trained):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"cut{suffix}").write_bytes(prefix(trained).with_suffix(suffix).read_bytes())
    whole = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="cut short"):
        phalanx.Dataset(tmp_path / "cut")
