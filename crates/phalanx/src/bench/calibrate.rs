//! `phalanx bench machine`: what this machine's kernels, messages and cores give, for the planner.
//!
//! Kernels are measured where they are used: short programs of several shapes run on the executor with spans on, alone
//! and side by side, so that caches and memory are as full as in training.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use machine::table::{KernelKey, LinkKey, Message, Sample};
use machine::{Conditions, Machine, kernel};
use serde_json::{Value, json};
use spec::{Context, Error, Result, RunSpec};
use train::{CpuClock, Mesh};

use super::step::Stepper;
use crate::output;

/// A model of the Llama family and a batch: hidden, ffn, heads, key and value heads, vocabulary, layers, then tokens of
/// a sequence, sequences at once, and micro-batches.
type Shape = (usize, usize, usize, usize, usize, usize, usize, usize, usize);

/// Widths, rows and lengths in steps of about two, small enough that a step takes half a second at most.
const SHAPES: [Shape; 13] = [
    (64, 176, 2, 2, 320, 2, 64, 4, 2),
    (64, 176, 2, 1, 1024, 2, 32, 1, 2),
    (128, 344, 4, 2, 1024, 2, 128, 1, 2),
    (128, 344, 4, 4, 4096, 2, 256, 4, 1),
    (192, 512, 3, 3, 2048, 2, 256, 1, 2),
    (256, 688, 4, 2, 2048, 1, 256, 8, 1),
    (256, 688, 8, 4, 8192, 1, 512, 1, 1),
    (384, 1024, 6, 6, 4096, 2, 256, 1, 2),
    (384, 1024, 6, 6, 4096, 1, 256, 4, 1),
    (512, 1376, 8, 4, 4096, 1, 256, 2, 1),
    (512, 1376, 8, 8, 2048, 1, 1024, 1, 1),
    (768, 2048, 12, 12, 8192, 1, 256, 1, 1),
    (1024, 2816, 16, 4, 8192, 1, 128, 1, 1),
];
/// Those that a quick calibration measures, and those that are measured in bf16 too.
const QUICK: [usize; 5] = [0, 2, 5, 7, 9];
const BF16: [usize; 5] = [0, 3, 5, 7, 9];

/// Keys of models with the kinds of op that the shapes above lack.
const OTHERS: [&str; 3] = [
    "model.hidden=128 model.ffn=512 model.heads=4 model.kv_heads=4 model.head_dim=32 model.vocab=1024 model.norm=layer \
     model.position=learned model.max_positions=128 model.activation=gelu_tanh model.qkv_bias=true \
     model.attn_out_bias=true model.mlp_bias=true model.tied_embeddings=true batch.sequence=128 batch.sequences=4",
    "model.hidden=512 model.ffn=2048 model.heads=8 model.kv_heads=8 model.head_dim=64 model.vocab=4096 model.norm=layer \
     model.position=learned model.max_positions=256 model.activation=gelu model.qkv_bias=true \
     model.attn_out_bias=true model.mlp_bias=true model.tied_embeddings=true batch.sequence=256 batch.sequences=2",
    "model.hidden=256 model.ffn=688 model.heads=8 model.kv_heads=4 model.head_dim=32 model.vocab=2048 \
     model.qk_norm=true batch.sequence=256 batch.sequences=4",
];

/// Rounds in which programs and conditions take turns: machines are slow and fast by the minute.
const ROUNDS: usize = 2;
/// Sizes of messages, bytes.
const LINK_BYTES_MAX: usize = 16 << 20;
/// The operations of the links' tables.
const LINK_OPS: [&str; 4] = ["all_reduce", "all_gather", "reduce_scatter", "send"];

/// What others take of the machine while it is measured is not its own noise.
const SPREAD_MAX: f64 = 0.25;
/// Share of the steps that nothing interrupts between two ops, however busy the machine.
const UNDISTURBED_SHARE: f64 = 0.05;

