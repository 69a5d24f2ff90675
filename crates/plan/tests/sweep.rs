//! No answer is nonsense: every platform and node, models of all kinds, every number format, one node up to the whole.
//!
//! Either there is an answer that obeys the machine's limits, or a refusal that says what to do.

use std::collections::BTreeSet;

use plan::answer::{Answer, Choice, Question, default_batch, plan, sequences_for};
use plan::calibration::Calibration;
use plan::models;
use spec::{Catalog, Cluster, EntryKind, Error, NumberFormat};

/// Dense, with experts, with latent attention; small, middling, large.
const MODELS: [&str; 6] = ["gpt2", "llama3-8b", "mixtral-8x7b", "llama3-70b", "gpt3-175b", "deepseek-v3"];
/// Bytes of state for each parameter, and what must be left for activations.
const STATE_BYTES: f64 = 22.0;
/// A model that cannot fit is asked for once in so many cases: the refusal looks for what would fit, which takes long.
const BEYOND_EVERY: usize = 150;
/// No stack reaches more of a peak on a whole step.
const MFU_MAX: f64 = 0.8;

/// Accelerators to plan on: a node, a power of two, all of it.
fn sizes(catalog: &Catalog, name: &str) -> Vec<usize> {
    let whole = catalog.cluster(name, None).unwrap();
    let power = (whole.per_node * 8).next_power_of_two().min(whole.accelerators_max);
    let mut sizes = vec![whole.per_node, power, whole.accelerators];
    if whole.accelerators_max == whole.per_node {
        // A node that stands alone may have any number.
        sizes.extend([1, 3]);
    }
    sizes.retain(|n| *n <= whole.accelerators_max);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

fn question(cluster: Cluster, model: &str, format: NumberFormat) -> Question {
    let shape = models::find(model).unwrap();
    let (sequences, sequence) = default_batch(&shape);
    Question {
        sequences: sequences_for(sequences, cluster.accelerators),
        shape,
        cluster,
        software: None,
        format,
        sequence,
        tokens: Some(1e12),
        keep: 3,
        trainable_only: false,
        strategy: None,
        optimizer: Default::default(),
    }
}

fn refused(case: &str, error: &Error) {
    let hint = error.hint_text().unwrap_or_default();
    assert!(!hint.is_empty(), "{case}: {error} without a hint");
    assert_eq!(error.exit_code(), 2, "{case}: {error}");
}

fn answered(case: &str, answer: &Answer) {
    let q = &answer.question;
    let accelerator = &q.cluster.accelerator;
    let world = q.cluster.accelerators as f64;
    let tokens = (q.sequence * q.sequences) as f64;
    let flops = q.shape.flops_per_token(q.sequence as f64, true) * tokens;
    let peak = accelerator.peak(q.format).expect("a format that is answered is there").value;
    let best = &answer.best[0];
    for c in answer.best.iter().chain(&answer.pareto) {
        // Each parameter of the shard is at least read forward and backward, and its state updated.
        let streamed = (c.memory.params + c.memory.optimizer) / accelerator.memory_bytes_per_s.value;
        sane(case, c, flops / peak / world, streamed);
        assert!(
            c.fits && c.memory_bytes <= accelerator.memory_bytes.value,
            "{case}: {} does not fit",
            c.placement()
        );
        let loss: f64 = c.loses_s.iter().map(|l| l.1).sum();
        let slower = c.step_s - best.step_s;
        assert!(
            loss >= 0.0 && slower >= -1e-9 * best.step_s,
            "{case}: {} gains {loss} over the best",
            c.placement()
        );
        assert!((loss - slower).abs() <= 1e-6 * c.step_s, "{case}: loses {loss} of {slower} s");
    }
}

fn sane(case: &str, c: &Choice, roofline_s: f64, streamed_s: f64) {
    let place = c.placement();
    assert!(c.mfu > 0.0 && c.mfu <= MFU_MAX, "{case}: {place} has an MFU of {}", c.mfu);
    assert!(
        c.step_s >= roofline_s,
        "{case}: {place} takes {} s, its FLOPs {roofline_s} s at the peak",
        c.step_s
    );
    assert!(c.step_s >= streamed_s, "{case}: {place} takes {} s, its bytes {streamed_s} s", c.step_s);
    assert!(
        c.step_low_s <= c.step_s && c.step_s <= c.step_high_s,
        "{case}: {place} lies outside its interval"
    );
    assert!(c.step_low_s > 0.0 && c.step_high_s.is_finite(), "{case}: {place} has an endless interval");
    let parts = c.breakdown.parts();
    assert!(parts.iter().all(|p| p.1 >= 0.0 && p.1.is_finite()), "{case}: {place}: {parts:?}");
    let days = c.train_days.expect("tokens were asked");
    assert!(days > 0.0 && days.is_finite(), "{case}: {place} trains {days} days");
}

/// The models of one case: by turns the largest that may fit and one of those below it, and now and then one that cannot.
fn models_for(cluster: &Cluster, turn: usize) -> Vec<&'static str> {
    let room = cluster.accelerator.memory_bytes.value * cluster.accelerators as f64;
    let fits = |model: &&str| models::find(model).unwrap().params() * STATE_BYTES < room;
    let (fitting, beyond): (Vec<&str>, Vec<&str>) = MODELS.into_iter().partition(fits);
    let smaller = fitting.get(turn % fitting.len().max(1)).copied();
    let beyond = beyond.first().copied().filter(|_| turn.is_multiple_of(BEYOND_EVERY));
    let largest = fitting.last().copied().filter(|_| turn.is_multiple_of(6));
    largest.or(smaller).into_iter().chain(beyond).collect()
}

#[test]
fn every_platform_model_format_and_size_is_answered_or_refused() {
    let catalog = Catalog::builtin().unwrap();
    let calibration = Calibration::builtin().unwrap();
    let (mut turn, mut answers, mut refusals) = (0, 0, 0);
    let mut met = BTreeSet::new();
    for kind in [EntryKind::Node, EntryKind::Platform] {
        for listed in catalog.list(Some(kind)) {
            for (i, n) in sizes(&catalog, &listed.name).into_iter().enumerate() {
                let cluster = catalog.cluster(&listed.name, Some(n)).unwrap();
                // Each accelerator is asked in every format; more of it, and on other fabrics, in turns. A format that is not
                // there costs nothing.
                let first = i == 0 && met.insert(cluster.accelerator.name.clone());
                if !first && !(turn + i).is_multiple_of(2) {
                    turn += 1;
                    continue;
                }
                let asked = |(at, f): &(usize, NumberFormat)| {
                    first || (turn + at).is_multiple_of(7) || cluster.accelerator.peak(*f).is_none()
                };
                for (_, format) in NumberFormat::all().enumerate().filter(asked).collect::<Vec<_>>() {
                    turn += 1;
                    for model in models_for(&cluster, turn) {
                        let case = format!("{model} in {format} on {n} of {}", listed.name);
                        match plan(question(cluster.clone(), model, format), &calibration, &|_, _| ()) {
                            Ok(answer) => {
                                answered(&case, &answer);
                                answers += 1;
                            }
                            Err(error) => {
                                refused(&case, &error);
                                refusals += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    assert!(answers > 250 && refusals > 300, "{answers} answers, {refusals} refusals");
}
