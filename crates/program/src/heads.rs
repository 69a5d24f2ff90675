//! Heads of attention as one rank holds them.

use serde::Serialize;

/// Heads of the local shard.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Heads {
    /// Query heads.
    pub q: usize,
    /// Key and value heads.
    pub kv: usize,
    /// Width of one head's queries and keys.
    pub dim: usize,
    /// Width of one head's values.
    pub value_dim: usize,
    /// What scores are multiplied by, beside one over the root of `dim` ([`spec::RopeScaling::score_factor`]).
    #[serde(skip_serializing_if = "is_one")]
    pub score_factor: f32,
}

pub(crate) fn is_one(x: &f32) -> bool {
    *x == 1.0
}

impl Heads {
    /// What scores are multiplied by.
    pub fn scale(self) -> f32 {
        self.score_factor * (1.0 / (self.dim as f32).sqrt())
    }

    /// Columns of the packed query, key and value projections.
    pub fn packed(self) -> usize {
        (self.q + self.kv) * self.dim + self.kv * self.value_dim
    }

    /// Columns of the keys and values alone.
    pub fn kv_cols(self) -> usize {
        self.kv * (self.dim + self.value_dim)
    }

    /// Columns of the attention's output.
    pub fn out_cols(self) -> usize {
        self.q * self.value_dim
    }

    /// The heads of the attention's output alone: as many as queries, as wide as values.
    pub fn of_output(self) -> Heads {
        Heads { q: self.q, kv: 0, dim: self.value_dim, value_dim: 0, score_factor: 1.0 }
    }

    /// Those of each of `ranks` ranks that these are dealt to. Fewer key and value heads than ranks are copied.
    ///
    /// ```
    /// let heads = program::Heads { q: 8, kv: 2, dim: 16, value_dim: 16, score_factor: 1.0 };
    /// assert_eq!(heads.dealt(2), program::Heads { q: 4, kv: 1, ..heads });
    /// assert_eq!(heads.dealt(4), program::Heads { q: 2, kv: 1, ..heads });
    /// ```
    pub fn dealt(self, ranks: usize) -> Heads {
        Heads { q: self.q / ranks, kv: self.kv.div_ceil(ranks), ..self }
    }
}