pub(super) fn run(path: &Path, quick: bool, as_json: bool) -> Result<u8> {
    let m = measure(path, quick)?;
    if as_json {
        output::print(&serde_json::to_string_pretty(&summary(&m, path)).expect("numbers are JSON"));
    } else {
        output::print(&path.display().to_string());
    }
    Ok(0)
}

/// Measures this machine and writes what it found to `path`.
pub(crate) fn measure(path: &Path, quick: bool) -> Result<Machine> {
    let start = Instant::now();
    let cores = output::threads(0);
    let busy = load_average().filter(|load| *load > 0.5 * cores as f64);
    let mut bench = Calibration::new(quick, cores);
    bench.kernels()?;
    bench.split_kinds()?;
    let crowding = bench.crowding()?;
    let links = bench.links()?;
    let took = start.elapsed().as_secs_f64();
    let machine = bench.table(cores, crowding, links);
    write(path, &machine.to_toml())?;
    output::say(&format!(
        "measured {} ({cores} cores) in {took:.0} s: {} kernel tables, {} link tables in {}",
        machine.cpu,
        machine.kernels.len(),
        machine.links.len(),
        path.display()
    ));
    if let Some(load) = busy {
        output::say(&format!(
            "other work had the machine (load average {load} before the start): rates of kernels and messages may be low; \
             measure again when it is quiet"
        ));
    }
    Ok(machine)
}

/// Measurements of one op of one program under one condition: shape, work, and seconds of its runs by place.
#[derive(Default)]
struct Runs {
    work: f64,
    /// By block, op and micro-batch: the seconds of each step.
    places: BTreeMap<(u32, u32, u32), Vec<Took>>,
}

/// Seconds on the clock, and seconds of work for each of the rank's threads (0 if not known).
#[derive(Clone, Copy, Debug)]
struct Took {
    wall_s: f64,
    cpu_s: f64,
}

struct Calibration {
    quick: bool,
    cores: usize,
    bar: ProgressBar,
    runs: BTreeMap<(KernelKey, [u64; 3]), Runs>,
    gaps: Vec<f64>,
}

impl Calibration {
    fn new(quick: bool, cores: usize) -> Calibration {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template("{msg:>28} {wide_bar} {pos}/{len} {eta}") {
            bar.set_style(style);
        }
        Calibration { quick, cores, bar, runs: BTreeMap::new(), gaps: Vec::new() }
    }

    /// Seconds for one program under one condition in one round.
    fn budget(&self) -> Duration {
        Duration::from_millis(if self.quick { 60 } else { 120 })
    }

    fn programs(&self) -> Result<Vec<RunSpec>> {
        let shape = |i: usize, precision: &str| {
            let (hidden, ffn, heads, kv, vocab, layers, sequence, at_once, micro_batches) = SHAPES[i];
            let dim = hidden / heads;
            load(&format!(
                "model.hidden={hidden} model.ffn={ffn} model.heads={heads} model.kv_heads={kv} model.head_dim={dim} \
                 model.vocab={vocab} model.layers={layers} batch.sequence={sequence} batch.sequences={} \
                 layout.micro_batch={at_once} train.precision={precision}",
                micro_batches * at_once
            ))
        };
        let all: Vec<usize> = if self.quick { QUICK.to_vec() } else { (0..SHAPES.len()).collect() };
        let f32s = all.iter().map(|i| shape(*i, "f32"));
        let bf16s = BF16.iter().filter(|_| !self.quick).map(|i| shape(*i, "bf16"));
        let others = OTHERS.iter().map(|keys| load(&format!("{keys} model.layers=1")));
        f32s.chain(others).chain(bf16s).collect()
    }

    /// One rank with some of the cores and with all, and as many ranks side by side as fill them.
    fn conditions(&self) -> Vec<Conditions> {
        let mut out = Vec::new();
        let mut threads = 1;
        while threads <= self.cores {
            out.push(Conditions { threads, beside: 1 });
            let beside = self.cores / threads;
            if beside > 1 {
                out.push(Conditions { threads, beside });
            }
            threads *= 2;
        }
        out
    }

