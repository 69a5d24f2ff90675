"""Stages of accept.sh that measure: training steps in turn with PyTorch, attention, matrix products."""

import re
import select
import statistics
import subprocess
import time

import matrix
from runner import CUT, FAILED, OK, SKIPPED, end, json_lines, programs

PEAK_TFLOPS, REACHED_TFLOPS = 989.4, 790.0


def prepare_peers(a):
    """Compiles the peers once, so that the timed ones find their kernels in torch.compile's cache: jobs of one sequence."""
    if not a.has_torch or not a.gpu:
        return []

    def all_of_them():
        for step in matrix.STEPS:
            # A captured step replays the kernels of `compile`; an eager one has none.
            for peer in (p for p in step.peers if p not in ("eager", "capture")):
                done = a.runner.run([*peer_command(a, step, peer), "--steps", 1, "--warmup", 1], 150, a.peer_env)
                if done.state != OK:
                    a.results.add("steps", f"prepare {step.model} {peer}", done.state, done.seconds, done.why())

    return [all_of_them]


def steps(a):
    a.table = []
    for step in matrix.STEPS:
        if a.runner.left() < 15:
            a.results.add("steps", step.model, CUT, note="no time was left")
            continue
        one_model(a, step)


def one_model(a, step):
    """Our program stays, peers come one after the other and take turns with it; or, on a small card, each alone."""
    together = not a.gpu or a.card_gib >= step.together_gib
    ours_command = [a.phalanx, "bench", "step", "--resident", *our_keys(a, step)]
    placed = placed_bytes(a, step)
    ours, alone = None, None
    try:
        before = used_mib(a)
        ours = Side(ours_command, {})
        try:
            ours.turn(a, matrix.WARMUP)
            resident_mib = used_mib(a) - before
            if not together:
                alone = ours.turn(a, matrix.TIMED)
                ours.close()
        except Broken as e:
            a.results.add("steps", f"{step.model} ours", FAILED, note=str(e)[:200])
            return
        for peer, goal in step.peers.items():
            if not a.has_torch:
                a.results.add("steps", f"{step.model} {peer}", SKIPPED, note=f"no torch in {a.python}")
                continue
            if not a.gpu and peer in ("graphs", "capture", "compile+cudnn"):
                a.results.add("steps", f"{step.model} {peer}", SKIPPED, note="needs a GPU")
                continue
            start = time.monotonic()
            try:
                pair(a, step, peer, goal, None if not together else ours, alone, placed, resident_mib, start)
            except Broken as e:
                a.results.add("steps", f"{step.model} {peer}", FAILED, time.monotonic() - start, str(e)[:200])
                if ours.process.poll() is not None and together:
                    return
    finally:
        if ours:
            ours.close()


