//! What a module that predicts one token more reads beside a step's tokens and targets.

/// Fills in the token and the target behind each of whole sequences of `t` tokens: of a sequence's last token its own
/// target stands for the one, and it has none of the other (`u32::MAX`).
pub(crate) fn look_ahead(
    (tokens, targets): (&[u32], &[u32]),
    (next_tokens, next_targets): (&mut Vec<u32>, &mut Vec<u32>),
    t: usize,
) {
    next_tokens.clear();
    next_targets.clear();
    for (tokens, targets) in tokens.chunks_exact(t).zip(targets.chunks_exact(t)) {
        next_tokens.extend_from_slice(&tokens[1..]);
        next_tokens.push(targets[t - 1]);
        next_targets.extend_from_slice(&targets[1..]);
        next_targets.push(u32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sequence_looks_ahead_inside_itself() {
        const NONE: u32 = u32::MAX;
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        // The second sequence wants nothing of its first token, and nothing of its last.
        let batch = (&[1, 2, 3, 5, 6, 7][..], &[2, 3, 4, NONE, 7, NONE][..]);
        look_ahead(batch, (&mut tokens, &mut targets), 3);
        assert_eq!(tokens, [2, 3, 4, 6, 7, NONE]);
        assert_eq!(targets, [3, 4, NONE, 7, NONE, NONE]);
    }
}
