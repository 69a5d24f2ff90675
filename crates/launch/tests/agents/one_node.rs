//! One node: the contract, supervision, logs, and no process left behind.

use crate::common::{Folder, Running, SAVING, is_alive, kill, run, run_without_reader, until, until_gone};
use launch::{LocalJob, Streams};

/// A shell worker that writes its pid into `$D/pid$RANK`, then does `then`.
fn worker(folder: &Folder, then: &str) -> String {
    format!("D={}; echo $$ > $D/pid$RANK; {then}", folder.text())
}

#[test]
fn workers_see_torchruns_environment() {
    let folder = Folder::new();
    let script = worker(&folder, "env > $D/env$RANK");
    run(&["--nproc-per-node", "2", "--rdzv-id=job", "sh", "-c", &script]).check(0, &["OMP_NUM_THREADS=1"]);
    let env = folder.read("env1").unwrap();
    let expected = [
        "RANK=1",
        "LOCAL_RANK=1",
        "WORLD_SIZE=2",
        "LOCAL_WORLD_SIZE=2",
        "GROUP_RANK=0",
        "GROUP_WORLD_SIZE=1",
        "ROLE_RANK=1",
        "ROLE_NAME=default",
        "ROLE_WORLD_SIZE=2",
        "MASTER_ADDR=127.0.0.1",
        "TORCHELASTIC_RESTART_COUNT=0",
        "TORCHELASTIC_MAX_RESTARTS=0",
        "TORCHELASTIC_RUN_ID=job",
        "TORCHELASTIC_USE_AGENT_STORE=False",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING=1",
        "OMP_NUM_THREADS=1",
    ];
    for line in expected {
        assert!(env.lines().any(|l| l == line), "{line} is not in\n{env}");
    }
    let port =
        |text: String| text.lines().find_map(|l| l.strip_prefix("MASTER_PORT=").map(str::to_owned)).unwrap();
    assert_eq!(port(env), port(folder.read("env0").unwrap()));
}

#[test]
fn a_launcher_with_nobody_to_tell_looks_after_its_workers() {
    let folder = Folder::new();
    let script = worker(&folder, "echo x >> $D/starts; [ $(wc -l < $D/starts) = 2 ] && exit 0; exit 7");
    // It has something to say before workers start, at the restart, and in the end.
    let args = ["--nproc-per-node", "1", "--max-restarts", "1", "sh", "-c", &script];
    let check = |args: &[&str], code: i32| assert_eq!(run_without_reader(args).code, Some(code), "{args:?}");
    check(&args, 0);
    assert_eq!(folder.read("starts").unwrap(), "x\nx\n");
    check(&["--nproc-per-node", "2", "sh", "-c", "exit 7"], 1);
    check(&["--nproc-per-node", "no"], 2);
}

#[test]
fn a_failed_worker_ends_the_others_and_is_the_root_cause() {
    let folder = Folder::new();
    let script = worker(
        &folder,
        "if [ $RANK = 1 ]; then while ! [ -s $D/pid0 -a -s $D/pid2 ]; do sleep 0.01; done; exit 7; fi; exec sleep 1000",
    );
    let ended = run(&["--nproc-per-node", "3", "sh", "-c", &script]);
    ended.check(
        1,
        &[
            "sh FAILED",
            "Root Cause (first observed failure):",
            "rank      : 1 (local_rank: 1)",
            "exitcode  : 7",
        ],
    );
    until_gone(&[folder.pid("pid0"), folder.pid("pid2")]);
}

#[test]
fn a_killed_worker_is_named_with_its_signal() {
    let folder = Folder::new();
    let script = worker(&folder, "exec sleep 1000");
    let running = Running::start(&["--nproc-per-node", "2", "sh", "-c", &script]);
    let pids = [folder.pid("pid0"), folder.pid("pid1")];
    kill(pids[1], libc::SIGKILL);
    running.end().check(1, &["exitcode  : -9", "(SIGKILL)", "Signal 9 (SIGKILL) received by PID"]);
    until_gone(&pids);
}

