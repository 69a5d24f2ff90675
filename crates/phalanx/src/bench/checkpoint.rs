//! `phalanx bench checkpoint`: what saving a model's state costs the step loop, and how near it comes to the disk.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use ckpt::{Checkpoint, FileRecord, Meta, Saver};
use measure::Stepper;
use serde::Serialize;
use spec::stats::quantile;
use spec::{Error, Result};
use train::{Mesh, Saving};

use crate::args::BenchCheckpoint;
use crate::device;
use crate::output;

/// Ranks that a checkpoint is resharded from and to.
const RESHARD: (usize, usize) = (8, 6);

/// Bytes that `dd` writes at a time, those of a chunk.
const DD_BLOCK_BYTES: u64 = 4 << 20;

/// What was measured; rates are medians over rounds in which the ways take turns.
#[derive(Debug, Serialize)]
struct Found {
    /// Weights and moments.
    state_bytes: u64,
    rounds: usize,
    threads: usize,
    /// One-minute load average before the start.
    load_average: Option<f64>,
    step_s: f64,
    /// Of steps during which a checkpoint was written.
    step_while_saving_s: f64,
    /// How long the step loop waited for a save in the background: for the copy, and for the commit.
    stall_s: f64,
    /// Of that: the copy.
    stall_copy_s: f64,
    /// Of that: the commit.
    stall_commit_s: f64,
    /// Of one step.
    stall_share_of_step: f64,
    /// From the begin of a save in the background to its commit.
    background_save_s: f64,
    /// What the process grew by while a save was under way, over the bytes of the state.
    extra_copies: Option<f64>,
    save_mb_per_s: f64,
    /// `dd` with `conv=fsync` to the same disk; absent in an object store.
    dd_mb_per_s: Option<f64>,
    save_share_of_dd: Option<f64>,
    reshard_mb_per_s: f64,
    load_mb_per_s: f64,
}

pub(super) fn run(args: &BenchCheckpoint) -> Result<u8> {
    if args.rounds == 0 || args.steps == 0 {
        return Err(Error::user("--rounds 0 or --steps 0, expected at least one").hint("leave them out"));
    }
    let place = Place::make(&args.dir)?;
    let found = measure(args, &place.path);
    // Before anything is said: what was written must not outlive a failure.
    let removed = place.remove();
    let found = found?;
    removed?;
    if args.json {
        let value = serde_json::to_value(&found).expect("numbers are JSON");
        output::print(&serde_json::to_string_pretty(&value).expect("numbers are JSON"));
    } else {
        output::print(&table(&found));
    }
    Ok(0)
}

/// Where the checkpoints go while they are measured.
struct Place {
    path: PathBuf,
}

impl Place {
    fn make(dir: &Path) -> Result<Place> {
        let path = dir.join(format!("phalanx-bench-{}", std::process::id()));
        if !ckpt::is_url(&path) {
            std::fs::create_dir_all(&path)
                .map_err(|e| Error::io("create", &path, &e).hint("name a writable place with --dir"))?;
        }
        Ok(Place { path })
    }

    fn remove(self) -> Result<()> {
        if ckpt::is_url(&self.path) {
            for part in PARTS {
                let dir = self.path.join(part);
                let steps: Vec<u64> = ckpt::list(&dir)?.into_iter().map(|(step, _)| step).collect();
                ckpt::remove(&dir, &steps)?;
            }
            return Ok(());
        }
        std::fs::remove_dir_all(&self.path).map_err(|e| Error::io("remove", &self.path, &e))
    }
}

/// Directories of what is written.
const PARTS: [&str; 4] = ["background", "saved", "eight", "six"];

