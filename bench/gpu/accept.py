"""The program behind accept.sh, which says how to call it: stages in order, each with its limit, then one table."""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import checks
import matrix
import timing
from runner import CUT, FAILED, OK, SKIPPED, Results, Runner, line

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
        self.card_gib, self.table = 0.0, []
        cache = self.folder / "compiled"
        self.peer_env = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
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

    def wants(self, stage):
        return stage in self.only


def main():
    a = Acceptance(parse_args())
    try:
        if a.wants("devices"):
            checks.devices(a)
        check(a)
        for stage, measure in (("steps", timing.steps), ("attention", timing.attention), ("gemm", timing.gemm)):
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
    at_once = max(2, min(8, (os.cpu_count() or 2) // 2))
    jobs = timing.prepare_peers(a) if a.wants("steps") else []
    for stage in ("kernels", "rust", "runs", "golden", "sanitizer"):
        if a.wants(stage):
            guarded(a, stage, lambda: jobs.extend(getattr(checks, stage)(a)))
    a.runner.all(jobs, at_once)
    if a.wants("runs"):
        guarded(a, "runs", lambda: checks.agree(a))
    if a.wants("checkpoints"):
        guarded(a, "checkpoints", lambda: a.runner.all(checks.checkpoints(a), at_once))
    a.runner.end = whole


def guarded(a, stage, work):
    """A stage that breaks does not take the others along."""
    try:
        work()
    except Exception as e:
        a.results.add(stage, "the stage broke", FAILED, note=f"{type(e).__name__}: {e}"[:200])


def finish(a):
    rows = a.results.rows
    lines = [line(r) for stage in ("accept", *STAGES) for r in rows if r["stage"] == stage]
    lines.append("")
    if a.table:
        lines.append(f"{'model':<17}{'peer':<15}{'ours ms':>9}{'peer ms':>9}{'free ms':>9}{'ratio':>7}{'goal':>6}{'MFU':>7}{'peer':>7}"
                     f"{'of 790':>8}{'GiB':>7}{'peer':>7}")
    for t in a.table:
        gib = lambda b: f"{b / 2**30:.1f}" if b else "-"
        free = f"{1e3 * t['peer_free_step_s']:.2f}" if t["peer_free_step_s"] else "-"
        lines.append(f"{t['model']:<17}{t['peer']:<15}{1e3 * t['our_step_s']:>9.2f}{1e3 * t['peer_step_s']:>9.2f}{free:>9}{t['ratio']:>7.3f}"
                     f"{t['goal'] or '-':>6}{100 * t['our_mfu']:>6.1f}%{100 * t['peer_mfu']:>6.1f}%{100 * t['our_share_of_790']:>7.1f}%"
                     f"{gib(t['our_bytes_placed']):>7}{gib(t['peer_bytes_reserved']):>7}")
    states = [r["state"] for r in rows]
    gpu = a.results.facts.get("gpu", {}).get("name", a.device)
    rehearsed = ", a rehearsal: no figure counts" if a.rehearse or not a.gpu else ""
    lines.append(f"{gpu}: {', '.join(f'{states.count(s)} {s}' for s in (OK, 'missed', CUT, SKIPPED, FAILED) if s in states)}{rehearsed}")
    a.results.facts["seconds"] = round(60 * 0 + (__import__("time").monotonic() - a.results.start), 1)
    a.results.save()
    text = "\n".join(lines)
    (a.out / "accept.txt").write_text(text + "\n")
    print(f"\n{text}")
    return 1 if {FAILED, CUT, "missed"} & set(states) else 0


if __name__ == "__main__":
    main()
