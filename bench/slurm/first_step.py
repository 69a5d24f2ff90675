"""From srun to the first step, under a Slurm of its own on this machine: ours and torchrun's ranks take turns.

    python bench/slurm/first_step.py target/release/phalanx --torchrun torchrun --ranks 12 --rounds 5

Two nodes of this machine, as many ranks on each. Ours trains a tiny model on prepared data; torchrun's ranks join over gloo and
do one DistributedDataParallel step of a linear layer. Needs root, and Debian's slurmctld, slurmd, slurm-client and munge.
"""

import argparse
import os
import pathlib
import secrets
import socket
import statistics
import subprocess
import tempfile
import time

PEER = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 32))
optim = torch.optim.AdamW(model.parameters())
model(torch.ones(4, 32)).sum().backward()
optim.step()
if dist.get_rank() == 0:
    print("step 1/", flush=True)
dist.destroy_process_group()
"""

CONF = """ClusterName=bench
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munge, a controller and two nodes, for as long as the program runs."""

    def __init__(self, folder, cpus):
        self.dir, self.daemons = folder, []
        held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
        ports = [s.getsockname()[1] for s in held]
        for s in held:
            s.close()
        self.port = ports[3]
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(CONF.format(dir=folder, ports=ports, cpus=cpus))
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        os.chmod(folder / "munge.key", 0o400)
        munge = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.start("munged", "--foreground", "--force", *(f"--{k}={folder}/munge.{v}" for k, v in munge.items()))
        self.wait(lambda: (folder / "munge.sock").exists())
        self.start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for n in (1, 2):
            self.start("slurmd", "-D", "-N", f"n{n}", "-f", str(folder / "slurm.conf"))
        self.wait(lambda: self.say("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def env(self):
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRUN", "PMI", "MASTER_"))}
        return own | {"SLURM_CONF": str(self.dir / "slurm.conf"), "PHALANX_SECRET": secrets.token_hex(32)}

    def start(self, *command):
        log = open(self.dir / f"{command[0]}.out", "ab")
        path = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"
        program = next(p for d in path.split(":") if os.access(p := os.path.join(d, command[0]), os.X_OK))
        self.daemons.append(subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def say(self, *command):
        return subprocess.run(command, env=self.env(), capture_output=True, text=True).stdout

    def wait(self, look):
        end = time.monotonic() + 120
        while not look():
            if time.monotonic() > end:
                raise SystemExit(f"Slurm did not start: see {self.dir}")
            time.sleep(0.05)

    def first_step_s(self, *command, env=None):
        """Seconds from the start of srun to the line of the first step, and to the end of all."""
        began, first = time.monotonic(), None
        env = self.env() | (env or {})
        child = subprocess.Popen(command, cwd=self.dir, env=env, text=True, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = []
        for line in child.stdout:
            said.append(line)
            if "step 1/" in line and first is None:
                first = time.monotonic() - began
        if child.wait() or first is None:
            raise SystemExit("".join(said))
        return first, time.monotonic() - began

    def end(self):
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("phalanx")
    parser.add_argument("--torchrun")
    parser.add_argument("--ranks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    node, program = args.ranks // 2, str(pathlib.Path(args.phalanx).resolve())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        os.chmod(folder, 0o755)
        (folder / "text.txt").write_text("".join(f"mesh {i * i // 7} rank {i // 3}.\n" for i in range(6000)))
        (folder / "peer.py").write_text(PEER)
        keys = ["model.preset=tiny", "data.vocab_size=300", "model.vocab=300", "layout.reduce=ring", "layout.micro_batch=1", "batch.sequence=32", f"batch.sequences={args.ranks}",
                "train.steps=2", "train.eval_every=0", "train.sample_tokens=0", "checkpoint.every=0", "run.threads=1",
                "data.cache_dir=cache"]
        train = [program, "train", "--text", "text.txt", *(a for k in keys for a in ("--set", k))]
        subprocess.run([*train, "--set", "run.dir=alone"], cwd=folder, check=True, capture_output=True)
        cluster = Cluster(folder, node)
        try:
            srun = ["srun", "-N", "2", "--ntasks-per-node"]
            peer = [*srun, "1", "--cpus-per-task", str(node), args.torchrun, "--nnodes", "2", "--nproc-per-node", str(node),
                    "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{cluster.port}", "peer.py"]
            times = {"phalanx": [], "torchrun": []}
            for i in range(args.rounds):
                times["phalanx"].append(cluster.first_step_s(*srun, str(node), *train, "--set", f"run.dir=run-{i}"))
                if args.torchrun:
                    times["torchrun"].append(cluster.first_step_s(*peer, env={"OMP_NUM_THREADS": "1"}))
            for who, all_of in times.items():
                for what, each in zip(("first step", "end"), zip(*all_of)):
                    print(f"{who}: {what} after {statistics.median(each):.2f} s ({min(each):.2f} to {max(each):.2f})")
        finally:
            cluster.end()


if __name__ == "__main__":
    main()
