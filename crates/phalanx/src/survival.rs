//! `phalanx ledger` and `phalanx chaos`: what a run went through, and whether it kept its promises.

use std::fmt::Write as _;
use std::path::PathBuf;

use ::chaos::{Chaos as Disturb, Report};
use spec::{Error, Result};
use train::{Audit, Tokens};

use crate::args::{Chaos, Ledger};
use crate::busy::{Progress, busy};
use crate::output;

/// More faults than a night has time for.
const FAULTS_MAX: usize = 100_000;
/// The widest layout that there is.
const RANKS_MAX: usize = 8;

pub(crate) fn ledger(args: &Ledger) -> Result<u8> {
    let busy = busy("reading journals");
    let audit =
        Audit::of(&args.run_dir, &|step, steps| busy.now(format!("comparing step {step} of {steps}")))?;
    drop(busy);
    audit.damage.iter().for_each(|what| output::say(what));
    if args.json {
        let mut json = serde_json::to_value(&audit).expect("numbers are JSON");
        json["exact"] = audit.is_exact().into();
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        output::print(&in_words(&audit));
    }
    Ok(u8::from(!audit.is_exact()))
}

fn in_words(audit: &Audit) -> String {
    let l = &audit.ledger;
    let mut out = String::new();
    let mut write = || -> std::fmt::Result {
        writeln!(
            out,
            "{} steps of {} samples in {} sessions, {} steps redone",
            l.steps, l.samples, l.sessions, l.steps_redone
        )?;
        writeln!(out, "{} samples lost, {} repeated", l.samples_lost, l.samples_repeated)?;
        if !l.skipped.is_empty() {
            writeln!(out, "{} samples left out by decisions on record", l.samples_skipped)?;
        }
        for s in &l.skipped {
            let steps = match s.first_step == s.last_step {
                true => format!("step {}", s.first_step),
                false => format!("steps {} to {}", s.first_step, s.last_step),
            };
            writeln!(out, "  {steps}: {}, {}: {}", s.what, s.action, s.why)?;
        }
        for w in &l.wrong {
            writeln!(out, "  step {}: {} lost, {} repeated", w.step, w.lost, w.repeated)?;
        }
        for m in &l.missing {
            let steps = if m.first == m.last {
                format!("step {}", m.first)
            } else {
                format!("steps {} to {}", m.first, m.last)
            };
            writeln!(out, "records are missing for {steps}: what they drew is not known")?;
        }
        match &audit.tokens {
            Tokens::Equal if l.steps_missing > 0 => {
                writeln!(out, "the tokens of every step on record are those of the data")
            }
            Tokens::Equal => writeln!(out, "the tokens of every step are those of the data"),
            Tokens::Differ { step } => writeln!(out, "the tokens of step {step} are not those of the data"),
            Tokens::Unknown { reason } => writeln!(out, "the tokens could not be compared: {reason}"),
        }
    };
    write().expect("writing to a string");
    out
}

pub(crate) fn chaos(args: &Chaos) -> Result<u8> {
    if !(1..=FAULTS_MAX).contains(&args.faults) {
        return Err(Error::user(format!("--faults {}, expected 1 to {FAULTS_MAX}", args.faults))
            .hint("each takes a second or two"));
    }
    if !(1..=RANKS_MAX).contains(&args.ranks) {
        return Err(Error::user(format!("--ranks {}, expected 1 to {RANKS_MAX}", args.ranks))
            .hint("layouts of so many ranks at most are tried"));
    }
    let dir = directory(args)?;
    let program = std::env::current_exe().map_err(|e| Error::failure(format!("find this program: {e}")))?;
    let shown = Progress::begin("disturbing a run", "{msg:>20} {wide_bar} {pos}/{len} faults {eta}");
    let progress = |what: &str, done: usize, of: usize| {
        shown.now(what, done as u64, of as u64, || format!("{what}, {done} of {of} faults"));
    };
    let (faults, seed, ranks) = (args.faults, args.seed, args.ranks);
    let done = Disturb { program: &program, dir: &dir, faults, seed, ranks, progress: &progress }.run();
    drop(shown);
    let again = format!("phalanx chaos --faults {faults} --seed {seed} --ranks {ranks}");
    let report = done.map_err(|e| e.context(&again).hint(format!("{} has all logs", dir.display())))?;
    print(args, &report, &again);
    let holds = report.holds();
    for (first, last) in &report.unrecorded {
        output::say(&format!("records are missing for steps {first} to {last}"));
    }
    report.damage.iter().for_each(|what| output::say(what));
    if !holds {
        output::say(&format!("{} has both runs and all logs", dir.display()));
    } else if args.dir.is_none() {
        let _ = std::fs::remove_dir_all(&dir);
    }
    Ok(u8::from(!holds))
}

/// An empty directory: the one asked for, or a temporary one.
fn directory(args: &Chaos) -> Result<PathBuf> {
    let dir = args.dir.clone().unwrap_or_else(|| {
        std::env::temp_dir().join(format!("phalanx-chaos-{}-{}", args.seed, std::process::id()))
    });
    let io = |e: std::io::Error| Error::io("make", &dir, &e).hint("name a new directory with --dir");
    std::fs::create_dir_all(&dir).map_err(io)?;
    if std::fs::read_dir(&dir).map_err(io)?.next().is_some() {
        return Err(Error::user(format!("--dir {}: not empty", dir.display()))
            .hint("name a new directory: what is in this one is not touched"));
    }
    std::fs::canonicalize(&dir).map_err(io)
}

fn print(args: &Chaos, r: &Report, again: &str) {
    if args.json {
        let mut json = serde_json::to_value(r).expect("numbers are JSON");
        json["seed"] = args.seed.into();
        json["replay"] = again.into();
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
        return;
    }
    let kinds: Vec<String> = r.kinds.iter().map(|(kind, n)| format!("{n} {kind:?}")).collect();
    let median = |n: usize, s: f64| if n == 0 { "of none".to_owned() } else { format!("{s:.2} s") };
    let bits = if r.bit_identical { "equal to the last bit" } else { "DIFFERENT" };
    for (kind, why) in &r.not_tried {
        output::say(&format!("{kind:?} is not tried: {why}"));
    }
    output::print(&format!(
        "{} faults over {} steps: {}\n{} recoveries, {} of them from the loss of ranks without a restart, known after {} and median {} \
         to the next step (with one {}); {} steps redone\n{} hangs, {} orphans, {} leftovers\n\
         weights and moments of the undisturbed run: {bits}\nsamples lost {}, repeated {}; {} steps without records; \
         tokens {}\nagain: {again}",
        r.faults,
        r.steps,
        kinds.join(", "),
        r.recoveries,
        r.survived,
        median(r.survived, r.median_detection_s),
        median(r.survived, r.median_recovery_s),
        median(r.recoveries - r.survived, r.median_restart_s),
        r.steps_redone,
        r.hangs,
        r.orphans,
        r.leftovers,
        r.samples_lost,
        r.samples_repeated,
        r.steps_unrecorded,
        if r.tokens_equal { "equal" } else { "DIFFERENT" },
    ));
}
