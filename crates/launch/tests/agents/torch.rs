//! With PyTorch on the machine: its scripts under our launcher, and our ranks under its launcher. The Python to use is
//! `PHALANX_TORCH_PYTHON`, else `python3`; without PyTorch these tests say so and pass.

use crate::common::{Folder, Running};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// A Python that can import PyTorch.
fn python() -> Option<&'static String> {
    static PYTHON: OnceLock<Option<String>> = OnceLock::new();
    let find = || {
        let python = std::env::var("PHALANX_TORCH_PYTHON").unwrap_or_else(|_| "python3".into());
        let look = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)";
        let found = Command::new(&python).args(["-c", look]).stderr(Stdio::null()).status();
        found.is_ok_and(|s| s.success()).then_some(python)
    };
    let python = PYTHON.get_or_init(find).as_ref();
    if python.is_none() {
        eprintln!("skipped: no PyTorch; PHALANX_TORCH_PYTHON names a Python that has it");
    }
    python
}

/// Plain data-parallel training over gloo, as any tutorial has it; knows nothing of Phalanx.
const SCRIPT: &str = r#"
import os, sys
import torch, torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

@record
def main():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    losses = []
    for step in range(20):
        x = torch.randn(16, 4)
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(sys.argv) > 2 and rank == 1 and step == 3:
            raise ValueError("no more")
    weights = [torch.empty(1, 4) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, model.module.weight.detach())
    assert all(torch.equal(w, weights[0]) for w in weights)
    assert losses[-1] < losses[0] / 10, losses
    open(os.path.join(sys.argv[1], f"ok{rank}"), "w").write(f"{dist.get_world_size()}\n")
    dist.destroy_process_group()
    # PyTorch 2.15 now and then aborts in the interpreter's exit after this, under torchrun too.
    os._exit(0)

main()
"#;

fn script(folder: &Folder) -> String {
    let path = folder.path().join("train.py");
    std::fs::write(&path, SCRIPT).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn an_unmodified_script_trains_on_one_node() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let (script, out) = (script(&folder), folder.text());
    let args = ["--nproc-per-node", "2", "--no-python", python, "-u", &script, out];
    Running::start(&args).end().check(0, &[]);
    assert_eq!((folder.wait("ok0"), folder.wait("ok1")), ("2".into(), "2".into()));
}

#[test]
fn an_unmodified_script_trains_on_two_nodes() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let (script, out) = (script(&folder), folder.text());
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let node = |rank| {
        let fixed = ["--nnodes=2", "--node-rank", rank, "--master-addr=127.0.0.1", "--master-port", &port];
        Running::start(&[&fixed[..], &["--no-python", python, "-u", &script, out]].concat())
    };
    for node in [node("0"), node("1")] {
        node.end().check(0, &[]);
    }
    assert_eq!((folder.wait("ok0"), folder.wait("ok1")), ("2".into(), "2".into()));
}

#[test]
fn a_recorded_exception_is_the_root_cause() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let (script, out) = (script(&folder), folder.text());
    let ended = Running::start(&["--nproc-per-node", "2", "--no-python", python, &script, out, "fail"]).end();
    ended.check(1, &["ValueError: no more"]);
    let root = ended.stderr.split("Root Cause").nth(1).unwrap();
    assert!(root.contains("rank      : 1") && root.contains("ValueError: no more"), "{root}");
}

#[test]
fn torchrun_starts_our_ranks() {
    let Some(python) = python() else { return };
    let folder = Folder::new();
    let rank = crate::ranks::rank();
    let mut torchrun = Command::new(python);
    torchrun.args(["-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]).args(&rank);
    let mut torchrun = torchrun
        .env(crate::ranks::FOLDER, folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = torchrun.wait().unwrap();
    assert!(status.success());
    assert_eq!(folder.wait("rank0"), "Torchrun 0/2 local 0/2 node 0 restart 0");
    assert_eq!(folder.wait("rank1"), "Torchrun 1/2 local 1/2 node 0 restart 0");
}
