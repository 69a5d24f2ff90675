//! The machine at hand: its calibration file, `layout = "auto"`, and `phalanx plan --cluster this`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use machine::search::{Chosen, lacking, search};
use machine::{Machine, Workload};
use serde_json::json;
use spec::{DType, Error, Layout, ModelSpec, NumberFormat, Recompute, Result, RunSpec};
use train::RunDir;

use crate::args::Plan;
use crate::{bench, output, ranks};

/// Where the calibration of this machine lies unless another file is named.
pub(crate) const FILE: &str = "runs/machine.toml";

/// Reads a calibration file.
pub(crate) fn load(path: &Path) -> Result<Machine> {
    let text = train::read(path).map_err(|e| e.hint("measure this machine first: phalanx bench machine"))?;
    Machine::parse(&path.display().to_string(), &text)
}

/// What to do when there is no calibration file yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Measure, quickly: this process alone decides.
    Measure,
    /// Refuse: ranks that somebody else started would disturb each other.
    Refuse,
}

/// Gives a run whose layout is left to this machine the fastest that fits, and says why. A run that was begun under
/// as many ranks keeps its layout.
pub(crate) fn choose(
    run: &mut RunSpec,
    nproc: usize,
    transport: &str,
    missing: Missing,
    fresh: bool,
) -> Result<()> {
    if !fresh && let Some(layout) = begun_with(run, nproc)? {
        output::say(&format!("layout auto: kept from {}: {}", run.run.dir.display(), keys(&layout)));
        set(run, layout);
        return Ok(());
    }
    let path = Path::new(FILE);
    let mut machine = if path.exists() || missing == Missing::Refuse {
        load(path)?
    } else {
        output::say(&format!(
            "layout auto: no calibration in {FILE} yet, measuring this machine first, which takes a minute or two"
        ));
        bench::calibrate(path, true)?
    };
    // MPI was not measured; between ranks that share no memory it is nearest to TCP.
    let transport = if ["tcp", "mpi"].contains(&transport) { "tcp" } else { "shm" };
    if missing == Missing::Measure {
        complete(&mut machine, path, &measure::workload(run, 1, transport), nproc)?;
    }
    let chosen = on(&machine, run, nproc, transport, None)?;
    explain(&chosen, &machine);
    set(run, chosen.best[0].layout.clone());
    Ok(())
}

/// Measures what the calibration in `path` lacks of a run's layouts, which takes seconds, and adds it there. Layouts that
/// need what nothing here measures are left out of the search.
fn complete(machine: &mut Machine, path: &Path, load: &Workload<'_>, ranks: usize) -> Result<()> {
    let lacks = lacking(machine, load, ranks)?;
    if lacks.is_empty() {
        return Ok(());
    }
    let what = lacks.iter().copied().collect::<Vec<_>>().join(", ");
    output::say(&format!("{} knows nothing of {what}: measuring that, which takes seconds", path.display()));
    bench::add(machine, path, &lacks)
}

fn set(run: &mut RunSpec, layout: Layout) {
    run.layout = layout;
    run.auto_layout = false;
}

/// The layout of a run that has saved a checkpoint, if it is one of so many ranks.
fn begun_with(run: &RunSpec, nproc: usize) -> Result<Option<Layout>> {
    let dir = RunDir::of(run);
    if ckpt::latest(&dir.checkpoints())?.is_none() {
        return Ok(None);
    }
    let Ok(earlier) = dir.load() else { return Ok(None) };
    let works = earlier.layout.world() == nproc && run.validate_layout(&earlier.layout).is_ok();
    Ok(works.then_some(earlier.layout))
}

/// Searches the layouts of a run on a machine. What its ranks compute with depends on the file alone, so that every
/// rank that reads it comes to the same answer.
fn on(
    machine: &Machine,
    run: &RunSpec,
    ranks: usize,
    transport: &str,
    experts: Option<&[Vec<f64>]>,
) -> Result<Chosen> {
    let threads = run.run.threads.unwrap_or_else(|| (machine.cores / ranks.max(1)).max(1));
    search(machine, &Workload { experts, ..measure::workload(run, threads, transport) }, ranks)
}

