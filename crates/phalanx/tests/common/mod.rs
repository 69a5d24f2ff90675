//! A folder with a small text, and the program run in it.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use serde_json::Value;

/// Keys of a model and a batch so small that a step takes about a millisecond.
const TINY: &[&str] = &[
    "model.vocab=300",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=2",
    "model.kv_heads=2",
    "model.head_dim=16",
    "model.ffn=48",
    "data.vocab_size=300",
    "batch.sequence=32",
    "batch.sequences=4",
    "train.steps=6",
    "train.eval_every=3",
    "train.eval_batches=1",
    "train.sample_tokens=4",
    "checkpoint.every=2",
    "run.threads=1",
];

/// A child's stdout holds this many bytes before it waits for a reader: some thirty lines of steps.
const PIPE_BYTES: usize = 4096;

pub(crate) struct Lab {
    dir: tempfile::TempDir,
}

/// How a run of the program ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Lab {
    pub(crate) fn new() -> Lab {
        let lab = Lab { dir: tempfile::tempdir().expect("a temporary folder") };
        // Words in an order that has no period, so that there is something to learn and no end to it.
        let words = ["mesh", "rank", "stage", "chunk", "bucket", "slot", "layout", "journal"];
        let word = |i: usize| words[(i * i / 7 + i / 3) % words.len()];
        let text: Vec<String> =
            (0..6000).map(|i| word(i).to_owned() + [" ", ".\n"][usize::from(i % 11 == 0)]).collect();
        lab.write("text.txt", text.concat());
        lab
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("write into the folder");
    }

    /// The program in this folder, with arguments that are separated by blanks.
    pub(crate) fn command(&self, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_phalanx"));
        command.current_dir(self.dir.path()).args(args.split_whitespace()).stdin(Stdio::null());
        for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"] {
            command.env_remove(name);
        }
        heed_signals(&mut command);
        command
    }

    pub(crate) fn run(&self, args: &str) -> Ran {
        let output = self.command(args).output().expect("start the program");
        Ran {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// What it printed; it must have succeeded.
    pub(crate) fn ok(&self, args: &str) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "{args}\n{}{}", ran.out, ran.err);
        ran.out
    }

    pub(crate) fn json(&self, args: &str) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap_or_else(|e| panic!("{args}: {e}"))
    }

    /// Trains the tiny model in `run`; later keys override earlier ones.
    pub(crate) fn train(&self, run: &str, args: &str) -> String {
        self.ok(&tiny(run, args))
    }

    /// Starts training with a short pipe on stdout, which keeps it from getting far ahead of its reader.
    pub(crate) fn start(&self, args: &str) -> Started {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES).expect("a short pipe");
        let child = self.command(args).stdout(Stdio::from(write)).stderr(Stdio::piped()).spawn();
        Started { child: child.expect("start the program"), out: read.into() }
    }

    pub(crate) fn newest(&self, run: &str) -> PathBuf {
        let found = ckpt::latest(&self.path(run).join("checkpoints")).expect("a directory of checkpoints");
        found.unwrap_or_else(|| panic!("no checkpoint in {run}"))
    }

    /// Every file below `path` but the manifest, which holds times: name and bytes.
    pub(crate) fn files(&self, path: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = fs::read_dir(path).expect("a directory").map(|e| e.expect("an entry").path());
        let mut files: Vec<_> = entries
            .filter(|p| p.file_name().is_some_and(|n| n != "manifest.json"))
            .map(|p| {
                let name = p.file_name().expect("a name").to_string_lossy().into_owned();
                (name, fs::read(&p).expect("a file"))
            })
            .collect();
        files.sort();
        files
    }
}

/// Arguments that train the tiny model in `run`.
pub(crate) fn tiny(run: &str, args: &str) -> String {
    format!("train {} --set run.dir={run} --text text.txt {args}", sets())
}

/// The tiny model as overrides.
pub(crate) fn sets() -> String {
    TINY.iter().map(|key| format!("--set {key} ")).collect()
}

/// Losses as they are printed, which every step line must have.
pub(crate) fn losses(out: &str) -> Vec<f64> {
    let lines = out.lines().filter(|l| l.starts_with("step "));
    lines
        .map(|line| {
            let loss = line.split("loss ").nth(1).and_then(|rest| rest.split(' ').next());
            loss.and_then(|l| l.parse().ok()).unwrap_or_else(|| panic!("no loss in: {line}"))
        })
        .collect()
}

/// A run under way.
pub(crate) struct Started {
    pub(crate) child: Child,
    out: fs::File,
}

impl Started {
    /// Reads stdout until `text` has come, and no further than that.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            let n = self.out.read(&mut byte).expect("read stdout");
            assert_eq!(n, 1, "stdout ended before '{text}': {}", String::from_utf8_lossy(&seen));
            seen.push(byte[0]);
        }
    }

    /// The process with `RANK=rank` among all that this one started, whoever stands between.
    pub(crate) fn descendant(&self, rank: usize) -> i32 {
        let parent = |pid: i32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            status.lines().find_map(|l| l.strip_prefix("PPid:")?.trim().parse::<i32>().ok())
        };
        let is_ours =
            |pid: i32| std::iter::successors(Some(pid), |p| parent(*p)).any(|p| p == self.child.id() as i32);
        let wanted = format!("RANK={rank}");
        let mut pids = fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        let found = pids.find(|pid| {
            let env = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            env.split(|b| *b == 0).any(|v| v == wanted.as_bytes()) && is_ours(*pid)
        });
        found.unwrap_or_else(|| panic!("no process below {} has {wanted}", self.child.id()))
    }

    /// The process's rank `rank`, once it runs.
    pub(crate) fn rank(&self, rank: usize) -> i32 {
        let wanted = format!("RANK={rank}");
        let mut found = None;
        for entry in fs::read_dir("/proc").expect("/proc").flatten() {
            let parent = format!("\nPPid:\t{}\n", self.child.id());
            let is_child = fs::read_to_string(entry.path().join("status")).is_ok_and(|s| s.contains(&parent));
            let env = fs::read(entry.path().join("environ")).unwrap_or_default();
            if is_child && env.split(|b| *b == 0).any(|v| v == wanted.as_bytes()) {
                found = entry.file_name().to_str().and_then(|pid| pid.parse().ok());
            }
        }
        found.unwrap_or_else(|| panic!("no process of {} has {wanted}", self.child.id()))
    }

    /// Sends `signal` to `pid`.
    pub(crate) fn signal(pid: i32, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
        rustix::process::kill_process(pid, signal).expect("send a signal");
    }

    /// Closes its stdout, and how it ended.
    pub(crate) fn close(mut self) -> ExitStatus {
        drop(self.out);
        let mut err = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("read stderr");
        self.child.wait().expect("wait for the program")
    }

    /// Reads the rest, and how it ended.
    pub(crate) fn end(mut self) -> (ExitStatus, String) {
        let mut rest = Vec::new();
        self.out.read_to_end(&mut rest).expect("read stdout");
        let mut err = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut err).expect("read stderr");
        (self.child.wait().expect("wait for the program"), err)
    }
}

/// Tests that are started in the background (`tests &`) are handed signals that are ignored, and would hand them on.
fn heed_signals(command: &mut Command) {
    let heed = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1] {
            // SAFETY: a call that only sets a signal's default action may be made between fork and exec.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: `heed` allocates nothing and takes no lock.
    unsafe { command.pre_exec(heed) };
}
