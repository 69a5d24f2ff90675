//! The tests of kernels, in C++, in the emulator: against references in double precision, under several schedules, and
//! with planted faults that must be noticed. `bench/gpu/accept.sh` runs the same tests on a GPU.

use std::path::Path;
use std::process::Command;

/// Runs a script of the emulator; without g++ it says so and passes.
fn check(script: &str, arguments: &[&Path]) {
    if Command::new("g++").arg("--version").output().is_err() {
        println!("skipped: no g++ to build the emulator with");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator").join(script);
    let done = Command::new("sh").arg(&script).args(arguments).output().expect("started");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn kernels_agree_with_double_precision() {
    check("run-tests.sh", &[]);
}

#[test]
fn planted_faults_are_noticed() {
    check("check-faults.sh", &[]);
}

#[test]
fn stand_ins_do_what_they_stand_for() {
    check("selftest/run.sh", &[&Path::new(env!("CARGO_TARGET_TMPDIR")).join("stand-ins")]);
}
