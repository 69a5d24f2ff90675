//! The tests of kernels, in C++, in the emulator: against references in double precision, under several schedules, and
//! with planted faults that must be noticed. `bench/gpu/accept.sh` runs the same tests on a GPU.

use std::path::Path;
use std::process::Command;
use std::sync::Once;

/// Whether there is g++ to build the emulator with; without it that is said.
fn has_compiler() -> bool {
    let has = Command::new("g++").arg("--version").output().is_ok();
    if !has {
        println!("skipped: no g++ to build the emulator with");
    }
    has
}

/// Runs a script of the emulator.
fn run(script: &str, arguments: &[&Path]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulator").join(script);
    let done = Command::new("sh").arg(&script).args(arguments).output().expect("started");
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{said}\n{}", String::from_utf8_lossy(&done.stderr));
}

/// Runs a script on the tests of kernels, which are built once.
fn check(script: &str, arguments: &[&str]) {
    static BUILT: Once = Once::new();
    if !has_compiler() {
        return;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels");
    BUILT.call_once(|| run("run-tests.sh", &[Path::new("build"), &folder]));
    let arguments: Vec<&Path> = arguments.iter().map(Path::new).chain([&*folder]).collect();
    run(script, &arguments);
}

#[test]
fn kernels_agree_with_double_precision() {
    check("run-tests.sh", &["run"]);
}

#[test]
fn planted_faults_are_noticed() {
    check("check-faults.sh", &[]);
}

#[test]
fn stand_ins_do_what_they_stand_for() {
    if has_compiler() {
        run("selftest/run.sh", &[&Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator")]);
    }
}
