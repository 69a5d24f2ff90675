//! `phalanx`: plan, rehearse and run the training of large models.
//!
//! Flags, rendering, hints and exit codes; everything else lives in the libraries.

// Both panic when nobody reads: `output` does not.
#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

mod alive;
mod args;
mod bench;
mod busy;
mod catalog;
mod ckpts;
mod clusters;
mod compare;
mod watching;
mod data;
mod decide;
mod device;
mod doctor;
mod economy;
mod files;
mod guide;
mod inference;
mod journals;
mod live;
mod models;
mod output;
mod places;
mod planner;
mod program;
mod ranks;
mod replay;
mod show;
mod simulate;
mod stop;
mod survival;
mod this_machine;
mod top;
mod train;
mod usage;
mod validate;
mod version;

use crate::args::{Args, Command};

/// Exit codes: 0 done, 1 something failed, 2 the input was wrong, 130 interrupted.
fn main() -> std::process::ExitCode {
    let args = match usage::parse::<Args>(std::env::args_os()) {
        Ok(Ok(args)) => args,
        Ok(Err(code)) => return code.into(),
        Err(e) => return failed(e),
    };
    let busy = doing(&args.command).map(busy::busy);
    let done = match args.command {
        Command::Train(a) => train::train(&a),
        Command::Generate(a) => models::generate(&a),
        Command::Logits(a) => models::logits(&a),
        Command::Import(a) => models::import(&a),
        Command::Export(a) => models::export(&a),
        Command::Program(a) => program::run(&a),
        Command::Data(a) => data::run(&a),
        Command::Bench(a) => bench::run(&a),
        Command::Plan(a) => planner::run(&a),
        Command::Guide(a) => guide::run(&a),
        Command::Simulate(a) => simulate::run(&a),
        Command::Inference(a) => inference::run(&a),
        Command::Decide(a) => decide::run(&a),
        Command::Validate(a) => validate::run(&a),
        Command::Catalog(a) => catalog::run(&a),
        Command::Compare(a) => compare::run(&a),
        Command::Devices(a) => device::list(&a),
        Command::Launch(a) => clusters::launch(a.args),
        Command::Alive(a) => alive::run(&a),
        Command::Trace(a) => models::trace(&a),
        Command::Dash(a) => watching::dash(&a),
        Command::Top(a) => top::run(&a),
        Command::Journal(a) => journals::run(&a),
        Command::Doctor(a) => doctor::run(&a),
        Command::Completions(a) => version::completions(&a),
        Command::Man(a) => version::man(&a),
        Command::Ckpt(a) => ckpts::run(&a),
        Command::Ledger(a) => survival::ledger(&a),
        Command::Replay(a) => replay::run(&a),
        Command::Chaos(a) => survival::chaos(&a),
        Command::Keys(a) => models::keys(&a),
    };
    drop(busy);
    match done {
        Ok(code) => {
            if let Err(e) = comm::Mpi::end() {
                output::say(&format!("warning: {e}"));
            }
            code.into()
        }
        Err(e) => failed(e),
    }
}

fn failed(e: spec::Error) -> std::process::ExitCode {
    ranks::leave_it_to_the_culprit(&e);
    let e = match e.kind() {
        spec::Kind::User => e.hint("phalanx COMMAND --help says what each flag takes"),
        spec::Kind::Failure => e,
    };
    output::error(&e);
    comm::Mpi::abort(e.exit_code());
    e.exit_code().into()
}

/// What a command may be long about, for those that do not say so themselves.
fn doing(command: &Command) -> Option<&'static str> {
    Some(match command {
        Command::Logits(_) => "running the model",
        Command::Import(_) => "reading and converting the model",
        Command::Export(_) => "reading and converting the checkpoint",
        Command::Program(_) => "building the step program",
        Command::Bench(a) if !matches!(a.what, args::BenchCommand::Machine { .. }) => "measuring",
        Command::Plan(_) => "pricing layouts",
        Command::Guide(_) => "recomputing the guide's figures",
        Command::Simulate(_) => "rehearsing",
        Command::Validate(_) => "pricing runs",
        Command::Compare(_) => "reading journals and pricing the program",
        Command::Trace(_) => "reading journals",
        Command::Ckpt(_) => "reading checkpoints",
        Command::Data(a) if matches!(a.what, args::DataCommand::Show { .. }) => "reading the dataset",
        _ => return None,
    })
}
