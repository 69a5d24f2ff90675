use crate::element::{ElementType, OpTag, Order, even_ranges};
use crate::header::OpKind;
use crate::inner::Transport;
use crate::mpi::Mpi;
use crate::op::Op;
use crate::world::World;
use spec::{Error, Result};
use std::time::{Duration, Instant};

/// The usual sizes in bytes: 1 KiB to 256 MiB, in steps of four.
pub const BENCH_SIZES: [usize; 10] =
    [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

/// Bounds on the repetitions of one operation and size.
const MIN_REPEATS: usize = 5;
const MAX_REPEATS: usize = 2000;
const WARM_UP: usize = 3;

/// An operation to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchOp {
    /// Its kind; `Send` measures a message there and back, and halves it.
    pub kind: OpKind,
    /// Whether its buffers are in shared memory, as those of a placed program are, or private.
    pub shared: bool,
}

impl BenchOp {
    /// Every operation on shared buffers, and the all-reduce on private ones too.
    pub const ALL: [BenchOp; 8] = [
        BenchOp { kind: OpKind::AllReduce, shared: true },
        BenchOp { kind: OpKind::AllReduce, shared: false },
        BenchOp { kind: OpKind::ReduceScatter, shared: true },
        BenchOp { kind: OpKind::AllGather, shared: true },
        BenchOp { kind: OpKind::AllToAll, shared: true },
        BenchOp { kind: OpKind::Broadcast, shared: true },
        BenchOp { kind: OpKind::Send, shared: true },
        BenchOp { kind: OpKind::Barrier, shared: true },
    ];
}

/// One measured operation and size.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Name of the operation.
    pub op: &'static str,
    /// The slowest transport between any two of the ranks.
    pub transport: &'static str,
    /// Whether the buffers were in shared memory.
    pub shared: bool,
    /// Number of ranks.
    pub ranks: usize,
    /// Size of the whole buffer, bytes.
    pub bytes: usize,
    /// Median time of the slowest rank, microseconds.
    pub us: f64,
    /// The same for the lower quartile: what the operation takes where nothing else disturbs it.
    pub quartile_us: f64,
    /// Bus bandwidth as nccl-tests define it: bytes that a ring would move per link, over the time, 10^9 bytes/s.
    /// 0 for a barrier.
    pub bus_gb_per_s: f64,
}

/// Measures `ops` at each of `sizes` (bytes of f32) over all ranks, each for about `budget`. Collective: every rank
/// calls it alike and gets the same rows. Over MPI its own all-reduce, whose sums come in another order, is measured too.
///
/// # Errors
/// Memory for the buffers is short, or an operation fails.
pub fn bench_collectives(
    world: &World,
    ops: &[BenchOp],
    sizes: &[usize],
    budget: Duration,
) -> Result<Vec<Row>> {
    let largest = sizes.iter().copied().max().unwrap_or(0).next_multiple_of(4096);
    let arena = world.alloc_shared(2 * largest.max(4096))?;
    let mut private = vec![1.0f32; if ops.iter().any(|op| !op.shared) { largest / 4 } else { 0 }];
    let mut rows = Vec::new();
    for op in ops {
        for &bytes in if op.kind == OpKind::Barrier { &[0][..] } else { sizes } {
            let count = bytes / 4;
            let (input, output) = if op.shared {
                (arena.span(0, count, ElementType::F32)?, arena.span(largest, count, ElementType::F32)?)
            } else {
                let span = crate::element::RawSlice::of(&mut private[..count]);
                (span, span)
            };
            let [us, quartile_us] = measure(world, budget, || {
                let op = operation(world, op.kind, input, output)?;
                // SAFETY: the spans are parts of the arena or of `private`, which nothing else uses.
                op.into_iter().try_for_each(|op| unsafe { world.all().run(OpTag(0), op) })
            })?;
            let half = if op.kind == OpKind::Send { 0.5 } else { 1.0 };
            let (us, quartile_us) = (us * half, quartile_us * half);
            rows.push(Row {
                op: op.kind.name(),
                transport: slowest_transport(world).name(),
                shared: op.shared,
                ranks: world.size(),
                bytes,
                us,
                quartile_us,
                bus_gb_per_s: bus_bytes(op.kind, world.size(), bytes) / us / 1e3,
            });
        }
    }
    if slowest_transport(world) == Transport::Mpi && ops.iter().any(|op| op.kind == OpKind::AllReduce) {
        rows.extend(plain_mpi(world, sizes, budget)?);
    }
    Ok(rows)
}

/// The library's own all-reduce beside ours, on private buffers.
fn plain_mpi(world: &World, sizes: &[usize], budget: Duration) -> Result<Vec<Row>> {
    let Some(mpi) = Mpi::started() else { return Ok(Vec::new()) };
    let largest = sizes.iter().copied().max().unwrap_or(0) / 4;
    let (input, mut output) = (vec![1.0f32; largest], vec![0.0f32; largest]);
    let row = |bytes: usize, [us, quartile_us]: [f64; 2]| Row {
        op: "mpi_allreduce",
        transport: Transport::Mpi.name(),
        shared: false,
        ranks: world.size(),
        bytes,
        us,
        quartile_us,
        bus_gb_per_s: bus_bytes(OpKind::AllReduce, world.size(), bytes) / us / 1e3,
    };
    let measured = sizes.iter().map(|&bytes| {
        let count = bytes / 4;
        let times =
            measure(world, budget, || mpi.all_reduce_unordered(&input[..count], &mut output[..count]))?;
        Ok(row(bytes, times))
    });
    measured.collect()
}