fn explain(chosen: &Chosen, machine: &Machine) {
    let mut say = String::new();
    let mut write = || -> std::fmt::Result {
        write!(say, "layout auto: {} layouts priced from {FILE}", chosen.layouts_estimated)?;
        if chosen.too_large > 0 {
            write!(say, ", {} of them too large", chosen.too_large)?;
        }
        if chosen.not_measured > 0 {
            write!(
                say,
                "; {} others need {}, of which it knows nothing: phalanx bench machine measures it again",
                chosen.not_measured,
                chosen.lacks.iter().copied().collect::<Vec<_>>().join(", ")
            )?;
        }
        if machine.cpu != train::processor() || machine.cores != output::threads(0) {
            write!(say, "; it was measured on {} with {} cores", machine.cpu, machine.cores)?;
        }
        let best = &chosen.best[0];
        write!(
            say,
            "\nlayout auto: {} takes {} a step ({} to {}) and {} a rank",
            keys(&best.layout),
            ms(best.step_s),
            ms(best.step_low_s),
            ms(best.step_high_s),
            crate::show::binary(best.memory_bytes)
        )?;
        if let Some(next) = chosen.best.get(1) {
            write!(
                say,
                "\nlayout auto: next best is {}: {}, {:+.1} %",
                keys(&next.layout),
                ms(next.step_s),
                100.0 * (next.step_s / best.step_s - 1.0)
            )?;
        }
        if best.layout.tp * best.layout.cp > 1 {
            write!(
                say,
                "\nlayout auto: only cuts of products or sequences fit, which change the last bits of sums"
            )?;
        }
        if let Some(faster) = &chosen.faster_with_other_bits {
            write!(
                say,
                "\nlayout auto: {} would take {}, but changes the last bits of sums; set it by hand to have it",
                keys(&faster.layout),
                ms(faster.step_s)
            )?;
        }
        Ok(())
    };
    write().expect("writing to a string");
    output::say(&say);
}

fn ms(s: f64) -> String {
    format!("{:.1} ms", 1e3 * s)
}

/// The keys of a layout that differ from the default, as in a run file.
pub(crate) fn keys(l: &Layout) -> String {
    let mut out = Vec::new();
    for (key, n) in [("dp", l.dp), ("tp", l.tp), ("pp", l.pp), ("cp", l.cp), ("ep", l.ep)] {
        if n > 1 {
            out.push(format!("{key}={n}"));
        }
    }
    if l.deals_heads() {
        out.push("context=heads".into());
    }
    if l.sequence_parallel {
        out.push("sequence_parallel=true".into());
    }
    if u8::from(l.zero) > 0 {
        out.push(format!("zero={}", u8::from(l.zero)));
    }
    if l.pp > 1 {
        out.push(format!("schedule={}", l.schedule.name()));
    }
    if l.chunks > 1 {
        out.push(format!("chunks={}", l.chunks));
    }
    out.push(format!("micro_batch={}", l.micro_batch));
    match l.recompute {
        Recompute::None => {}
        Recompute::Selective => out.push("recompute=selective".into()),
        Recompute::Full => out.push("recompute=full".into()),
    }
    out.join(" ")
}

/// Tells ranks that this process starts which layout it chose.
const CHOSEN: &str = "PHALANX_LAYOUT";

/// The variable that hands a chosen layout to ranks.
pub(crate) fn hand_over(layout: &Layout) -> (String, String) {
    (CHOSEN.to_owned(), serde_json::to_string(layout).expect("a layout is plain data"))
}

/// Takes the layout that the starter of this rank chose; false if somebody else started it.
pub(crate) fn take_over(run: &mut RunSpec) -> Result<bool> {
    if !ranks::started_by_us() {
        return Ok(false);
    }
    let Ok(text) = std::env::var(CHOSEN) else { return Ok(false) };
    let layout =
        serde_json::from_str(&text).map_err(|e| Error::failure(format!("{CHOSEN} holds no layout: {e}")))?;
    set(run, layout);
    Ok(true)
}