#[test]
fn a_stopped_worker_is_told_of_and_does_not_outlive_the_job() {
    let folder = Folder::new();
    let script = worker(&folder, "if [ $RANK = 0 ]; then read x < $D/fifo; exit 3; fi; exec sleep 1000");
    let fifo = std::ffi::CString::new(format!("{}/fifo", folder.text())).unwrap();
    // SAFETY: a valid path.
    assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
    let running = Running::start(&["--nproc-per-node", "2", "sh", "-c", &script]);
    let pids = [folder.pid("pid0"), folder.pid("pid1")];
    kill(pids[1], libc::SIGSTOP);
    until("stopped", || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pids[1])).ok()?;
        stat.contains(") T ").then_some(())
    });
    std::fs::write(folder.path().join("fifo"), "go\n").unwrap();
    running.end().check(1, &["exitcode  : 3", &format!("rank 1 (pid {}) is stopped", pids[1])]);
    until_gone(&pids);
}

#[test]
fn a_worker_that_ignores_sigterm_is_killed_after_the_shutdown_time() {
    let folder = Folder::new();
    let script = worker(&folder, "trap '' TERM; echo > $D/ready$RANK; while :; do sleep 1000; done");
    let fail = format!(
        "if [ $RANK = 0 ]; then while ! [ -s {0}/ready1 ]; do sleep 0.01; done; exit 1; fi; {script}",
        folder.text()
    );
    let ended = run(&["--nproc-per-node", "2", "--shutdown-timeout", "0.3", "sh", "-c", &fail]);
    ended.check(1, &["killing rank 1: SIGTERM did not end it"]);
    until_gone(&[folder.pid("pid1")]);
}

#[test]
fn signals_reach_the_workers_and_give_the_exit_status() {
    let check = |signal: i32, name: &str| {
        let folder = Folder::new();
        let script = worker(
            &folder,
            "trap 'echo got > $D/got$RANK; exit 0' TERM INT; echo > $D/up$RANK; while :; do sleep 0.02; done",
        );
        let running = Running::start(&["--nproc-per-node", "2", "sh", "-c", &script]);
        (0..2).for_each(|rank| {
            drop(until("up", || folder.read(&format!("up{rank}")).filter(|t| !t.is_empty())))
        });
        running.signal(signal);
        running.end().check(128 + signal, &[&format!("{name}: stopping the workers")]);
        assert_eq!((folder.wait("got0"), folder.wait("got1")), ("got".into(), "got".into()));
    };
    check(libc::SIGTERM, "SIGTERM");
    check(libc::SIGINT, "SIGINT");
}

#[test]
fn a_warning_signal_is_passed_on_without_stopping_the_job() {
    let folder = Folder::new();
    let script = worker(
        &folder,
        "trap 'echo saved > $D/saved$RANK; exit 0' USR1; echo > $D/up$RANK; while :; do sleep 0.02; done",
    );
    let running = Running::start(&["--nproc-per-node", "2", "sh", "-c", &script]);
    (0..2).for_each(|rank| drop(until("up", || folder.read(&format!("up{rank}")).filter(|t| !t.is_empty()))));
    running.signal(libc::SIGUSR1);
    running.end().check(0, &[]);
    assert_eq!(folder.wait("saved1"), "saved");
}

/// Ranks that save once they are told to stop, which a second SIGINT ends without; the launcher is told by `signal`,
/// twice, and so is every rank if `directly`.
fn check_saving(signal: i32, directly: bool) {
    let folder = Folder::new();
    let script = worker(
        &folder,
        "trap 'stop=1' TERM HUP QUIT USR1; trap '[ -n \"$stop\" ] && exit 99; stop=1' INT; echo > $D/up$RANK; \
         while [ -z \"$stop\" ]; do sleep 0.02; done; while ! [ -s $D/told ]; do sleep 0.01; done; \
         echo saved > $D/saved$RANK; exit 130",
    );
    let running = Running::start(&[SAVING, "sh", "-c", &script]);
    (0..4).for_each(|rank| drop(until("up", || folder.read(&format!("up{rank}")).filter(|t| !t.is_empty()))));
    if directly {
        (0..4).for_each(|rank| kill(folder.pid(&format!("pid{rank}")), signal));
    }
    running.signal(signal);
    // A closing terminal and schedulers send their signal more than once.
    if signal != libc::SIGINT {
        running.signal(signal);
    }
    std::fs::write(folder.path().join("told"), "now\n").unwrap();
    running.end().check(130, &[]);
    (0..4).for_each(|rank| assert_eq!(folder.wait(&format!("saved{rank}")), "saved", "signal {signal}"));
}

