//! A model that steps on random tokens, and what its steps take.

use std::collections::BTreeMap;
use std::time::Instant;

use program::Request;
use serde::Serialize;
use spec::stats::quantile;
use spec::{Result, RunSpec};
use train::{Device, Executor, Mesh, StepInputs};

/// One rank of a model that steps on random tokens.
pub struct Stepper {
    run: RunSpec,
    /// Its executor.
    pub exec: Executor,
    threads: usize,
    step: u64,
    loss: f64,
}

/// What the timed steps of all ranks took.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Threads of a rank.
    pub threads: usize,
    /// Timed steps.
    pub steps: usize,
    /// Median seconds of a step.
    pub step_s: f64,
    /// Seconds of the fastest.
    pub best_step_s: f64,
    /// Seconds of each, in order.
    pub steps_s: Vec<f64>,
    /// At the median.
    pub tokens_per_s: f64,
    /// Of the fastest step.
    pub best_tokens_per_s: f64,
    /// 10^9 model FLOP/s of all ranks at the median.
    pub model_gflops: f64,
    /// Best rate of matrix products on all ranks.
    pub gemm_peak_gflops: f64,
    /// Of that rate at the median, 0 to 1.
    pub share_of_peak: f64,
    /// Bytes that the first rank's program places.
    pub peak_bytes_placed: usize,
    /// Bytes that its executor mapped.
    pub peak_bytes_allocated: usize,
    /// Ranks.
    pub ranks: usize,
    /// Bytes that each executor mapped.
    pub rank_bytes: Vec<u64>,
    /// Of the last step, in nats a token.
    pub loss: f64,
}

/// Time of the last step in ops of one name, layers added up.
#[derive(Clone, Debug)]
pub struct OpTime {
    /// The name without the numbers of layers.
    pub name: String,
    /// Nanoseconds.
    pub ns: u64,
    /// FLOPs, 0 of ops that are not counted in them.
    pub flops: u64,
}

impl Stepper {
    /// Opens rank `rank` of `run`; `record` asks for the spans of its ops.
    ///
    /// # Errors
    /// If the layout does not fit the model and the batch, or the memory cannot be had.
    pub fn open(
        run: RunSpec,
        device: Box<dyn Device>,
        record: bool,
        rank: usize,
        mesh: Mesh,
    ) -> Result<Stepper> {
        let threads = device.threads();
        let request = Request::of(&run, rank);
        let mut exec = Executor::on(device, &request, mesh, record)?;
        exec.initialise(&run.model, run.train.seed)?;
        let mut state = 1 + rank as u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32 % below as u32
        };
        exec.tokens().fill_with(|| random(run.model.vocab));
        exec.targets().fill_with(|| random(run.model.vocab));
        exec.behind().as_flattened_mut().fill_with(|| random(run.model.vocab));
        Ok(Stepper { run, exec, threads, step: 0, loss: 0.0 })
    }

    /// One step; its seconds.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn step(&mut self) -> Result<f64> {
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
            momentum: 0.95,
            ema: self.run.train.ema,
            seed: self.run.train.seed,
            clip: Some(1.0),
            stop: false,
            saved: false,
        })?;
        self.loss = out.loss;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Times `steps` steps after two that warm up; every rank calls it, the first gets the report.
    ///
    /// # Errors
    /// If a peer is lost.
    pub fn report(&mut self, steps: usize) -> Result<Option<StepReport>> {
        for _ in 0..2 {
            self.step()?;
        }
        let steps_s: Vec<f64> = (0..steps).map(|_| self.step()).collect::<Result<_>>()?;
        let mine = self.exec.allocated_bytes() as u64;
        let all = self.exec.exchange(&mine.to_le_bytes())?;
        let rank_bytes: Vec<u64> =
            all.iter().map(|b| b.as_slice().try_into().map_or(0, u64::from_le_bytes)).collect();
        if self.exec.program.rank > 0 {
            return Ok(None);
        }
        let mut sorted = steps_s.clone();
        let best_step_s = quantile(&mut sorted, 0.0);
        let step_s = quantile(&mut sorted, 0.5);
        let tokens = (self.run.batch.sequence * self.run.batch.sequences) as f64;
        let model_gflops = self.run.model.flops_per_token(self.run.batch.sequence) * tokens / step_s / 1e9;
        let gemm_peak_gflops = self.exec.peak_gflops() * rank_bytes.len() as f64;
        Ok(Some(StepReport {
            threads: self.threads,
            steps,
            step_s,
            best_step_s,
            steps_s,
            tokens_per_s: tokens / step_s,
            best_tokens_per_s: tokens / best_step_s,
            model_gflops,
            gemm_peak_gflops,
            share_of_peak: model_gflops / gemm_peak_gflops,
            peak_bytes_placed: self.exec.program.memory.total,
            peak_bytes_allocated: self.exec.allocated_bytes(),
            ranks: rank_bytes.len(),
            rank_bytes,
            loss: self.loss,
        }))
    }

    /// Time of the last step by op, longest first; needs spans.
    pub fn by_op(&self) -> Vec<OpTime> {
        let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for s in self.exec.spans.all() {
            let op = &self.exec.program.blocks[s.block as usize].ops[s.op as usize];
            let plain: Vec<&str> = op.name.split('.').filter(|p| p.parse::<u32>().is_err()).collect();
            let sum = sums.entry(plain.join(".")).or_default();
            sum.0 += s.end_ns - s.start_ns;
            sum.1 += op.cost.flops;
        }
        let mut rows: Vec<OpTime> =
            sums.into_iter().map(|(name, (ns, flops))| OpTime { name, ns, flops }).collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.ns));
        rows
    }
}
