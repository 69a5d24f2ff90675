//! `phalanx dash`, and what views of runs ask besides journals.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dash::watch::{Expected, Lookup};
use dash::{Options, serve};
use spec::{Error, Result};
use train::RunDir;

use crate::args::Dash;
use crate::{output, this_machine};

/// Shortest token taken from a file.
const TOKEN_CHARS_MIN: usize = 16;

pub(crate) fn dash(args: &Dash) -> Result<u8> {
    if args.machine != Path::new(this_machine::FILE) {
        // One that is named is there, or is not what was meant.
        this_machine::load(&args.machine)?;
    }
    let token = match &args.token_file {
        Some(path) => Some(read_token(path)?),
        None if !args.bind.is_loopback() => {
            let token = comm::Secret::random_text();
            Some(token.map_err(|e| e.hint("give a token with --token-file"))?)
        }
        None => None,
    };
    let server = serve(Options {
        dirs: args.dirs.clone(),
        bind: SocketAddr::new(args.bind, args.port),
        token,
        lookup: lookup(&args.machine),
    })?;
    output::say("reads only; ends with Ctrl-C. Open this address:");
    output::print(&server.url());
    server.forever();
    Ok(0)
}

/// Run files and the planner, with the calibration file of the machine.
pub(crate) fn lookup(machine: &Path) -> Arc<dyn Lookup> {
    Arc::new(Files { machine: machine.to_owned() })
}

struct Files {
    machine: PathBuf,
}

impl Lookup for Files {
    fn steps_wanted(&self, dir: &Path) -> Option<u64> {
        RunDir::new(dir).load().ok().map(|run| run.train.steps as u64)
    }

    fn expected(&self, dir: &Path, threads: Option<usize>) -> Result<Vec<Expected>> {
        let run = RunDir::new(dir).load()?;
        let table = this_machine::load(&self.machine)?;
        let threads = threads.unwrap_or_else(|| (table.cores / run.layout.world()).max(1));
        let estimate = machine::estimate(&table, &measure::workload(&run, threads, "shm"), &run.layout)?;
        let of_rank = |(rank, r): (usize, &machine::RankEstimate)| {
            r.ops.iter().map(move |o| Expected { op: o.id.0, rank, s: o.s }).collect::<Vec<_>>()
        };
        Ok(estimate.ranks.iter().enumerate().flat_map(of_rank).collect())
    }
}

fn read_token(path: &Path) -> Result<String> {
    let text = train::read(path)
        .map_err(|e| e.context("--token-file").hint("name a file that holds the token with --token-file"))?;
    let token = text.lines().next().unwrap_or_default().trim();
    let is_plain = token.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~".contains(&b));
    if token.len() < TOKEN_CHARS_MIN || !is_plain {
        return Err(Error::user(format!(
            "{} must hold a token of {TOKEN_CHARS_MIN} letters, digits and -_.~ or more",
            path.display()
        ))
        .hint("make one: head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'"));
    }
    Ok(token.to_owned())
}
