"""The program behind accept.sh, which says how to call it: stages in order, each with its limit, then one table."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import checks
import matrix
import timing
from runner import CUT, FAILED, MISSED, OK, SKIPPED, Results, Runner, line

STAGES = tuple(matrix.LIMITS)


class Acceptance:
    """What the stages share."""

    def __init__(self, args):
        self.phalanx, self.programs = args.phalanx.resolve(), args.programs and args.programs.resolve()
        self.only, self.here, self.python = args.only, pathlib.Path(__file__).resolve().parent, sys.executable
        self.rehearse = os.environ.get("ACCEPT_REHEARSE", "") not in ("", "0")
        self.device = os.environ.get("ACCEPT_DEVICE", "cuda")
        self.gpu = self.device == "cuda"
        self.out = pathlib.Path(os.environ.get("OUT", "gpu-results")).resolve()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="phalanx-accept-"))
        self.prefix = self.folder / "tokens"
        self.results = Results(self.out)
        self.runner = Runner(self.results, args.minutes)
        self.card_gib, self.cards, self.table = 0.0, 0, []
        self.unusable = set()
        self.has_torch, self.has_transformers = (self.has(m) for m in ("torch", "transformers"))
        keys = self.runner.run([self.phalanx, "keys"], 20)
        self.knows_device = "run.device" in keys.out
        if keys.state != OK:
            sys.exit(f"{self.phalanx} keys: {keys.why()}")
        self.results.facts.update(device=self.device, rehearsed=self.rehearse, phalanx=str(self.phalanx), cores=os.cpu_count())

    def has(self, module):
        find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-c", find]).returncode == 0

    def device_keys(self, device):
        """A binary from before there was a choice takes no key, and runs on the CPU."""
        return [f"run.device={device}"] if self.knows_device or device != "cpu" else []

    def peer_env(self, model, peer):
        """Where torch.compile keeps what it made. One that was ended while it wrote may have left half a file behind."""
        peer = {"capture": "compile"}.get(peer, peer)
        name = f"compiled-{model}-{peer}" + ("-again" if (model, peer) in self.unusable else "")
        return {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / name), "TRITON_CACHE_DIR": str(self.folder / name / "triton")}

    def wants(self, stage):
        return stage in self.only


def main():
    a = Acceptance(parse_args())
    try:
        if a.wants("devices"):
            checks.devices(a)
        check(a)
        for stage, measure in (("steps", timing.steps), ("attention", timing.attention), ("gemm", timing.gemm),
                               ("extra", timing.extra)):
            if a.wants(stage):
                guarded(a, stage, lambda: measure(a))
    except KeyboardInterrupt:
        a.results.add("accept", "interrupted", FAILED)
    finally:
        shutil.rmtree(a.folder, ignore_errors=True)
    sys.exit(finish(a))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, prog="accept.sh")
    parser.add_argument("phalanx", type=pathlib.Path, help="the built binary")
    parser.add_argument("programs", type=pathlib.Path, nargs="?", help="folder with kernels/, rust/ and bench/")
    parser.add_argument("--only", type=lambda s: s.split(","), default=list(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=8.0)
    args = parser.parse_args()
    if unknown := set(args.only) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; known: {', '.join(STAGES)}")
    if not args.phalanx.is_file():
        parser.error(f"no binary {args.phalanx}")
    return args


def check(a):
    """Right or wrong, several at once: these share the card, and while they do the peers compile. Timing comes after."""
    timed = any(map(a.wants, ("steps", "attention", "gemm")))
    whole, kept = a.runner.end, matrix.KEPT_FOR_TIMING_S if timed else 0
    a.runner.end = whole - min(kept, a.runner.left() / 2)
    at_once = max(2, min(6, (os.cpu_count() or 2) // 2))
    jobs = timing.prepare_peers(a) if a.wants("steps") else []
    at_once += len(jobs)
    for stage in ("kernels", "rust", "runs", "checkpoints", "golden", "sanitizer"):
        if a.wants(stage):
            guarded(a, stage, lambda: jobs.extend(getattr(checks, stage)(a)))
    a.runner.all(jobs, at_once)
    if a.wants("runs"):
        guarded(a, "runs", lambda: checks.agree(a))
    a.runner.end = whole


def guarded(a, stage, work):
    """A stage that breaks does not take the others along."""
    try:
        work()
    except Exception as e:
        a.results.add(stage, "the stage broke", FAILED, note=f"{type(e).__name__}: {e}"[:200])


def finish(a):
    """One table: what is not as it should be line by line, the rest counted; then the timed steps."""
    rows, lines = a.results.rows, []
    for stage in ("accept", *STAGES):
        mine = [r for r in rows if r["stage"] == stage]
        good = [r for r in mine if r["state"] == OK]
        if len(good) > 1:
            lines.append(line({"stage": stage, "item": f"{len(good)} of {len(mine)}", "state": OK, "seconds": sum(r["seconds"] for r in good), "note": ""}))
            good = []
        lines += [line(r) for r in mine if r["state"] != OK or good]
    if a.table:
        lines += ["", timed("model", "peer", "ours ms", "peer ms", "free ms", "ratio", "goal", "MFU", "peer", "of 790", "GiB", "peer")]
    for t in a.table:
        ms = lambda key: f"{1e3 * t[key]:.2f}" if t[key] else "-"
        share = lambda key: f"{100 * t[key]:.1f}%"
        gib = lambda key: f"{t[key] / 2**30:.1f}" if t[key] else "-"
        lines.append(timed(t["model"], t["peer"], ms("our_step_s"), ms("peer_step_s"), ms("peer_free_step_s"), f"{t['ratio']:.3f}" if t["ratio"] else "-", t["goal"] or "-",
                           share("our_mfu"), share("peer_mfu"), share("our_share_of_790"), gib("our_bytes_placed"), gib("peer_bytes_reserved")))
    states = [r["state"] for r in rows]
    gpu = a.results.facts.get("gpu", {}).get("name", a.device)
    rehearsed = ", a rehearsal: no figure counts" if a.rehearse or not a.gpu else ""
    seconds = time.monotonic() - a.results.start
    counts = ", ".join(f"{states.count(s)} {s}" for s in (OK, MISSED, CUT, SKIPPED, FAILED) if s in states)
    lines.append(f"{gpu}, {seconds:.0f} s: {counts}{rehearsed}")
    a.results.facts["seconds"] = seconds
    a.results.save()
    text = "\n".join(lines)
    (a.out / "accept.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if {FAILED, CUT, MISSED} & set(states) else 0


def timed(model, peer, *columns):
    return f"{model:<17}{peer:<15}" + "".join(f"{c:>9}" for c in columns)


if __name__ == "__main__":
    main()
