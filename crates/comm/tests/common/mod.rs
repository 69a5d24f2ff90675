//! Worlds of every transport inside one process, and the sums they must arrive at.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod mpi;

use comm::{Bootstrap, StoreClient, StoreServer, TransportChoice, World, bf16};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How the ranks of a test reach each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Threads,
    Shm,
    Tcp,
    /// Hosts of so many ranks each.
    Hosts(usize),
    /// MPI alone, in processes that [`mpi::under_mpiexec`] has started.
    Mpi,
    /// Hosts of so many ranks each, with MPI between them.
    MpiHosts(usize),
}

pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// Of worlds of sessions that are called so: long enough to start, short enough to wait for.
const SHORT: (&str, Duration) = ("still", Duration::from_secs(2));

pub(crate) fn serve() -> (StoreServer, StoreClient) {
    let server = StoreServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let client = StoreClient::connect(&server.addr().to_string(), TIMEOUT).unwrap();
    (server, client)
}

/// Rank `rank` of `n`; hosts have loopback addresses of their own.
pub(crate) fn bootstrap(kind: Kind, rank: usize, n: usize, store: StoreClient, session: &str) -> Bootstrap {
    let mut b = Bootstrap::new(rank, n, store, session);
    b.timeout = if session == SHORT.0 { SHORT.1 } else { TIMEOUT };
    b.transport = match kind {
        Kind::Tcp => TransportChoice::Tcp,
        Kind::Mpi => TransportChoice::Mpi,
        _ => TransportChoice::Auto,
    };
    b.has_mpi = matches!(kind, Kind::MpiHosts(_));
    if let Kind::Hosts(local) | Kind::MpiHosts(local) = kind {
        b.host = format!("host-{}/test", rank / local);
        b.bind = Some(std::net::Ipv4Addr::new(127, 0, 0, (1 + rank / local) as u8).into());
    }
    b
}

/// Runs `work` as each of `n` ranks; the results in rank order.
pub(crate) fn run<T: Send>(kind: Kind, n: usize, work: impl Fn(World) -> T + Sync) -> Vec<T> {
    static SESSIONS: AtomicUsize = AtomicUsize::new(0);
    if kind == Kind::Threads {
        let worlds = World::threads_with(n, TIMEOUT).unwrap();
        return std::thread::scope(|s| {
            let threads: Vec<_> = worlds.into_iter().map(|w| s.spawn(|| work(w))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
    }
    if matches!(kind, Kind::Mpi | Kind::MpiHosts(_)) {
        let session = format!("test-{}", SESSIONS.fetch_add(1, Ordering::Relaxed));
        return vec![work(mpi::world(kind, n, &session))];
    }
    let (_server, store) = serve();
    let session = format!("test-{}", SESSIONS.fetch_add(1, Ordering::Relaxed));
    let (store, session, work) = (&store, &session, &work);
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..n)
            .map(|rank| {
                s.spawn(move || {
                    work(World::connect(&bootstrap(kind, rank, n, store.clone(), session)).unwrap())
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// The sum as the contract defines it: halves first, then odd primes ascending, children from left to right.
pub(crate) fn tree_sum(rows: &[Vec<f32>]) -> Vec<f32> {
    if rows.len() == 1 {
        return rows[0].clone();
    }
    let radix =
        if rows.len().is_multiple_of(2) { 2 } else { (3..).find(|p| rows.len().is_multiple_of(*p)).unwrap() };
    let mut parts = rows.chunks(rows.len() / radix).map(tree_sum);
    let first = parts.next().unwrap();
    parts.fold(first, |a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect())
}

/// Values whose sum depends on the order of additions.
pub(crate) fn value(rank: usize, i: usize) -> f32 {
    let h = (rank as u32).wrapping_mul(0x9e37_79b9) ^ (i as u32).wrapping_mul(0x85eb_ca6b).wrapping_add(77);
    let h = (h ^ (h >> 15)).wrapping_mul(0xc2b2_ae35);
    ((h >> 8) as f32 / 65536.0 - 128.0) * if h & 7 == 0 { 1024.0 } else { 1.0 }
}

pub(crate) fn values(rank: usize, count: usize) -> Vec<f32> {
    (0..count).map(|i| value(rank, i)).collect()
}

pub(crate) fn summed(ranks: &[usize], count: usize) -> Vec<f32> {
    tree_sum(&ranks.iter().map(|&r| values(r, count)).collect::<Vec<_>>())
}

pub(crate) fn to_bf16(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|x| bf16::from_f32(*x)).collect()
}

pub(crate) fn summed_bf16(ranks: &[usize], count: usize) -> Vec<bf16> {
    let rounded = |r: &usize| to_bf16(&values(*r, count)).iter().map(|x| x.to_f32()).collect();
    to_bf16(&tree_sum(&ranks.iter().map(rounded).collect::<Vec<_>>()))
}
