//! Estimates of many kinds of layouts, digit by digit, under constants that no fit changes: whoever changes a formula sees
//! here what else it moves, and means it. The figures are the estimator's own; whether they are right is asked elsewhere
//! (`phalanx validate`, the doctests, `closed_form.rs`).

use plan::calibration::PRIOR;
use plan::estimate::parts::SectionParts;
use plan::estimate::{Estimator, Problem};
use plan::network::{Collective, CommTime, Group, NetworkModel, collective};
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
        optimizer: Default::default(),
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

/// One line each: cluster, members, stride, what, bytes; then seconds, of them latency, what bounds, bytes on the wire.
const COLLECTIVES: &str = include_str!("pinned_collectives.txt");

#[test]
fn collectives_take_what_they_took() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let whats = [
        Collective::AllReduce,
        Collective::AllGather,
        Collective::ReduceScatter,
        Collective::AllToAll,
        Collective::Send,
    ];
    let mut found = String::new();
    for name in [
        "dgx-superpod-h100-64su",
        "meta-24k-roce",
        "dgx-a100",
        "tpu-v4-pod",
        "aws-p5",
        "dgx-superpod-gb200-1su",
        "rtx-4090",
        "frontier",
    ] {
        for (size, stride) in [(2, 1), (8, 1), (4, 2), (16, 1), (32, 8), (4, 512), (3072, 1), (3072, 8)] {
            let Ok(cluster) = catalog.cluster(name, Some(size * stride)) else { continue };
            let net = NetworkModel::of(&cluster);
            for what in whats {
                for bytes in [1e4, 1e9] {
                    let t = collective(&cluster, &net, what, Group { size, stride }, bytes);
                    let CommTime { seconds, latency_s, bound, wire_bytes } = t;
                    found += &format!(
                        "{name} {size} {stride} {what:?} {bytes:e}: {seconds:.6e} {latency_s:.6e} {bound:?} {wire_bytes:.6e}\n"
                    );
                }
            }
        }
    }
    let moved: Vec<&str> = found.lines().filter(|l| !COLLECTIVES.lines().any(|known| known == *l)).collect();
    assert!(
        found == COLLECTIVES,
        "moved:\n{}\ntests/pinned_collectives.txt becomes:\n{found}",
        moved.join("\n")
    );
}