    fn kernels(&mut self) -> Result<()> {
        let (programs, conditions) = (self.programs()?, self.conditions());
        self.bar.set_length((ROUNDS * programs.len() * conditions.len()) as u64);
        for run in (0..ROUNDS).flat_map(|_| &programs) {
            for &at in &conditions {
                self.bar.set_message(format!(
                    "width {}, {} x {} threads",
                    run.model.hidden, at.beside, at.threads
                ));
                let open = |_| {
                    let mut stepper = Stepper::open(run.clone(), at.threads, true, 0, Mesh::alone())?;
                    match at {
                        Conditions { threads: 1, .. } => stepper.exec.spans.watch_cpu(CpuClock::Thread),
                        Conditions { beside: 1, .. } => stepper.exec.spans.watch_cpu(CpuClock::Process),
                        // The threads of ranks side by side in this process cannot be told apart.
                        _ => {}
                    }
                    Ok(stepper)
                };
                let steppers = (0..at.beside).map(open).collect::<Result<Vec<_>>>()?;
                let budget = self.budget();
                for stepper in side_by_side(steppers, budget)? {
                    self.keep(&stepper, at, false);
                }
                self.bar.inc(1);
            }
        }
        self.bar.finish_and_clear();
        Ok(())
    }

    /// Kinds of op that only ranks in a group run: of split vocabularies, added biases and sharded gradients.
    fn split_kinds(&mut self) -> Result<()> {
        let (llama, gpt) = ("model.hidden=384 model.ffn=1024 model.heads=6 model.kv_heads=6", OTHERS[0]);
        let small = "model.hidden=128 model.ffn=344 model.heads=4 model.kv_heads=4 model.head_dim=32 model.vocab=1024";
        for keys in [
            format!("{llama} model.layers=1 batch.sequence=256 batch.sequences=2 layout.tp=2"),
            format!("{small} model.layers=2 batch.sequence=64 batch.sequences=2 layout.tp=2"),
            format!("{gpt} model.layers=1 layout.tp=2"),
            format!("{llama} model.layers=1 batch.sequence=256 batch.sequences=4 layout.dp=2 layout.zero=2"),
            format!("{small} model.layers=2 batch.sequence=64 batch.sequences=4 layout.dp=2 layout.zero=2"),
        ] {
            let run = load(&keys)?;
            let worlds = comm::World::threads(2)?;
            let budget = self.budget();
            // Meshes are founded together, each by its own thread.
            let steppers = std::thread::scope(|scope| {
                let open = |world: comm::World| {
                    let run = run.clone();
                    scope.spawn(move || {
                        let (rank, mesh) = (world.rank(), Mesh::new(world, &run.layout)?);
                        Stepper::open(run, 1, true, rank, mesh)
                    })
                };
                let all: Vec<_> = worlds.into_iter().map(open).collect();
                all.into_iter().map(joined).collect::<Result<Vec<_>>>()
            })?;
            for stepper in side_by_side(steppers, budget)? {
                self.keep(&stepper, Conditions { threads: 1, beside: 2 }, true);
            }
        }
        Ok(())
    }

    /// Adds what the steps took; with `new_kinds`, only of kinds that were not measured before.
    fn keep(&mut self, (stepper, steps): &(Stepper, Vec<Recorded>), at: Conditions, new_kinds: bool) {
        let p = &stepper.exec.program;
        let storage = p.precision.to_string();
        let before: Vec<String> = match new_kinds {
            true => self.runs.keys().map(|(k, _)| k.kind.clone()).collect(),
            false => Vec::new(),
        };
        for step in steps {
            for &(block, i, micro_batch, Took { wall_s, cpu_s }) in &step.ops {
                let s = Took { wall_s, cpu_s: cpu_s / at.threads as f64 };
                let op = &p.blocks[block as usize].ops[i as usize];
                let Some(k) = kernel(op, p).filter(|k| k.work > 0.0) else { continue };
                if before.iter().any(|b| b == k.kind) {
                    continue;
                }
                let key = KernelKey {
                    kind: k.kind.to_owned(),
                    storage: storage.clone(),
                    threads: at.threads,
                    beside: at.beside,
                };
                let runs = self.runs.entry((key, k.shape.map(f64::to_bits))).or_default();
                runs.work = k.work;
                runs.places.entry((block, i, micro_batch)).or_default().push(s);
            }
            self.gaps.push(step.gap_s);
        }
    }

