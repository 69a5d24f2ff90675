//! Ranks that step side by side, with what each op took.

use std::sync::{Barrier, Mutex, PoisonError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use spec::{Result, RunSpec};
use train::{Cpu, CpuClock, Mesh};

use crate::Stepper;

/// Seconds on the clock, and seconds of work for each of the rank's threads (0 if not known).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Took {
    pub(crate) wall_s: f64,
    pub(crate) cpu_s: f64,
}

/// What one op of a step took.
pub(crate) struct RecordedOp {
    pub(crate) block: u32,
    pub(crate) op: u32,
    pub(crate) micro_batch: u32,
    pub(crate) took: Took,
}

/// What a step of one rank took.
pub(crate) struct RecordedStep {
    pub(crate) wall_s: f64,
    /// Seconds between ops, on average.
    pub(crate) gap_s: f64,
    pub(crate) ops: Vec<RecordedOp>,
}

/// A rank and its recorded steps.
pub(crate) type Recorded = (Stepper, Vec<RecordedStep>);

/// Ranks that do not talk, each a whole model.
pub(crate) fn strangers(
    run: &RunSpec,
    count: usize,
    threads: usize,
    cpu: Option<CpuClock>,
) -> Result<Vec<Stepper>> {
    let open = |_| {
        let mut stepper = Stepper::open(run.clone(), Box::new(Cpu::new(threads)), true, 0, Mesh::alone())?;
        if let Some(clock) = cpu {
            stepper.exec.spans.watch_cpu(clock);
        }
        Ok(stepper)
    };
    (0..count).map(open).collect()
}

/// The ranks of a layout, one thread each. Meshes are founded together, each by its own thread.
pub(crate) fn partners(run: &RunSpec) -> Result<Vec<Stepper>> {
    let worlds = comm::World::threads(run.layout.world())?;
    std::thread::scope(|scope| {
        let open = |world: comm::World| {
            let run = run.clone();
            scope.spawn(move || {
                let (rank, mesh) = (world.rank(), Mesh::new(world, &run.layout)?);
                Stepper::open(run, Box::new(Cpu::new(1)), true, rank, mesh)
            })
        };
        let all: Vec<_> = worlds.into_iter().map(open).collect();
        all.into_iter().map(joined).collect()
    })
}

/// Lets ranks step at the same time until the budget is spent, and gives back what each recorded.
pub(crate) fn side_by_side(steppers: Vec<Stepper>, budget: Duration) -> Result<Vec<Recorded>> {
    const LEAST: usize = 2;
    const MOST: usize = 60;
    let barrier = Barrier::new(steppers.len());
    let first = Mutex::new(Duration::ZERO);
    let run = |mut stepper: Stepper| {
        // Everyone comes to every meeting, also after a failure. The first step touches the memory.
        let mut failure = stepper.step().err();
        barrier.wait();
        let start = Instant::now();
        failure = failure.or(stepper.step().err());
        let took = start.elapsed();
        let mut steps = vec![record(&stepper, took.as_secs_f64())];
        let mut longest = first.lock().unwrap_or_else(PoisonError::into_inner);
        *longest = took.max(*longest);
        drop(longest);
        barrier.wait();
        let took = *first.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = budget.as_nanos() / took.as_nanos().max(1);
        for _ in 1..(fits as usize).clamp(LEAST, MOST) {
            barrier.wait();
            let start = Instant::now();
            failure = failure.or(stepper.step().err());
            steps.push(record(&stepper, start.elapsed().as_secs_f64()));
        }
        failure.map_or(Ok((stepper, steps)), Err)
    };
    std::thread::scope(|scope| {
        let run = &run;
        let all: Vec<_> = steppers.into_iter().map(|s| scope.spawn(move || run(s))).collect();
        all.into_iter().map(joined).collect()
    })
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn record(stepper: &Stepper, wall_s: f64) -> RecordedStep {
    let op = |s: &train::OpSpan| {
        let took = Took { wall_s: (s.end_ns - s.start_ns) as f64 / 1e9, cpu_s: s.cpu_ns as f64 / 1e9 };
        RecordedOp { block: s.block, op: s.op, micro_batch: s.micro_batch, took }
    };
    let ops: Vec<RecordedOp> = stepper.exec.spans.all().iter().map(op).collect();
    let busy: f64 = ops.iter().map(|o| o.took.wall_s).sum();
    let gap_s = (wall_s - busy).max(0.0) / ops.len().max(1) as f64;
    RecordedStep { wall_s, gap_s, ops }
}
