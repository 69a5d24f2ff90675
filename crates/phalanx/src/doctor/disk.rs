//! The disk that runs will lie on.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use spec::{Error, Result};

use super::{Check, Verdict, binary};

/// Written to measure, a block at a time until the time is up: enough for a disk to show itself.
const WRITE_BYTES: usize = 256 << 20;
const BLOCK_BYTES: usize = 4 << 20;
const WRITE_S: f64 = 2.0;

/// A checkpoint of a small model.
const FREE_BYTES: u64 = 10 << 30;

/// A hard disk: below that a checkpoint takes minutes for a billion parameters.
const BYTES_PER_S: f64 = 100e6;

pub(super) fn checks(dir: &Path) -> Result<Vec<Check>> {
    let meta = std::fs::metadata(dir).map_err(|e| {
        Error::io("look at", dir, &e).hint("name the directory where runs will lie with --dir")
    })?;
    if !meta.is_dir() {
        return Err(Error::user(format!("{} is no directory", dir.display()))
            .hint("name the directory where runs will lie with --dir"));
    }
    let mut all = vec![free(dir)];
    let why = "training waits while a checkpoint is copied, and a slow disk falls behind the next one";
    all.push(match speed(dir) {
        Ok((bytes, s)) => {
            let rate = bytes as f64 / s;
            let found =
                format!("{:.0} MB/s in {}, {} with fsync", rate / 1e6, dir.display(), binary(bytes as u64));
            Check::ok("disk speed", found, why).unless(
                rate >= BYTES_PER_S,
                Verdict::Warn,
                "put run.dir on a faster disk, or save less often (checkpoint.every)",
            )
        }
        Err(e) => Check::ok("disk speed", format!("cannot write to {}: {e}", dir.display()), why)
            .amiss(Verdict::Bad, "give run.dir a writable place with free space"),
    });
    Ok(all)
}

fn free(dir: &Path) -> Check {
    let why = "a checkpoint takes 12 bytes for each parameter, and the one before is kept until it is whole";
    match rustix::fs::statvfs(dir) {
        Ok(at) => {
            let free = at.f_bavail * at.f_frsize;
            let verdict = if free < 100 << 20 { Verdict::Bad } else { Verdict::Warn };
            Check::ok("free space", format!("{} in {}", binary(free), dir.display()), why).unless(
                free >= FREE_BYTES,
                verdict,
                "remove old checkpoints (phalanx ckpt prune), or move run.dir",
            )
        }
        Err(e) => {
            Check::ok("free space", format!("not known: {e}"), why).amiss(Verdict::Warn, "look with df -h")
        }
    }
}

/// Bytes written and seconds that it took until they were on the disk.
fn speed(dir: &Path) -> std::io::Result<(usize, f64)> {
    let path = dir.join(format!(".phalanx-doctor-{}", std::process::id()));
    let _gone = Remove(&path);
    // Not all zeros: some disks and file systems would not write those.
    let block: Vec<u8> =
        (0..BLOCK_BYTES as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut file = File::create_new(&path)?;
    let began = Instant::now();
    let mut written = 0;
    while written < WRITE_BYTES && began.elapsed().as_secs_f64() < WRITE_S {
        file.write_all(&block)?;
        written += block.len();
    }
    file.sync_all()?;
    Ok((written, began.elapsed().as_secs_f64()))
}

struct Remove<'a>(&'a Path);

impl Drop for Remove<'_> {
    fn drop(&mut self) {
        // Where it could not be made it need not be removed.
        let _ = std::fs::remove_file(self.0);
    }
}