    /// How much slower twice as many ranks as cores are than their share of the cores accounts for.
    fn crowding(&self) -> Result<f64> {
        let run = load(
            "model.hidden=256 model.ffn=688 model.heads=4 model.kv_heads=4 model.head_dim=64 model.vocab=1024 \
             model.layers=1 batch.sequence=128 batch.sequences=2",
        )?;
        let wall = |ranks: usize| -> Result<f64> {
            let open = |_| Stepper::open(run.clone(), 1, true, 0, Mesh::alone());
            let steppers = (0..ranks).map(open).collect::<Result<Vec<_>>>()?;
            let all = side_by_side(steppers, 2 * self.budget())?;
            Ok(all[0].1.iter().map(|step| step.wall_s).fold(f64::INFINITY, f64::min))
        };
        let (mut full, mut over) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..3 {
            full = full.min(wall(self.cores)?);
            over = over.min(wall(2 * self.cores)?);
        }
        /// Beyond this something else took the cores.
        const MOST: f64 = 1.3;
        Ok((over / full / 2.0).clamp(1.0, MOST))
    }

    /// Messages between processes, over each transport.
    fn links(&self) -> Result<BTreeMap<LinkKey, Vec<Message>>> {
        let mut links: BTreeMap<LinkKey, Vec<Message>> = BTreeMap::new();
        let program =
            std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
        let budget = if self.quick { "10" } else { "30" };
        let mut ranks = vec![2, 4];
        ranks.extend((3..).map(|i| 1 << i).take_while(|n| *n <= self.cores));
        for transport in ["shm", "tcp"] {
            for &n in &ranks {
                let output = Command::new(&program)
                    .args(["bench", "collectives", "--json", "--transport", transport])
                    .args(["--ranks", &n.to_string(), "--budget-ms", budget])
                    .args(["--max-bytes", &LINK_BYTES_MAX.to_string()])
                    .stdin(Stdio::null())
                    .stderr(Stdio::inherit())
                    .output()
                    .map_err(|e| Error::failure(format!("start ranks to measure messages: {e}")))?;
                let found: Value = serde_json::from_slice(&output.stdout).map_err(|_| {
                    Error::failure(format!("{n} ranks over {transport} could not be measured"))
                })?;
                for row in found["results"].as_array().into_iter().flatten() {
                    let op = row["op"].as_str().unwrap_or_default();
                    let (bytes, us) =
                        (row["bytes"].as_f64().unwrap_or(0.0), row["quartile_us"].as_f64().unwrap_or(0.0));
                    if row["shared"] == true && LINK_OPS.contains(&op) && bytes > 0.0 && us > 0.0 {
                        let key = LinkKey { transport: transport.into(), op: op.into(), ranks: n };
                        links.entry(key).or_default().push(Message { bytes, s: us / 1e6 });
                    }
                }
            }
        }
        Ok(links)
    }

