//! `phalanx bench machine`: measures this machine and writes what it found.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use machine::Machine;
use measure::calibrate::{Calibration, Collective, LINK_BYTES_MAX};
use serde::Deserialize;
use serde_json::{Value, json};
use spec::{Error, Result};

use crate::busy::Progress;
use crate::{files, output};

pub(super) fn run(path: &Path, quick: bool, as_json: bool) -> Result<u8> {
    let m = calibrate(path, quick)?;
    if as_json {
        output::print(&serde_json::to_string_pretty(&summary(&m, path)).expect("numbers are JSON"));
    } else {
        output::print(&path.display().to_string());
    }
    Ok(0)
}

/// Measures this machine and writes what it found to `path`.
pub(crate) fn calibrate(path: &Path, quick: bool) -> Result<Machine> {
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|e| {
            Error::io("make folder", folder, &e).hint("name a file in a writable folder with --output")
        })?;
    }
    // Minutes of measuring are not for a file that cannot be written.
    drop(files::Pending::create("--output", path)?);
    let start = Instant::now();
    let cores = output::threads(0);
    let loaded = measure::load_average().filter(|load| *load > 0.5 * cores as f64);
    let shown = Progress::begin("measuring this machine", "{msg:>28} {wide_bar} {pos}/{len} {eta}");
    let progress = |what: &str, done: usize, all: usize| {
        let said = || format!("measuring this machine: {what}, {done} of {all} done");
        shown.now(what, done as u64, all as u64, said);
    };
    let machine = Calibration { quick, cores, collectives: &collectives, progress: &progress }.measure()?;
    drop(shown);
    files::write("--output", path, &machine.to_toml())?;
    output::say(&format!(
        "measured {} ({cores} cores) in {:.0} s: {} kernel tables, {} link tables in {}",
        machine.cpu,
        start.elapsed().as_secs_f64(),
        machine.kernels.len(),
        machine.links.len(),
        path.display()
    ));
    if let Some(load) = loaded {
        output::say(&format!(
            "other work had the machine (load average {load} before the start): rates of kernels and messages may be low; \
             measure again when it is quiet"
        ));
    }
    Ok(machine)
}

/// Measures what a calibration lacks, and writes the file with it.
pub(crate) fn add(machine: &mut Machine, path: &Path, lacks: &BTreeSet<&str>) -> Result<()> {
    drop(files::Pending::create("--machine", path)?);
    let cores = machine.cores.min(output::threads(0));
    let progress = |_: &str, _: usize, _: usize| {};
    let calibration = Calibration { quick: true, cores, collectives: &collectives, progress: &progress };
    calibration.add(machine, lacks)?;
    files::write("--machine", path, &machine.to_toml())
}

/// Starts this program as ranks that time their collectives.
fn collectives(transport: &str, ranks: usize, budget: Duration) -> Result<Vec<Collective>> {
    #[derive(Deserialize)]
    struct Found {
        results: Vec<Collective>,
    }
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let output = Command::new(program)
        .args(["bench", "collectives", "--json", "--transport", transport])
        .args(["--ranks", &ranks.to_string(), "--budget-ms", &budget.as_millis().to_string()])
        .args(["--max-bytes", &LINK_BYTES_MAX.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| Error::failure(format!("start ranks to measure messages: {e}")))?;
    let found: Found = serde_json::from_slice(&output.stdout)
        .map_err(|_| could_not(&format!("{ranks} ranks over {transport}"), &output.stderr))?;
    Ok(found.results)
}

/// What a process that was to measure said last.
pub(super) fn could_not(measure: &str, said: &[u8]) -> Error {
    let said = String::from_utf8_lossy(said);
    Error::failure(format!("{measure} could not be measured: {}", said.trim()))
}

fn summary(m: &Machine, path: &Path) -> Value {
    let best = |kind: &str| {
        let of = m.kernels.iter().filter(|(k, _)| k.kind == kind && k.storage == "f32" && k.at.beside == 1);
        let rates = of.map(|(k, s)| {
            let best = s.iter().map(|s| s.per_s).fold(0.0, f64::max);
            (k.at.threads.to_string(), Value::from(best / 1e9))
        });
        Value::Object(rates.collect())
    };
    json!({
        "file": path.display().to_string(),
        "host": m.host,
        "cpu": m.cpu,
        "cores": m.cores,
        "memory_bytes": m.memory_bytes,
        "measured": m.measured,
        "spread": m.spread,
        "crowding": m.crowding,
        "op_gap_us": 1e6 * m.op_gap_s,
        "kernel_tables": m.kernels.len(),
        "samples": m.kernels.values().map(Vec::len).sum::<usize>(),
        "link_tables": m.links.len(),
        "best_gflops_by_threads": { "linear": best("linear"), "attention": best("attention") },
        "load_average": measure::load_average(),
    })
}
