//! `phalanx bench step`: one model on random tokens, alone or over several ranks.

use std::fmt::Write as _;
use std::io::BufRead;

use comm::TransportChoice;
use kernels::Backend;
use measure::Stepper;
use measure::stepper::OpTime;
use spec::{Error, Result, RunSpec};
use train::Mesh;

use crate::args::BenchStep;
use crate::device;
use crate::output;
use crate::ranks::{self, Rank};

pub(super) fn run(args: &BenchStep) -> Result<u8> {
    if args.nproc == 0 {
        return Err(Error::user("--nproc 0, expected at least one rank").hint("leave it out for one rank"));
    }
    if args.resident && args.nproc > 1 {
        return Err(Error::user("--resident answers for one rank, found --nproc above 1")
            .hint("leave out --resident or --nproc"));
    }
    if args.steps == 0 {
        return Err(Error::user("--steps 0, expected at least one timed step").hint("leave it out for 10"));
    }
    output::threads_asked(args.threads)?;
    args.simd.as_deref().map_or(Ok(()), keep_to)?;
    let run = reference(&args.set, args.nproc == 1)?;
    run.layout.validate_world(args.nproc)?;
    let threads = |share: usize| if args.threads > 0 { args.threads } else { share };
    match Rank::from_env(TransportChoice::Auto)? {
        Some(rank) => {
            let world = rank.world(&run.to_toml(), TransportChoice::Auto, comm::DEFAULT_TIMEOUT)?;
            let (me, mesh) = (world.rank(), Mesh::new(world, &run.layout)?);
            let device = device::open(&run.run, rank.env.local_rank, threads(rank.threads()))?;
            let mut s = Stepper::open(run, device, args.ops, me, mesh)?;
            report(&mut s, args)?;
            drop(s);
            rank.leave().map(|()| 0)
        }
        None if args.nproc > 1 => ranks::start(args.nproc, ranks::Losses::default(), &[]),
        None => {
            let device = device::open(&run.run, 0, threads(output::threads(0)))?;
            let mut s = Stepper::open(run, device, args.ops, 0, Mesh::alone())?;
            if args.resident { serve(&mut s) } else { report(&mut s, args) }.map(|()| 0)
        }
    }
}

/// Has kernels use these instructions alone, in this process and, since ranks are started with the same words, in every rank.
fn keep_to(simd: &str) -> Result<()> {
    let known = [("avx512", Backend::Avx512), ("avx2", Backend::Avx2), ("scalar", Backend::Scalar)];
    let Some((_, backend)) = known.into_iter().find(|(name, _)| *name == simd) else {
        return Err(Error::user(format!("--simd {simd}, expected avx512, avx2 or scalar"))
            .hint("leave it out for the best"));
    };
    if kernels::force_backend(backend) {
        return Ok(());
    }
    Err(Error::user(format!("--simd {simd}: this processor has no such instructions"))
        .hint("leave it out for the best"))
}

/// The reference model with overrides; a rank alone runs its batch of 8 sequences at once.
pub(super) fn reference(set: &[String], alone: bool) -> Result<RunSpec> {
    let auto = set.iter().any(|s| ["layout=", "layout.auto"].iter().any(|p| s.trim_start().starts_with(p)));
    let at_once = (alone && !auto).then(|| "layout.micro_batch=8".to_owned());
    let overrides: Vec<String> = at_once.into_iter().chain(set.iter().cloned()).collect();
    crate::train::fixed(RunSpec::load(None, &overrides, &train::read)?)
}

/// Answers `step` lines, so that another program can take turns with this one.
fn serve(stepper: &mut Stepper) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        match line.trim() {
            "step" => output::print(&stepper.step()?.to_string()),
            "quit" => break,
            other => return Err(Error::user(format!("'{other}' on stdin, expected step or quit"))),
        }
    }
    Ok(())
}

/// Times the steps; the first rank prints.
fn report(stepper: &mut Stepper, args: &BenchStep) -> Result<()> {
    let Some(r) = stepper.report(args.steps)? else { return Ok(()) };
    if args.json {
        // By way of a value, whose keys are sorted.
        let value = serde_json::to_value(&r).expect("numbers are JSON");
        output::print(&serde_json::to_string_pretty(&value).expect("numbers are JSON"));
        return Ok(());
    }
    output::print(&format!(
        "{} threads  step {:.1} ms (best {:.1})  {:.0} tokens/s  {:.1} model GFLOP/s  {:.0} % of {:.0} GFLOP/s  {}",
        r.threads,
        1e3 * r.step_s,
        1e3 * r.best_step_s,
        r.tokens_per_s,
        r.model_gflops,
        100.0 * r.share_of_peak,
        r.gemm_peak_gflops,
        crate::show::binary(r.peak_bytes_placed),
    ));
    if args.ops {
        output::print(&by_op(&stepper.by_op()));
    }
    Ok(())
}

fn by_op(rows: &[OpTime]) -> String {
    let mut out = String::new();
    for OpTime { name, ns, flops } in rows {
        let rate =
            if *flops > 0 { format!("{:.1} GFLOP/s", *flops as f64 / *ns as f64) } else { String::new() };
        writeln!(out, "{name:<34} {:>9.3} ms  {rate}", *ns as f64 / 1e6).expect("writing to a string");
    }
    out
}
