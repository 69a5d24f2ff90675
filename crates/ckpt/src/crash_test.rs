//! Saves that are stopped after every single disk operation.

use std::fs;
use std::os::unix::fs::symlink;
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
            let partial = dir.join(dir::temporary_name(step));
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
    fs::rename(dir::committed_path(dir, 1), dir.join(dir::old_name(1))).unwrap();
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

fn tree(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An archive beside the run, with a checkpoint and a folder in it.
fn archive(root: &Path) -> std::path::PathBuf {
    let archive = root.join("archive");
    fs::create_dir_all(archive.join("sub")).unwrap();
    for name in ["manifest.json", "rank-00000.safetensors", "sub/deep"] {
        fs::write(archive.join(name), "kept").unwrap();
    }
    archive
}

#[track_caller]
fn check_archive(archive: &Path) {
    assert_eq!(tree(archive), ["manifest.json", "rank-00000.safetensors", "sub"]);
    for name in ["manifest.json", "rank-00000.safetensors", "sub/deep"] {
        assert_eq!(fs::read_to_string(archive.join(name)).unwrap(), "kept", "{name}");
    }
}

#[test]
fn retention_unlinks_a_link_and_leaves_the_archive() {
    let root = tempfile::tempdir().unwrap();
    let (dir, archive) = (root.path().join("checkpoints"), root.path().join("archive"));
    for step in [10, 20] {
        save(&dir, step, 1.0).unwrap();
    }
    fs::rename(dir::committed_path(&dir, 10), &archive).unwrap();
    symlink(&archive, dir::committed_path(&dir, 10)).unwrap();
    let before = tree(&archive);
    assert_eq!(newest(&dir), 1.0);
    save(&dir, 30, 2.0).unwrap();
    assert_eq!(dir::keep(&dir, 2, None).unwrap(), [10]);
    assert_eq!(tree(&archive), before, "the archive is as it was");
    assert!(Checkpoint::open(&archive).unwrap().verify().is_ok());
    save(&dir, 40, 3.0).unwrap();
    assert_eq!(dir::keep(&dir, 2, None).unwrap(), [20]);
    assert_eq!((newest(&dir), tree(&dir)), (3.0, vec!["step-00000030".into(), "step-00000040".into()]));
}

/// What somebody may leave at a name.
#[derive(Clone, Copy, Debug)]
enum Left {
    LinkToFolder,
    LinkToFile,
    Dangling,
    File,
    Pipe,
    Folder,
}

impl Left {
    const ALL: [Left; 6] =
        [Left::LinkToFolder, Left::LinkToFile, Left::Dangling, Left::File, Left::Pipe, Left::Folder];

    fn put(self, at: &Path, archive: &Path) {
        match self {
            Left::LinkToFolder => symlink(archive, at).unwrap(),
            Left::LinkToFile => symlink(archive.join("manifest.json"), at).unwrap(),
            Left::Dangling => symlink(archive.join("gone"), at).unwrap(),
            Left::File => fs::write(at, "x").unwrap(),
            Left::Pipe => mkfifo(at),
            Left::Folder => {
                fs::create_dir_all(at.join("a/b")).unwrap();
                symlink(archive, at.join("a/link")).unwrap();
                symlink(archive.join("manifest.json"), at.join("manifest.json")).unwrap();
                symlink(archive.join("manifest.json"), at.join("rank-00000.safetensors")).unwrap();
                mkfifo(&at.join("rank-00001.safetensors"));
            }
        }
    }
}

fn mkfifo(at: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, at, FileType::Fifo, Mode::from_bits_truncate(0o600), 0).unwrap();
}

#[test]
fn whatever_is_left_is_replaced_and_never_followed() {
    for left in Left::ALL {
        for name in ["step-00000020", ".step-00000020.tmp", ".step-00000020.old", ".step-00000010.tmp"] {
            for exchange in [true, false] {
                let root = tempfile::tempdir().unwrap();
                let (dir, archive) = (root.path().join("checkpoints"), archive(root.path()));
                save(&dir, 15, 1.0).unwrap();
                left.put(&dir.join(name), &archive);
                fault::with(Fault::Full, usize::MAX, exchange, || {
                    save(&dir, 20, 2.0).unwrap_or_else(|e| panic!("{left:?} at {name}: {e}"));
                    assert_eq!(newest(&dir), 2.0, "{left:?} at {name}");
                    save(&dir, 30, 3.0).unwrap_or_else(|e| panic!("{left:?} at {name}: {e}"));
                });
                assert_eq!(dir::keep(&dir, 1, None).unwrap().last(), Some(&20));
                assert_eq!(tree(&dir), ["step-00000030"], "{left:?} at {name}");
                check_archive(&archive);
            }
        }
        let root = tempfile::tempdir().unwrap();
        let (dir, archive) = (root.path().join("checkpoints"), archive(root.path()));
        fs::create_dir(&dir).unwrap();
        left.put(&dir.join(".step-00000020.tmp"), &archive);
        Saver::abort(&dir, 20).unwrap();
        assert_eq!(tree(&dir), [""; 0], "{left:?}");
        check_archive(&archive);
    }
}
