use std::collections::BTreeSet;
use std::fmt;

use crate::{Error, Layout, ModelSpec, Position};

/// What a training stack makes of sizes that an axis does not divide, where this program refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Tolerance {
    /// Ranks hold copies of key and value heads where there are fewer than ranks.
    pub copied_kv_heads: bool,
    /// Heads, columns of feed-forward layers and experts are padded until they divide.
    pub padded: bool,
    /// So are sequences.
    pub padded_sequence: bool,
    /// The embedding and the head count as a layer each when layers are dealt to chunks, which may hold nothing else.
    pub empty_ends: bool,
}

impl Tolerance {
    /// This program's own: none.
    pub const NONE: Tolerance =
        Tolerance { copied_kv_heads: false, padded: false, padded_sequence: false, empty_ends: false };
    /// What any stack was seen to do.
    pub const ALL: Tolerance =
        Tolerance { copied_kv_heads: true, padded: true, padded_sequence: true, empty_ends: true };

    /// The model and the tokens of a sequence as the ranks of `layout` hold them, copies and padding among them: a layout
    /// within this tolerance is legal for these without any, its number of stages apart.
    pub fn held(&self, layout: &Layout, model: &ModelSpec, sequence: usize) -> (ModelSpec, usize) {
        let Layout { tp, cp, ep, .. } = *layout;
        let mut m = model.clone();
        if self.copied_kv_heads {
            m.kv_heads = m.kv_heads.max(tp);
        }
        if self.padded {
            // Keys and values of latent attention are as many as queries; else queries are dealt to them evenly.
            if m.latent.is_some() {
                m.heads = m.heads.next_multiple_of(tp);
                m.kv_heads = m.heads;
            } else {
                m.kv_heads = m.kv_heads.next_multiple_of(tp);
                m.heads = m.heads.next_multiple_of(m.kv_heads);
            }
            m.ffn = m.ffn.next_multiple_of(tp);
            if let Some(e) = &mut m.experts {
                e.count = e.count.next_multiple_of(ep);
                e.shared_ffn = e.shared_ffn.next_multiple_of(tp);
            }
        }
        let mut tokens = sequence;
        if self.padded_sequence {
            // A ring of context-parallel ranks cuts in halves, tensor parallelism takes equal shares.
            let halves = if cp > 1 { layout.context.pieces() } else { 1 };
            let shares = if layout.sequence_parallel || model.experts.is_some() { tp } else { 1 };
            tokens = sequence.div_ceil(cp).next_multiple_of(lcm(halves, shares)) * cp;
        }
        if let Position::Learned { max_positions } = &mut m.position {
            *max_positions = (*max_positions).max(tokens);
        }
        (m, tokens)
    }
}

/// What divides `n`, in order.
pub fn divisors(n: usize) -> impl Iterator<Item = usize> {
    let pairs = (1..=n).take_while(|d| d * d <= n).filter(|d| n.is_multiple_of(*d)).flat_map(|d| [d, n / d]);
    pairs.collect::<BTreeSet<_>>().into_iter()
}

/// The least number that both divide.
pub fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}

/// A kind of rule that layouts keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Counts are from one to the most ranks of any machine.
    Sizes,
    /// Context parallelism cuts a sequence into equal pieces, or deals heads evenly.
    Context,
    /// Tensor parallelism takes equal shares of heads, columns and tokens.
    Tensor,
    /// Expert parallelism takes whole experts and divides the ranks of a stage.
    Experts,
    /// ZeRO shards over equal groups of the data-parallel ranks.
    Shards,
    /// Every stage holds a layer.
    Stages,
    /// Ranks, micro-batches and rounds divide the batch.
    Batch,
}

/// Nothing, or the rule that a layout breaks.
pub type Checked<'a> = Result<(), Broken<'a>>;

/// A broken rule. The message is worked out when it is asked for: a search breaks many and reads none.
pub struct Broken<'a> {
    /// Which one.
    pub rule: Rule,
    explain: Box<dyn Fn() -> Error + 'a>,
}

impl fmt::Debug for Broken<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rule.fmt(f)
    }
}

impl From<Broken<'_>> for Error {
    fn from(broken: Broken<'_>) -> Error {
        (broken.explain)()
    }
}

pub(crate) fn broken<'a>(rule: Rule, explain: impl Fn() -> Error + 'a) -> Checked<'a> {
    Err(Broken { rule, explain: Box::new(explain) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ContextMode, Experts, Reduce};
    use proptest::prelude::*;

    prop_compose! {
        fn models()(
            heads in 1usize..9,
            groups in 1usize..4,
            ffn in 1usize..40,
            experts in proptest::option::of((1usize..9, 0usize..3)),
        ) -> ModelSpec {
            let experts = experts.map(|(count, shared_ffn)| Experts {
                count, top_k: 1, ffn: 8, shared_ffn: 6 * shared_ffn, dense_layers: 0, every: 2,
                router: Default::default(),
            });
            let tiny = ModelSpec::preset("tiny").unwrap();
            ModelSpec { heads: heads * groups, kv_heads: heads, ffn, experts, layers: 4, ..tiny }
        }
    }

    prop_compose! {
        fn layouts()(
            tp in 1usize..9, cp in 1usize..4, ep in 1usize..4, dp in 1usize..4, pp in 1usize..6, sp: bool, heads: bool,
        ) -> Layout {
            let sequence_parallel = sp && tp > 1;
            let context = if heads { ContextMode::Heads } else { ContextMode::Ring };
            Layout { dp: dp * ep, tp, pp, cp, context, ep, sequence_parallel, reduce: Reduce::Ring, ..Layout::default() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// One legality: what a tolerance lets pass is legal without any, once sizes are what ranks hold.
        #[test]
        fn what_ranks_hold_of_a_tolerated_layout_is_legal(
            model in models(),
            layout in layouts(),
            sequence in 1usize..70,
            (copied_kv_heads, padded, padded_sequence, empty_ends) in any::<(bool, bool, bool, bool)>(),
        ) {
            let tolerance = Tolerance { copied_kv_heads, padded, padded_sequence, empty_ends };
            let sequences = layout.dp * 2;
            let strict = layout.check(&model, sequences, sequence, Tolerance::NONE).is_ok();
            let tolerated = layout.check(&model, sequences, sequence, tolerance).is_ok();
            let (held, tokens) = tolerance.held(&layout, &model, sequence);
            let legal = layout.check(&held, sequences, tokens, Tolerance::NONE).is_ok();
            prop_assert!(tolerated || !strict, "no tolerance forbids");
            prop_assert_eq!(tolerated, legal, "{:?}", held);
            prop_assert!(!strict || (held.ffn, held.heads, tokens) == (model.ffn, model.heads, sequence));
        }
    }
}