    fn table(self, cores: usize, crowding: f64, links: BTreeMap<LinkKey, Vec<Message>>) -> Machine {
        let mut kernels: BTreeMap<KernelKey, Vec<Sample>> = BTreeMap::new();
        let (mut all_slow, mut all_taken) = (0.0, 0.0);
        for ((key, shape), runs) in self.runs {
            let (mut slow, mut taken) = (0.0, 0.0);
            let places = runs.places.len() as f64;
            for (_, took) in runs.places {
                let mut wall: Vec<f64> = took.iter().map(|t| t.wall_s).collect();
                let cpu: Vec<f64> = took.iter().map(|t| t.cpu_s).collect();
                slow += quantile(&mut wall, 0.75) / places;
                taken += seconds(&wall, &cpu) / places;
            }
            // Spans are of whole nanoseconds.
            let taken = taken.max(1e-9);
            (all_slow, all_taken) = (all_slow + slow, all_taken + taken);
            let sample = Sample { shape: shape.map(f64::from_bits), per_s: runs.work / taken };
            kernels.entry(key).or_default().push(sample);
        }
        no_faster_side_by_side(&mut kernels);
        let mut gaps = self.gaps;
        Machine {
            host: train::host(),
            cpu: cpu(),
            cores,
            memory_bytes: memory_bytes(),
            phalanx: env!("CARGO_PKG_VERSION").into(),
            measured: iso_date(train::now_us() / 1_000_000),
            op_gap_s: quantile(&mut gaps, UNDISTURBED_SHARE),
            spread: (all_slow / f64::max(all_taken, 1e-9) - 1.0).clamp(0.0, SPREAD_MAX),
            crowding,
            kernels,
            links,
        }
    }
}

/// What a step of one rank took.
struct Recorded {
    wall_s: f64,
    /// Seconds between ops, on average.
    gap_s: f64,
    /// Block, op, micro-batch and what it took.
    ops: Vec<(u32, u32, u32, Took)>,
}

/// Lets ranks that do not talk step at the same time until the budget is spent, and gives back what each recorded.
fn side_by_side(steppers: Vec<Stepper>, budget: Duration) -> Result<Vec<(Stepper, Vec<Recorded>)>> {
    const LEAST: usize = 2;
    const MOST: usize = 60;
    let barrier = Barrier::new(steppers.len());
    let first = std::sync::Mutex::new(Duration::ZERO);
    std::thread::scope(|scope| {
        let run = |mut stepper: Stepper| {
            let (barrier, first) = (&barrier, &first);
            scope.spawn(move || {
                // Everyone comes to every meeting, also after a failure. The first step touches the memory.
                let mut failure = stepper.step().err();
                barrier.wait();
                let start = Instant::now();
                failure = failure.or(stepper.step().err());
                let took = start.elapsed();
                let mut recorded = vec![record(&stepper, took.as_secs_f64())];
                let mut longest = first.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                *longest = took.max(*longest);
                drop(longest);
                barrier.wait();
                let took = *first.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let fits = budget.as_nanos() / took.as_nanos().max(1);
                let steps = (fits as usize).clamp(LEAST, MOST);
                for _ in 1..steps {
                    barrier.wait();
                    let start = Instant::now();
                    failure = failure.or(stepper.step().err());
                    recorded.push(record(&stepper, start.elapsed().as_secs_f64()));
                }
                failure.map_or(Ok((stepper, recorded)), Err)
            })
        };
        let all: Vec<_> = steppers.into_iter().map(run).collect();
        all.into_iter().map(joined).collect()
    })
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn record(stepper: &Stepper, wall_s: f64) -> Recorded {
    let spans = stepper.exec.spans.all();
    let took =
        |s: &train::Span| Took { wall_s: (s.end_ns - s.start_ns) as f64 / 1e9, cpu_s: s.cpu_ns as f64 / 1e9 };
    let ops: Vec<_> = spans.iter().map(|s| (s.block, s.op, s.micro_batch, took(s))).collect();
    let busy: f64 = ops.iter().map(|o| o.3.wall_s).sum();
    let gap_s = (wall_s - busy).max(0.0) / ops.len().max(1) as f64;
    Recorded { wall_s, gap_s, ops }
}

fn load(keys: &str) -> Result<RunSpec> {
    let mut set: Vec<String> = keys.split_whitespace().map(str::to_owned).collect();
    let vocab =
        set.iter().find_map(|k| k.strip_prefix("model.vocab=")?.parse::<usize>().ok()).unwrap_or(4096);
    set.push(format!("data.vocab_size={}", vocab.min(4096)));
    RunSpec::load(None, &set, &RunSpec::no_files).context("a program of the calibration")
}

/// What an op usually takes: the clock's word, unless it is far above the work done, because something else had the
/// cores. The fastest runs would promise what a machine that others share seldom gives, and side by side they are the
/// ones in which the other ranks happened to rest.
fn seconds(wall: &[f64], cpu: &[f64]) -> f64 {
    const FAR: f64 = 1.15;
    let median = |values: &[f64]| quantile(&mut values.to_vec(), 0.5);
    let (wall, cpu) = (median(wall), median(cpu));
    if cpu > 0.0 && wall > FAR * cpu { cpu } else { wall }
}

/// Others at work make no kernel faster: where it seems so, the rank alone was disturbed less.
fn no_faster_side_by_side(kernels: &mut BTreeMap<KernelKey, Vec<Sample>>) {
    let alone: BTreeMap<KernelKey, Vec<Sample>> =
        kernels.iter().filter(|(k, _)| k.beside == 1).map(|(k, s)| (k.clone(), s.clone())).collect();
    for (key, samples) in kernels.iter_mut().filter(|(k, _)| k.beside > 1) {
        let Some(alone) = alone.get(&KernelKey { beside: 1, ..key.clone() }) else { continue };
        for sample in samples {
            let same = alone.iter().find(|a| a.shape == sample.shape);
            sample.per_s = same.map_or(sample.per_s, |a| sample.per_s.min(a.per_s));
        }
    }
}

/// The value that the share `q` of `values` is not above.
pub(super) fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = (q * values.len().saturating_sub(1) as f64).round() as usize;
    values.get(at).copied().unwrap_or(0.0)
}

