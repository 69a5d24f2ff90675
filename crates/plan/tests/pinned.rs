//! Estimates of many kinds of layouts, digit by digit, under constants that no fit changes: whoever changes a formula sees
//! here what else it moves, and means it. The figures are the estimator's own; whether they are right is asked elsewhere
//! (`phalanx validate`, the doctests, `closed_form.rs`).

use plan::calibration::PRIOR;
use plan::estimate::parts::SectionParts;
use plan::estimate::{Estimator, Problem};
use plan::software::Software;
use plan::{given, models};
use spec::{Catalog, NumberFormat, Result};

/// Two lines each: model, cluster, accelerators, stack, format, sequences x tokens of one, layout; then the figures.
const PINNED: &str = include_str!("pinned.txt");

fn figures(case: &str) -> Result<String> {
    let words: Vec<&str> = case.split(' ').collect();
    let [model, cluster, n, stack, format, batch, layout] = words[..] else { panic!("{case}: seven words") };
    let count = |text: &str| text.parse::<usize>().expect("a count");
    let (sequences, sequence) = batch.split_once('x').expect("sequences x tokens");
    let format = NumberFormat::parse(format).expect("a format");
    let problem = Problem {
        shape: models::find(model)?,
        cluster: Catalog::builtin()?.cluster(cluster, Some(count(n)))?,
        software: Software::named(stack).expect("a stack"),
        constants: PRIOR,
        sequence: count(sequence),
        sequences: count(sequences),
    };
    let placement = given::parse(layout, &problem, format)?.placement;
    let mut estimator = Estimator::new(&problem, format)?;
    let estimate = estimator.estimate(&placement)?;
    let parts = estimator.parts(&placement)?;
    let sum = |of: &dyn Fn(&SectionParts) -> [f64; 3]| -> f64 {
        [&parts.embed, &parts.layer, &parts.expert_layer, &parts.head].iter().flat_map(|s| of(s)).sum()
    };
    let mut all = vec![("step", estimate.step_s), ("mfu", estimate.mfu)];
    all.extend(estimate.breakdown.parts());
    all.extend(estimate.memory.parts());
    all.extend([
        ("kernels", sum(&|s| s.kernels)),
        ("members", sum(&|s| s.members)),
        ("far", sum(&|s| s.far_s)),
        ("pieces", sum(&|s| [&s.forward, &s.input, &s.weight].map(|p| p.len() as f64))),
        ("stages", (1..).zip(&parts.virtual_layers).map(|(v, n)| f64::from(v) * *n as f64).sum()),
        ("reads", sum(&|s| [s.reads.forward, s.reads.backward, s.expert_reads.forward])),
    ]);
    let shown =
        all.iter().filter(|f| f.1 != 0.0).map(|(name, x)| format!("{}={x:.6e}", name.replace(' ', "_")));
    Ok(format!("  {:?} {}", estimate.breakdown.pace(), shown.collect::<Vec<_>>().join(" ")))
}

#[test]
fn estimates_change_only_on_purpose() {
    let cases = PINNED.lines().filter(|l| !l.starts_with(' '));
    let found: Vec<String> = cases
        .map(|case| format!("{case}\n{}\n", figures(case).unwrap_or_else(|e| panic!("{case}: {e}"))))
        .collect();
    let moved = found.iter().filter(|f| !PINNED.contains(f.as_str())).count();
    assert!(
        moved == 0 && found.concat() == PINNED,
        "{moved} of {} moved; if they should, tests/pinned.txt becomes:\n{}",
        found.len(),
        found.concat()
    );
}
