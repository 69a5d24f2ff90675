//! Dying and coming back: no checkpoint, two trainers, signals, full disks, torn journals.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::common::{Lab, Started, losses, tiny};

/// Steps enough that a run is still under way when it is killed.
const LONG: &str = "--set train.steps=400 --set train.eval_every=0 --set checkpoint.every=0";

/// Starts a run and waits for a step of it.
fn begun(lab: &Lab, run: &str, args: &str) -> Started {
    let mut started = lab.start(&tiny(run, args));
    started.wait_for("step 3/");
    started
}

fn kill(mut started: Started) {
    started.child.kill().expect("kill it");
    started.end();
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let lab = Lab::new();
    let stop = format!("{LONG} --stop-after 4");
    for resume in ["", "--resume"] {
        kill(begun(&lab, "r", LONG));
        let ran = lab.run(&tiny("r", &format!("{stop} {resume}")));
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        assert!(
            ran.err.contains("r was started before and has no checkpoint: it begins at step 0"),
            "{}",
            ran.err
        );
        assert!(ran.err.contains("took over r from process "), "{}", ran.err);
        assert_eq!(losses(&ran.out).len(), 4);
        // Both segments are in the journal, and the second says from where it went on.
        let records = journal::read(&journal::path(&lab.path("r"), 0)).expect("a journal");
        let started = records.iter().filter(|r| matches!(r, journal::Record::RunStarted { .. })).count();
        assert!(started >= 2, "{started}");
        let from_0 = |r: &journal::Record| matches!(r, journal::Record::Resumed { step: 0, path, .. } if path.is_empty());
        assert!(records.iter().any(from_0));
        fs::remove_dir_all(lab.path("r")).expect("the next case");
    }
    // A name that holds nothing is a mistake, unless a launcher will start the run again.
    let ran = lab.run(&tiny("absent", &format!("{stop} --resume")));
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(!lab.path("absent").exists());
    let ran = lab
        .command(&tiny("absent", &format!("{stop} --resume")))
        .env("TORCHELASTIC_MAX_RESTARTS", "2")
        .output();
    let err = String::from_utf8_lossy(&ran.expect("start the program").stderr).into_owned();
    assert!(err.contains("nothing to resume yet in absent: it begins at step 0"), "{err}");
}