/// What this rank does once; a message goes from rank 0 to the last and back.
fn operation<'a>(
    world: &World,
    kind: OpKind,
    input: crate::element::RawSlice,
    output: crate::element::RawSlice,
) -> Result<Vec<Op<'a>>> {
    let (n, me) = (world.size(), world.rank());
    let ranges = || even_ranges(input.count, n).into();
    let order = Order::Tree;
    Ok(vec![match kind {
        OpKind::AllReduce => Op::AllReduce { buffer: input, order },
        OpKind::ReduceScatter => Op::ReduceScatter { input, output: None, ranges: ranges(), order },
        OpKind::AllGather => Op::AllGather { input: None, output: input, ranges: ranges() },
        OpKind::AllToAll => {
            // Equal parts, so that all ranks agree on what each pair exchanges.
            let part = input.count / n;
            let ranges: Vec<_> = (0..n).map(|i| i * part..(i + 1) * part).collect();
            Op::AllToAll { input, input_ranges: ranges.clone().into(), output, output_ranges: ranges.into() }
        }
        OpKind::Broadcast => Op::Broadcast { buffer: input, root: 0 },
        OpKind::Barrier => Op::Barrier,
        OpKind::Send | OpKind::Recv => {
            let there = Op::Send { buffer: input, to: n - 1, channel: 0 };
            let here = Op::Recv { buffer: output, from: n - 1, channel: 0 };
            return Ok(match me {
                _ if n == 1 => vec![],
                0 => vec![there, here],
                _ if me == n - 1 => vec![
                    Op::Recv { buffer: output, from: 0, channel: 0 },
                    Op::Send { buffer: input, to: 0, channel: 0 },
                ],
                _ => vec![],
            });
        }
        OpKind::Join => return Err(Error::failure("founding a group cannot be measured")),
    }])
}

/// Median and lower quartile of the time of `once` in microseconds, each of the rank where it is longest.
fn measure(world: &World, budget: Duration, mut once: impl FnMut() -> Result<()>) -> Result<[f64; 2]> {
    let began = Instant::now();
    for _ in 0..WARM_UP {
        once()?;
    }
    let each = began.elapsed() / WARM_UP as u32;
    let fits = budget.as_nanos() / each.as_nanos().max(1);
    // Ranks must agree on the number: the fewest of all.
    let mut repeats = [(fits as usize).clamp(MIN_REPEATS, MAX_REPEATS) as u32];
    let mut all = vec![0; world.size()];
    all[world.rank()] = repeats[0];
    world.all().all_gather(OpTag(0), &mut all, &even_ranges(world.size(), world.size()))?;
    repeats[0] = all.into_iter().min().unwrap_or(repeats[0]);
    world.barrier()?;
    let mut times = Vec::with_capacity(repeats[0] as usize);
    for _ in 0..repeats[0] {
        let began = Instant::now();
        once()?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    let mut longest = [0.0; 2];
    for (longest, at) in longest.iter_mut().zip([times.len() / 2, times.len() / 4]) {
        let mut all = vec![0.0f64; world.size()];
        all[world.rank()] = times[at].as_secs_f64() * 1e6;
        world.all().all_gather(OpTag(0), &mut all, &even_ranges(world.size(), world.size()))?;
        *longest = all.into_iter().fold(0.0, f64::max);
    }
    Ok(longest)
}

fn slowest_transport(world: &World) -> Transport {
    let others = || (0..world.size()).filter(|r| *r != world.rank()).map(|r| world.transport(r));
    others()
        .find(|t| matches!(t, Transport::Tcp | Transport::Mpi))
        .or_else(|| others().next())
        .unwrap_or(world.transport(world.rank()))
}

/// Bytes over the busiest link of a ring, for a buffer of `bytes`.
fn bus_bytes(kind: OpKind, ranks: usize, bytes: usize) -> f64 {
    let (n, bytes) = (ranks as f64, bytes as f64);
    match kind {
        OpKind::AllReduce => 2.0 * (n - 1.0) / n * bytes,
        OpKind::ReduceScatter | OpKind::AllGather | OpKind::AllToAll => (n - 1.0) / n * bytes,
        OpKind::Broadcast | OpKind::Send | OpKind::Recv => bytes,
        OpKind::Barrier | OpKind::Join => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_is_measured() {
        let rows = std::thread::scope(|s| {
            let worlds = World::threads(2).unwrap();
            let ranks: Vec<_> = worlds
                .into_iter()
                .map(|w| {
                    s.spawn(move || {
                        bench_collectives(&w, &BenchOp::ALL, &[1024], Duration::from_millis(250)).unwrap()
                    })
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(rows[0], rows[1]);
        assert_eq!(rows[0].len(), BenchOp::ALL.len());
        assert!(rows[0].iter().all(|r| r.us > 0.0 && r.transport == "threads" && r.ranks == 2));
    }
}