#[test]
fn whatever_stops_the_job_lets_its_ranks_save() {
    for signal in [libc::SIGHUP, libc::SIGQUIT, libc::SIGTERM, libc::SIGINT, libc::SIGUSR1] {
        check_saving(signal, false);
        check_saving(signal, true);
    }
}

#[test]
fn workers_that_end_by_request_are_not_started_over() {
    let folder = Folder::new();
    let script = worker(&folder, "trap 'exit 130' USR1; echo >> $D/up$RANK; while :; do sleep 0.02; done");
    let running = Running::start(&["--nproc-per-node", "2", "--max-restarts", "2", "sh", "-c", &script]);
    (0..2).for_each(|rank| drop(until("up", || folder.read(&format!("up{rank}")).filter(|t| !t.is_empty()))));
    running.signal(libc::SIGUSR1);
    let ended = running.end();
    ended.check(128 + libc::SIGUSR1, &[]);
    assert!(!ended.stderr.contains("restart 1 of 2"), "{ended:#?}");
    assert_eq!(folder.read("up0").unwrap().lines().count(), 1);
}

/// Rank 1 is killed; the others hear of it at once, from the kernel, and fail of it before anybody has seen it end.
#[test]
fn a_killed_rank_is_the_root_cause_whoever_is_seen_first() {
    let lost = r#"{"message":{"message":"error: rank 0: rank 1 (pid 1 on h) was lost: its connection closed","extraInfo":{"timestamp":"1"}}}"#;
    let check = |script: &str| {
        let folder = Folder::new();
        for pipe in ["f0", "f2"] {
            let made = std::process::Command::new("mkfifo").arg(folder.path().join(pipe)).status();
            assert!(made.unwrap().success());
        }
        let script = worker(
            &folder,
            &script.replace("FAIL", &format!("printf '%s' '{lost}' > $TORCHELASTIC_ERROR_FILE; exit 1")),
        );
        let ended = run(&["--nproc-per-node", "3", "sh", "-c", &script]);
        let root = ended.stderr.split("Root Cause").nth(1).unwrap_or_else(|| panic!("{ended:#?}"));
        assert!(root.contains("rank      : 1") && root.contains("(SIGKILL)"), "{ended:#?}");
    };
    // Rank 1 holds the pipes open until it dies.
    for _ in 0..20 {
        check(
            "if [ $RANK = 1 ]; then exec 8>$D/f0 9>$D/f2; kill -9 $$; fi; \
             read x < $D/f$RANK; FAIL",
        );
    }
    // It dies of its own accord only after the others have failed.
    check(
        "if [ $RANK = 1 ]; then trap 'kill -9 $$' TERM; echo > $D/up; while :; do sleep 0.01; done; fi; \
         while ! [ -s $D/up ]; do sleep 0.01; done; FAIL",
    );
}

#[test]
fn a_second_signal_does_not_wait_for_the_shutdown_time() {
    let folder = Folder::new();
    let script =
        worker(&folder, "trap 'echo > $D/deaf$RANK' TERM; echo > $D/up$RANK; while :; do sleep 0.02; done");
    let running = Running::start(&["--shutdown-timeout", "1000", "sh", "-c", &script]);
    until("up", || folder.read("up0").filter(|t| !t.is_empty()));
    running.signal(libc::SIGTERM);
    until("the first signal has come", || folder.read("deaf0"));
    running.signal(libc::SIGTERM);
    running.end().check(128 + libc::SIGTERM, &[]);
    until_gone(&[folder.pid("pid0")]);
}

#[test]
fn nothing_outlives_a_killed_launcher() {
    let folder = Folder::new();
    // A child in the worker's group, one that ignores polite signals, and one in a session of its own.
    let script = worker(
        &folder,
        "sleep 1000 & echo $! > $D/child$RANK; \
         (trap '' TERM HUP INT; exec sleep 1000) & echo $! > $D/deaf$RANK; \
         setsid sh -c \"echo \\$\\$ > $D/away$RANK; exec sleep 1000\" & \
         wait",
    );
    let running = Running::start(&["--nproc-per-node", "2", "sh", "-c", &script]);
    let names = ["pid", "child", "deaf", "away"];
    let pids: Vec<i32> =
        names.iter().flat_map(|n| [0, 1].map(|rank| folder.pid(&format!("{n}{rank}")))).collect();
    assert!(pids.iter().all(|p| is_alive(*p)));
    running.signal(libc::SIGKILL);
    drop(running.end());
    until_gone(&pids);
}

