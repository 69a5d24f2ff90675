//! Ranks as real processes: this binary starts itself, and kills, stops and counts what it started.

mod common;

use comm::{Bootstrap, ElementType, Op, OpTag, Order, StoreClient, TransportChoice, World};
use common::serve;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const TAG: OpTag = OpTag(1);

/// A child process, killed at the end whatever happens.
struct Rank(Child);

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Rank {
    fn signal(&self, signal: i32) {
        // SAFETY: the process is our child and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    /// Waits until the rank prints the line.
    fn await_line(&mut self, line: &str) {
        let out = self.0.stdout.as_mut().unwrap();
        // Not buffered beyond the line, for `finish` reads the rest.
        let mut got = Vec::new();
        while !String::from_utf8_lossy(&got).lines().any(|l| l == line) || got.last() != Some(&b'\n') {
            let mut byte = [0];
            assert_eq!(out.read(&mut byte).unwrap(), 1, "ended after {:?}", String::from_utf8_lossy(&got));
            got.push(byte[0]);
        }
    }

    /// The last line that the rank prints; it ends by itself.
    fn finish(mut self) -> String {
        let out = BufReader::new(self.0.stdout.take().unwrap());
        let lines = out.lines().map(Result::unwrap).filter(|l| !l.is_empty() && !l.starts_with("running"));
        let last = lines.last().unwrap_or_default();
        let status = self.0.wait().unwrap();
        assert!(status.success(), "{status} after {last:?}");
        last
    }
}

/// Starts `n` ranks of a scenario that is played by [`child`].
fn start(scenario: &str, n: usize, hosts: usize, timeout: Duration, store: &StoreClient) -> Vec<Rank> {
    start_with(1024, scenario, n, hosts, timeout, store)
}

/// The same with a limit on open files.
fn start_with(
    files: usize,
    scenario: &str,
    n: usize,
    hosts: usize,
    timeout: Duration,
    store: &StoreClient,
) -> Vec<Rank> {
    let start = |rank: usize| {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("ulimit -n {files}; exec \"$@\"")).arg("sh");
        command.arg(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--nocapture", "--test-threads", "1"]);
        command.env("COMM_TEST", format!("{scenario} {rank} {n} {hosts} {}", timeout.as_millis()));
        command.env("COMM_STORE", store.addr());
        Rank(command.stdout(Stdio::piped()).spawn().unwrap())
    };
    (0..n).map(start).collect()
}

/// No test of its own: what a rank does, if this process is one.
#[test]
fn child() {
    let Ok(play) = std::env::var("COMM_TEST") else { return };
    let words: Vec<&str> = play.split(' ').collect();
    let number = |i: usize| words[i].parse::<usize>().unwrap();
    let (rank, n, hosts) = (number(1), number(2), number(3));
    let store = StoreClient::connect(&std::env::var("COMM_STORE").unwrap(), common::TIMEOUT).unwrap();
    let mut b = Bootstrap::new(rank, n, store, words[0]);
    b.timeout = Duration::from_millis(number(4) as u64);
    if hosts > 1 {
        b.host = format!("host-{}/test", rank % hosts);
        b.bind = Some(std::net::Ipv4Addr::new(127, 0, 0, 1 + (rank % hosts) as u8).into());
    }
    if words[0].ends_with("tcp") {
        b.transport = TransportChoice::Tcp;
    }
    // On a line of its own: the test harness has begun one.
    let outcome = match World::connect(&b) {
        Ok(world) => play_scenario(words[0], &world).unwrap_or_else(|error| {
            let silence = world.silence().expect("processes show that they live");
            format!("{error}; silent for {} ms", silence.as_millis())
        }),
        Err(error) => error.to_string(),
    };
    println!("\n{outcome}");
    std::process::exit(0);
}

fn play_scenario(scenario: &str, world: &World) -> spec::Result<String> {
    let count = 100_000;
    let arena = world.alloc_shared(8 * count)?;
    let buffer = arena.span(0, count, ElementType::F32)?;
    let mut private = common::values(world.rank(), count);
    let all = world.all();
    if scenario.starts_with("sum") {
        all.all_reduce(TAG, &mut private, Order::Tree)?;
        world.barrier()?;
        return Ok(format!("{:016x}", hash(&private)));
    }
    world.barrier()?;
    println!("\nready");
    if scenario.starts_with("idle") && world.rank() == 1 {
        // Never comes to what the others do next.
        std::thread::park();
    }
    loop {
        // SAFETY: the span is the arena's, which nobody else uses.
        let started = unsafe { all.start(TAG, Op::AllReduce { buffer, order: Order::Tree }) }?;
        all.all_reduce(TAG, &mut private, Order::Tree)?;
        started.wait()?;
        private.fill(0.0);
    }
}

/// How long the quietest rank had been silent by the last word of another.
fn silent_ms(said: &str) -> u64 {
    let ms = said.rsplit_once("; silent for ").and_then(|(_, rest)| rest.strip_suffix(" ms")?.parse().ok());
    ms.unwrap_or_else(|| panic!("no silence in: {said}"))
}

fn hash(x: &[f32]) -> u64 {
    x.iter().fold(7, |h: u64, x| (h ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3).rotate_left(23))
}

#[test]
fn processes_sum_to_the_same_bits_on_every_transport() {
    let (_server, store) = serve();
    let want = format!("{:016x}", hash(&common::summed(&[0, 1, 2, 3], 100_000)));
    for (scenario, hosts) in [("sum-shm", 1), ("sum-tcp", 1), ("sum-hosts", 2)] {
        for rank in start(scenario, 4, hosts, common::TIMEOUT, &store) {
            assert_eq!(rank.finish(), want, "{scenario}");
        }
    }
}

/// Rank 1 is killed while all sum without end: the others must say so long before their deadline.
#[test]
fn a_killed_rank_is_named_by_all_others_at_once() {
    let (_server, store) = serve();
    for (scenario, hosts) in [("loop-shm", 1), ("loop-tcp", 1), ("loop-hosts", 2), ("idle-shm", 1)] {
        let before = shared_files();
        let mut ranks = start(scenario, 3, hosts, 4 * common::TIMEOUT, &store);
        for rank in &mut ranks {
            rank.await_line("ready");
        }
        let pid = ranks[1].0.id();
        ranks[1].signal(libc::SIGKILL);
        let began = Instant::now();
        let dead = ranks.remove(1);
        for rank in ranks {
            let said = rank.finish();
            assert!(
                said.contains(&format!("rank 1 (pid {pid}")) && said.contains("was lost"),
                "{scenario}: {said}"
            );
            assert!(silent_ms(&said) < 4 * common::TIMEOUT.as_millis() as u64, "{scenario}: {said}");
        }
        // The deadline is minutes away; how many milliseconds it really takes depends on the machine.
        assert!(began.elapsed() < common::TIMEOUT, "{scenario}");
        drop(dead);
        assert_eq!(shared_files(), before);
    }
}

#[test]
fn a_stopped_rank_is_named_at_the_deadline() {
    let (_server, store) = serve();
    // On one host, and between hosts; started together, because each takes its deadline.
    let jobs = [("loop-stopped", 1), ("loop-stopped-hosts", 2), ("loop-stopped-tcp", 1)];
    let jobs = jobs.map(|(scenario, hosts)| {
        let mut ranks = start(scenario, 3, hosts, Duration::from_secs(3), &store);
        for rank in &mut ranks {
            rank.await_line("ready");
        }
        ranks[1].signal(libc::SIGSTOP);
        ranks
    });
    for mut ranks in jobs {
        let stopped = ranks.remove(1);
        for rank in ranks {
            let said = rank.finish();
            assert!(said.contains("waited 3.0 s") && said.contains("rank 1 (pid"), "{said}");
            assert!(said.contains("has given no sign of life"), "{said}");
            // For as long as it was waited for, but for the time between two signs of life.
            assert!(silent_ms(&said) > 1500, "{said}");
        }
        // Woken up, it hears what happened, or finds the others gone.
        stopped.signal(libc::SIGCONT);
        let said = stopped.finish();
        assert!(said.contains("waited 3.0 s") || said.contains("was lost"), "{said}");
    }
}

#[test]
fn a_rank_that_dies_before_all_have_met_is_missed_by_name() {
    let (_server, store) = serve();
    let mut ranks = start("half", 3, 1, Duration::from_secs(2), &store);
    ranks[2].signal(libc::SIGKILL);
    drop(ranks.remove(2));
    for rank in ranks {
        let said = rank.finish();
        assert!(said.contains("rank 2"), "{said}");
    }
}

/// Ranks that run out of file descriptors say so at once, and so do those that wait for them.
#[test]
fn a_limit_on_open_files_is_named() {
    let (_server, store) = serve();
    let want = format!("{:016x}", hash(&common::summed(&[0, 1, 2, 3], 100_000)));
    let mut named = 0;
    for files in (10..28).step_by(3) {
        for rank in start_with(files, &format!("sum-files-{files}"), 4, 1, 4 * common::TIMEOUT, &store) {
            let said = rank.finish();
            let is_named = said.contains("may open no more files: its limit (ulimit -n) is ");
            assert!(is_named || said == want || said.contains(" was lost: "), "{files}: {said}");
            named += usize::from(is_named);
        }
    }
    assert!(named > 0, "no limit was too low");
}

/// Names in the file system that shared memory could have left.
fn shared_files() -> Vec<String> {
    let files = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    files.map(|f| f.file_name().to_string_lossy().into_owned()).filter(|f| f.contains("phalanx")).collect()
}