/// `phalanx plan --cluster this`.
pub(crate) fn plan(args: &Plan) -> Result<u8> {
    only_here(args)?;
    let path = args.machine.as_deref().unwrap_or(Path::new(FILE));
    let mut machine = load(path)?;
    let run = question(args)?;
    let n = args.accelerators.unwrap_or(machine.cores);
    if n == 0 {
        return Err(Error::user("--accelerators 0, expected at least one rank")
            .hint("leave it out for one rank on each core"));
    }
    complete(&mut machine, path, &measure::workload(&run, 1, "shm"), n)?;
    let start = Instant::now();
    let experts = args.experts_of.as_deref().map(|dir| shares(dir, &run)).transpose()?;
    let chosen = on(&machine, &run, n, "shm", experts.as_deref())?;
    let seconds = start.elapsed().as_secs_f64();
    if args.json {
        let out = answer(&chosen, &machine, &run, n, seconds, args);
        output::print(&serde_json::to_string_pretty(&out).expect("numbers are JSON"));
    } else {
        output::print(&text(&chosen, &machine, &run, n, seconds, args));
    }
    Ok(0)
}

/// Refuses flags that this machine's planner does not ask.
fn only_here(args: &Plan) -> Result<()> {
    let flags = [
        ("--explain", args.explain),
        ("--emit", args.emit.is_some()),
        ("--tokens", args.tokens.is_some()),
        ("--software", args.software.is_some()),
        ("--layout", args.layout.is_some()),
        ("--threads", args.threads > 0),
        ("--rank-map", args.rank_map.is_some()),
        ("--catalog", !args.catalog.is_empty()),
        ("--calibration", args.calibration.is_some()),
    ];
    let given = flags.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag);
    match given.or(crate::economy::given_flag(&args.economy)) {
        Some(flag) => Err(Error::user(format!("{flag} with --cluster this, which takes no notice of it"))
            .hint(format!("leave out {flag}, or name a cluster of the catalogue"))),
        None => Ok(()),
    }
}

/// What to plan for: a run file, or a model with the batch of the default recipe.
fn question(args: &Plan) -> Result<RunSpec> {
    let path = Path::new(&args.model);
    let quoted = serde_json::to_string(&args.model).expect("text");
    let mut set: Vec<String> = [("sequence", args.sequence), ("sequences", args.sequences)]
        .into_iter()
        .filter_map(|(key, n)| n.map(|n| format!("batch.{key}={n}")))
        .collect();
    if let Some(batch) = &args.batch {
        let tokens = crate::planner::tokens("--batch", batch)?;
        set.push(format!("batch.tokens={tokens}"));
    }
    set.extend(args.optimizer.as_ref().map(|kind| format!("optim.kind={kind}")));
    let is_run_file = path.extension().is_some_and(|e| e == "toml");
    // A run file says itself how it stores; a model of the catalogue is taken as clusters take it.
    let format = args.format.as_deref().or((!is_run_file).then_some("bf16"));
    set.extend(format.map(stored).transpose()?.map(|precision| format!("train.precision={precision}")));
    // Planning reads no data, so that no tokenizer has to fit the model.
    let no_data = || "data.prefix=unread".to_owned();
    // Models of the catalogue that take less than the default recipe's sequences get what they take.
    let shorten = |set: &mut Vec<String>, model: &ModelSpec| {
        let usual = RunSpec::load(None, &[], &train::read).map_or(usize::MAX, |run| run.batch.sequence);
        if args.sequence.is_none() && model.max_positions() < usual {
            set.push(format!("batch.sequence={}", model.max_positions()));
        }
    };
    match path.extension().and_then(|e| e.to_str()) {
        Some("toml") => RunSpec::load(Some((&args.model, &train::read(path)?)), &set, &train::read),
        Some("json") => {
            shorten(&mut set, &ModelSpec::from_hf_config(&train::read(path)?)?);
            set.extend([no_data(), format!("model.config={quoted}")]);
            RunSpec::load(None, &set, &train::read)
        }
        _ => {
            shorten(&mut set, &ModelSpec::preset(&args.model)?);
            set.extend([no_data(), format!("model.preset={quoted}")]);
            RunSpec::load(None, &set, &train::read)
        }
    }
}

/// How parameters are stored whose products run in this format.
fn stored(format: &str) -> Result<DType> {
    match NumberFormat::parse(&format.to_lowercase()) {
        Some(NumberFormat::Fp32) => Ok(DType::F32),
        Some(NumberFormat::Bf16) => Ok(DType::Bf16),
        _ => Err(Error::user(format!("format {format}, expected bf16 or fp32 on this machine"))
            .hint("give --format bf16 or --format fp32")),
    }
}

