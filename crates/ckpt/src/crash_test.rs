//! Saves that are stopped after every single disk operation.

use std::fs;
use std::path::Path;

use crate::disk::fault::{self, Fault};
use crate::{Checkpoint, Kind, Meta, Piece, Region, Saver, dir, latest};

/// Two ranks save one tensor filled with `value`.
fn save(dir: &Path, step: u64, value: f32) -> spec::Result<()> {
    let data = [value; 4];
    let mut records = Vec::new();
    for rank in 0..2 {
        let piece = Piece {
            name: "w",
            kind: Kind::Param,
            global_shape: &[8],
            boxes: vec![Region::range(4 * rank, 4)],
            data: &data,
        };
        records.push(Saver::begin(dir, step)?.write_rank(rank, [piece])?);
    }
    Saver::commit(dir, step, records, Meta { world: 2, ..Meta::default() })?;
    Ok(())
}

/// The value in the newest checkpoint, which must be whole.
fn newest(dir: &Path) -> f32 {
    let ckpt = Checkpoint::open(&latest(dir).unwrap().expect("a checkpoint")).unwrap();
    ckpt.verify().unwrap();
    let mut out = [0.0; 8];
    ckpt.read_box("w", Kind::Param, 0, 1, 0, 8, &mut out).unwrap();
    assert!(out.iter().all(|x| *x == out[0]), "{out:?}");
    out[0]
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|n| n.starts_with('.')).collect()
}

/// Saves value 1 at step 1, then value 2 at `step` with a fault at every operation in turn.
fn check(step: u64, fault: Fault, exchange: bool) {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        save(dir, 1, 1.0).unwrap();
        let (result, operations) = fault::with(fault, at, exchange, || save(dir, step, 2.0));
        if operations <= at {
            result.expect("no fault was met");
            assert!(at > 10, "the save has more operations than {at}");
            return;
        }
        let error = result.expect_err("a fault is reported");
        let found = newest(dir);
        assert!(found == 1.0 || found == 2.0, "operation {at}: {found}");
        if error.to_string().contains("is written") {
            assert_eq!(found, 2.0, "operation {at}: {error}");
        } else if fault == Fault::Full {
            assert_eq!(found, 1.0, "operation {at}: {error}");
            let partial = dir::temporary_path(dir, step);
            let left: Vec<_> = fs::read_dir(&partial)
                .map(|d| d.map(|e| e.unwrap().file_name()).collect())
                .unwrap_or_default();
            // A rank that fails removes its own file; the other rank's goes when rank 0 aborts.
            assert!(left.iter().all(|n| n == "rank-00000.safetensors"), "operation {at}: {left:?}");
            Saver::abort(dir, step).unwrap();
            assert_eq!(hidden(dir), [""; 0], "operation {at}");
        }
        save(dir, 3, 3.0).unwrap();
        assert_eq!(newest(dir), 3.0, "operation {at}");
        assert_eq!(hidden(dir), [""; 0], "operation {at}: leftovers are cleared by the next save");
    }
}

#[test]
fn a_crash_leaves_the_old_or_the_new() {
    check(2, Fault::Crash, true);
}

#[test]
fn a_crash_while_replacing_a_step_leaves_the_old_or_the_new() {
    check(1, Fault::Crash, true);
    check(1, Fault::Crash, false);
}

#[test]
fn a_full_disk_leaves_the_old() {
    check(2, Fault::Full, true);
    check(1, Fault::Full, true);
    check(1, Fault::Full, false);
}

#[test]
fn a_crash_between_two_renames_is_mended() {
    // What a file system without atomic exchange leaves behind.
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    save(dir, 1, 1.0).unwrap();
    fs::rename(dir::committed_path(dir, 1), dir::old_path(dir, 1)).unwrap();
    assert_eq!(newest(dir), 1.0);
    save(dir, 2, 2.0).unwrap();
    assert_eq!(hidden(dir), [""; 0]);
    assert!(Checkpoint::open(&dir::committed_path(dir, 1)).is_ok());
}

/// The kernel itself refuses to let the file grow: this test runs itself again under a file size limit.
#[test]
fn a_real_write_error_is_a_failure() {
    const TASK: &str = "PHALANX_TEST_FULL_DISK";
    if let Some(dir) = std::env::var_os(TASK) {
        let error = save(Path::new(&dir), 2, 2.0).expect_err("no room");
        assert_eq!(error.exit_code(), 1, "{error}");
        assert!(error.hint_text().unwrap_or_default().contains("step-00000001"), "{error}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 1, 1.0).unwrap();
    let status = std::process::Command::new("sh")
        .args([
            "-c",
            r#"trap "" XFSZ; ulimit -f 0; exec "$0" --exact crash_test::a_real_write_error_is_a_failure -q"#,
        ])
        .arg(std::env::current_exe().unwrap())
        .env(TASK, dir.path())
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    assert_eq!(newest(dir.path()), 1.0);
    assert_eq!(hidden(dir.path()), [""; 0]);
}