fn measure(args: &BenchCheckpoint, place: &Path) -> Result<Found> {
    let load_average = measure::load_average();
    let run = super::step::reference(&args.set, true)?;
    let threads = if args.threads > 0 { args.threads } else { output::threads(0) };
    let device = device::open(&run.run, 0, threads)?;
    let mut stepper = Stepper::open(run, device, false, 0, Mesh::alone())?;
    let [background, saved, eight, six] = PARTS.map(|part| place.join(part));
    let state_bytes = 4 * stepper.exec.state()?.pieces().map(|p| p.data.len() as u64).sum::<u64>();

    let beside = beside(&mut stepper, args, &background, state_bytes)?;
    let (mut saves, mut copies) = (Vec::new(), Vec::new());
    let dd_file = (!ckpt::is_url(place)).then(|| place.join("dd"));
    for round in 0..args.rounds as u64 {
        let began = Instant::now();
        let record = Saver::begin(&saved, round)?.write_rank(0, stepper.exec.state()?.pieces())?;
        Saver::commit(&saved, round, vec![record], Meta::default())?;
        saves.push(rate(state_bytes, began));
        if let Some(file) = &dd_file {
            copies.push(dd(file, state_bytes)?);
        }
        ckpt::keep(&saved, 1, None)?;
    }
    let of_eight = dealt_out(&stepper, &eight)?;
    let (mut reshards, mut loads) = (Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let began = Instant::now();
        let done = ckpt::reshard(&of_eight, &six, RESHARD.1)?;
        reshards.push(rate(state_bytes, began));
        loads.push(load(&done.path, state_bytes)?);
        ckpt::remove(&six, &[Checkpoint::open(&done.path)?.step()])?;
    }
    let save_mb_per_s = quantile(&mut saves, 0.5);
    let dd_mb_per_s = (!copies.is_empty()).then(|| quantile(&mut copies, 0.5));
    Ok(Found {
        state_bytes,
        rounds: args.rounds,
        threads,
        load_average,
        save_mb_per_s,
        dd_mb_per_s,
        save_share_of_dd: dd_mb_per_s.map(|dd| save_mb_per_s / dd),
        reshard_mb_per_s: quantile(&mut reshards, 0.5),
        load_mb_per_s: quantile(&mut loads, 0.5),
        ..beside
    })
}

/// Steps with a save in the background every few of them, as a run makes it. Rates of the rest are left 0.
fn beside(stepper: &mut Stepper, args: &BenchCheckpoint, dir: &Path, state_bytes: u64) -> Result<Found> {
    let (mut free, mut busy, mut stalls, mut whole) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut copies, mut commits, mut copy, mut extra) = (Vec::new(), Vec::new(), Vec::new(), None);
    for _ in 0..2 {
        stepper.step()?;
    }
    for round in 0..args.rounds as u64 {
        for _ in 0..args.steps {
            free.push(stepper.step()?);
        }
        let before = (round == 0).then(memory).flatten();
        let began = Instant::now();
        let dir = dir.to_owned();
        let Some(saving) = Saving::begin(&stepper.exec, copy, dir.clone(), round, Meta::default())? else {
            return Err(Error::failure("no memory for a copy of the state").hint("take a smaller model"));
        };
        let copied_s = saving.stall_s;
        while !saving.is_written() {
            busy.push(stepper.step()?);
        }
        let commit = Instant::now();
        let (back, written) = saving.join();
        copy = back;
        Saver::commit(&dir, round, vec![FileRecord::from_bytes(&written?)?], Meta::default())?;
        let commit_s = commit.elapsed().as_secs_f64();
        stalls.push(copied_s + commit_s);
        copies.push(copied_s);
        commits.push(commit_s);
        whole.push(began.elapsed().as_secs_f64());
        let grown = before.zip(memory_most()).map(|(before, most)| most.saturating_sub(before));
        extra = extra.or(grown.map(|bytes| bytes as f64 / state_bytes as f64));
        ckpt::keep(&dir, 1, None)?;
    }
    let (step_s, stall_s) = (quantile(&mut free, 0.5), quantile(&mut stalls, 0.5));
    Ok(Found {
        state_bytes,
        rounds: 0,
        threads: 0,
        load_average: None,
        step_s,
        step_while_saving_s: quantile(&mut busy, 0.5),
        stall_s,
        stall_copy_s: quantile(&mut copies, 0.5),
        stall_commit_s: quantile(&mut commits, 0.5),
        stall_share_of_step: stall_s / step_s,
        background_save_s: quantile(&mut whole, 0.5),
        extra_copies: extra,
        save_mb_per_s: 0.0,
        dd_mb_per_s: None,
        save_share_of_dd: None,
        reshard_mb_per_s: 0.0,
        load_mb_per_s: 0.0,
    })
}

