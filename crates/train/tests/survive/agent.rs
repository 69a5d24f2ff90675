//! A small agent: starts ranks as processes of this binary, and brings them together again as a test wants it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use comm::StoreServer;
use elastic::{Orders, Report};

/// Longer than any wait for a report if the test goes well.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the agent hears: which process it is, and what it says; `None` when it hangs up.
type Heard = (usize, Option<Report>);

/// A job under way.
pub(crate) struct Job<'a> {
    dir: &'a Path,
    keys: &'a [String],
    server: StoreServer,
    heard: Receiver<Heard>,
    tell: Sender<Heard>,
    /// By number, for as long as they live.
    processes: BTreeMap<usize, Process>,
    /// The process that is each rank of this round.
    pub(crate) ranks: Vec<usize>,
    round: u64,
    started: usize,
    /// The last step that ranks may do before they are allowed more.
    limit: u64,
}

struct Process {
    child: Child,
    socket: UnixStream,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl<'a> Job<'a> {
    /// Starts `n` ranks, which may do so many steps at first.
    pub(crate) fn start(dir: &'a Path, keys: &'a [String], n: usize, limit: u64) -> Job<'a> {
        let server = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a store");
        let (tell, heard) = channel();
        let processes = BTreeMap::new();
        let (ranks, round, started) = (Vec::new(), 0, 0);
        let mut job = Job { dir, keys, server, heard, tell, processes, ranks, round, started, limit };
        job.gather(&[], n, "the job begins");
        job
    }

    /// Begins another round with the processes `who` and `new` ones after them.
    pub(crate) fn gather(&mut self, who: &[usize], new: usize, why: &str) {
        let round = if self.started == 0 { 0 } else { self.round + 1 };
        self.round = round;
        let world = who.len() + new;
        self.ranks = who.to_vec();
        self.ranks.extend(self.started..self.started + new);
        self.started += new;
        for (rank, id) in self.ranks.clone().into_iter().enumerate() {
            let orders = Orders {
                round,
                rank,
                world,
                local_rank: rank,
                local_world: world,
                store: self.server.addr().to_string(),
                session: format!("test/{round}"),
                why: why.to_owned(),
            };
            match self.processes.get_mut(&id) {
                // One that dies at this moment is missed later.
                Some(process) => _ = process.socket.write_all(orders.line().as_bytes()),
                None => self.spawn(id, &orders),
            }
        }
    }

    /// Lets all that live, and those to come, do more steps.
    pub(crate) fn allow(&mut self, limit: u64) {
        self.limit = limit;
        for process in self.processes.values_mut() {
            if let Some(stdin) = &mut process.child.stdin {
                // One that has ended needs no leave.
                let _ = writeln!(stdin, "{limit}");
            }
        }
    }

    fn spawn(&mut self, id: usize, orders: &Orders) {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let fd = theirs.as_raw_fd();
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", "a_rank", "--nocapture", "--test-threads", "1"]);
        command.env("SURVIVE_ORDERS", orders.line()).env("PHALANX_AGENT_FD", fd.to_string());
        command.env("SURVIVE_KEYS", self.keys.join("\n")).current_dir(self.dir);
        let log = std::fs::File::create(self.dir.join(format!("rank-{id}.log"))).expect("a log");
        command.env("SURVIVE_LIMIT", self.limit.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log);
        // SAFETY: only makes the socket survive the start of the program, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().expect("a rank");
        let (tell, lines) = (self.tell.clone(), BufReader::new(ours.try_clone().expect("a socket")).lines());
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let report = Report::read(&line).expect("a report");
                if tell.send((id, Some(report))).is_err() {
                    return;
                }
            }
            let _ = tell.send((id, None));
        });
        self.processes.insert(id, Process { child, socket: ours });
    }

    /// Waits until rank `rank` says that `step` is done; false if it has ended before.
    pub(crate) fn await_step(&mut self, rank: usize, step: u64) -> bool {
        let id = self.ranks[rank];
        self.until(|who, report| {
            let is_done = |r: &Report| matches!(r, Report::Step { step: s } if *s >= step);
            who == id && report.as_ref().is_none_or(is_done)
        })
        .is_some()
    }

    fn until(&mut self, wanted: impl Fn(usize, &Option<Report>) -> bool) -> Option<Report> {
        loop {
            let (who, report) = self.heard.recv_timeout(PATIENCE).expect("a rank says something");
            if wanted(who, &report) {
                return report;
            }
        }
    }

    /// Kills a rank, and gives the processes that are left in the order of their ranks.
    pub(crate) fn kill(&mut self, rank: usize) -> Vec<usize> {
        let id = self.ranks[rank];
        drop(self.processes.remove(&id));
        self.ranks.iter().copied().filter(|other| *other != id).collect()
    }

    /// Stops a rank for good without killing it: only its silence tells.
    pub(crate) fn stop(&self, rank: usize) {
        let process = &self.processes[&self.ranks[rank]];
        // SAFETY: the process is a child that was not waited for.
        assert_eq!(unsafe { libc::kill(process.child.id() as i32, libc::SIGSTOP) }, 0);
    }

    /// Waits until all ranks that train are done, lets spares go, and looks how each ended.
    pub(crate) fn finish(mut self, training: usize) {
        let ranks = std::mem::take(&mut self.ranks);
        let (training, spares) = ranks.split_at(training);
        for &id in training {
            self.end_of(id);
        }
        for &id in spares {
            self.processes[&id].socket.shutdown(std::net::Shutdown::Both).expect("shut");
            self.end_of(id);
        }
    }

    fn end_of(&mut self, id: usize) {
        let mut process = self.processes.remove(&id).expect("it lives");
        let status = process.child.wait().expect("waited for");
        let log = std::fs::read_to_string(self.dir.join(format!("rank-{id}.log"))).unwrap_or_default();
        assert!(status.success(), "process {id}: {status}\n{log}");
    }
}