#[test]
fn nothing_outlives_a_killed_launcher_inside_a_launch() {
    let folder = Folder::new();
    let script = worker(&folder, "sleep 1000 & echo $! > $D/child; wait");
    let inner = crate::common::launcher(&["sh", "-c", &script]);
    let text = |a: &std::ffi::OsStr| a.to_str().unwrap().to_owned();
    // Through a file: the arguments of one launcher cannot stand in those of another.
    let sets = inner.get_envs().filter_map(|(k, v)| Some(format!("export {}='{}'\n", text(k), text(v?))));
    let args: Vec<String> = inner.get_args().map(text).collect();
    let start =
        format!("{}exec {} {}\n", sets.collect::<String>(), text(inner.get_program()), args.join(" "));
    let path = folder.path().join("inner.sh");
    std::fs::write(&path, start).unwrap();
    let running = Running::start(&["sh", path.to_str().unwrap()]);
    let pids = [folder.pid("pid0"), folder.pid("child")];
    running.signal(libc::SIGKILL);
    drop(running.end());
    until_gone(&pids);
}

#[test]
fn exit_codes_are_seen_where_a_parent_ignores_its_children() {
    let inner = crate::common::launcher(&["sh", "-c", "exit 7"]);
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "trap '' CHLD; exec \"$@\"", "sh"]).arg(inner.get_program()).args(inner.get_args());
    shell.envs(inner.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let output = shell.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("exitcode  : 7"));
}

#[test]
fn what_a_worker_leaves_behind_is_ended_after_success() {
    let folder = Folder::new();
    let script = worker(
        &folder,
        "sleep 1000 & echo $! > $D/child; setsid sh -c \"echo \\$\\$ > $D/away; exec sleep 1000\" & \
         while ! [ -s $D/away ]; do sleep 0.01; done",
    );
    run(&["sh", "-c", &script]).check(0, &[]);
    let pids = [folder.pid("child"), folder.pid("away")];
    assert!(pids.iter().all(|p| !is_alive(*p)), "they are gone when the launcher has ended");
}

#[test]
fn restarts_are_counted_and_each_attempt_has_its_logs() {
    let folder = Folder::new();
    let script = "echo attempt $TORCHELASTIC_RESTART_COUNT; [ $TORCHELASTIC_RESTART_COUNT = 2 ] || exit 5";
    let args = [
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "-r",
        "3",
        "--log-dir",
        folder.text(),
        "--rdzv-id",
        "j",
    ];
    run(&[&args[..], &["sh", "-c", script]].concat()).check(0, &["restart 1 of 2: rank ", "restart 2 of 2"]);
    let files: Vec<String> = folder.files().iter().map(|p| p.to_str().unwrap().to_owned()).collect();
    assert_eq!(files.len(), 12, "{files:#?}");
    let last = files.iter().find(|f| f.ends_with("attempt_2/1/stdout.log")).unwrap();
    assert!(last.starts_with(&format!("{}/j_", folder.text())), "{last}");
    assert_eq!(std::fs::read_to_string(last).unwrap(), "attempt 2\n");
    let script = "exit 5";
    run(&["--max-restarts", "1", "sh", "-c", script]).check(1, &["restart 1 of 1", "exitcode  : 5"]);
}

#[test]
fn the_error_that_a_worker_recorded_is_the_root_cause() {
    let folder = Folder::new();
    // Rank 1 fails first in truth, but rank 0, which noticed, is the first to exit.
    let json = r#"{"message":{"message":"V: x","extraInfo":{"py_callstack":"Traceback\nValueError: x","timestamp":"17"}}}"#;
    let script = worker(
        &folder,
        &format!(
            "if [ $RANK = 1 ]; then trap 'exit 9' TERM; printf '%s' '{json}' > $TORCHELASTIC_ERROR_FILE; \
             echo > $D/recorded; while :; do sleep 0.02; done; fi; \
             while ! [ -s $D/recorded ]; do sleep 0.01; done; exit 4"
        ),
    );
    let ended = run(&["--nproc-per-node", "2", "sh", "-c", &script]);
    ended.check(1, &["Traceback\n  ValueError: x", "error_file: /"]);
    let root = ended.stderr.split("Root Cause").nth(1).unwrap();
    assert!(root.contains("rank      : 1") && root.contains("exitcode  : 9"), "{root}");
}

