//! What tags cost on TCP: two ranks with two worlds, of which one carries no tags, take turns. They are threads that talk
//! over loopback, or processes that meet at an address of rank 0's machine.
//!
//!     cargo run --release -p phalanx-comm --features bench-untagged --example tag_cost -- [ROUNDS] [BYTES]...
//!     tag_cost --rank 0 10.0.0.1:4000 [ROUNDS] [BYTES]...     # there, and with --rank 1 elsewhere

use comm::{Bootstrap, OpTag, Order, StoreClient, StoreServer, TransportChoice, World};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Sessions that the feature leaves without tags begin so.
const WORLDS: [&str; 2] = ["untagged", "tagged"];
const TIMEOUT: Duration = Duration::from_secs(60);
/// Operations that are timed together: one is too short for a clock and a scheduler.
const BATCH: usize = 8;
/// Of the times of a world, the part that others on the machine disturbed least.
const QUANTILES: [(f64, &str); 3] = [(0.02, "fastest 2 %"), (0.1, "fastest 10 %"), (0.5, "median")];

fn main() -> spec::Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let process = (args.first().is_some_and(|arg| arg == "--rank") && args.len() > 2)
        .then(|| (args[1] == "1", args.drain(..3).next_back().unwrap_or_default()));
    let args: Vec<usize> = args.iter().filter_map(|arg| arg.parse().ok()).collect();
    let rounds = args.first().copied().unwrap_or(500);
    let sizes = if args.len() > 1 { &args[1..] } else { &[64 << 10, 1 << 20, 16 << 20][..] };
    if let Some((true, addr)) = &process {
        return rank(1, &StoreClient::connect(addr, TIMEOUT)?, rounds, sizes);
    }
    let here = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let at = process.as_ref().map_or(Ok(here), |(_, addr)| addr.parse());
    let server = StoreServer::start(at.map_err(|e| spec::Error::user(format!("address: {e}")))?)?;
    let store = StoreClient::connect(&server.addr().to_string(), TIMEOUT)?;
    if process.is_some() {
        return rank(0, &store, rounds, sizes);
    }
    std::thread::scope(|s| {
        let other = s.spawn(|| rank(1, &store, rounds, sizes));
        rank(0, &store, rounds, sizes)?;
        other.join().unwrap_or_else(|_| Err(spec::Error::failure("rank 1 panicked")))
    })
}

fn rank(rank: usize, store: &StoreClient, rounds: usize, sizes: &[usize]) -> spec::Result<()> {
    let join = |session: &str| {
        let mut bootstrap = Bootstrap::new(rank, 2, store.clone(), session);
        (bootstrap.transport, bootstrap.timeout) = (TransportChoice::Tcp, TIMEOUT);
        World::connect(&bootstrap)
    };
    let worlds = [join(WORLDS[0])?, join(WORLDS[1])?];
    for &bytes in sizes {
        let mut buffer = vec![1.0f32; bytes / 4];
        compare("all-reduce", bytes, rounds, &worlds, |world| {
            world.all().all_reduce(OpTag(0), &mut buffer, Order::Tree)
        })?;
        let mut buffer = vec![1.0f32; bytes / 4];
        compare("a message there and back", bytes, rounds, &worlds, |world| {
            let (all, other) = (world.all(), 1 - world.rank());
            if world.rank() == 0 {
                all.send(OpTag(0), other, 0, &buffer)?;
                return all.recv(OpTag(0), other, 0, &mut buffer);
            }
            all.recv(OpTag(0), other, 0, &mut buffer)?;
            all.send(OpTag(0), other, 0, &buffer)
        })?;
    }
    Ok(())
}

/// Times of both worlds in turn, the order changing from round to round.
fn compare(
    what: &str,
    bytes: usize,
    rounds: usize,
    worlds: &[World; 2],
    mut once: impl FnMut(&World) -> spec::Result<()>,
) -> spec::Result<()> {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        for which in [round % 2, 1 - round % 2] {
            let began = Instant::now();
            (0..BATCH).try_for_each(|_| once(&worlds[which]))?;
            times[which].push(began.elapsed().as_secs_f64() * 1e6 / BATCH as f64);
        }
    }
    times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
    if worlds[0].rank() == 0 {
        let shown = QUANTILES.map(|(part, name)| {
            let [plain, tagged] = [0, 1].map(|i: usize| times[i][(times[i].len() as f64 * part) as usize]);
            format!("{name} {plain:.1} us, with tags {:+.1} %", 100.0 * (tagged / plain - 1.0))
        });
        println!("{what} of {bytes} bytes: {}", shown.join("; "));
    }
    Ok(())
}
