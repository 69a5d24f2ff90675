//! Processor, memory, clocks.

use super::{Check, Verdict, binary, line_of};

/// Memory below which nothing but toys trains.
const MEMORY_BYTES: u64 = 4 << 30;

pub(super) fn checks() -> Vec<Check> {
    let mut all = vec![processor(), cores(), memory(), clock_source(), clock_set()];
    all.extend(frequency());
    all
}

fn processor() -> Check {
    let name = train::processor();
    let why = "matrix products run on the widest vectors that there are; other processors get the same bits, slower";
    #[cfg(target_arch = "x86_64")]
    let (vectors, fine) = match () {
        () if std::arch::is_x86_feature_detected!("avx512f") => ("AVX-512", true),
        () if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") => {
            ("AVX2", true)
        }
        () => ("no AVX2", false),
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (vectors, fine) = ("NEON", true);
    Check::ok("processor", format!("{name}, {vectors}"), why).unless(
        fine,
        Verdict::Warn,
        "in a virtual machine, pass the host's processor on (-cpu host)",
    )
}

fn field(info: &str, name: &str) -> Option<String> {
    let line = info.lines().find(|l| l.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn cores() -> Check {
    let usable = crate::output::threads(0);
    let online =
        line_of("/proc/cpuinfo").unwrap_or_default().lines().filter(|l| l.starts_with("processor")).count();
    let load = measure::load_average().unwrap_or(0.0);
    let found = format!("{usable} usable of {online}, load {load:.1}");
    Check::ok("cores", found, "ranks wait for the slowest; what else runs here slows all of them").unless(
        load <= 0.5 * usable as f64,
        Verdict::Warn,
        "end what else runs here, or leave it cores of its own; run.threads says how many a rank takes",
    )
}

fn memory() -> Check {
    let info = line_of("/proc/meminfo").unwrap_or_default();
    let kib = |name| field(&info, name)?.split(' ').next()?.parse::<u64>().ok();
    let total = kib("MemTotal").unwrap_or(0) << 10;
    let free = kib("MemAvailable").unwrap_or(0) << 10;
    // What the machine has, a container may not.
    let group = line_of("/sys/fs/cgroup/memory.max").and_then(|t| t.parse::<u64>().ok());
    let most = group.unwrap_or(u64::MAX).min(free);
    let limit = group.map(|g| format!(", limited to {}", binary(g))).unwrap_or_default();
    let swap = kib("SwapTotal").unwrap_or(0) << 10;
    let found = format!("{} ({} available{limit}), swap {}", binary(total), binary(free), binary(swap));
    let verdict = if most < 512 << 20 { Verdict::Bad } else { Verdict::Warn };
    Check::ok(
        "memory",
        found,
        "phalanx program show says to the byte what a rank needs; a rank that gets less is killed",
    )
    .unless(
        most >= MEMORY_BYTES,
        verdict,
        "free memory, raise the container's limit, or take a smaller model or micro-batch",
    )
}

fn clock_source() -> Check {
    let at = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = line_of(at).unwrap_or_else(|| "not known".to_owned());
    let slow = ["hpet", "acpi_pm", "pit", "jiffies"].contains(&source.as_str());
    Check::ok("clock", source, "traces read the clock at every op; some sources take microseconds").unless(
        !slow,
        Verdict::Warn,
        format!("echo tsc > {at}, if the kernel lists it as available"),
    )
}

fn clock_set() -> Check {
    use std::time::{SystemTime, UNIX_EPOCH};
    /// Nobody trains on this before it was written: the start of 2026.
    const WRITTEN_S: u64 = 1_767_225_600;
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let is_synchronised = synchronised();
    let found = match is_synchronised {
        Some(true) => "set, synchronised",
        Some(false) => "set, not synchronised",
        None => "set",
    };
    let why = "journals of several machines are laid beside each other by their times";
    let check = Check::ok("time", found, why);
    if now_s < WRITTEN_S {
        return Check { found: "before 2026".to_owned(), ..check }
            .amiss(Verdict::Bad, "set the clock: chronyd -q, or timedatectl");
    }
    check.unless(
        is_synchronised != Some(false),
        Verdict::Warn,
        "run chrony or systemd-timesyncd, if several machines train together",
    )
}

/// What a running time service leaves behind; none if there is no way to tell.
fn synchronised() -> Option<bool> {
    if std::path::Path::new("/run/systemd/timesync/synchronized").exists() {
        return Some(true);
    }
    let running = std::fs::read_dir("/proc").ok()?.flatten().any(|e| {
        let name = line_of(&format!("{}/comm", e.path().display())).unwrap_or_default();
        ["chronyd", "ntpd", "ptp4l", "systemd-timesyn"].contains(&name.as_str())
    });
    running.then_some(true).or_else(|| std::path::Path::new("/run/systemd/system").exists().then_some(false))
}

fn frequency() -> Option<Check> {
    let governor = line_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")?;
    let fine = governor != "powersave" && governor != "conservative";
    Some(Check::ok("clock rates", governor, "cores that clock up late or not at all slow every step").unless(
        fine,
        Verdict::Warn,
        "cpupower frequency-set -g performance",
    ))
}
