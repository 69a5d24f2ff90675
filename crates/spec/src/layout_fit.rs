//! The layout for the ranks that are left, when some were lost or came.

use crate::{Layout, ModelSpec, PipelineSchedule, Zero};

/// A layout for a number of ranks, and why it is that one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fitted {
    /// At most that many ranks; those beyond it wait.
    pub layout: Layout,
    /// For people.
    pub why: String,
}

impl Layout {
    /// The layout nearest to this one for `ranks` ranks, with the same global batch and, under a fixed tree, the same bits:
    /// itself if it takes as many, else the legal one that uses most ranks without splitting the model further than it was
    /// split, and that keeps tensor, pipeline and context degrees if it can. `None` if not even one rank can run it.
    ///
    /// ```
    /// use spec::{Layout, ModelSpec, Zero};
    /// let model = ModelSpec::preset("tiny")?;
    /// let four = Layout { dp: 4, zero: Zero::Optimizer, ..Layout::default() };
    /// let three = four.fitted(&model, 8, 16, 3).unwrap();
    /// assert_eq!(three.layout, Layout { dp: 2, ..four.clone() });
    /// assert_eq!(three.why, "dp x tp x pp = 2 x 1 x 1, zero 1; 1 of 3 ranks waits, since no such layout takes more than 2");
    /// assert_eq!(four.fitted(&model, 8, 16, 4).unwrap().layout, four);
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn fitted(
        &self,
        model: &ModelSpec,
        sequences: usize,
        sequence: usize,
        ranks: usize,
    ) -> Option<Fitted> {
        self.fitted_where(ranks, &|layout| layout.validate(model, sequences, sequence).is_ok())
    }

    /// [`Layout::fitted`] by a rule of one's own for what is legal.
    pub fn fitted_where(&self, ranks: usize, legal: &dyn Fn(&Layout) -> bool) -> Option<Fitted> {
        let layout = match self.world() == ranks && legal(self) {
            true => self.clone(),
            false => (1..=ranks).rev().find_map(|n| self.nearest(n, legal))?,
        };
        let why = layout.described(ranks);
        Some(Fitted { layout, why })
    }

    /// The legal layout of exactly `n` ranks that is nearest.
    fn nearest(&self, n: usize, legal: &dyn Fn(&Layout) -> bool) -> Option<Layout> {
        let splits = |n: usize, most: usize| (1..=most.min(n)).rev().filter(move |k| n.is_multiple_of(*k));
        let both = splits(n, self.tp).flat_map(|tp| splits(n / tp, self.pp).map(move |pp| (tp, pp)));
        let mut degrees = both
            .flat_map(|(tp, pp)| splits(n / tp / pp, self.cp).map(move |cp| (n / tp / pp / cp, tp, pp, cp)));
        degrees.find_map(|degrees| self.with_degrees(degrees, legal))
    }

    /// This layout with other degrees, and with what depends on them: shards, stages, experts and micro-batches.
    fn with_degrees(
        &self,
        (dp, tp, pp, cp): (usize, usize, usize, usize),
        legal: &dyn Fn(&Layout) -> bool,
    ) -> Option<Layout> {
        let mut layout = Layout { dp, tp, pp, cp, ..self.clone() };
        layout.ep = self.ep.min(layout.stage_ranks());
        if layout.zero > Zero::Off && dp * cp == 1 && self.dp * self.cp > 1 {
            // There is nobody to shard over; sharded state over one rank is the whole.
            layout.zero = Zero::Off;
        }
        layout.shard = self.shard.filter(|shard| layout.zero > Zero::Off && dp.is_multiple_of(*shard));
        if pp != self.pp {
            layout.stage_layers = Vec::new();
        }
        if pp == 1 {
            layout.chunks = 1;
            layout.schedule = PipelineSchedule::OneFOneB;
        }
        layout.sequence_parallel = self.sequence_parallel && tp > 1;
        let micro_batches = (1..=self.micro_batch).rev();
        micro_batches
            .flat_map(|micro_batch| {
                let experts = (1..=layout.ep).rev();
                experts.map(|ep| Layout { micro_batch, ep, ..layout.clone() }).collect::<Vec<_>>()
            })
            .find(legal)
    }

