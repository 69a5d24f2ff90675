"""Stages of accept.sh that say right or wrong: device, kernels, tests, runs that must agree, checkpoints, goldens."""

import hashlib
import json
import re
import shutil

import matrix
import tokens
from runner import CUT, FAILED, OK, SKIPPED, json_lines, programs


def devices(a):
    done = a.runner.run([a.phalanx, "devices"], 20)
    a.results.add("devices", "phalanx devices", done.state, done.seconds,
                  done.why() if done.state != OK else (done.out.strip().splitlines() or [""])[0][:100])
    fields = "name,driver_version,memory.total,memory.used,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    done = a.runner.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 20)
    a.cards = len(done.out.strip().splitlines()) if done.state == OK else 0
    if done.state == OK and done.out.strip():
        first = [x.strip() for x in done.out.strip().splitlines()[0].split(",")]
        a.results.facts["gpu"] = dict(zip(fields.split(","), first))
        a.card_gib = float(first[2]) / 1024 if first[2].replace(".", "").isdigit() else 0.0
    a.results.add("devices", "nvidia-smi", SKIPPED if not a.gpu else done.state, done.seconds,
                  done.out.strip()[:100] if done.state == OK else "no GPU here" if not a.gpu else done.why())


def kernels(a):
    """Every test of kernels, several at once: they share the card without knowing."""
    found = need_programs(a, "kernels")

    def one(program):
        done = a.runner.run([program], matrix.LIMITS["kernels"])
        lines = done.out.strip().splitlines() or [""]
        failed = [x for x in lines if x.startswith("FAILED")]
        a.results.add("kernels", program.name, done.state, done.seconds, (failed or [done.why()])[0] if done.state != OK else lines[-1])

    return [lambda p=p: one(p) for p in found]


def sanitizer(a):
    found = need_programs(a, "kernels", "sanitizer")
    tool_path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin:/opt/cuda/bin")
    if found and tool_path is None:
        a.results.add("sanitizer", "compute-sanitizer", SKIPPED, note="no compute-sanitizer on PATH or in /usr/local/cuda/bin")
        return []

    def one(program, tool):
        limit = matrix.LIMITS["sanitizer"]
        done = a.runner.run([tool_path, "--tool", tool, "--error-exitcode", "77", program], limit, {"PHALANX_TEST_SMALL": "1"})
        errors = [x for x in done.out.splitlines() if x.startswith("=========") and re.search(r"ERROR SUMMARY: [1-9]|Invalid|hazard|[Rr]ace", x)]
        refused = "Device not supported" in done.out + done.err
        state = SKIPPED if refused else FAILED if done.status == 77 or (done.state == CUT and errors) else done.state
        cases = sum(x.startswith("ok") for x in done.out.splitlines())
        note = {SKIPPED: "the sanitizer does not support this device", OK: f"{cases} cases, no error",
                CUT: f"no error in the {cases} cases until its limit"}.get(state) or (errors or [done.why()])[0][:150]
        a.results.add("sanitizer", f"{tool} {program.name}", state, done.seconds, note)

    return [lambda p=p, t=t: one(p, t) for t in matrix.SANITIZED_TOOLS for p in found]


def rust(a):
    found = need_programs(a, "rust")

    def one(program):
        done = a.runner.run([program], matrix.LIMITS["rust"])
        sums = [x for x in done.out.splitlines() if x.startswith("test result:")]
        a.results.add("rust", program.name, done.state, done.seconds, sums[-1] if sums and done.state == OK else done.why())

    return [lambda p=p: one(p) for p in found]


def need_programs(a, kind, stage=None):
    stage = stage or kind
    if not a.gpu and kind == "kernels":
        a.results.add(stage, "tests of kernels", SKIPPED, note="they run on a GPU; the emulator runs the same sources elsewhere")
        return []
    found = programs(a.programs, kind)
    if not found:
        a.results.add(stage, f"programs in {kind}/", SKIPPED, note=f"no executables in {a.programs}/{kind}" if a.programs else "no PROGRAMS given")
    return found


def runs(a):
    """Jobs of the invariance matrix; `agree` judges them and the checkpoints afterwards."""
    if not a.prefix.with_name("tokens.bin").exists():
        tokens.write(a.prefix, tokens.made_up(matrix.COMPARED_VOCAB, matrix.COMPARED_TOKENS, 3), end=0)
    a.trained, a.continued = {}, []

    def one(precision, run):
        got = train(a, a.folder / "runs" / precision / slug(run.name), precision, run.keys, run.ranks, a.device)
        a.trained[precision, run.name] = got

    return [lambda p=p, r=r: one(p, r) for r in possible(a) for p in r.precisions]


def possible(a):
    """Runs that there are cards for."""
    return [r for r in matrix.RUNS if r.cards <= max(a.cards, 1)]


def agree(a):
    for cards in sorted({r.cards for r in matrix.RUNS} - {r.cards for r in possible(a)}):
        many = sum(r.cards == cards for r in matrix.RUNS)
        a.results.add("runs", f"{many} runs of ranks with a card each", SKIPPED, note=f"they want {cards} cards, here are {a.cards}")
    for precision in matrix.PRECISIONS:
        for run in (r for r in possible(a) if precision in r.precisions):
            base, got = a.trained.get((precision, run.of)), a.trained.get((precision, run.name))
            judge(a, "runs", f"{precision} {run.name}", got, base, run.same_bits, matrix.CLOSE[precision])
    for precision, item, got, same_bits in sorted(a.continued, key=lambda c: c[:2]):
        base = a.trained.get((precision, matrix.RUNS[0].name))
        judge(a, "checkpoints", item, got, base, same_bits, matrix.CLOSE[precision])


