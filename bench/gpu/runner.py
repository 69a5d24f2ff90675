"""Commands with time limits, and results that are written down as they come."""

import concurrent.futures
import json
import os
import pathlib
import shlex
import signal
import subprocess
import threading
import time

OK, MISSED, FAILED, SKIPPED, CUT = "ok", "missed", "FAILED", "skipped", "cut short"


class Results:
    """What happened, line by line on the terminal, as JSON on disk after every line, and as a table at the end."""

    def __init__(self, folder):
        self.folder = folder
        self.rows, self.facts = [], {}
        self.start = time.monotonic()
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / "accept.log", "w")

    def add(self, stage, item, state, seconds=0.0, note="", **data):
        row = {"stage": stage, "item": item, "state": state, "seconds": round(seconds, 2), "note": note, **data}
        with self.lock:
            self.rows.append(row)
            print(f"{time.monotonic() - self.start:6.1f} s  {line(row)}", flush=True)
            self.save()

    def save(self):
        text = json.dumps({"facts": self.facts, "results": self.rows}, indent=1)
        (self.folder / "accept.json").write_text(text)

    def write_log(self, title, text):
        with self.lock:
            self.log.write(f"=== {title}\n{text.rstrip()}\n")
            self.log.flush()


def line(row):
    return f"{row['stage']:<12}{row['item']:<37.36}{row['state']:<10}{row['seconds']:>7.1f} s  {row['note']}".rstrip()


class Done:
    """How a command ended; `timed_out` if it was ended."""

    def __init__(self, status, out, err, seconds, timed_out):
        self.status, self.out, self.err, self.seconds, self.timed_out = status, out, err, seconds, timed_out

    @property
    def state(self):
        return CUT if self.timed_out else OK if self.status == 0 else FAILED

    def why(self):
        """The line that tells most about a failure."""
        if self.timed_out:
            return f"over its limit, ended after {self.seconds:.0f} s" if self.seconds else self.err
        lines = [x.strip() for x in (self.err + "\n" + self.out).splitlines() if x.strip()]
        telling = [x for x in lines if x.startswith(("error", "FAILED", "panicked")) or "Error" in x or "panicked" in x]
        return f"status {self.status}: {(telling or lines or ['no output'])[0 if telling else -1]}"[:160]


class Runner:
    def __init__(self, results, minutes):
        self.results = results
        self.end = results.start + 60 * minutes

    def left(self):
        return self.end - time.monotonic()

    def run(self, command, limit, env=None, cwd=None):
        """Runs a command in a session of its own, which ends with it or with its limit."""
        command = [str(x) for x in command]
        limit, start = min(limit, self.left()), time.monotonic()
        if limit <= 0:
            return Done(-1, "", "no time was left", 0.0, True)
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True)
        except OSError as e:
            return Done(-1, "", f"error: {command[0]}: {e.strerror}", 0.0, False)
        timed_out = False
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            end(process)
            try:
                out, err = process.communicate(timeout=10)
            except subprocess.TimeoutExpired:  # a process that the kernel does not let go of
                out, err = b"", b""
        seconds = time.monotonic() - start
        done = Done(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"), seconds, timed_out)
        self.results.write_log(f"{shlex.join(command)}  status {done.status}, {seconds:.1f} s", tail(done.out) + tail(done.err))
        return done

    def all(self, jobs, at_once):
        """Calls the functions, some at once; one that throws is a failure of its own."""
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(job) for job in jobs]:
                try:
                    future.result()
                except Exception as e:  # the other jobs and stages go on
                    self.results.add("accept", "a job broke", FAILED, note=f"{type(e).__name__}: {e}"[:200])


def end(process):
    """Ends a process and what it started in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def tail(text, most=12_000):
    return text if len(text) <= most else f"...\n{text[-most:]}"


def json_lines(text):
    """The lines that are JSON objects; programs may talk in between."""
    found = []
    for x in text.splitlines():
        if x.startswith("{"):
            try:
                found.append(json.loads(x))
            except ValueError:
                pass
    return found


def programs(folder, kind):
    """Executables in a subfolder; none if there is no such folder."""
    place = pathlib.Path(folder) / kind if folder else None
    if place is None or not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.is_file() and os.access(p, os.X_OK))
