//! Steps that are not like others, and what is done about them: decided from what all ranks know alike, and from the
//! run's own settings, so that every rank decides the same, in every layout.
//!
//! PaLM went back some hundred steps before a spike and left out the 200 to 500 batches around it, which the run then
//! got over (Chowdhery et al. 2022, section 5.1): a rollback. Others leave out single updates whose gradient norm stands
//! out: a skip.

use journal::{Action, Trouble};
use serde::{Deserialize, Serialize};
use spec::run::{OnNan, OnSpike, TroubleSpec};

/// Robust standard deviations: of normal noise, 1.4826 times the median absolute deviation is the standard deviation
/// (Rousseeuw and Croux 1993, section 1).
const MAD_TO_STD: f64 = 1.4826;

/// Steps that are all alike make no deviation of a hair a spike: at least this share of the median counts as one.
const LEAST_DEVIATION: f64 = 0.02;

/// A loss and a gradient norm beyond which a step is a spike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Of the mean loss.
    pub loss: f64,
    /// Of the gradient norm before clipping.
    pub grad_norm: f64,
}

impl Limits {
    /// Whatever is finite is good.
    pub const NONE: Limits = Limits { loss: f64::INFINITY, grad_norm: f64::INFINITY };

    /// What is bad about a step, if something is.
    pub fn judge(&self, loss: f64, grad_norm: f64) -> Option<Bad> {
        let of = |what, value: f64, limit: f64| Bad { what, value, limit };
        let (loss, norm) = (of("loss", loss, self.loss), of("gradient norm", grad_norm, self.grad_norm));
        let finite = [loss, norm].into_iter().find(|b| !b.value.is_finite());
        finite.or_else(|| [loss, norm].into_iter().find(|b| b.value > b.limit))
    }
}

/// What is bad about a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bad {
    what: &'static str,
    value: f64,
    limit: f64,
}

impl Bad {
    /// A number that is none, rather than a spike.
    pub fn is_nan(&self) -> bool {
        !self.value.is_finite()
    }

    fn trouble(&self) -> Trouble {
        if self.is_nan() { Trouble::Nan } else { Trouble::Spike }
    }
}

impl std::fmt::Display for Bad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_nan() {
            return write!(f, "{} is {}", self.what, self.value);
        }
        write!(f, "{} is {:.4}, beyond {:.4}", self.what, self.value, self.limit)
    }
}

/// What is to be done about a bad step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) what: Trouble,
    pub(crate) action: Action,
    pub(crate) why: String,
}

/// A good step, by the bits of what it yielded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Good {
    step: u64,
    loss_bits: u64,
    norm_bits: u64,
}

/// What is remembered of a run to judge its next step: part of its state, as weights are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Watch {
    /// The last good steps, newest last.
    good: Vec<Good>,
    /// Bad steps about which something was decided.
    bad: Vec<u64>,
}

impl Watch {
    /// What the manifest of a checkpoint says; nothing if it says nothing.
    pub(crate) fn of(state: &serde_json::Value) -> Watch {
        state.get(KEY).and_then(|w| serde_json::from_value(w.clone()).ok()).unwrap_or_default()
    }

    /// Adds itself to what a manifest says, unless there is nothing to say.
    pub(crate) fn write(&self, spec: &TroubleSpec, state: &mut serde_json::Value) {
        let is_used = spec.on_spike != OnSpike::Ignore || !self.bad.is_empty();
        if let (true, Ok(own)) = (is_used, serde_json::to_value(self)) {
            state[KEY] = own;
        }
    }

    /// Beyond what the next step is a spike.
    pub(crate) fn limits(&self, spec: &TroubleSpec) -> Limits {
        if spec.on_spike == OnSpike::Ignore || self.good.len() < spec.window.div_ceil(2) {
            return Limits::NONE;
        }
        let of = |bits: fn(&Good) -> u64| {
            limit(self.good.iter().map(|g| f64::from_bits(bits(g))).collect(), spec.spike_factor)
        };
        Limits { loss: of(|g| g.loss_bits), grad_norm: of(|g| g.norm_bits) }
    }

