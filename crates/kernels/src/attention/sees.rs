//! Which keys a query sees: those up to itself, of its document, within its window.

use std::ops::Range;

use crate::dropout::Dropout;

/// What bounds the keys that a query sees, beside its own position, and what else is in the sum of its softmax.
#[derive(Clone, Copy, Debug)]
pub struct Sees<'a, T> {
    /// A query sees this many keys, its own the last of them (Beltagy et al. 2020, arXiv 2004.05150, section 3.1).
    pub window: Option<usize>,
    /// For each row the position at which its document begins: keys before it are not seen.
    pub starts: Option<&'a [u32]>,
    /// For each query head a score without a value, which every softmax sums as well (GPT-OSS, arXiv 2508.10925,
    /// section 2.1; Miller 2023).
    pub sinks: Option<&'a [T]>,
    /// Which probabilities of keys are left out at random.
    pub dropout: Option<AttentionDropout>,
}

/// Probabilities of keys that are left out at random, after the softmax, whose sum counts them (GPT-2's `attn_pdrop`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDropout {
    /// How many, and the key of what is drawn for sequence, head, query and key.
    pub of: Dropout,
    /// Place of the first sequence in the global batch.
    pub sequence: usize,
    /// Place of the first query head among the model's.
    pub head: usize,
}

impl AttentionDropout {
    /// What the probability that a query of a sequence and head gives a key is multiplied by: sequence and head as they are
    /// counted here, query and key by their positions.
    pub fn factor(&self, sequence: usize, head: usize, query: usize, key: usize) -> f32 {
        self.plane(head).of(self.row(sequence, query), key)
    }

    fn plane(&self, head: usize) -> Dropout {
        self.of.of_plane((self.head + head) as u64)
    }

    fn row(&self, sequence: usize, query: usize) -> u64 {
        ((self.sequence + sequence) as u64) << 32 | query as u64
    }
}

impl<T> Sees<'_, T> {
    /// Every key up to its own.
    pub const ALL: Self = Sees { window: None, starts: None, sinks: None, dropout: None };

    pub(super) fn check(&self, rows: usize, heads: usize) {
        assert!(self.window != Some(0), "a window of no keys");
        assert!(self.starts.is_none_or(|s| s.len() == rows), "starts of documents");
        assert!(self.sinks.is_none_or(|s| s.len() == heads), "sinks");
    }

    /// Whether some query may see none of the keys of a block that others see.
    pub(super) fn bounds(&self) -> bool {
        self.window.is_some() || self.starts.is_some()
    }

    /// What the queries of one sequence see of `seq` rows each.
    pub(super) fn of<'b>(&'b self, span: &'b Queries, sequence: usize, seq: usize) -> View<'b> {
        let starts = self.starts.map(|s| &s[sequence * seq..(sequence + 1) * seq]);
        View { span, window: self.window, starts, sequence, dropout: self.dropout.as_ref() }
    }
}

/// Positions of the rows of a sequence that are at hand: `half` of them from `front` on, the rest from `back` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    half: usize,
    front: usize,
    back: usize,
}

impl Places {
    /// All of a sequence.
    pub(super) fn whole(seq: usize) -> Places {
        Places { half: seq, front: 0, back: seq }
    }

    /// The `seq` rows of a rank of a ring: a piece from the front of the sequence, and its mirror from the back.
    pub(super) fn of(rank: usize, ranks: usize, seq: usize) -> Places {
        let half = seq / 2;
        Places { half, front: rank * half, back: (2 * ranks - 1 - rank) * half }
    }

    fn position(&self, row: usize) -> usize {
        if row < self.half { self.front + row } else { self.back + row - self.half }
    }

    /// How many rows lie before a position.
    fn before(&self, position: usize) -> usize {
        let front = position.saturating_sub(self.front).min(self.half);
        front + position.saturating_sub(self.back)
    }
}

/// Some queries of a sequence, and the first `keys` rows of keys, of which the query in row i sees those up to `i + shift`
/// at most.
#[derive(Clone, Debug)]
pub(super) struct Queries {
    pub(super) queries: Range<usize>,
    pub(super) keys: usize,
    pub(super) shift: usize,
    /// Where the queries stand in the sequence.
    pub(super) at: Places,
    /// Where the keys do.
    pub(super) of: Places,
}

impl Queries {
    /// All queries of a sequence, each with the keys up to itself.
    pub(super) fn causal(seq: usize, at: Places) -> Queries {
        Queries { queries: 0..seq, keys: seq, shift: 0, at, of: at }
    }
}

/// What the queries of one sequence see.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    span: &'a Queries,
    window: Option<usize>,
    starts: Option<&'a [u32]>,
    sequence: usize,
    dropout: Option<&'a AttentionDropout>,
}

impl View<'_> {
    /// The first row of keys that the query in a row sees. Never less than that of a row before.
    pub(super) fn first(&self, row: usize) -> usize {
        let position = self.span.at.position(row);
        let window = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        let document = self.starts.map_or(0, |s| s[row] as usize);
        self.span.of.before(window.max(document))
    }

    /// Those of `count` keys from row `first` on that the query in a row sees; where it sees none, the range is empty and
    /// lies where it would.
    pub(super) fn of(&self, row: usize, first: usize, count: usize) -> Range<usize> {
        let end = (row + self.span.shift + 1).saturating_sub(first).min(count);
        self.first(row).saturating_sub(first).min(end)..end
    }

    /// What the probabilities of keys from row `first` on are multiplied by, for the query of a head in a row; `None` where
    /// all are kept.
    pub(super) fn kept<'b>(
        &self,
        (head, row): (usize, usize),
        first: usize,
        factors: &'b mut [f32],
    ) -> Option<&'b [f32]> {
        let dropout = self.dropout?;
        let (of, query) = (dropout.plane(head), dropout.row(self.sequence, self.span.at.position(row)));
        // Positions go on but for where the back half of the rows begins.
        let half = self.span.of.half.saturating_sub(first).min(factors.len());
        let (front, back) = factors.split_at_mut(half);
        of.of_row(query, self.span.of.position(first), front);
        of.of_row(query, self.span.of.position(first + half), back);
        Some(factors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What rank 0 of two sees of its own 8 rows of 16 and of the other's: positions 0 to 3 and 12 to 15, and 4 to 11.
    #[test]
    fn windows_reach_over_pieces() {
        let check = |of: usize, shift: usize, row: usize, expected: Range<usize>| {
            let (at, of) = (Places::of(0, 2, 8), Places::of(of, 2, 8));
            let span = Queries { queries: 0..8, keys: 8, shift, at, of };
            let sees = Sees::<f32> { window: Some(4), ..Sees::ALL };
            assert_eq!(sees.of(&span, 0, 8).of(row, 0, 8), expected, "row {row}");
        };
        check(0, 0, 3, 0..4);
        check(0, 0, 4, 4..5);
        check(0, 0, 7, 4..8);
        check(1, 100, 4, 5..8);
        check(1, 100, 6, 7..8);
        check(1, 100, 7, 8..8);
    }
}
