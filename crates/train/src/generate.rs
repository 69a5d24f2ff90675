use half::bf16;
use spec::random::mix;
use spec::{DType, Error, Result};

use crate::exec::Executor;
use crate::launch::{Operand, Turn};

/// How to pick the next token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Only this many of the likeliest tokens; 0 for all.
    pub top_k: usize,
    /// Only the likeliest tokens that together hold this share.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Why no more tokens were drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As many as were asked for are there.
    Count,
    /// The model ended the document, or whoever took tokens had enough.
    Stop,
    /// The context is full.
    Full,
}

impl Ended {
    /// One word for it.
    pub fn name(self) -> &'static str {
        match self {
            Ended::Count => "count",
            Ended::Stop => "stop",
            Ended::Full => "full",
        }
    }
}

impl Executor {
    /// Continues `prompt` by up to `tokens` tokens, calling `each` with every one; stops early at `stop` or when `each`
    /// returns false.
    ///
    /// # Errors
    /// If the prompt is empty, longer than the cache, or holds ids outside the vocabulary.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        tokens: usize,
        sampling: Sampling,
        stop: Option<u32>,
        each: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Ended> {
        self.check_prompt(prompt)?;
        let vocab = self.logits_len();
        let mut candidates = Vec::with_capacity(vocab);
        let mut last = 0;
        for (position, &token) in prompt.iter().enumerate() {
            self.feed(token, position)?;
            last = position;
        }
        for n in 0..tokens {
            let token = self.pick(&mut candidates, sampling, n as u64)?;
            if Some(token) == stop || !each(token) {
                return Ok(Ended::Stop);
            }
            last += 1;
            if n + 1 == tokens {
                break;
            }
            if last >= self.positions() {
                return Ok(Ended::Full);
            }
            self.feed(token, last)?;
        }
        Ok(Ended::Count)
    }

    /// The logits after each of these tokens.
    ///
    /// # Errors
    /// As [`Executor::generate`].
    pub fn all_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
        self.check_prompt(tokens)?;
        let mut all = Vec::with_capacity(tokens.len());
        for (position, &token) in tokens.iter().enumerate() {
            self.feed(token, position)?;
            let mut logits = Vec::with_capacity(self.logits_len());
            self.each_logit(&mut |l| logits.push(l))?;
            all.push(logits);
        }
        Ok(all)
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab = self.logits_len();
        if prompt.is_empty() {
            return Err(
                Error::user("a prompt of no tokens, expected at least one").hint("give token ids from 0")
            );
        }
        if prompt.len() > self.positions() {
            return Err(Error::user(format!(
                "a prompt of {} tokens, expected at most {}",
                prompt.len(),
                self.positions()
            ))
            .hint("shorten the prompt, or train with a longer batch.sequence"));
        }
        if let Some(bad) = prompt.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::user(format!("prompt token {bad} is outside the vocabulary of {vocab}"))
                .hint(format!(
                    "give ids from 0 to {}; a tokenizer that gives others is not this model's",
                    vocab - 1
                )));
        }
        Ok(())
    }

    /// Runs one token through the model; the logits of the next one are then in the block's output.
    fn feed(&mut self, token: u32, position: usize) -> Result<()> {
        let to = self.whole(self.program.io.tokens).part(0, 1);
        self.device.copy_in(to, &token.to_ne_bytes())?;
        let block =
            self.program.decode.ok_or_else(|| Error::failure("the program has no generation block"))?;
        self.block(block, Turn { position, ..Turn::default() })
    }

    /// Tokens that the cache, or a sequence, has room for.
    pub(crate) fn positions(&self) -> usize {
        self.program.sequence.max(self.program.mode.positions())
    }

    /// The logits of the next token, after [`Executor::feed`].
    fn logits(&self) -> Option<Operand> {
        self.output(self.program.decode?)
    }

    fn logits_len(&self) -> usize {
        self.logits().map_or(0, |l| l.len())
    }

    fn each_logit(&self, each: &mut dyn FnMut(f32)) -> Result<()> {
        let Some(logits) = self.logits() else { return Ok(()) };
        match logits.dtype {
            DType::Bf16 => self.device.read::<bf16>(logits)?.iter().for_each(|l| each(l.to_f32())),
            _ => self.device.read::<f32>(logits)?.iter().for_each(|l| each(*l)),
        }
        Ok(())
    }

    fn pick(&self, candidates: &mut Vec<(f64, u32)>, s: Sampling, draw: u64) -> Result<u32> {
        candidates.clear();
        self.each_logit(&mut |l| candidates.push((f64::from(l), candidates.len() as u32)))?;
        if candidates.iter().any(|(logit, _)| logit.is_nan()) {
            return Err(Error::user(
                "the model's logits are NaN: some of its weights are, or have grown beyond reason",
            )
            .hint("go back to an earlier checkpoint, or import the model again"));
        }
        Ok(sample(candidates, s, draw))
    }
}

/// Draws from (logit, token) pairs.
fn sample(candidates: &mut Vec<(f64, u32)>, s: Sampling, draw: u64) -> u32 {
    // Ties go to the lower id, so that the draw does not depend on the sort.
    candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if s.temperature <= 0.0 {
        return candidates[0].1;
    }
    if s.top_k > 0 {
        candidates.truncate(s.top_k);
    }
    let top = candidates[0].0;
    let mut total = 0.0;
    for c in candidates.iter_mut() {
        c.0 = ((c.0 - top) / s.temperature).exp();
        total += c.0;
    }
    let mut held = 0.0;
    let keep = candidates.iter().position(|c| {
        held += c.0;
        held >= s.top_p * total
    });
    candidates.truncate(keep.map_or(candidates.len(), |k| k + 1));
    let total: f64 = candidates.iter().map(|c| c.0).sum();
    let mut at = (mix(mix(s.seed) ^ draw) >> 11) as f64 / (1u64 << 53) as f64 * total;
    for c in candidates.iter() {
        at -= c.0;
        if at < 0.0 {
            return c.1;
        }
    }
    candidates[candidates.len() - 1].1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(temperature: f64, top_k: usize, top_p: f64, allowed: &[u32]) {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let mut seen = Vec::new();
        for draw in 0..500 {
            let mut candidates: Vec<(f64, u32)> = logits.iter().copied().zip(0..).collect();
            seen.push(sample(&mut candidates, Sampling { temperature, top_k, top_p, seed: 5 }, draw));
        }
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, allowed);
    }

    #[test]
    fn only_what_the_bounds_allow_is_drawn() {
        check(0.0, 0, 1.0, &[1]);
        check(1.0, 2, 1.0, &[1, 2]);
        check(1.0, 0, 0.6, &[1]);
        check(1.0, 0, 0.8, &[1, 2]);
        check(3.0, 0, 1.0, &[0, 1, 2, 3]);
    }
}
