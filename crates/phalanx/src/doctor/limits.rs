//! What the kernel lets a process have.

use rustix::process::{Resource, getrlimit};

use super::{Check, Verdict, binary, line_of};

/// Ranks of a machine, each with a few connections to others, journals and data.
const FILES: u64 = 4096;

/// Shared memory that a rank's messages take, about: buffers of collectives on both sides.
const SHM_BYTES: u64 = 1 << 30;

pub(super) fn checks() -> Vec<Check> {
    vec![open_files(), processes(), locked_memory(), file_size(), shared_memory(), huge_pages()]
}

fn limit(of: Resource) -> (Option<u64>, Option<u64>) {
    let limit = getrlimit(of);
    (limit.current, limit.maximum)
}

fn open_files() -> Check {
    let (soft, hard) = limit(Resource::Nofile);
    let said = |n: Option<u64>| n.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
    Check::ok(
        "open files",
        format!("{} (at most {})", said(soft), said(hard)),
        "each connection between ranks, and each journal and data file, is an open file",
    )
    .unless(
        soft.is_none_or(|n| n >= FILES),
        Verdict::Warn,
        format!("ulimit -n {FILES}, or LimitNOFILE= of the service"),
    )
}

fn processes() -> Check {
    let (soft, _) = limit(Resource::Nproc);
    let cores = crate::output::threads(0) as u64;
    Check::ok(
        "threads",
        soft.map_or_else(|| "unlimited".to_owned(), |n| n.to_string()),
        "each rank starts a thread for every core that it has, and some for its messages",
    )
    .unless(soft.is_none_or(|n| n >= 64 * cores), Verdict::Warn, format!("ulimit -u {}", 64 * cores))
}

fn locked_memory() -> Check {
    let (soft, _) = limit(Resource::Memlock);
    Check::ok(
        "locked memory",
        soft.map_or_else(|| "unlimited".to_owned(), binary),
        "InfiniBand and RoCE register buffers that must not be swapped; NCCL fails without",
    )
    .unless(
        soft.is_none_or(|n| n >= 1 << 30),
        Verdict::Warn,
        "where there is such a fabric: ulimit -l unlimited, or LimitMEMLOCK=infinity",
    )
}

fn file_size() -> Check {
    let (soft, _) = limit(Resource::Fsize);
    Check::ok(
        "file size",
        soft.map_or_else(|| "unlimited".to_owned(), binary),
        "a checkpoint's file holds a rank's share of all weights and of the optimiser's state",
    )
    .unless(soft.is_none(), Verdict::Warn, "ulimit -f unlimited")
}

fn shared_memory() -> Check {
    let why = "ranks of one machine talk through /dev/shm";
    match rustix::fs::statvfs("/dev/shm") {
        Err(e) => Check::ok("/dev/shm", format!("none: {e}"), why)
            .amiss(Verdict::Warn, "mount a tmpfs there; until then ranks use --transport tcp"),
        Ok(at) => {
            let (size, free) = (at.f_blocks * at.f_frsize, at.f_bavail * at.f_frsize);
            let found = format!("{} ({} free)", binary(size), binary(free));
            let verdict = if free < 64 << 20 { Verdict::Bad } else { Verdict::Warn };
            Check::ok("/dev/shm", found, why).unless(
                free >= SHM_BYTES,
                verdict,
                "mount -o remount,size=8G /dev/shm; in containers --shm-size=8g, or an emptyDir with medium: Memory",
            )
        }
    }
}

fn huge_pages() -> Check {
    let at = "/sys/kernel/mm/transparent_hugepage/enabled";
    let found = line_of(at).unwrap_or_default();
    let chosen = found.split('[').nth(1).and_then(|t| t.split(']').next()).unwrap_or("not known").to_owned();
    let fine = chosen != "never";
    Check::ok(
        "huge pages",
        chosen,
        "a step touches all of its memory; small pages cost time in the translation buffer",
    )
    .unless(fine, Verdict::Warn, format!("echo madvise > {at}"))
}