/// A rank that is killed before the first checkpoint costs a restart, no more; and `--fresh` means the job, not each of
/// its starts.
#[test]
fn a_launcher_restarts_a_run_that_has_no_checkpoint() {
    for (ranks, flags) in [(1, ""), (2, "--resume"), (2, "--fresh")] {
        let lab = Lab::new();
        let program = env!("CARGO_BIN_EXE_phalanx");
        let steps = "--set train.steps=60 --set train.eval_every=0 --set checkpoint.every=0";
        let train = tiny("r", &format!("{steps} {flags}"));
        let launch =
            format!("launch --standalone --nproc-per-node {ranks} --max-restarts 2 {program} {train}");
        let mut started = lab.start(&launch);
        started.wait_for("step 3/");
        let rank = started.descendant(ranks - 1);
        Started::signal(rank, Signal::KILL);
        let (status, err) = started.end();
        assert!(status.success(), "{ranks} {flags}: {err}");
        assert!(err.contains("restart 1 of 2"), "{err}");
        assert!(lab.newest("r").ends_with("step-00000060"));
        assert!(!lab.path("r.old-1").exists(), "{err}");
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_by_restarts_only() {
    let lab = Lab::new();
    lab.train("r", "--stop-after 4 --set checkpoint.keep=0");
    let newest = lab.newest("r").join("rank-00000.safetensors");
    let mut bytes = fs::read(&newest).expect("a checkpoint");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let check = |args: &str, file: &[u8], said: &str| {
        fs::write(&newest, file).expect("damage it");
        let by_hand = lab.run(&tiny("r", args));
        assert_eq!(by_hand.code, Some(2), "{}", by_hand.err);
        assert!(
            by_hand.err.contains("move it away to go on from r/checkpoints/step-00000002"),
            "{}",
            by_hand.err
        );
        let again = lab
            .command(&tiny("r", &format!("{args} --set checkpoint.keep=0")))
            .env("SLURM_RESTART_COUNT", "1")
            .output();
        let err = String::from_utf8_lossy(&again.expect("start the program").stderr).into_owned();
        let fell = err
            .lines()
            .find(|l| l.contains("falling back to the checkpoint before the newest: "))
            .unwrap_or_default();
        assert!(fell.contains(said) && fell.contains("step-00000004"), "{said}: {err}");
        assert!(err.contains("resumed from r/checkpoints/step-00000002 at step 2"), "{err}");
    };
    check("--stop-after 3", &bytes, "is damaged");
    fs::remove_dir_all(lab.path("r/checkpoints/step-00000003")).expect("as it was");
    check("--stop-after 3 --nproc 2", &bytes, "is damaged");
    fs::remove_dir_all(lab.path("r/checkpoints/step-00000003")).expect("as it was");
    check("--stop-after 3", &bytes[..middle], "cut short");
}

#[test]
fn one_directory_has_one_owner() {
    let lab = Lab::new();
    for args in [LONG.to_owned(), format!("{LONG} --nproc 2")] {
        let started = begun(&lab, "r", &args);
        let who = format!("error: r is in use: process {} on ", started.child.id());
        for second in ["", "--fresh", "--resume", "--nproc 2"] {
            let ran = lab.run(&tiny("r", &format!("{LONG} {second}")));
            assert_eq!(ran.code, Some(2), "{second}: {}", ran.err);
            assert!(ran.err.contains(&who) && ran.err.contains("hint: wait for it"), "{second}: {}", ran.err);
        }
        assert!(!lab.path("r.old-1").exists());
        Started::signal(started.child.id() as i32, Signal::TERM);
        let (status, err) = started.end();
        assert_eq!(status.code(), Some(130), "{err}");
        assert!(!lab.path("r/lock").exists(), "given back");
        // Readers need no lock.
        lab.ok("generate r --tokens 1,2 -n 2");
        fs::remove_dir_all(lab.path("r")).expect("the next case");
    }
}

#[test]
fn every_signal_that_stops_a_run_saves_it_first() {
    let lab = Lab::new();
    let signals = [Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT, Signal::USR1];
    for signal in signals {
        let run = format!("alone-{}", signal.as_raw());
        let started = begun(&lab, &run, LONG);
        Started::signal(started.child.id() as i32, signal);
        let (status, err) = started.end();
        assert_eq!(status.code(), Some(130), "{signal:?}: {err}");
        assert!(err.contains("stopped; the same command goes on"), "{err}");
        lab.newest(&run);

        // As a rank gets it, whoever sends it.
        let run = format!("ranks-{}", signal.as_raw());
        let started = begun(&lab, &run, &format!("{LONG} --nproc 2"));
        Started::signal(started.rank(1), signal);
        let (status, err) = started.end();
        assert_eq!(status.code(), Some(130), "{signal:?} to a rank: {err}");
        lab.newest(&run);
    }
}

#[test]
fn output_that_cannot_be_written_loses_no_work() {
    let lab = Lab::new();
    let full = |args: &str| {
        let stdout = OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let done =
            lab.command(args).stdout(stdout).stderr(Stdio::piped()).output().expect("start the program");
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    for (run, args, code) in [("text", "", 0), ("ranks", "--nproc 2", 0), ("json", "--json", 1)] {
        let (found, err) = full(&tiny(run, args));
        assert_eq!(found, Some(code), "{err}");
        assert!(err.contains("stdout takes no more (No space left on device"), "{err}");
        assert!(err.contains(&format!("every record is in {run}/journal-00000.jsonl")), "{err}");
        assert!(lab.newest(run).ends_with("step-00000006"));
    }
    let (code, err) = full("generate text --tokens 1,2 -n 2");
    assert_eq!(code, Some(1), "{err}");
    let (code, err) = full("generate text --prompt mesh -n 2");
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("write to stdout: No space left on device"), "{err}");
}

/// Hours of training are worth more than one checkpoint: it is said and tried again, and only the last one must be.
#[test]
fn a_checkpoint_that_cannot_be_written_is_tried_again() {
    let steps = "--set train.steps=400 --set train.eval_every=0 --set checkpoint.every=50";
    for (ranks, freed) in [("", true), ("--nproc 2", true), ("", false)] {
        let lab = Lab::new();
        let mut started = begun(&lab, "r", &format!("{steps} {ranks}"));
        // Nobody can make a directory of it.
        lab.write("r/checkpoints", "in the way");
        started.wait_for("step 120/");
        if freed {
            fs::remove_file(lab.path("r/checkpoints")).expect("make room");
        }
        let (status, err) = started.end();
        assert!(err.contains("warning: step 50 is not saved: "), "{err}");
        assert!(err.contains(": training goes on and saves again at step 100"), "{err}");
        assert_eq!(status.code(), Some(if freed { 0 } else { 1 }), "{err}");
        let records = journal::read(&journal::path(&lab.path("r"), 0)).expect("a journal");
        let warned = |r: &journal::Record| matches!(r, journal::Record::Warning { text, .. } if text.contains("step 50 is not saved"));
        assert!(records.iter().any(warned));
        if freed {
            assert!(lab.newest("r").ends_with("step-00000400"));
        } else {
            assert!(err.contains("error: step 400 is not saved, and with it the run: "), "{err}");
            assert!(err.contains("the same command begins at step 0: no checkpoint was saved"), "{err}");
            assert!(matches!(records.last(), Some(journal::Record::Failed { step: 400, .. })));
        }
    }
}

#[test]
fn a_run_whose_last_weights_do_not_fit_has_failed() {
    let lab = Lab::new();
    // Journal and data fit into so many blocks of 512 bytes, a checkpoint does not.
    let full = |args: &str| {
        let plain = lab.command(args);
        let mut limited = Command::new("sh");
        limited.current_dir(lab.path("")).args(["-c", "ulimit -f 128; exec \"$@\"", "sh"]);
        let done = limited.arg(plain.get_program()).args(plain.get_args()).output().expect("start sh");
        (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    lab.train("r", "--stop-after 2");
    // A stop is one only if it saves.
    for (args, step) in [("", 6), ("--stop-after 5", 5)] {
        let (code, err) = full(&tiny("r", args));
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains("warning: step 4 is not saved: ") && err.contains("File too large"), "{err}");
        assert!(err.contains(&format!("error: step {step} is not saved, and with it the run: ")), "{err}");
        assert!(err.contains("hint: free space under r/checkpoints"), "{err}");
        assert!(err.contains("the same command goes on from r/checkpoints/step-00000002"), "{err}");
    }
    assert_eq!(losses(&lab.train("r", "")).len(), 4);
}

/// Killed while it wrote: a part of a line, or a block of zeros that a file system left.
#[test]
fn a_torn_journal_is_read_and_gone_on_with() {
    let lab = Lab::new();
    lab.train("r", "--trace --stop-after 3");
    let path = journal::path(&lab.path("r"), 0);
    let whole = journal::read(&path).expect("a journal").len();
    for torn in [&b"{\"kind\":\"step\",\"time_us\":1"[..], &[0; 70_000]] {
        OpenOptions::new().append(true).open(&path).expect("a journal").write_all(torn).expect("torn");
        lab.ok("trace r --output trace.json");
        assert!(journal::read(&path).expect("whole lines").len() >= whole);
    }
    lab.train("r", "--trace");
    let records = journal::read(&path).expect("a journal");
    let steps: Vec<u64> = records
        .iter()
        .filter_map(|r| {
            if let journal::Record::Step(journal::Step { step, .. }) = r { Some(*step) } else { None }
        })
        .collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    lab.ok("trace r --output trace.json");
}

#[test]
fn what_is_past_is_not_trained_again() {
    let lab = Lab::new();
    lab.train("r", "--stop-after 4");
    for step in [4, 3, 1] {
        let out = lab.train("r", &format!("--stop-after {step}"));
        assert_eq!(losses(&out), [0.0; 0], "{out}");
        assert!(lab.newest("r").ends_with("step-00000004"));
    }
}

/// Before there is anything to save, a stop says that nothing is lost, and what it leaves is cleared by the next start.
#[test]
fn a_stop_while_data_is_prepared_says_so() {
    let lab = Lab::new();
    // Large enough that tokenising it takes seconds.
    let text = fs::read_to_string(lab.path("text.txt")).expect("a text");
    lab.write("text.txt", text.repeat(400));
    let mut stopped = lab.start(&tiny("r", "--nproc 1"));
    let has_begun = |lab: &Lab| {
        let cache = fs::read_dir(lab.path("cache")).into_iter().flatten().flatten();
        cache.into_iter().any(|e| e.file_name().to_string_lossy().ends_with(".tmp"))
    };
    while !has_begun(&lab) {
        assert!(stopped.child.try_wait().expect("its state").is_none(), "it was too fast");
        std::thread::yield_now();
    }
    Started::signal(stopped.child.id() as i32, Signal::TERM);
    let (status, err) = stopped.end();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(err.contains("stopped before the first step: nothing was trained, and nothing is lost"), "{err}");
    assert!(has_begun(&lab), "it was too fast");
    lab.train("r", "--stop-after 1");
    assert!(!has_begun(&lab), "what was left is cleared away");
}

#[test]
fn a_launcher_that_waits_for_its_peers_can_be_stopped() {
    let lab = Lab::new();
    let alone = "launch --nnodes 2 --node-rank 1 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 1 --no-python /bin/true";
    for signal in [Signal::TERM, Signal::INT] {
        let mut started = lab.command(alone).stderr(Stdio::piped()).spawn().expect("start it");
        // It listens once the kernel says that it catches the signal.
        let caught = |pid: u32| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let mask =
                status.lines().find_map(|l| l.strip_prefix("SigCgt:")).map(str::trim).map(str::to_owned);
            let mask = mask.and_then(|m| u64::from_str_radix(&m, 16).ok()).unwrap_or(0);
            mask & (1 << (signal.as_raw() - 1)) != 0
        };
        while !caught(started.id()) {
            std::thread::yield_now();
        }
        Started::signal(started.id() as i32, signal);
        let status = started.wait().expect("its end");
        assert!(!status.success(), "{status}");
    }
}

/// What is left of a file that was being written when the power went.
#[test]
fn an_empty_run_file_is_no_run_file() {
    let lab = Lab::new();
    lab.train("r", "--stop-after 4");
    lab.write("r/run.toml", "");
    let ran = lab.run(&tiny("r", "--stop-after 5"));
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(
        ran.err.contains("r/run.toml is empty; by its checkpoint's fingerprint it is this run"),
        "{}",
        ran.err
    );
    lab.write("r/run.toml", "\n");
    let ran = lab.run("generate r --tokens 1,2 -n 2");
    assert_eq!(ran.code, Some(2), "{}", ran.err);
    assert!(ran.err.contains("r/run.toml is empty"), "{}", ran.err);
}

/// Whoever reads a damaged checkpoint is told of one that is whole, and of none that is not.
#[test]
fn only_a_whole_checkpoint_is_recommended() {
    let lab = Lab::new();
    lab.train("r", "--set checkpoint.keep=0");
    let manifest = |step: u64| format!("r/checkpoints/step-{step:08}/manifest.json");
    let check = |damaged: u64, hint: &str| {
        lab.write(&manifest(damaged), "{");
        for args in [tiny("r", ""), "generate r --tokens 1,2 -n 2".into(), "export r out".into()] {
            let ran = lab.run(&args);
            assert_eq!(ran.code, Some(2), "{args}: {}", ran.err);
            assert!(ran.err.contains(hint), "{args}: {}", ran.err);
        }
    };
    check(6, "move it away to go on from r/checkpoints/step-00000004");
    check(4, "move it away to go on from r/checkpoints/step-00000002");
    check(2, "copy it from a backup; no older checkpoint of the run is whole");
}
