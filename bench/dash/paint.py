"""What `phalanx dash` takes on a long journal: first paint, time until all was read, a record to the screen, memory.

    cargo run --release -p phalanx-dash --example long_journal -- /tmp/long 1000000
    python bench/dash/paint.py target/release/phalanx /tmp/long

Drives a headless Chromium over its debugging pipe; needs nothing but Python's library.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

BROWSER = "/usr/lib/chromium/chromium-headless-shell"
READY = "document.documentElement.dataset.ready === 'yes' && charts.get('loss').scale !== undefined"


class Browser:
    def __init__(self):
        to_r, self.to = os.pipe()
        self.out, from_w = os.pipe()

        def wire():
            a, b = os.dup(to_r), os.dup(from_w)
            os.dup2(a, 3)
            os.dup2(b, 4)

        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--user-data-dir=" + tempfile.mkdtemp(), "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen([BROWSER, *flags], preexec_fn=wire, close_fds=False, stderr=subprocess.DEVNULL)
        self.number, self.held, self.session = 0, b"", None
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self.session = attached["sessionId"]

    def call(self, method, params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                self.held += os.read(self.out, 1 << 16)
            one, self.held = self.held.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.number:
                return answer["result"]

    def value(self, expression):
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", params)["result"].get("value")

    def until(self, expression):
        while self.value(expression) is not True:
            time.sleep(0.005)


def memory_mib(pid):
    lines = open(f"/proc/{pid}/status").read().splitlines()
    of = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith("Vm")}
    return of["VmRSS"], of["VmHWM"]


def main():
    program, run = sys.argv[1:]
    browser = Browser()
    began = time.monotonic()
    dash = subprocess.Popen([program, "dash", run], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    url = dash.stdout.readline().strip()
    browser.call("Page.navigate", {"url": url})
    browser.until(f"typeof charts !== 'undefined' && {READY}")
    print(f"first paint {time.monotonic() - began:.2f} s after the start of phalanx dash")
    browser.until("runs[0].facts.preview === false")
    print(f"whole journal read after {time.monotonic() - began:.2f} s")
    path = os.path.join(run, "journal-00000.jsonl")
    with open(path, "rb") as file:
        file.seek(-2000, os.SEEK_END)
        record = json.loads(file.read().splitlines()[-1])
    # The page notes when it has drawn a step.
    browser.value(
        "globalThis.drawn = {}; { const draw = charts.get('loss').draw; charts.get('loss').draw = function () {"
        " draw.call(this); drawn[runs[0].columns.step.at(-1)] ??= Date.now(); } }"
    )
    delays = []
    for _ in range(50):
        record["step"] += 1
        wrote = time.time()
        with open(path, "a") as file:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
        browser.until(f"drawn[{record['step']}] !== undefined")
        delays.append(1e3 * (browser.value(f"drawn[{record['step']}]") / 1e3 - wrote))
    delays.sort()
    print(f"record to screen {statistics.median(delays):.0f} ms median, {delays[-3]:.0f} ms of 19 in 20, {delays[-1]:.0f} ms at most")
    now, most = memory_mib(dash.pid)
    print(f"memory of phalanx dash {now:.0f} MiB, at most {most:.0f} MiB")
    dash.kill()
    browser.process.kill()


main()
