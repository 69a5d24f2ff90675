//! `phalanx bench`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::BufRead;
use std::time::Instant;

use comm::{BenchOp, Row, TransportChoice};
use program::Request;
use serde_json::json;
use spec::{Result, RunSpec};
use train::{Executor, Mesh, StepInputs};

use crate::args::{Bench, BenchCommand};
use crate::output;
use crate::ranks::{self, Rank};

pub(crate) fn run(args: &Bench) -> Result<u8> {
    match &args.what {
        BenchCommand::Step { threads, steps, set, ops, resident, json } => {
            let mut s = Stepper::new(output::threads(*threads), set, *ops)?;
            if *resident { s.serve() } else { s.report((*steps).max(1), *ops, *json) }
        }
        BenchCommand::Collectives { ranks, transport, max_bytes, json } => {
            collectives(*ranks, transport, *max_bytes, *json)
        }
    }
}

/// `phalanx bench collectives`: ranks of this machine, as processes or threads.
fn collectives(ranks: usize, transport: &str, max_bytes: usize, as_json: bool) -> Result<u8> {
    let choice = match transport {
        "auto" | "shm" => TransportChoice::Shm,
        "tcp" => TransportChoice::Tcp,
        "threads" => {
            let rows = on_threads(ranks, max_bytes)?;
            print_rows(&rows, as_json);
            return Ok(0);
        }
        other => {
            return Err(spec::Error::user(format!("transport {other}, expected auto, shm, tcp or threads")));
        }
    };
    let Some(rank) = Rank::from_env()? else {
        if ranks < 2 {
            return Err(spec::Error::user(format!("{ranks} ranks, expected 2 or more")));
        }
        return ranks::start(ranks);
    };
    let world = rank.world("bench collectives", choice)?;
    let rows = comm::bench_collectives(&world, &BenchOp::ALL, &sizes(max_bytes))?;
    if world.rank() == 0 {
        print_rows(&rows, as_json);
    }
    drop(world);
    rank.leave().map(|()| 0)
}

fn sizes(max_bytes: usize) -> Vec<usize> {
    comm::BENCH_SIZES.iter().copied().filter(|&s| s <= max_bytes).collect()
}

fn on_threads(ranks: usize, max_bytes: usize) -> Result<Vec<Row>> {
    let worlds = comm::World::threads(ranks)?;
    std::thread::scope(|scope| {
        let run = |w: comm::World| comm::bench_collectives(&w, &BenchOp::ALL, &sizes(max_bytes));
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
                    "us": r.us, "bus_gb_per_s": r.bus_gb_per_s })
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

/// A model that steps on random tokens.
struct Stepper {
    run: RunSpec,
    exec: Executor,
    threads: usize,
    step: u64,
    loss: f64,
}

impl Stepper {
    fn new(threads: usize, set: &[String], record: bool) -> Result<Stepper> {
        // The reference step runs its batch of 8 sequences at once.
        let mut overrides = vec!["layout.micro_batch=8".to_owned()];
        overrides.extend(set.iter().cloned());
        let run = RunSpec::load(None, &overrides, &train::read)?;
        run.layout.validate_world(1)?;
        let request = Request {
            model: &run.model,
            layout: &run.layout,
            sequence: run.batch.sequence,
            sequences: run.batch.sequences,
            precision: run.train.precision,
            rank: 0,
            cache: 0,
        };
        let mut exec = Executor::new(&request, threads, Mesh::alone(), record)?;
        exec.initialise(&run.model, run.train.seed)?;
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % below as u32
        };
        exec.tokens().fill_with(|| random(run.model.vocab));
        exec.targets().fill_with(|| random(run.model.vocab));
        Ok(Stepper { run, exec, threads, step: 0, loss: 0.0 })
    }

    /// One step; its seconds.
    fn step(&mut self) -> Result<f64> {
        self.step += 1;
        let start = Instant::now();
        let out = self.exec.step(&StepInputs {
            valid_tokens: (self.run.batch.sequence * self.run.batch.sequences) as u64,
            lr: 3e-4,
            step: self.step,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip: Some(1.0),
            stop: false,
        })?;
        self.loss = out.loss;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Answers `step` lines, so that another program can take turns with this one.
    fn serve(&mut self) -> Result<u8> {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            match line.trim() {
                "step" => output::print(&self.step()?.to_string()),
                "quit" => break,
                other => {
                    return Err(spec::Error::user(format!("'{other}' on stdin, expected step or quit")));
                }
            }
        }
        Ok(0)
    }

    fn report(&mut self, steps: usize, ops: bool, as_json: bool) -> Result<u8> {
        for _ in 0..2 {
            self.step()?;
        }
        let mut seconds = Vec::with_capacity(steps);
        for _ in 0..steps {
            seconds.push(self.step()?);
        }
        seconds.sort_by(f64::total_cmp);
        let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
        let tokens = (self.run.batch.sequence * self.run.batch.sequences) as f64;
        let flops = self.run.model.flops_per_token(self.run.batch.sequence).0 * tokens;
        let peak = self.exec.peak_gflops();
        let memory = &self.exec.program.memory;
        let result = json!({
            "threads": self.threads,
            "steps": steps,
            "step_s": median,
            "best_step_s": best,
            "tokens_per_s": tokens / median,
            "best_tokens_per_s": tokens / best,
            "model_gflops": flops / median / 1e9,
            "gemm_peak_gflops": peak,
            "share_of_peak": flops / median / 1e9 / peak,
            "peak_bytes_placed": memory.total,
            "peak_bytes_allocated": self.exec.allocated_bytes(),
            "loss": self.loss,
        });
        if as_json {
            output::print(&serde_json::to_string_pretty(&result).expect("numbers are JSON"));
        } else {
            output::print(&format!(
                "{} threads  step {:.1} ms (best {:.1})  {:.0} tokens/s  {:.1} model GFLOP/s  {:.0} % of {peak:.0} GFLOP/s  {}",
                self.threads,
                1e3 * median,
                1e3 * best,
                tokens / median,
                flops / median / 1e9,
                100.0 * flops / median / 1e9 / peak,
                crate::show::binary(memory.total),
            ));
        }
        if ops && !as_json {
            output::print(&self.by_op());
        }
        Ok(0)
    }

    /// Time of the last step by op, layers added up.
    fn by_op(&self) -> String {
        let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for s in self.exec.spans.all() {
            let op = &self.exec.program.blocks[s.block as usize].ops[s.op as usize];
            let plain: Vec<&str> = op.name.split('.').filter(|p| p.parse::<u32>().is_err()).collect();
            let sum = sums.entry(plain.join(".")).or_default();
            sum.0 += s.end_ns - s.start_ns;
            sum.1 += op.cost.flops;
        }
        let mut rows: Vec<_> = sums.into_iter().collect();
        rows.sort_by_key(|(_, (ns, _))| std::cmp::Reverse(*ns));
        let mut out = String::new();
        for (name, (ns, flops)) in rows {
            let rate =
                if flops > 0 { format!("{:.1} GFLOP/s", flops as f64 / ns as f64) } else { String::new() };
            writeln!(out, "{name:<34} {:>9.3} ms  {rate}", ns as f64 / 1e6).expect("writing to a string");
        }
        out
    }
}
