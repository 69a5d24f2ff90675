//! `phalanx replay`: a step done again, and who is to blame.

use std::fmt::Write as _;

use spec::{Error, Result};
use train::{Replay, Verdict};

use crate::args;
use crate::busy::Progress;
use crate::output;

/// Exit code 0 if the bits are the same, 1 if not.
pub(crate) fn run(args: &args::Replay) -> Result<u8> {
    if args.step == 0 {
        return Err(Error::user("--step 0, expected a step from 1").hint("the first step of a run is 1"));
    }
    let shown = Progress::begin("doing steps again", "{msg:>20} {wide_bar} {pos}/{len} {eta}");
    let progress = |step: u64, last: u64| {
        shown.now("doing steps again", step, last, || format!("did step {step} of {last} again"));
    };
    let threads = output::threads_asked(args.threads)?;
    let replay = Replay::of(&args.run_dir, args.step, &args.layout, threads, &progress)?;
    drop(shown);
    if args.json {
        let mut json = serde_json::to_value(&replay).expect("numbers are JSON");
        json["says"] = replay.verdict.words().into();
        output::print(&serde_json::to_string_pretty(&json).expect("numbers are JSON"));
    } else {
        output::print(in_words(&replay).trim_end());
    }
    Ok(u8::from(replay.verdict != Verdict::ModelOrData))
}

fn in_words(r: &Replay) -> String {
    let mut out = String::new();
    let from = r.from.as_ref().map_or_else(|| "the beginning".to_owned(), |path| path.display().to_string());
    let mut write = || -> std::fmt::Result {
        writeln!(out, "step {} again, from {from}: {} steps", r.step, r.redone)?;
        let hash = |hash: &Option<String>| hash.clone().unwrap_or_else(|| "-".to_owned());
        let recorded = &r.recorded;
        let done = recorded.action.map(|action| format!("  {action}")).unwrap_or_default();
        writeln!(
            out,
            "{:<24} loss {:.9}  norm {:.9}  hash {}{done}",
            format!("recorded, {} ranks", recorded.world),
            recorded.loss,
            recorded.grad_norm,
            hash(&recorded.hash)
        )?;
        for t in &r.tries {
            let same = if t.differs_at.is_none() { "the same" } else { "DIFFERENT" };
            writeln!(
                out,
                "{:<24} loss {:.9}  norm {:.9}  hash {}  {same}",
                t.layout,
                t.loss,
                t.grad_norm,
                hash(&t.hash)
            )?;
            if let Some(step) = t.differs_at {
                writeln!(out, "  step {step} differs: {}", t.differs_in.join("; "))?;
            }
        }
        r.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))?;
        writeln!(out, "{}", r.verdict.words())
    };
    write().expect("writing to a string");
    out
}