def pair(a, step, peer, goal, ours, alone, placed, resident_mib, start):
    theirs = Side([str(x) for x in [*peer_command(a, step, peer), "--resident", "--warmup", matrix.WARMUP]], a.peer_env)
    try:
        theirs.turn(a, matrix.WARMUP)
        mine, its, ratios = [], [], []
        if ours is None:
            mine, its = list(alone), theirs.turn(a, matrix.TIMED)
            ratios = [statistics.median(its) / statistics.median(mine)]
        else:
            for i in range(-(-matrix.TIMED // matrix.TURN)):
                # The first step of a turn pays for the change of program on the card.
                order = [(ours, mine), (theirs, its)]
                for side, seconds in order if i % 2 == 0 else order[::-1]:
                    seconds.append(side.turn(a, matrix.TURN + 1)[1:])
            ratios = [statistics.median(t) / statistics.median(m) for m, t in zip(mine, its)]
            mine, its = sum(mine, []), sum(its, [])
        report = theirs.finish()
    finally:
        theirs.close()
    row = compare(a, step, peer, goal, mine, its, ratios, report, placed, resident_mib) | {"side_by_side": ours is not None}
    a.table.append(row)
    fast = goal is None or row["ratio"] >= goal
    enough = step.mfu is None or row["our_mfu"] >= step.mfu
    small = row["memory_ratio"] is None or row["memory_ratio"] <= matrix.MEMORY_GOAL
    note = f"ours {1e3 * row['our_step_s']:.2f} ms, {peer} {1e3 * row['peer_step_s']:.2f} ms: {row['ratio']:.3f}"
    note += f" (goal {goal})" if goal else ""
    if not a.rehearse:
        note += f", mfu {100 * row['our_mfu']:.1f} and {100 * row['peer_mfu']:.1f} %"
        note += f", memory {row['memory_ratio']:.2f}" if row["memory_ratio"] else ""
    # A rehearsal's speed says nothing, so it misses no goal.
    state = OK if a.rehearse or (fast and enough and small) else "missed"
    a.results.add("steps", f"{step.model} {peer}", state, time.monotonic() - start, note, measured=row)


def compare(a, step, peer, goal, mine, its, ratios, report, placed, resident_mib):
    ours, theirs, tokens = statistics.median(mine), statistics.median(its), report["batch"] * report["sequence"]
    flops, reserved = report["flops_per_token"] * tokens, report["max_memory_reserved"]
    tflops = lambda seconds: flops / seconds / 1e12
    free = report.get("free_step_s")
    return {
        "model": step.model, "peer": peer, "goal": goal, "ratio": statistics.median(ratios), "ratios": ratios,
        "our_step_s": ours, "peer_step_s": theirs, "our_steps_s": mine, "peer_steps_s": its,
        "our_tokens_per_s": tokens / ours, "peer_tokens_per_s": tokens / theirs, "peer_free_step_s": free,
        "our_tflops": tflops(ours), "peer_tflops": tflops(theirs),
        "our_mfu": tflops(ours) / PEAK_TFLOPS, "peer_mfu": tflops(theirs) / PEAK_TFLOPS,
        "our_share_of_790": tflops(ours) / REACHED_TFLOPS, "peer_share_of_790": tflops(theirs) / REACHED_TFLOPS,
        "our_bytes_placed": placed, "our_resident_mib": resident_mib, "peer_bytes_reserved": reserved,
        "memory_ratio": placed / reserved if placed and reserved else None, "peer_report": report,
    }


def our_keys(a, step):
    keys = [f"batch.sequence={step.sequence}", f"batch.sequences={step.batch}", f"layout.micro_batch={step.batch}",
            "train.precision=bf16", *step.keys, *a.device_keys(a.device), *(matrix.TINY_KEYS if a.rehearse else [])]
    return [x for key in keys for x in ("--set", key)]


def peer_command(a, step, peer):
    mode, _, attention = peer.partition("+")
    return [a.python, a.here / "train_peer.py", step.model, "--mode", mode, "--batch", step.batch, "--attention", attention or "flash",
            *(["--tiny"] if a.rehearse else [])]


def placed_bytes(a, step):
    done = a.runner.run([a.phalanx, "program", "show", "--brief", *our_keys(a, step)], 20)
    found = re.search(r"^\s*total\s+(\d+)", done.out, re.M)
    return int(found[1]) if found else None


def used_mib(a):
    if not a.gpu:
        return 0
    try:
        out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True,
                             text=True, timeout=10).stdout
        return int(out.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return 0


class Broken(Exception):
    """A side ended, or did not answer in time."""


class Side:
    """A program that answers a line `step` with a line of seconds."""

    def __init__(self, command, env):
        import os
        import tempfile
        self.command = [str(x) for x in command]
        self.errors = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
                                            env={**os.environ, **env}, start_new_session=True)
        except OSError as e:
            raise Broken(f"{self.command[0]}: {e.strerror}") from e
        self.pending = b""

    def turn(self, a, count):
        """Seconds of steps, asked for at once so that no answer has to be waited for in between."""
        try:
            self.process.stdin.write(b"step\n" * count)
        except (BrokenPipeError, ValueError) as e:
            raise Broken(self.last_words("ended")) from e
        until = time.monotonic() + min(120, a.runner.left())
        return [self.seconds(until) for _ in range(count)]

    def seconds(self, until):
        line = self.read_line(until)
        try:
            return float(line)
        except ValueError as e:
            raise Broken(self.last_words(f"answered {line[:80]!r}")) from e

    def read_line(self, until):
        while b"\n" not in self.pending:
            ready = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))[0]
            if not ready:
                raise Broken(self.last_words("gave no answer in time"))
            more = self.process.stdout.read(65536)
            if not more:
                raise Broken(self.last_words("ended"))
            self.pending += more
        line, _, self.pending = self.pending.partition(b"\n")
        return line.decode(errors="replace").strip()

    def finish(self):
        """Ends its input and reads its report."""
        self.process.stdin.close()
        rows = json_lines(self.read_line(time.monotonic() + 60))
        if not rows:
            raise Broken(self.last_words("gave no report"))
        return rows[0]

    def last_words(self, how):
        self.errors.seek(0)
        lines = [x for x in self.errors.read().decode(errors="replace").splitlines() if x.strip()]
        telling = [x for x in lines if x.startswith("error") or "Error" in x or "panicked" in x]
        return f"{how}: {(telling or lines or ['it said nothing'])[-1]}"

    def close(self):
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            end(self.process)
            self.process.wait(5)


def rates(a, stage, script, fields, key):
    """PyTorch's rates by script, ours by the programs in bench/ whose name starts with the stage's; joined by `fields`."""
    theirs, ours = [], []
    if a.has_torch:
        done = a.runner.run([a.python, a.here / script, *(["--tiny"] if a.rehearse else [])], matrix.LIMITS[stage], a.peer_env)
        theirs = json_lines(done.out)
        a.results.add(stage, "PyTorch", done.state if done.state != OK or theirs else FAILED, done.seconds,
                      f"{len(theirs)} rates" if done.state == OK else done.why(), rates=theirs)
    else:
        a.results.add(stage, "PyTorch", SKIPPED, note=f"no torch in {a.python}")
    found = [p for p in programs(a.programs, "bench") if p.name.startswith(stage)]
    if not found:
        a.results.add(stage, "ours", SKIPPED, note=f"no program {stage}* in {a.programs}/bench" if a.programs else "no PROGRAMS given")
    for program in found:
        done = a.runner.run([program], matrix.LIMITS[stage])
        rows = json_lines(done.out)
        ours += rows
        a.results.add(stage, program.name, done.state, done.seconds, f"{len(rows)} rates" if done.state == OK else done.why(), rates=rows)
    for row in ours:
        same = [t for t in theirs if "tflops" in t and all(t.get(f) == row.get(f) for f in fields)]
        if same and row.get("tflops"):
            best = max(t["tflops"] for t in same)
            share = row["tflops"] / best
            state = OK if key is None or a.rehearse or share >= key else "missed"
            item = " ".join(str(row[f]) for f in fields)
            goal = f" (goal {key})" if key else ""
            a.results.add(stage, item, state, row.get("seconds", 0.0), f"{row['tflops']:.0f} TFLOP/s, PyTorch {best:.0f}: {share:.2f}{goal}", share=share)


def attention(a):
    rates(a, "attention", "attention_peer.py", ("batch", "sequence", "heads", "kv_heads", "width", "pass"), matrix.ATTENTION_GOAL)


def gemm(a):
    rates(a, "gemm", "gemm_peer.py", ("m", "n", "k", "form"), None)
