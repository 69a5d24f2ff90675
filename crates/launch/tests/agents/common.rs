//! Launchers as processes of their own, so that they can be killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Far above what anything here takes; reached only when a test fails.
pub(crate) const DEADLINE: Duration = Duration::from_secs(40);

/// The arguments of `phalanx launch`, one a line, for the copy of the test binary that plays the launcher.
const ARGS: &str = "LAUNCH_TEST_ARGS";

/// Call it from a test named `as_launcher`: does nothing unless this process was started by [`launcher`].
pub(crate) fn play_launcher() {
    if let Ok(args) = std::env::var(ARGS) {
        let args: Vec<std::ffi::OsString> = args.split('\u{1}').map(Into::into).collect();
        // The test harness has begun a line.
        println!();
        std::process::exit(match args.split_first() {
            Some((first, rest)) if first == SAVING => run_saving(rest),
            _ => launch::cli(args),
        });
    }
}

/// In place of the arguments of `phalanx launch`: four ranks of a program that saves before it ends by request.
pub(crate) const SAVING: &str = "--saving";

/// 130 if all have saved, else 1.
fn run_saving(command: &[std::ffi::OsString]) -> i32 {
    let mut job = launch::LocalJob::new(4, command.iter().cloned());
    job.saving = Some(launch::Saving { signal: libc::SIGTERM, timeout: DEADLINE });
    let outcome = job.run().unwrap();
    let saved = outcome.signal.is_some() && outcome.failures.iter().all(|f| f.code == Some(130));
    eprintln!("{outcome:?}");
    if saved { 130 } else { 1 }
}

/// The command of a launcher with `args`; `PATH` is all that it inherits.
pub(crate) fn launcher(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "as_launcher", "--nocapture", "--test-threads=1"]);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env(ARGS, args.join("\u{1}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running launcher.
pub(crate) struct Running {
    child: Option<Child>,
}

impl Running {
    pub(crate) fn start(args: &[&str]) -> Running {
        Running { child: Some(launcher(args).spawn().unwrap()) }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub(crate) fn signal(&self, signal: i32) {
        kill(self.pid(), signal);
    }

    /// Its end, within the deadline.
    pub(crate) fn end(mut self) -> Ended {
        let child = self.child.take().unwrap();
        let watchdog = Watchdog::start(child.id());
        let status = child.wait_with_output().unwrap();
        drop(watchdog);
        Ended::new(status)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Kills a launcher that hangs, so that the test fails instead of hanging.
struct Watchdog {
    done: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start(pid: u32) -> Watchdog {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            if wait.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("launcher {pid} hangs: killing it");
                kill(i32::try_from(pid).unwrap(), libc::SIGKILL);
            }
        });
        Watchdog { done }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.done.send(());
    }
}

/// What a launcher left.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn new(output: Output) -> Ended {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
    }

    /// Asserts the exit code and that stderr holds `parts`.
    #[track_caller]
    pub(crate) fn check(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        for part in parts {
            assert!(self.stderr.contains(part), "{part} is not in {self:#?}");
        }
    }
}

/// Runs a launcher to its end.
pub(crate) fn run(args: &[&str]) -> Ended {
    Running::start(args).end()
}

/// The same with a stderr that nobody reads any more.
pub(crate) fn run_without_reader(args: &[&str]) -> Ended {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = launcher(args).stderr(writer).spawn().unwrap();
    Running { child: Some(child) }.end()
}

/// The same with a limit on open files.
pub(crate) fn run_with_files(files: usize, args: &[&str]) -> Ended {
    let plain = launcher(args);
    let mut command = Command::new("sh");
    command.arg("-c").arg(format!("ulimit -n {files}; exec \"$@\"")).arg("sh");
    command.arg(plain.get_program()).args(plain.get_args()).env_clear();
    command.envs(plain.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running { child: Some(command.spawn().unwrap()) }.end()
}

pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: a plain system call on a process that the test started.
    unsafe { libc::kill(pid, signal) };
}

/// Waits until `look` gives something.
#[track_caller]
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A folder for the files that workers write.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn text(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// The content of `name`, once a worker has written a whole line.
    #[track_caller]
    pub(crate) fn wait(&self, name: &str) -> String {
        until(name, || self.read(name).filter(|t| t.ends_with('\n'))).trim().to_owned()
    }

    pub(crate) fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path().join(name)).ok()
    }

    /// The process id that a worker wrote into `name`.
    #[track_caller]
    pub(crate) fn pid(&self, name: &str) -> i32 {
        self.wait(name).parse().unwrap()
    }

    /// All paths below the folder.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for path in std::fs::read_dir(folder).unwrap().flatten().map(|e| e.path()) {
                if path.is_dir() { folders.push(path) } else { found.push(path) }
            }
        }
        found.sort();
        found
    }
}

/// Whether the process is there and not a zombie.
pub(crate) fn is_alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Waits until none of `pids` is left.
#[track_caller]
pub(crate) fn until_gone(pids: &[i32]) {
    until("processes gone", || pids.iter().all(|p| !is_alive(*p)).then_some(()));
}
