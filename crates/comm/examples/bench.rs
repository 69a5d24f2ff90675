//! Measures the collectives between processes: `bench RANKS [auto|tcp] [all]`. It starts its own ranks.

use comm::{BENCH_SIZES, BenchOp, Bootstrap, OpKind, StoreClient, StoreServer, TransportChoice, World};
use std::process::Command;
use std::time::Duration;

fn main() -> spec::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let ranks: usize = args.first().and_then(|a| a.parse().ok()).unwrap_or(2);
    let tcp = args.iter().any(|a| a == "tcp");
    let second = Duration::from_secs(1);
    if let Ok(rank) = std::env::var("BENCH_RANK") {
        let store = StoreClient::connect(&std::env::var("BENCH_STORE").unwrap_or_default(), 10 * second)?;
        let mut b = Bootstrap::new(rank.parse().unwrap_or(0), ranks, store, "bench");
        b.transport = if tcp { TransportChoice::Tcp } else { TransportChoice::Auto };
        let world = World::connect(&b)?;
        let all = args.iter().any(|a| a == "all");
        let reduce: Vec<_> =
            BenchOp::ALL.into_iter().filter(|op| all || op.kind == OpKind::AllReduce).collect();
        let rows = comm::bench_collectives(&world, &reduce, &BENCH_SIZES[..9], second / 4)?;
        for r in rows.iter().filter(|_| world.rank() == 0) {
            let kib = r.bytes / 1024;
            let buffers = if r.shared { "shared" } else { "private" };
            println!(
                "{:<14} {:<4} {buffers:<7} n={} {kib:>7} KiB {:>11.1} us {:>8.3} GB/s",
                r.op, r.transport, r.ranks, r.us, r.bus_gb_per_s
            );
        }
        return Ok(());
    }
    let server = StoreServer::start(std::net::SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let exe = std::env::current_exe().map_err(|e| spec::Error::failure(e.to_string()))?;
    let start = |rank: usize| {
        let (rank, addr) = (rank.to_string(), server.addr().to_string());
        Command::new(&exe).args(&args).env("BENCH_RANK", rank).env("BENCH_STORE", addr).spawn()
    };
    let children: Vec<_> = (0..ranks).map(start).collect();
    for child in children {
        let status = child.and_then(|mut c| c.wait());
        if !status.is_ok_and(|s| s.success()) {
            return Err(spec::Error::failure("a rank failed"));
        }
    }
    Ok(())
}