fn answer(
    chosen: &Chosen,
    machine: &Machine,
    run: &RunSpec,
    ranks: usize,
    seconds: f64,
    args: &Plan,
) -> serde_json::Value {
    json!({
        "model": run.model.name,
        "params": run.model.param_count(),
        "cluster": "this",
        "accelerator": machine.cpu,
        "accelerators": ranks,
        "format": run.train.precision.to_string(),
        "sequence": run.batch.sequence,
        "sequences": run.batch.sequences,
        "search": {
            "layouts_priced": chosen.layouts_estimated,
            "layouts_per_s": chosen.layouts_estimated as f64 / seconds.max(1e-9),
            "seconds": seconds,
            "too_large": chosen.too_large,
            "not_allowed": chosen.not_allowed,
            "not_measured": chosen.not_measured,
            "lacks": chosen.lacks,
        },
        "best": &chosen.best[..chosen.best.len().min(args.keep.max(1))],
        "faster_with_other_bits": chosen.faster_with_other_bits,
        "assumptions": assumptions(machine, run, args),
    })
}

fn assumptions(machine: &Machine, run: &RunSpec, args: &Plan) -> Vec<String> {
    let experts = run.model.experts.map(|_| match &args.experts_of {
        Some(dir) => format!("experts are chosen as in {}", dir.display()),
        None => "every expert is chosen as often; --experts-of RUN_DIR takes a run's counts".to_owned(),
    });
    let always = [
        format!("rates measured on {} ({} cores) at {}", machine.cpu, machine.cores, machine.measured),
        "nothing else runs on the machine; tokens are at hand when a step begins".to_owned(),
        "tensor- and context-parallel layouts are set apart, because they change the order of sums"
            .to_owned(),
    ];
    always.into_iter().chain(experts).collect()
}

/// Which share of a layer's tokens each expert got in a run, which must have as many as the one that is planned.
fn shares(dir: &Path, run: &RunSpec) -> Result<Vec<Vec<f64>>> {
    let found = measure::expert_shares(dir)?;
    let model = &run.model;
    let wanted = |layer: usize| model.experts.filter(|_| model.has_experts(layer)).map_or(0, |e| e.count);
    let fits =
        found.len() == model.all_layers() && found.iter().enumerate().all(|(i, s)| s.len() == wanted(i));
    if !fits {
        return Err(Error::user(format!(
            "{} has other layers or experts than {}",
            dir.display(),
            model.name
        ))
        .hint("give a run of the same model"));
    }
    Ok(found)
}

fn text(
    chosen: &Chosen,
    machine: &Machine,
    run: &RunSpec,
    ranks: usize,
    seconds: f64,
    args: &Plan,
) -> String {
    let mut out = String::new();
    let mut write = || -> std::fmt::Result {
        writeln!(
            out,
            "{} ({} parameters) on {ranks} ranks of this machine ({}), {} sequences of {} tokens",
            run.model.name,
            output::count(run.model.param_count() as f64),
            machine.cpu,
            run.batch.sequences,
            run.batch.sequence
        )?;
        writeln!(
            out,
            "{} layouts priced in {seconds:.2} s, {} too large, {} not allowed\n",
            chosen.layouts_estimated, chosen.too_large, chosen.not_allowed
        )?;
        for (i, c) in chosen.best.iter().take(args.keep.max(1)).enumerate() {
            writeln!(
                out,
                "{}. {} ({} to {})  mfu {:.1} %  {} a rank\n   {}",
                i + 1,
                ms(c.step_s),
                ms(c.step_low_s),
                ms(c.step_high_s),
                100.0 * c.mfu,
                crate::show::binary(c.memory_bytes),
                keys(&c.layout)
            )?;
        }
        if let Some(c) = &chosen.faster_with_other_bits {
            writeln!(out, "\nfaster, with other bits: {}  {}", ms(c.step_s), keys(&c.layout))?;
        }
        writeln!(out, "\nassumed")?;
        assumptions(machine, run, args).iter().try_for_each(|a| writeln!(out, "  {a}"))
    };
    write().expect("writing to a string");
    out
}
