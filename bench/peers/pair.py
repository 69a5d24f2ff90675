"""Time a training step of Phalanx against PyTorch, in turn, on one machine.

    python bench/peers/pair.py --threads 2 --rounds 20
    python bench/peers/pair.py --threads 1 --peers eager --ours 'target/release/phalanx bench step --resident --threads 1'

Starts all programs, lets each warm up, then asks one after the other for a step, in an order that turns round every
round. A ratio is the median over rounds of peer's seconds by ours in the same round: above 1, Phalanx is faster.
What slows the machine for a while slows both sides of a pair. Any program will do that answers every line `step` on
its input with a line of seconds.

On a CPU that is not Intel's, PyTorch's matrix products (oneMKL) leave AVX-512 out. To measure against a PyTorch that
has it too, build a library that says otherwise and hand it to the peers; say which of the two a figure comes from:

    echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' | gcc -shared -fPIC -x c -o /tmp/mkl.so -
    python bench/peers/pair.py --threads 1 --preload /tmp/mkl.so
"""

import argparse
import json
import os
import pathlib
import select
import shlex
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
# Compiling the peer takes a minute or two on a slow machine; a step never does.
STEP_TIMEOUT_S = 600


def main():
    args = parse_args()
    preload = ["env", f"LD_PRELOAD={args.preload.resolve()}"] if args.preload else []
    programs = {"ours": Program("ours", shlex.split(args.ours or OURS.format(threads=args.threads)))}
    for peer in args.peers.split(","):
        programs[peer] = Program(peer, [*preload, args.python, str(HERE / "reference_step.py"),
                                        "--threads", str(args.threads), *PEERS[peer], *(["--rotary"] if args.rotary else []), *shlex.split(args.peer_flags)])
    try:
        seconds = measure(programs, args)
    finally:
        for program in programs.values():
            program.close()
    result = summary(seconds, args)
    print(json.dumps(result) if args.json else table(result))


OURS = "target/release/phalanx bench step --resident --threads {threads}"
PEERS = {"eager": [], "compiled": ["--compile"]}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", default="eager,compiled", help="eager, compiled or both (default)")
    parser.add_argument("--rotary", action="store_true", help="give the peers rotary positions too")
    parser.add_argument("--preload", type=pathlib.Path, help="a shared library to load into the peers first")
    parser.add_argument("--peer-flags", default="", help="more flags of reference_step.py, such as '--experts 8 --hidden 512'")
    parser.add_argument("--ours", help=f"command of our side (default: {OURS})")
    parser.add_argument("--python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="steps of each that do not count")
    parser.add_argument("--pause-ms", type=int, default=30, help="rest before each step, so that idle threads sleep")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.peers.split(",")) - PEERS.keys():
        parser.error(f"unknown peer {', '.join(unknown)}; known: {', '.join(PEERS)}")
    if args.preload and not args.preload.is_file():
        parser.error(f"--preload: no file {args.preload}")
    if args.rounds < 1 or args.warmup < 0 or args.threads < 1:
        parser.error("--rounds and --threads start at 1, --warmup at 0")
    return args


class Program:
    """One resident side of the comparison."""

    def __init__(self, name, command):
        self.name, self.command = name, command
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        except OSError as e:
            sys.exit(f"cannot start {name} ({shlex.join(command)}): {e}")

    def step(self):
        try:
            self.process.stdin.write(b"step\n")
        except BrokenPipeError:
            self.fail("ended")
        if not select.select([self.process.stdout], [], [], STEP_TIMEOUT_S)[0]:
            self.fail(f"gave no answer in {STEP_TIMEOUT_S} s")
        line = self.process.stdout.readline()
        if not line:
            self.fail("ended")
        try:
            return float(line)
        except ValueError:
            self.fail(f"answered {line!r}, not seconds")

    def fail(self, how):
        sys.exit(f"{self.name} ({shlex.join(self.command)}) {how}")

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(programs, args):
    for program in programs.values():
        for _ in range(args.warmup):
            program.step()
    seconds = {name: [] for name in programs}
    order = list(programs)
    for _ in range(args.rounds):
        for name in order:
            time.sleep(args.pause_ms / 1e3)
            seconds[name].append(programs[name].step())
        order = order[1:] + order[:1] if len(order) > 2 else order[::-1]
    return seconds


def summary(seconds, args):
    result = {"threads": args.threads, "rounds": args.rounds, "preload": bool(args.preload),
              "cpu": cpu_name(), "load_average": os.getloadavg()[0]}
    for name, times in seconds.items():
        middle = statistics.median(times)
        result[name] = {"median_s": middle, "best_s": min(times), "tokens_per_s": args.tokens / middle}
        if name != "ours":
            ratios = sorted(p / o for p, o in zip(times, seconds["ours"]))
            result[name] |= {
                "paired_ratio": statistics.median(ratios),
                "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                "best_ratio": min(times) / min(seconds["ours"]),
            }
    return result


def table(result):
    preloaded = "library preloaded, " if result["preload"] else ""
    lines = [f"{result['threads']} threads, {result['rounds']} rounds, {preloaded}"
             f"load {result['load_average']:.1f}, {result['cpu']}",
             f"{'':10}{'median':>10}{'best':>10}{'tokens/s':>10}  peer / ours: paired (quartiles), best"]
    for name in ("ours", *(p for p in PEERS if p in result)):
        r = result[name]
        line = f"{name:10}{r['median_s'] * 1e3:>7.1f} ms{r['best_s'] * 1e3:>7.1f} ms{r['tokens_per_s']:>10.0f}"
        if name != "ours":
            low, high = r["ratio_quartiles"]
            line += f"  {r['paired_ratio']:.3f} ({low:.3f} to {high:.3f}), {r['best_ratio']:.3f}"
        lines.append(line)
    return "\n".join(lines)


def cpu_name():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown CPU"
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else "unknown CPU"


if __name__ == "__main__":
    main()
