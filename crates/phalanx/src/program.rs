//! `phalanx program`.

use program::{Program, Request};
use spec::{Error, Result};

use crate::args::{Program as Args, ProgramCommand};
use crate::{output, show, train};

pub(crate) fn run(args: &Args) -> Result<u8> {
    let ProgramCommand::Show { run, rank, brief, json } = &args.what;
    let run = train::fixed(train::resolve(run)?.run)?;
    let world = run.layout.world();
    if *rank >= world {
        return Err(Error::user(format!("rank {rank} of a layout of {world} ranks"))
            .hint(format!("give --rank 0 to {}", world.saturating_sub(1))));
    }
    let request = Request {
        model: &run.model,
        layout: &run.layout,
        sequence: run.batch.sequence,
        sequences: run.batch.sequences,
        precision: run.train.precision,
        rank: *rank,
        mode: program::Mode::Train,
    };
    let threads = output::threads(run.run.threads.unwrap_or(0));
    let program = Program::build(&request, &|op, p| ::train::workspace_len(op, p, threads))?;
    if *json {
        output::print(&serde_json::to_string_pretty(&program).expect("a program is plain data"));
    } else {
        output::print(&show::render(&program, !brief));
    }
    Ok(0)
}
