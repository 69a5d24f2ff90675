//! What a module that predicts one token more reads beside a step's tokens and targets.

use program::Program;
use spec::{Error, Result};

use crate::exec::Executor;

impl Executor {
    /// What lies behind each run of a sequence's positions that this rank has ([`Program::positions`]): a token and a target,
    /// `u32::MAX` behind the end. To be filled in where the model learns to predict one token more from sequences that cp
    /// cuts; else there are none.
    pub fn behind(&mut self) -> &mut [[u32; 2]] {
        let count = self.program.local_sequences * ends(&self.program).count();
        let wanted = self.program.layout.cp > 1 && self.program.io.next_tokens.is_some();
        let behind = &mut self.batch[5];
        behind.resize(if wanted { 2 * count } else { 0 }, u32::MAX);
        bytemuck::cast_slice_mut(behind)
    }

    /// Puts there what lies behind the runs of this rank's sequence `i`, of which `sample` is all, and the token behind it.
    pub(crate) fn take_behind(&mut self, i: usize, sample: &[u32]) {
        let (ends, token) = (ends(&self.program), |at: usize| sample.get(at).copied().unwrap_or(u32::MAX));
        let count = self.behind().len() / self.program.local_sequences.max(1);
        for (to, end) in self.behind().iter_mut().skip(i * count).take(count).zip(ends) {
            *to = [token(end), token(end + 1)];
        }
    }
}

/// Where the runs of a sequence's positions end that this rank has, one behind the other.
fn ends(p: &Program) -> impl Iterator<Item = usize> + use<> {
    // On a ring they are two, far from each other.
    p.positions().into_iter().skip(usize::from(!p.layout.has_ring())).map(|run| run.end)
}

/// Fills in the token and the target behind each of a batch.
///
/// # Errors
/// If sequences are cut, and nothing is known of what lies behind the cuts.
pub(crate) fn look(p: &Program, batch: &mut [Vec<u32>; 6]) -> Result<()> {
    let [tokens, targets, _, next_tokens, next_targets, behind] = batch;
    let (batch, next) = ((&tokens[..], &targets[..]), (next_tokens, next_targets));
    let t = p.local_sequence();
    if p.layout.cp == 1 {
        // Of a sequence's last token its own target stands for the one, and it has none of the other.
        look_ahead(batch, next, t, &|i| [targets[(i + 1) * t - 1], u32::MAX]);
        return Ok(());
    }
    let runs = ends(p).count();
    let behind: &[[u32; 2]] = bytemuck::cast_slice(behind);
    if behind.len() != runs * p.local_sequences {
        return Err(Error::user("the tokens behind this rank's parts of sequences are not there")
            .hint("take samples with Executor::load_samples, or fill in Executor::behind too"));
    }
    look_ahead(batch, next, t / runs, &|i| behind[i]);
    Ok(())
}

/// The token and the target behind each of runs of `len` tokens: of a run's last one those that lie `behind` it.
fn look_ahead(
    (tokens, targets): (&[u32], &[u32]),
    (next_tokens, next_targets): (&mut Vec<u32>, &mut Vec<u32>),
    len: usize,
    behind: &dyn Fn(usize) -> [u32; 2],
) {
    next_tokens.clear();
    next_targets.clear();
    for (i, (tokens, targets)) in tokens.chunks_exact(len).zip(targets.chunks_exact(len)).enumerate() {
        let [token, target] = behind(i);
        next_tokens.extend_from_slice(&tokens[1..]);
        next_tokens.push(token);
        next_targets.extend_from_slice(&targets[1..]);
        next_targets.push(target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_looks_ahead_inside_itself_and_at_what_lies_behind() {
        const NONE: u32 = u32::MAX;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        // The second run wants nothing of its first token, and nothing of its last.
        let batch = (&[1, 2, 3, 5, 6, 7][..], &[2, 3, 4, NONE, 7, NONE][..]);
        let behind = [[4, 9], [NONE, NONE]];
        look_ahead(batch, (&mut tokens, &mut targets), 3, &|i| behind[i]);
        assert_eq!(tokens, [2, 3, 4, 6, 7, NONE]);
        assert_eq!(targets, [3, 4, 9, 7, NONE, NONE]);
    }
}