/// Writes a file under a temporary name and renames it, so that nobody reads half of it.
fn write(path: &Path, text: &str) -> Result<()> {
    let io = |e: std::io::Error| {
        Error::io("write calibration", path, &e).hint("name a file in a writable folder with --output")
    };
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(io)?;
    }
    let temp = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temp, text).and_then(|()| std::fs::rename(&temp, path)).map_err(|e| {
        let _ = std::fs::remove_file(&temp);
        io(e)
    })
}

fn summary(m: &Machine, path: &Path) -> Value {
    let best = |kind: &str| {
        let of = m.kernels.iter().filter(|(k, _)| k.kind == kind && k.storage == "f32" && k.beside == 1);
        let rates = of.map(|(k, s)| {
            let best = s.iter().map(|s| s.per_s).fold(0.0, f64::max);
            (k.threads.to_string(), Value::from(best / 1e9))
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
        "load_average": load_average(),
    })
}

/// The name of this machine's processor.
pub(crate) fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// Memory of the machine; without the system's word enough not to stand in the way.
fn memory_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<usize>().ok());
    kib.map_or(usize::MAX >> 1, |kib| kib << 10)
}

/// The system's load average over the last minute.
pub(super) fn load_average() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Seconds since 1970 as a date in UTC (days to civil date after Hinnant, chrono-compatible low-level date algorithms).
fn iso_date(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (d, m) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let y = year + era * 400 + u64::from(m <= 2);
    format!("{y:04}-{m:02}-{d:02}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(iso_date(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso_date(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(iso_date(1_798_761_599), "2026-12-31T23:59:59Z");
    }

    #[test]
    fn disturbed_repetitions_do_not_count() {
        assert_eq!(seconds(&[9.0, 8.0], &[4.0, 4.0]), 4.0, "never undisturbed");
        assert_eq!(seconds(&[4.2, 4.5, 9.9], &[4.0, 4.1, 4.6]), 4.5);
        assert_eq!(seconds(&[9.0], &[0.0]), 9.0, "no word on the work");
    }

    #[test]
    fn quantiles_of_few_values() {
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.3), 2.0);
        assert_eq!(quantile(&mut [5.0, 1.0, 2.0, 3.0, 4.0], 0.3), 2.0);
        assert_eq!(quantile(&mut [7.0], 0.9), 7.0);
    }
}
