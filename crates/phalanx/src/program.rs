//! `phalanx program`.

use program::{Op, Program, Request, verify};
use serde_json::json;
use spec::run::DeviceChoice;
use spec::{Error, Result, RunSpec};

use crate::args::{Program as Args, ProgramCommand, RunArgs};
use crate::{output, show, train};

pub(crate) fn run(args: &Args) -> Result<u8> {
    match &args.what {
        ProgramCommand::Show { run, rank, brief, json } => show_rank(run, *rank, *brief, *json),
        ProgramCommand::Check { run, json } => check(run, *json),
    }
}

fn show_rank(run: &RunArgs, rank: usize, brief: bool, json: bool) -> Result<u8> {
    let run = train::fixed(train::resolve(run)?.run)?;
    let world = run.layout.world();
    if rank >= world {
        return Err(Error::user(format!("rank {rank} of a layout of {world} ranks"))
            .hint(format!("give --rank 0 to {}", world.saturating_sub(1))));
    }
    let threads = threads(&run);
    let program = Program::build(&request(&run, rank), &workspace(&run, threads))?;
    if json {
        output::print(&serde_json::to_string_pretty(&program).expect("a program is plain data"));
    } else {
        output::print(&show::render(&program, !brief));
    }
    Ok(0)
}

/// Programs of small models of as many ranks take some 3 GB.
const RANKS_CHECKED_MAX: usize = 16_384;

fn check(run: &RunArgs, json: bool) -> Result<u8> {
    let run = train::fixed(train::resolve(run)?.run)?;
    let (world, threads) = (run.layout.world(), threads(&run));
    if world > RANKS_CHECKED_MAX {
        return Err(Error::user(format!("a layout of {world} ranks, of which at most {RANKS_CHECKED_MAX} are checked"))
            .hint("all ranks' programs are held at once, some 0.2 MB each or more; lower layout.dp, whose ranks are alike"));
    }
    let build = |rank| Program::verified(&request(&run, rank), &workspace(&run, threads));
    let programs: Vec<Program> = (0..world).map(build).collect::<Result<_>>()?;
    let (checked, found) = verify::world(&programs);
    verify::accept("all passes", &found)?;
    output::print(&match json {
        true => serde_json::to_string_pretty(&json!({ "checked": checked, "violations": found }))
            .expect("plain data"),
        false => format!(
            "{} programs, {} ops, {} messages of a step: every rule holds",
            checked.ranks, checked.ops, checked.messages
        ),
    });
    Ok(0)
}

fn threads(run: &RunSpec) -> usize {
    output::threads(run.run.threads.unwrap_or(0))
}

/// The program as the run's device will have it; `auto` is the CPU here, so that the answer is the same everywhere.
fn request(run: &RunSpec, rank: usize) -> Request<'_> {
    let loss = if on_gpu(run) { cuda::LOSS } else { program::Loss::default() };
    Request { loss, ..Request::of(run, rank) }
}

fn on_gpu(run: &RunSpec) -> bool {
    run.run.device == DeviceChoice::Cuda
}

/// Work space of the kernels of the CPU, or of a Hopper GPU.
fn workspace(run: &RunSpec, threads: usize) -> impl Fn(&Op, &Program) -> usize {
    let gpu = on_gpu(run);
    move |op, p| if gpu { cuda::workspace_len(op, p, true) } else { ::train::workspace_len(op, p, threads) }
}
