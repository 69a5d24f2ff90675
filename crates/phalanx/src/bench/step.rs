//! `phalanx bench step`: one model on random tokens, alone or over several ranks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::BufRead;
use std::time::Instant;

use comm::TransportChoice;
use program::Request;
use serde_json::json;
use spec::{Error, Result, RunSpec};
use train::{Executor, Mesh, StepInputs};

use crate::args::BenchStep;
use crate::output;
use crate::ranks::{self, Rank};

pub(super) fn run(args: &BenchStep) -> Result<u8> {
    if args.nproc == 0 {
        return Err(Error::user("--nproc 0, expected at least one rank").hint("leave it out for one rank"));
    }
    if args.resident && args.nproc > 1 {
        return Err(Error::user("--resident answers for one rank, found --nproc above 1")
            .hint("leave out --resident or --nproc"));
    }
    let run = reference(&args.set, args.nproc == 1)?;
    run.layout.validate_world(args.nproc)?;
    let steps = args.steps.max(1);
    let threads = |share: usize| if args.threads > 0 { args.threads } else { share };
    match Rank::from_env()? {
        Some(rank) => {
            let world = rank.world(&run.to_toml(), TransportChoice::Auto)?;
            let (me, mesh) = (world.rank(), Mesh::new(world, &run.layout)?);
            let mut s = Stepper::open(run, threads(rank.threads()), args.ops, me, mesh)?;
            s.report(steps, args.ops, args.json)?;
            drop(s);
            rank.leave().map(|()| 0)
        }
        None if args.nproc > 1 => ranks::start(args.nproc, &[]),
        None => {
            let mut s = Stepper::open(run, threads(output::threads(0)), args.ops, 0, Mesh::alone())?;
            if args.resident { s.serve() } else { s.report(steps, args.ops, args.json).map(|()| 0) }
        }
    }
}

/// The reference model with overrides; a rank alone runs its batch of 8 sequences at once.
pub(super) fn reference(set: &[String], alone: bool) -> Result<RunSpec> {
    let auto = set.iter().any(|s| ["layout=", "layout.auto"].iter().any(|p| s.trim_start().starts_with(p)));
    let at_once = (alone && !auto).then(|| "layout.micro_batch=8".to_owned());
    let overrides: Vec<String> = at_once.into_iter().chain(set.iter().cloned()).collect();
    crate::train::fixed(RunSpec::load(None, &overrides, &train::read)?)
}

/// A model that steps on random tokens.
pub(super) struct Stepper {
    run: RunSpec,
    pub(super) exec: Executor,
    threads: usize,
    step: u64,
    loss: f64,
}

impl Stepper {
    pub(super) fn open(
        run: RunSpec,
        threads: usize,
        record: bool,
        rank: usize,
        mesh: Mesh,
    ) -> Result<Stepper> {
        let request = Request {
            model: &run.model,
            layout: &run.layout,
            sequence: run.batch.sequence,
            sequences: run.batch.sequences,
            precision: run.train.precision,
            rank,
            mode: program::Mode::Train,
        };
        let mut exec = Executor::new(&request, threads, mesh, record)?;
        exec.initialise(&run.model, run.train.seed)?;
        let mut state = 1 + rank as u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % below as u32
        };
        exec.tokens().fill_with(|| random(run.model.vocab));
        exec.targets().fill_with(|| random(run.model.vocab));
        Ok(Stepper { run, exec, threads, step: 0, loss: 0.0 })
    }

    /// One step; its seconds.
    pub(super) fn step(&mut self) -> Result<f64> {
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
                    return Err(Error::user(format!("'{other}' on stdin, expected step or quit")));
                }
            }
        }
        Ok(0)
    }

    fn report(&mut self, steps: usize, ops: bool, as_json: bool) -> Result<()> {
        for _ in 0..2 {
            self.step()?;
        }
        let mut seconds = Vec::with_capacity(steps);
        for _ in 0..steps {
            seconds.push(self.step()?);
        }
        let mine = self.exec.allocated_bytes() as u64;
        let ranks = self.exec.exchange(&mine.to_le_bytes())?;
        let ranks: Vec<u64> =
            ranks.iter().map(|b| b.as_slice().try_into().map_or(0, u64::from_le_bytes)).collect();
        if self.exec.program.rank > 0 {
            return Ok(());
        }
        let in_order = seconds.clone();
        seconds.sort_by(f64::total_cmp);
        let (best, median) = (seconds[0], seconds[seconds.len() / 2]);
        let tokens = (self.run.batch.sequence * self.run.batch.sequences) as f64;
        let flops = self.run.model.flops_per_token(self.run.batch.sequence).0 * tokens;
        let peak = self.exec.peak_gflops() * ranks.len() as f64;
        let memory = &self.exec.program.memory;
        let result = json!({
            "threads": self.threads,
            "steps": steps,
            "step_s": median,
            "best_step_s": best,
            "steps_s": in_order,
            "tokens_per_s": tokens / median,
            "best_tokens_per_s": tokens / best,
            "model_gflops": flops / median / 1e9,
            "gemm_peak_gflops": peak,
            "share_of_peak": flops / median / 1e9 / peak,
            "peak_bytes_placed": memory.total,
            "peak_bytes_allocated": self.exec.allocated_bytes(),
            "ranks": ranks.len(),
            "rank_bytes": ranks,
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
        Ok(())
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
