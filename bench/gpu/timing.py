"""Stages of accept.sh that measure: training steps in turn with PyTorch, attention, matrix products."""

import os
import re
import select
import statistics
import subprocess
import tempfile
import time

import matrix
from runner import CUT, FAILED, MISSED, OK, SKIPPED, end, json_lines, programs

PEAK_TFLOPS, REACHED_TFLOPS = 989.4, 790.0


def prepare_peers(a):
    """Compiles the peers while the checks run, so that the timed ones find their kernels in torch.compile's cache.

    The large ones go one after another, since the card does not hold them at once; the small one goes beside them.
    """
    if not a.has_torch or not a.gpu:
        return []

    def one_after_another(steps):
        for step in steps:
            # A captured step replays the kernels of `compile`; an eager one has none.
            for peer in (p for p in step.peers if p not in ("eager", "capture")):
                done = a.runner.run([*peer_command(a, step, peer), "--steps", 1, "--warmup", 1], 120, a.peer_env(step.model, peer))
                state = OK if done.state == OK else CUT
                if state != OK:
                    a.unusable.add((step.model, peer))
                a.results.add("steps", f"prepare {step.model} {peer}", state, done.seconds, "" if state == OK else done.why())

    large = [s for s in matrix.STEPS if s.together_gib]
    return [lambda s=s: one_after_another(s) for s in (large, [s for s in matrix.STEPS if not s.together_gib])]


def steps(a):
    for step in matrix.STEPS:
        if a.runner.left() < 15:
            a.results.add("steps", step.model, CUT, note="no time was left")
        else:
            one_model(a, step)


def extra(a):
    for step in matrix.EXTRA:
        if not a.gpu or not a.has_torch or a.runner.left() < 60:
            a.results.add("extra", step.model, SKIPPED, note="less than a minute was left" if a.gpu and a.has_torch else "needs a GPU and PyTorch")
        else:
            one_model(a, step)


def one_model(a, step):
    """Our program stays; peers take turns with it, one after the other. On a card too small for two, each is alone."""
    together, wanted = not a.gpu or a.card_gib >= step.together_gib, []
    for peer in step.peers:
        if not a.has_torch or (not a.gpu and peer not in ("compile", "eager")):
            a.results.add("steps", f"{step.model} {peer}", SKIPPED, note="needs a GPU" if a.has_torch else f"no torch in {a.python}")
        else:
            wanted.append(peer)
    sides, peers, ours, alone, placed = [], {}, None, None, None

    def start(command, env, warm):
        sides.append(Side(command, env))
        sides[-1].ask(warm)
        return sides[-1]

    try:
        ours = start([a.phalanx, "bench", "step", "--resident", *our_keys(a, step)], {}, matrix.WARMUP)
        # Programs start and warm up at once: nothing is timed yet.
        peers = {p: start(resident_peer(a, step, p), a.peer_env(step.model, p), matrix.WARMUP) for p in wanted} if together else {}
        placed = placed_bytes(a, step)
        ours.answers(a, matrix.WARMUP)
        if not together:
            used, alone = used_mib(a), ours.turn(a, matrix.TIMED)
            ours.close()
            a.results.add("steps", f"{step.model} ours alone", OK, note=f"{1e3 * statistics.median(alone):.2f} ms, {used} MiB of the card in use")
        else:
            a.results.add("steps", f"{step.model} ours", OK, note=f"warmed up, {placed or 0} bytes placed")
    except Broken as e:
        a.results.add("steps", f"{step.model} ours", FAILED, note=str(e)[:200])
        ours = alone = None
    # A peer that still compiles would disturb those that are timed already.
    for peer in list(peers):
        if problem := peers[peer].warmed_up(a, matrix.WARMUP):
            a.results.add("steps", f"{step.model} {peer}", FAILED, note=problem)
            wanted.remove(peer)
    for peer in wanted:
        begun = time.monotonic()
        try:
            theirs = peers.get(peer) or start(resident_peer(a, step, peer), a.peer_env(step.model, peer), matrix.WARMUP)
            if peer not in peers:
                theirs.answers(a, matrix.WARMUP)
            pair(a, step, peer, ours, theirs, alone, placed, begun)
        except Broken as e:
            a.results.add("steps", f"{step.model} {peer}", FAILED, time.monotonic() - begun, str(e)[:200])
    for side in sides:
        side.close()


