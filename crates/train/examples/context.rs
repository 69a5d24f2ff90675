//! Times a step over sequences that context-parallel ranks hold parts of, against one rank that holds them whole.
//!
//!     cargo run --release -p phalanx-train --example context -- [TOKENS] [LAYERS] [ROUNDS]
//!
//! Ranks are threads of this process, one thread each. Layouts take turns. Beside the time on the clock stands the CPU
//! time of the rank that worked longest, which others on the machine disturb less, and that of the whole process.

use std::time::Instant;

use comm::World;
use program::{Mode, Request};
use spec::{ContextMode, DType, Layout, ModelSpec, Result};
use train::{Executor, Mesh, StepInputs};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let (tokens, layers, rounds) =
        (args.next().unwrap_or(16_384), args.next().unwrap_or(2), args.next().unwrap_or(2));
    let tiny = ModelSpec::preset("llama-tiny-ref")?;
    let position = match tiny.position {
        spec::Position::Rope(rope) => spec::Position::Rope(spec::Rope { max_positions: tokens, ..rope }),
        learned => learned,
    };
    let model = ModelSpec { layers, position, ..tiny };
    println!("{} with {layers} layers, 1 sequence of {tokens} tokens, f32", model.name);
    for round in 1..=rounds {
        for (cp, context) in [(1, ContextMode::Ring), (2, ContextMode::Ring), (2, ContextMode::Heads)] {
            let layout = Layout { cp, context, ..Layout::default() };
            let before = cpu_s(libc::CLOCK_PROCESS_CPUTIME_ID);
            let ranks = step(&model, &layout, tokens);
            let process = cpu_s(libc::CLOCK_PROCESS_CPUTIME_ID) - before;
            let most = |of: fn(&Rank) -> f64| ranks.iter().map(of).fold(0.0, f64::max);
            println!(
                "round {round} cp={cp} {}: {:.1} s, {:.1} s of CPU on the busiest rank, {process:.1} s in all, {:.2} s \
                 waited, {:.1} MiB a rank, loss {:.6}",
                context.name(),
                most(|r| r.wall_s),
                most(|r| r.cpu_s),
                most(|r| r.waited_s),
                most(|r| r.bytes as f64) / f64::from(1 << 20),
                ranks[0].loss
            );
        }
    }
    Ok(())
}

struct Rank {
    wall_s: f64,
    cpu_s: f64,
    waited_s: f64,
    bytes: usize,
    loss: f64,
}

/// One step of every rank.
fn step(model: &ModelSpec, layout: &Layout, sequence: usize) -> Vec<Rank> {
    let worlds = World::threads(layout.world()).expect("ranks");
    std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| scope.spawn(move || one(model, layout, sequence, world)))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

fn one(model: &ModelSpec, layout: &Layout, sequence: usize, world: World) -> Rank {
    let rank = world.rank();
    let mesh = Mesh::new(world, layout).expect("groups");
    let (sequences, precision, mode, loss) = (1, DType::F32, Mode::Train, Default::default());
    let request = Request {
        model,
        layout,
        sequence,
        sequences,
        precision,
        rank,
        mode,
        loss,
        recipe: Default::default(),
    };
    let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
    exec.initialise(model, 1).expect("weights");
    let id = |at: usize| (at * 7919 % model.vocab) as u32;
    for (row, at) in exec.program.positions().into_iter().flatten().enumerate() {
        exec.tokens()[row] = id(at);
        exec.targets()[row] = id(at + 1);
    }
    let inputs = StepInputs { eps: 1e-8, ..StepInputs::adamw(1, 1e-3, sequence) };
    exec.mesh().barrier().expect("all ranks");
    let (began, cpu) = (Instant::now(), cpu_s(libc::CLOCK_THREAD_CPUTIME_ID));
    let out = exec.step(&inputs).expect("a step");
    Rank {
        wall_s: began.elapsed().as_secs_f64(),
        cpu_s: cpu_s(libc::CLOCK_THREAD_CPUTIME_ID) - cpu,
        waited_s: exec.exposed_comm_s(),
        bytes: exec.allocated_bytes(),
        loss: out.loss,
    }
}

fn cpu_s(clock: libc::clockid_t) -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock is one of the system's and `time` is a place for its answer.
    let known = unsafe { libc::clock_gettime(clock, &raw mut time) } == 0;
    if known { time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9 } else { f64::NAN }
}