    /// Remembers a good step.
    pub(crate) fn good(&mut self, spec: &TroubleSpec, step: u64, loss: f64, grad_norm: f64) {
        if self.good.len() >= spec.window {
            self.good.drain(..=self.good.len() - spec.window);
        }
        self.good.push(Good { step, loss_bits: loss.to_bits(), norm_bits: grad_norm.to_bits() });
    }

    /// Decides about a bad step, and remembers it.
    pub(crate) fn decide(&mut self, spec: &TroubleSpec, step: u64, bad: &Bad) -> Decision {
        let (key, word, action) = if bad.is_nan() {
            let action = match spec.on_nan {
                OnNan::Stop => Action::Stop,
                OnNan::Skip => Action::Skip,
                OnNan::Rollback => Action::Rollback,
            };
            ("on_nan", spec.on_nan.name(), action)
        } else {
            let action = match spec.on_spike {
                OnSpike::Ignore | OnSpike::Stop => Action::Stop,
                OnSpike::Skip => Action::Skip,
                OnSpike::Rollback => Action::Rollback,
            };
            ("on_spike", spec.on_spike.name(), action)
        };
        let what = bad.trouble();
        let since = step.saturating_sub(spec.window as u64);
        self.bad.retain(|b| *b > since && *b < step);
        if action != Action::Stop && self.bad.len() >= spec.most {
            let why = format!(
                "{bad}, after {} bad steps within {}: more than trouble.most = {}",
                self.bad.len(),
                spec.window,
                spec.most
            );
            return Decision { what, action: Action::Stop, why };
        }
        self.bad.push(step);
        Decision { what, action, why: format!("{bad}; trouble.{key} = {word}") }
    }

    /// The weights are those after `step` once more: what came later is forgotten, but for what was decided.
    pub(crate) fn rolled_back(&mut self, step: u64) {
        self.good.retain(|g| g.step <= step);
    }

    /// The run goes on after `step`, as if nothing later had been.
    pub(crate) fn back_to(&mut self, step: u64) {
        self.rolled_back(step);
        self.bad.retain(|b| *b <= step);
    }

    /// The last step that it knows of.
    pub(crate) fn last(&self) -> u64 {
        let good = self.good.last().map_or(0, |g| g.step);
        good.max(self.bad.last().copied().unwrap_or(0))
    }
}

/// Of what a manifest says.
const KEY: &str = "watch";

/// The median of `values`, which are some, and `factor` robust standard deviations more.
fn limit(mut values: Vec<f64>, factor: f64) -> f64 {
    let middle = median(&mut values);
    values.iter_mut().for_each(|v| *v = (*v - middle).abs());
    let deviation = (MAD_TO_STD * median(&mut values)).max(LEAST_DEVIATION * middle.abs());
    middle + factor * deviation
}