/// The state as that many ranks would have written it.
fn dealt_out(stepper: &Stepper, dir: &Path) -> Result<PathBuf> {
    let one = dir.join("one");
    let path = Saver::save(&one, 0, stepper.exec.state()?.pieces(), Meta::default())?;
    let done = ckpt::reshard(&path, dir, RESHARD.0)?;
    ckpt::remove(&one, &[0])?;
    Ok(done.path)
}

/// Reads all tensors as one rank that holds everything does.
fn load(path: &Path, state_bytes: u64) -> Result<f64> {
    let checkpoint = Checkpoint::open(path)?;
    let began = Instant::now();
    let mut room = Vec::new();
    for tensor in &checkpoint.manifest().tensors {
        room.resize(tensor.shape.iter().product(), 0.0);
        let whole = [ckpt::Region::whole(&tensor.shape)];
        checkpoint.read_regions(&tensor.name, tensor.kind, &whole, &mut room)?;
    }
    Ok(rate(state_bytes, began))
}

/// 10^6 bytes a second.
fn rate(bytes: u64, began: Instant) -> f64 {
    bytes as f64 / 1e6 / began.elapsed().as_secs_f64()
}

/// The rate at which `dd` writes as many bytes and makes them last.
fn dd(file: &Path, bytes: u64) -> Result<f64> {
    let mut command = Command::new("dd");
    command.arg("if=/dev/zero").arg(format!("of={}", file.display())).arg("conv=fsync");
    command.arg(format!("bs={DD_BLOCK_BYTES}")).arg(format!("count={}", bytes.div_ceil(DD_BLOCK_BYTES)));
    let began = Instant::now();
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let status = status.map_err(|e| Error::failure(format!("run dd: {e}")).hint("install coreutils"))?;
    let found = rate(bytes.next_multiple_of(DD_BLOCK_BYTES), began);
    if !status.success() {
        return Err(Error::failure(format!("dd to {} failed: {status}", file.display()))
            .hint("name a place with free space with --dir"));
    }
    std::fs::remove_file(file).map_err(|e| Error::io("remove", file, &e))?;
    Ok(found)
}

/// Bytes that this process holds now; from here on [`memory_most`] counts anew.
fn memory() -> Option<u64> {
    // "5" resets the peak (proc_pid_clear_refs(5)).
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    status("VmRSS:")
}

/// The most that this process held since [`memory`].
fn memory_most() -> Option<u64> {
    status("VmHWM:")
}

fn status(key: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = text.lines().find_map(|l| l.strip_prefix(key)?.trim().strip_suffix(" kB"))?;
    Some(kib.parse::<u64>().ok()? << 10)
}

fn table(f: &Found) -> String {
    let percent = |x: f64| format!("{:.1} %", 100.0 * x);
    let or_none = |x: Option<String>| x.unwrap_or_else(|| "-".to_owned());
    let size = crate::show::binary(f.state_bytes as usize);
    let load = or_none(f.load_average.map(|l| format!("{l:.1}")));
    [
        format!("state {size}, {} rounds, {} threads, load average {load}", f.rounds, f.threads),
        format!(
            "step {:.1} ms, {:.1} ms while a save is under way",
            1e3 * f.step_s,
            1e3 * f.step_while_saving_s
        ),
        format!(
            "background save: stall {:.1} ms (copy {:.1}, commit {:.1}; {} of a step), {:.2} s in all, {} copies of the state in memory",
            1e3 * f.stall_s,
            1e3 * f.stall_copy_s,
            1e3 * f.stall_commit_s,
            percent(f.stall_share_of_step),
            f.background_save_s,
            or_none(f.extra_copies.map(|c| format!("{c:.2}")))
        ),
        format!(
            "save {:.0} MB/s, dd with fsync {} MB/s: {}",
            f.save_mb_per_s,
            or_none(f.dd_mb_per_s.map(|x| format!("{x:.0}"))),
            or_none(f.save_share_of_dd.map(percent))
        ),
        format!("reshard {} to {} ranks {:.0} MB/s, load {:.0} MB/s", RESHARD.0, RESHARD.1, f.reshard_mb_per_s, f.load_mb_per_s),
    ]
    .join("\n")
}