def judge(a, stage, item, got, base, same_bits, close):
    """Holds one trained run to another: the same bits of weights, losses and norms, or losses that are close."""
    if got is None or not got.steps or got.problem:
        state = CUT if got and got.timed_out else FAILED
        a.results.add(stage, item, state, got.seconds if got else 0, (got.problem if got else "") or "it did not run")
        return
    if base is None or base.problem:
        a.results.add(stage, item, FAILED, got.seconds, "nothing to compare with: the first run failed")
        return
    apart = distance(got.steps, base.steps)
    same = (got.weights, got.steps) == (base.weights, base.steps)
    good = same if same_bits else apart <= close
    note = f"weights {got.weights[:12]}" if same else f"losses within {apart:.1e}, weights {got.weights[:12]} not {base.weights[:12]}"
    a.results.add(stage, item, OK if good else FAILED, got.seconds, note, weights=got.weights, steps=got.steps, apart=apart)


def distance(ours, theirs):
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(x - y) / abs(y) for (x, _), (y, _) in zip(ours, theirs))


class Trained:
    def __init__(self):
        self.steps, self.weights, self.problem, self.seconds, self.timed_out = [], "", "", 0.0, False


def train(a, folder, precision, keys, ranks, device, stop_after=None, export=True):
    """Trains the compared model; gives losses and norms of its steps, and the hash of its last checkpoint's tensors."""
    got = Trained()
    sets = [*matrix.COMPARED, f"data.prefix={a.prefix}", f"train.precision={precision}", f"run.dir={folder}", *keys,
            *(matrix.COMPARED_TINY if a.rehearse else []), *a.device_keys(device)]
    command = [a.phalanx, "train", "--json", *(["--nproc", ranks] if ranks > 1 else []),
               *(["--stop-after", stop_after] if stop_after else []), *(x for s in sets for x in ("--set", s))]
    done = a.runner.run(command, 60)
    got.seconds, got.timed_out = done.seconds, done.timed_out
    got.steps = [(r["loss"], r["grad_norm"]) for r in json_lines(done.out) if r.get("kind") == "step"]
    # 130 is the status of a run that was stopped with a checkpoint, as asked.
    if done.state != OK and not (stop_after and done.status == 130):
        got.problem = done.why()
    elif export:
        out = folder.with_name(folder.name + "-whole")
        done = a.runner.run([a.phalanx, "ckpt", "reshard", "--ranks", 1, folder, out], 30)
        if done.state != OK:
            got.problem = f"ckpt reshard: {done.why()}"
        else:
            got.weights = contents(next(out.glob("*/*.safetensors")))
            shutil.rmtree(out)
    return got


def contents(path):
    """A hash of all tensors of a file, weights and moments, by name; a part of one is called NAME@FIRST+LENGTH."""
    data, parts = path.read_bytes(), []
    start = 8 + int.from_bytes(data[:8], "little")
    for key, tensor in json.loads(data[8:start]).items():
        name, _, part = key.partition("@")
        if name != "__metadata__":
            first, end = tensor["data_offsets"]
            parts.append((name, int(part.partition("+")[0] or 0), data[start + first:start + end]))
    parts.sort()
    return hashlib.sha256(b"".join((b"" if first else name.encode()) + bits for name, first, bits in parts)).hexdigest()


def checkpoints(a):
    """A run that stops on one device and goes on on the other, in both directions, and on its own."""
    key, whole, stop = ("layout.micro_batch=8",), matrix.COMPARED_STEPS, matrix.STOPPED_AT

    def one(precision, first, second):
        item = f"{precision} {first} then {second}"
        folder = a.folder / "checkpoints" / precision / f"{first}-{second}"
        before = train(a, folder, precision, key, 1, first, stop_after=stop, export=False)
        if before.problem:
            a.continued.append((precision, item, before, False))
            return
        after = train(a, folder, precision, key, 1, second)
        after.steps, after.seconds = before.steps + after.steps, before.seconds + after.seconds
        if len(after.steps) != whole and not after.problem:
            after.problem = f"{len(after.steps)} steps in all, expected {whole}"
        a.continued.append((precision, item, after, first == second == a.device))

    if not hasattr(a, "trained"):
        a.results.add("checkpoints", "all", SKIPPED, note="they are held to the stage `runs`, which was not asked for")
        return []
    pairs = [(a.device, a.device)]
    if a.gpu:
        pairs += [("cpu", "cuda"), ("cuda", "cpu")]
    else:
        a.results.add("checkpoints", "cpu to cuda and back", SKIPPED, note="no GPU here")
    return [lambda p=p, f=f, s=s: one(p, f, s) for p in matrix.PRECISIONS for f, s in pairs]


def golden(a):
    if not a.has_torch or not a.has_transformers:
        a.results.add("golden", "PyTorch", SKIPPED, note=f"no {'transformers' if a.has_torch else 'torch'} in {a.python}")
        return []

    def one(family):
        sets = [x for key in [*a.device_keys(a.device), *(["run.threads=1"] if a.rehearse else [])] for x in ("--set", key)]
        done = a.runner.run([a.python, a.here / "golden.py", "--phalanx", a.phalanx, "--families", family, *sets,
                             *(["--tiny"] if a.rehearse else [])], matrix.LIMITS["golden"])
        rows = json_lines(done.out)
        for row in rows:
            note = f"losses within {row['loss_apart']:.1e}, norms within {row['norm_apart']:.1e} of PyTorch's float32"
            a.results.add("golden", f"{family} {row['precision']}", OK if row["ok"] else FAILED, done.seconds, note, golden=row)
        if len(rows) < 2:
            a.results.add("golden", family, done.state if done.state != OK else FAILED, done.seconds, done.why())

    return [lambda f=f: one(f) for f in ("llama", "gpt2")]


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name)
