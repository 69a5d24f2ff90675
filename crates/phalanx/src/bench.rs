//! `phalanx bench`.

mod checkpoint;
mod machine;
mod predict;
mod step;

use std::time::Duration;

use comm::{BenchOp, Row, TransportChoice};
use serde_json::json;
use spec::{Error, Result};

pub(crate) use machine::{add, calibrate};

use crate::args::{Bench, BenchCommand};
use crate::output;
use crate::ranks::{self, Rank};

pub(crate) fn run(args: &Bench) -> Result<u8> {
    match &args.what {
        BenchCommand::Step(a) => step::run(a),
        BenchCommand::Machine { output, quick, json } => machine::run(output, *quick, *json),
        BenchCommand::Predict(a) => predict::run(a),
        BenchCommand::Checkpoint(a) => checkpoint::run(a),
        BenchCommand::Collectives { ranks, transport, max_bytes, budget_ms, json } => {
            let budget = Duration::from_millis((*budget_ms).max(1));
            collectives(*ranks, transport, *max_bytes, budget, *json)
        }
    }
}

/// `phalanx bench collectives`: ranks of this machine, as processes or threads, or whatever ranks a launcher has started.
fn collectives(
    ranks: usize,
    transport: &str,
    max_bytes: usize,
    budget: Duration,
    as_json: bool,
) -> Result<u8> {
    if ranks < 2 {
        return Err(Error::user(format!("--ranks {ranks}, expected 2 or more"))
            .hint("one rank has nobody to talk to"));
    }
    let choice = match transport {
        "auto" | "shm" => TransportChoice::Shm,
        "tcp" => TransportChoice::Tcp,
        "mpi" => TransportChoice::Mpi,
        "threads" => {
            let rows = on_threads(ranks, max_bytes, budget)?;
            print_rows(&rows, as_json);
            return Ok(0);
        }
        other => {
            return Err(Error::user(format!("--transport {other}, expected auto, shm, tcp, mpi or threads"))
                .hint("auto is shared memory within a machine"));
        }
    };
    ranks::check_mpi(choice)?;
    let Some(rank) = Rank::from_env(choice)? else {
        return ranks::start(ranks, ranks::Losses::default(), &[]);
    };
    let world = rank.world("bench collectives", choice, comm::DEFAULT_TIMEOUT)?;
    let rows = comm::bench_collectives(&world, &BenchOp::ALL, &sizes(max_bytes), budget)?;
    if world.rank() == 0 {
        print_rows(&rows, as_json);
    }
    drop(world);
    rank.leave().map(|()| 0)
}

fn sizes(max_bytes: usize) -> Vec<usize> {
    comm::BENCH_SIZES.iter().copied().filter(|&s| s <= max_bytes).collect()
}

fn on_threads(ranks: usize, max_bytes: usize, budget: Duration) -> Result<Vec<Row>> {
    let worlds = comm::World::threads(ranks)?;
    std::thread::scope(|scope| {
        let run = |w: comm::World| comm::bench_collectives(&w, &BenchOp::ALL, &sizes(max_bytes), budget);
        let all: Vec<_> = worlds.into_iter().map(|w| scope.spawn(move || run(w))).collect();
        let mut rows: Vec<Result<Vec<Row>>> =
            all.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect();
        rows.swap_remove(0)
    })
}

fn print_rows(rows: &[Row], as_json: bool) {
    if as_json {
        let list: Vec<_> = rows
            .iter()
            .map(|r| {
                json!({ "op": r.op, "transport": r.transport, "shared": r.shared, "ranks": r.ranks, "bytes": r.bytes,
                    "us": r.us, "quartile_us": r.quartile_us, "bus_gb_per_s": r.bus_gb_per_s })
            })
            .collect();
        output::print(&serde_json::to_string_pretty(&json!({ "results": list })).expect("numbers are JSON"));
        return;
    }
    for r in rows {
        let place = if r.shared { "placed" } else { "private" };
        output::print(&format!(
            "{:<15} {:<8} {:<8} {} ranks {:>12} B {:>12.1} us {:>9.3} GB/s",
            r.op, r.transport, place, r.ranks, r.bytes, r.us, r.bus_gb_per_s
        ));
    }
}