/// The lower of two middle ones.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    let at = (values.len() - 1) / 2;
    *values.select_nth_unstable_by(at, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use spec::RunSpec;

    use super::*;

    fn spec(set: &[&str]) -> TroubleSpec {
        let set: Vec<String> = set.iter().map(|s| format!("trouble.{s}")).collect();
        RunSpec::load(None, &set, &RunSpec::no_files).expect("a run").trouble
    }

    /// After losses and norms of good steps: what a step with these is, and what is done.
    #[track_caller]
    fn check(set: &[&str], good: &[(f64, f64)], (loss, norm): (f64, f64), expected: Option<(Action, &str)>) {
        let spec = spec(set);
        let mut watch = Watch::default();
        (1..).zip(good).for_each(|(step, (loss, norm))| watch.good(&spec, step, *loss, *norm));
        let bad = watch.limits(&spec).judge(loss, norm);
        let step = good.len() as u64 + 1;
        let found = bad.map(|bad| watch.decide(&spec, step, &bad));
        assert_eq!(found.as_ref().map(|d| (d.action, d.why.as_str())), expected);
    }

    #[test]
    fn what_is_not_finite_is_never_good() {
        check(&[], &[], (f64::NAN, 1.0), Some((Action::Stop, "loss is NaN; trouble.on_nan = stop")));
        let why = "gradient norm is inf; trouble.on_nan = skip";
        check(&["on_nan=skip"], &[], (1.0, f64::INFINITY), Some((Action::Skip, why)));
        check(&[], &[(1.0, 1.0); 99], (1e30, 1e30), None);
    }

    #[test]
    fn a_spike_stands_out_of_the_last_steps() {
        let set = ["on_spike=rollback", "window=8", "spike_factor=10"];
        // Median 4, deviations 0.1: limits at 4 + 10 * 1.4826 * 0.1; norms are all alike, and 2 % count.
        let good: Vec<(f64, f64)> = (0..8).map(|i| (4.0 + 0.1 * f64::from(i % 3 - 1), 2.0)).collect();
        check(&set, &good, (5.4, 2.39), None);
        let why = "loss is 5.5000, beyond 5.4826; trouble.on_spike = rollback";
        check(&set, &good, (5.5, 2.0), Some((Action::Rollback, why)));
        let why = "gradient norm is 2.4100, beyond 2.4000; trouble.on_spike = rollback";
        check(&set, &good, (4.0, 2.41), Some((Action::Rollback, why)));
        // Too little is known of so short a run.
        check(&set, &good[..3], (99.0, 99.0), None);
        check(&["on_spike=ignore", "window=8"], &good, (99.0, 99.0), None);
    }

    #[test]
    fn so_many_bad_steps_and_no_more() {
        let spec = spec(&["on_nan=skip", "window=10", "most=3"]);
        let bad = Limits::NONE.judge(f64::NAN, 0.0).expect("it is bad");
        let mut watch = Watch::default();
        let actions: Vec<Action> =
            [5, 6, 7, 8, 15, 16].map(|step| watch.decide(&spec, step, &bad).action).to_vec();
        use Action::{Skip, Stop};
        // Step 5 is out of the window of 15, 6 of that of 16.
        assert_eq!(actions, [Skip, Skip, Skip, Stop, Skip, Skip]);
        let why = watch.decide(&spec, 16, &bad).why;
        assert_eq!(why, "loss is NaN; trouble.on_nan = skip", "the same step once more");
        assert!(watch.decide(&spec, 16, &bad).why.contains("trouble.on_nan"));
    }

    proptest! {
        #[test]
        fn what_a_checkpoint_keeps_decides_the_same(
            losses in proptest::collection::vec(any::<f64>(), 1..40),
            cut in 0usize..40,
        ) {
            let spec = spec(&["on_spike=skip", "window=8"]);
            let run = |watch: &mut Watch, from: usize, to: usize| {
                for (i, loss) in losses.iter().enumerate().take(to).skip(from) {
                    let step = i as u64 + 1;
                    match watch.limits(&spec).judge(*loss, 1.0) {
                        Some(bad) => { watch.decide(&spec, step, &bad); }
                        None => watch.good(&spec, step, *loss, 1.0),
                    }
                }
            };
            let mut straight = Watch::default();
            run(&mut straight, 0, losses.len());
            let cut = cut.min(losses.len());
            let mut first = Watch::default();
            run(&mut first, 0, cut);
            let mut state = serde_json::json!({});
            first.write(&spec, &mut state);
            let text = serde_json::to_string(&state).expect("JSON");
            let mut second = Watch::of(&serde_json::from_str(&text).expect("JSON"));
            run(&mut second, cut, losses.len());
            prop_assert_eq!(&straight, &second);
            prop_assert!(straight.last() <= losses.len() as u64);
            // From a later state back to an earlier one: as long as the window still reaches there.
            straight.back_to(0);
            prop_assert_eq!(straight, Watch::default());
        }
    }
}