#[test]
fn tee_writes_whole_lines_with_a_prefix_and_keeps_the_files() {
    let folder = Folder::new();
    let script = "i=0; while [ $i -lt 300 ]; do echo \"line $i of $RANK xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"; \
                  i=$((i+1)); done; echo err $RANK >&2; printf unfinished";
    let template = "<${rank}>";
    let args = [
        "--nproc-per-node",
        "3",
        "-t",
        "3",
        "--log-dir",
        folder.text(),
        "--log-line-prefix-template",
        template,
    ];
    let ended = run(&[&args[..], &["--local-ranks-filter", "0,2", "sh", "-c", script]].concat());
    ended.check(0, &["<0>err 0\n", "<2>err 2\n"]);
    assert!(!ended.stderr.contains("err 1"), "filtered");
    let lines: Vec<&str> = ended.stdout.lines().filter(|l| l.starts_with('<')).collect();
    assert_eq!(lines.len(), 2 * 301, "{}", ended.stdout);
    for rank in [0, 2] {
        let own: Vec<&&str> = lines.iter().filter(|l| l.starts_with(&format!("<{rank}>"))).collect();
        let whole = (0..300).map(|i| format!("<{rank}>line {i} of {rank} {}", "x".repeat(44)));
        assert!(whole.zip(&own).all(|(expected, found)| expected == **found));
        assert_eq!(**own[300], format!("<{rank}>unfinished"));
    }
    let log = folder.files().into_iter().find(|p| p.ends_with("attempt_0/1/stdout.log")).unwrap();
    assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 301);
}

#[test]
fn wrong_input_ends_at_once_with_a_hint() {
    let folder = Folder::new();
    let check = |args: &[&str], parts: &[&str]| run(args).check(2, parts);
    check(&["--nproc-per-node", "2", "no-such-program"], &["no-such-program: not found in PATH", "hint: "]);
    check(&["./no/such/program"], &["./no/such/program: no such file"]);
    check(&["--nproc-per-node", "0", "true"], &["--nproc-per-node=0: expected 1 to"]);
    check(&["--nprocs-per-node", "2", "true"], &["unknown flag", "did you mean --nproc-per-node?"]);
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    check(&["--log-dir", file.to_str().unwrap(), "true"], &["log folder: create folder", "--log-dir"]);
    check(&["--no-python", file.to_str().unwrap()], &["not an executable file"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    check(&["--master-port", &port, "true"], &[&format!("port {port} is taken"), "hint: "]);
}

#[test]
fn a_port_that_was_asked_for_is_given() {
    let folder = Folder::new();
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port().to_string()
    };
    let script = worker(&folder, "echo $MASTER_PORT > $D/port");
    run(&["--master-port", &port, "sh", "-c", &script]).check(0, &[]);
    assert_eq!(folder.wait("port"), port);
}

#[test]
fn programs_can_start_ranks_themselves() {
    let folder = Folder::new();
    let mut job = LocalJob::new(2, ["sh", "-c", "echo $RANK $X; exit $((RANK * 40))"]);
    job.env = vec![("X".into(), "y".into())];
    job.log_dir = Some(folder.path().to_owned());
    job.redirects = Streams::all();
    let outcome = job.run().unwrap();
    assert_eq!((outcome.exit_code, outcome.worker_code(), outcome.failures.len()), (1, 40, 1));
    assert_eq!(outcome.root_cause().map(|f| (f.rank, f.code)), Some((1, Some(40))));
    let log = outcome.log_dir.join("attempt_0/1/stdout.log");
    assert_eq!(std::fs::read_to_string(log).unwrap(), "1 y\n");
    job.command = vec!["no-such-program".into()];
    assert_eq!(job.run().err().map(|e| e.exit_code()), Some(2));
    job.nproc = 0;
    assert!(job.run().is_err_and(|e| e.to_string().contains("0 workers")));
}