    fn described(&self, ranks: usize) -> String {
        let Layout { dp, tp, pp, cp, zero, .. } = *self;
        let cp = if cp == 1 { String::new() } else { format!(" with cp {cp}") };
        let zero = if zero == Zero::Off { String::new() } else { format!(", zero {}", u8::from(zero)) };
        let layout = format!("dp x tp x pp = {dp} x {tp} x {pp}{cp}{zero}");
        let world = self.world();
        match ranks - world {
            0 => layout,
            1 => format!("{layout}; 1 of {ranks} ranks waits, since no such layout takes more than {world}"),
            n => format!("{layout}; {n} of {ranks} ranks wait, since no such layout takes more than {world}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEQUENCES: usize = 8;
    const SEQUENCE: usize = 16;

    fn model() -> ModelSpec {
        ModelSpec { layers: 4, ..ModelSpec::preset("tiny").expect("a preset") }
    }

    /// Of a layout and a number of ranks: dp, tp, pp and the micro-batch of the fitted one.
    #[track_caller]
    fn check(layout: &Layout, ranks: usize, expected: (usize, usize, usize, usize)) {
        let l = layout.fitted(&model(), SEQUENCES, SEQUENCE, ranks).expect("some layout").layout;
        assert_eq!((l.dp, l.tp, l.pp, l.micro_batch), expected);
    }

    #[test]
    fn what_stays_stays() {
        let dp4 = Layout { dp: 4, micro_batch: 2, ..Layout::default() };
        check(&dp4, 4, (4, 1, 1, 2));
        check(&dp4, 3, (2, 1, 1, 2));
        check(&dp4, 2, (2, 1, 1, 2));
        check(&dp4, 1, (1, 1, 1, 2));
        check(&dp4, 8, (8, 1, 1, 1));
        let pipeline = Layout { dp: 2, pp: 2, ..Layout::default() };
        check(&pipeline, 3, (1, 1, 2, 1));
        check(&pipeline, 2, (1, 1, 2, 1));
        check(&pipeline, 1, (1, 1, 1, 1));
        let zero = Layout { dp: 4, zero: Zero::Parameters, ..Layout::default() };
        let cut = Layout { dp: 2, cp: 2, ..Layout::default() };
        let of = |ranks| cut.fitted(&model(), SEQUENCES, SEQUENCE, ranks).expect("some layout").layout;
        assert_eq!([4, 3, 1].map(|ranks| (of(ranks).dp, of(ranks).cp)), [(2, 2), (1, 2), (1, 1)]);
        let one = zero.fitted(&model(), SEQUENCES, SEQUENCE, 1).expect("one rank").layout;
        assert_eq!(one.zero, Zero::Off);
    }

    proptest! {
        #[test]
        fn it_is_legal_and_uses_no_more_ranks(
            dp in 0u32..4, tp in 0u32..2, pp in 1usize..5, zero in 0u8..4, ranks in 1usize..17,
        ) {
            let zero = Zero::try_from(zero).expect("a stage");
            let layout = Layout { dp: 1 << dp, tp: 1 << tp, pp, zero, ..Layout::default() };
            let model = model();
            prop_assume!(layout.validate(&model, SEQUENCES, SEQUENCE).is_ok());
            let fitted = layout.fitted(&model, SEQUENCES, SEQUENCE, ranks).expect("one rank always can");
            prop_assert!(fitted.layout.world() <= ranks);
            prop_assert!(fitted.layout.validate(&model, SEQUENCES, SEQUENCE).is_ok());
            // The same for everybody who asks, and back where it was when all are back.
            prop_assert_eq!(layout.fitted(&model, SEQUENCES, SEQUENCE, layout.world()).map(|f| f.layout), Some(layout));
        }
    }
}