def pair(a, step, peer, ours, theirs, alone, placed, begun):
    """Times both; where ours was timed `alone`, the card does not hold both. Without ours, the peer's figures stand alone."""
    mine, its = [], []
    if ours is None:
        its = [theirs.turn(a, matrix.TIMED)]
    elif alone is not None:
        mine, its = [alone], [theirs.turn(a, matrix.TIMED)]
    else:
        for i in range(-(-matrix.TIMED // matrix.TURN)):
            # The first step of a turn pays for the change of program on the card.
            order = [(ours, mine), (theirs, its)]
            for side, seconds in order if i % 2 == 0 else order[::-1]:
                seconds.append(side.turn(a, matrix.TURN + 1)[1:])
    ratios = [statistics.median(t) / statistics.median(m) for m, t in zip(mine, its)]
    report = theirs.finish()
    theirs.close()
    row = compare(step, peer, sum(mine, []), sum(its, []), ratios, report, placed) | {"in_turn": alone is None}
    a.table.append(row)
    goal = step.peers[peer]
    if ours is None:
        note = f"{1e3 * row['peer_step_s']:.2f} ms, MFU {100 * row['peer_mfu']:.1f} %: nothing of ours to compare with"
        a.results.add("steps", f"{step.model} {peer}", OK, time.monotonic() - begun, note, measured=row)
        return
    fast = goal is None or row["ratio"] >= goal
    enough = step.mfu is None or row["our_mfu"] >= step.mfu
    small = row["memory_ratio"] is None or row["memory_ratio"] <= matrix.MEMORY_GOAL
    note = f"ours {1e3 * row['our_step_s']:.2f} ms, {peer} {1e3 * row['peer_step_s']:.2f} ms: {row['ratio']:.3f}"
    note += f" (goal {goal})" if goal else ""
    if not a.rehearse:
        note += f", MFU {100 * row['our_mfu']:.1f} and {100 * row['peer_mfu']:.1f} %"
        note += f", memory {row['memory_ratio']:.2f}" if row["memory_ratio"] else ""
    # A rehearsal's speed says nothing, so it misses no goal.
    state = OK if a.rehearse or (fast and enough and small) else MISSED
    a.results.add("steps", f"{step.model} {peer}", state, time.monotonic() - begun, note, measured=row)


def compare(step, peer, mine, its, ratios, report, placed):
    ours, theirs, tokens = statistics.median(mine) if mine else None, statistics.median(its), report["batch"] * report["sequence"]
    flops, reserved = report["flops_per_token"] * tokens, report["max_memory_reserved"]
    tflops = lambda seconds: flops / seconds / 1e12 if seconds else 0.0
    free = report.get("free_step_s")
    return {
        "model": step.model, "peer": peer, "goal": step.peers[peer], "ratio": statistics.median(ratios) if ratios else None, "ratios": ratios,
        "our_step_s": ours, "peer_step_s": theirs, "our_steps_s": mine, "peer_steps_s": its,
        "our_tokens_per_s": tokens / ours if ours else None, "peer_tokens_per_s": tokens / theirs, "peer_free_step_s": free,
        "our_tflops": tflops(ours), "peer_tflops": tflops(theirs),
        "our_mfu": tflops(ours) / PEAK_TFLOPS, "peer_mfu": tflops(theirs) / PEAK_TFLOPS,
        "our_share_of_790": tflops(ours) / REACHED_TFLOPS, "peer_share_of_790": tflops(theirs) / REACHED_TFLOPS,
        "our_bytes_placed": placed, "peer_bytes_reserved": reserved,
        "memory_ratio": placed / reserved if placed and reserved else None, "peer_report": report,
    }


def our_keys(a, step):
    keys = [f"batch.sequence={step.sequence}", f"batch.sequences={step.batch}", f"layout.micro_batch={step.at_once}",
            "train.precision=bf16", *step.keys, *a.device_keys(a.device), *(matrix.TINY_KEYS if a.rehearse else [])]
    return [x for key in keys for x in ("--set", key)]


def resident_peer(a, step, peer):
    return [*peer_command(a, step, peer), "--resident", "--warmup", matrix.WARMUP]


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
        self.command = [str(x) for x in command]
        self.errors = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0,
                                            env={**os.environ, **env}, start_new_session=True)
        except OSError as e:
            raise Broken(f"{self.command[0]}: {e.strerror}") from e
        self.pending = b""

    def ask(self, count):
        try:
            self.process.stdin.write(b"step\n" * count)
        except (BrokenPipeError, ValueError) as e:
            raise Broken(self.last_words("ended")) from e

    def answers(self, a, count):
        until = time.monotonic() + min(120, a.runner.left())
        return [self.seconds(until) for _ in range(count)]

    def turn(self, a, count):
        """Seconds of steps, asked for at once so that no answer has to be waited for in between."""
        self.ask(count)
        return self.answers(a, count)

    def warmed_up(self, a, count):
        """Waits for the first steps; what went wrong, if anything did."""
        try:
            self.answers(a, count)
        except Broken as e:
            return str(e)[:200]
        return None

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
        done = a.runner.run([a.python, a.here / script, *(["--tiny"] if a.rehearse else [])], matrix.LIMITS[stage])
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
            state = OK if key is None or a.rehearse or share >= key else MISSED
            item = " ".join(str(row[f]) for f in fields)
            goal = f" (goal {key})" if key else ""
            a.results.add(stage, item, state, row.get("seconds", 0.0), f"{row['tflops']:.0f} TFLOP/s, PyTorch {best:.0f}: {share:.2f}{goal}", share=share)


def attention(a):
    rates(a, "attention", "attention_peer.py", ("batch", "sequence", "heads", "kv_heads", "width", "pass"), matrix.ATTENTION_GOAL)


def gemm(a):
    rates(a, "gemm", "gemm_peer.py", ("m", "n", "k", "form"), None)
