"""From SIGKILL of a rank to the next completed step, of Phalanx and of its peers, on one machine and one model.

    python bench/peers/recovery.py phalanx --program target/release/phalanx --kills 10
    python bench/peers/recovery.py torchrun --kills 10          # with PyTorch; ddp.py is what it runs
    python bench/peers/recovery.py torchft --kills 10           # with torchft as well

Each trains the 13.8M-parameter reference model in batches of 8 sequences of 256 tokens on 4 ranks of one thread. Some
time within a step, chosen by --seed as the rank is, the rank is killed; the clock runs until the next line that tells of
a completed step. Prints one line a kill and the medians; `redone` counts steps that were done before and had to be again.
"""

import argparse
import glob
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MARK = "RECOVERY_BENCH"
STEP = re.compile(r"^(?:\[\w+\]:)?step (\d+)")
QUIET_S = 180


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["phalanx", "torchrun", "torchft"])
    parser.add_argument("--program", default="target/release/phalanx")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--nproc", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints of torchrun's run")
    parser.add_argument("--keep", action="store_true", help="keep logs and the run's directory")
    parser.add_argument("--text", help="what phalanx trains on; by default its own default text")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="recovery-")
    try:
        sys.exit(measure(args, folder))
    finally:
        if args.keep:
            print("kept", folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def measure(args, folder):
    print("load", open("/proc/loadavg").read().strip(), flush=True)
    run = {"phalanx": phalanx, "torchrun": torchrun, "torchft": torchft}[args.system](args, folder)
    chosen, rows = random.Random(args.seed), []
    try:
        lines = Lines(run, folder)
        lines.step()
        for _ in range(args.kills):
            before, at = lines.step()
            step_s = at - lines.before
            rank = chosen.randrange(args.nproc)
            time.sleep(chosen.random() * step_s)
            killed = time.time()
            os.kill(rank_pid(rank), signal.SIGKILL)
            step, at = lines.step()
            # What was done before the rank died does not count, nor what was on its way then.
            while at - killed < 0.02:
                before = step
                step, at = lines.step()
            redone = max(0, before - step + 1)
            rows.append((at - killed, redone))
            print(f"rank {rank} killed after step {before}: step {step} done {at - killed:.2f} s later, "
                  f"{redone} redone; a step took {step_s:.2f} s", flush=True)
            lines.step()
    finally:
        for pid in marked():
            os.kill(pid, signal.SIGKILL)
        run.wait()
    times = [t for t, _ in rows]
    print(f"{args.system}: median {statistics.median(times):.2f} s, {min(times):.2f} to {max(times):.2f} s, "
          f"{sum(r for _, r in rows)} steps redone over {len(rows)} kills")
    if args.system == "phalanx":
        phases(os.path.join(folder, "run"))
    return 0


def phalanx(args, folder):
    command = [args.program, "train", "--nproc", str(args.nproc), "--max-restarts", "1000"]
    keys = ["train.steps=100000", "train.eval_every=0", "train.sample_tokens=0", "run.threads=1", "schedule.warmup_steps=1",
            f"run.dir={folder}/run", "batch.sequences=8", "batch.sequence=256", "layout.micro_batch=1"]
    for key in keys:
        command += ["--set", key]
    return start(command + (["--text", args.text] if args.text else []), folder)


def torchrun(args, folder):
    launcher = os.path.join(os.path.dirname(sys.executable), "torchrun")
    return start([launcher, "--standalone", "--nproc-per-node", str(args.nproc), "--max-restarts", "1000",
                  os.path.join(HERE, "ddp.py"), "--checkpoint", f"{folder}/last.pt", "--every", str(args.every)], folder)


def torchft(args, folder):
    return start([sys.executable, os.path.join(HERE, "ddp_torchft.py"), "--replicas", str(args.nproc)], folder)


def start(command, folder):
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{HERE}:{os.environ.get('PYTHONPATH', '')}", **{MARK: str(os.getpid())})
    log = open(os.path.join(folder, "stderr.log"), "w")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=env)


class Lines:
    """Steps as they are told, with the time at which they were."""

    def __init__(self, run, folder):
        self.run, self.folder, self.at = run, folder, time.time()
        os.set_blocking(run.stdout.fileno(), False)
        self.text, self.found = b"", []

    def step(self):
        began = time.time()
        while not self.found:
            if time.time() - began > QUIET_S or self.run.poll() is not None:
                sys.exit("no step was told: " + open(os.path.join(self.folder, "stderr.log")).read()[-3000:])
            data = self.run.stdout.read()
            now = time.time()
            if not data:
                time.sleep(0.002)
                continue
            self.text += data
            *whole, self.text = self.text.split(b"\n")
            for line in whole:
                if told := STEP.match(line.decode(errors="replace")):
                    self.found.append((int(told[1]), now))
        step, now = self.found.pop(0)
        self.before, self.at = self.at, now
        return step, now


def marked():
    """Processes that this measurement started, whoever started them."""
    mark = f"{MARK}={os.getpid()}".encode()
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            if mark in open(path, "rb").read().split(b"\0"):
                yield int(path.split("/")[2])
        except OSError:
            pass


def rank_pid(rank):
    own = {f"RANK={rank}".encode(), f"REPLICA={rank}".encode()}
    for pid in marked():
        try:
            if own & set(open(f"/proc/{pid}/environ", "rb").read().split(b"\0")):
                return pid
        except OSError:
            pass
    sys.exit(f"no process of rank {rank}")


def phases(run):
    """Where the ranks' journals say that the time went: medians over all that survived, and over all that came anew."""
    records = [json.loads(line) for path in glob.glob(f"{run}/journal-*.jsonl") for line in open(path)]
    met = [r for r in records if r["kind"] == "recovered" and r.get("phases")]
    survived = [r for r in met if not r["why"].startswith("restart ")]
    for name, of in [("survivors", survived), ("the new", [r for r in met if r not in survived])]:
        names = list(dict.fromkeys(phase for r in of for phase, _ in r["phases"]))
        medians = [(n, statistics.median(dict(map(tuple, r["phases"])).get(n, 0.0) for r in of)) for n in names]
        print(f"{name}: " + ", ".join(f"{n} {s:.3f} s" for n, s in medians))


if __name__ == "__main__":
    main()
