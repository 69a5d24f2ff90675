use super::*;
use crate::calibration::Calibration;
use crate::shape::Shape;
use crate::software::Software;
use spec::Catalog;

fn problem(model: &str, cluster: &str, n: usize, sequences: usize, sequence: usize) -> Problem {
    let shape = Shape::find(model).unwrap().unwrap();
    let cluster = Catalog::builtin().unwrap().cluster(cluster, Some(n)).unwrap();
    let software = Software::usual(&cluster.accelerator.family);
    let constants = Calibration::builtin().unwrap().constants(
        &cluster.accelerator.family.name,
        &cluster.accelerator.name,
        "bf16",
        &software,
    );
    Problem { shape, cluster, software, constants, sequence, sequences, optimizer: Default::default() }
}

fn space(accelerators: usize) -> Space {
    Space {
        accelerators,
        format: NumberFormat::Bf16,
        keep: 5,
        micro_batch_max: 4,
        trainable_only: true,
        strategy: None,
    }
}

/// Every layout, estimated one by one without bounds.
fn brute_force(problem: &Problem, space: &Space) -> (f64, usize) {
    let mut best = f64::INFINITY;
    let mut count = 0;
    for job in jobs(problem, space) {
        let rest = space.accelerators / job.tp / job.cp;
        let mut estimator = Estimator::new(problem, space.format).unwrap();
        for pp in divisors(rest).filter(|pp| *pp <= problem.shape.model.layers) {
            let dp = rest / pp;
            if !problem.sequences.is_multiple_of(dp * job.micro_batch) {
                continue;
            }
            for (schedule, chunks) in schedules(
                pp,
                problem.shape.model.layers,
                problem.sequences / dp / job.micro_batch,
                false,
                true,
            ) {
                for zero in [Zero::Off, Zero::Optimizer, Zero::Gradients, Zero::Parameters] {
                    if dp == 1 && zero != Zero::Off {
                        continue;
                    }
                    for order in [Order::TpCpDpPp, Order::TpCpPpDp] {
                        if (pp == 1 || dp == 1) && order == Order::TpCpPpDp {
                            continue;
                        }
                        let layout = Layout {
                            dp,
                            tp: job.tp,
                            pp,
                            sequence_parallel: job.sequence_parallel,
                            zero,
                            schedule,
                            chunks,
                            micro_batch: job.micro_batch,
                            recompute: job.recompute,
                            reduce: Reduce::Ring,
                            ..Layout::default()
                        };
                        let whole = Placement { layout, format: space.format, order };
                        let node = 8 / whole.dp_stride();
                        let inside = node > 1 && node < dp && dp.is_multiple_of(node) && zero != Zero::Off;
                        for shard in [None].into_iter().chain(inside.then_some(Some(node))) {
                            let layout = Layout { shard, ..whole.layout.clone() };
                            let estimate = estimator.estimate(&Placement { layout, ..whole }).unwrap();
                            count += 1;
                            if estimate.fits {
                                best = best.min(estimate.step_s);
                            }
                        }
                    }
                }
            }
        }
    }
    (best, count)
}

#[test]
fn bounds_lose_nothing() {
    let problem = problem("gpt3-13b", "dgx-a100", 64, 256, 2048);
    let space = space(64);
    let found = search(&problem, &space, &|_, _| ()).unwrap();
    let (best, count) = brute_force(&problem, &space);
    assert_eq!(found.best[0].estimate.step_s, best);
    assert_eq!(found.layouts_estimated + found.layouts_pruned, count);
    assert!(found.layouts_pruned > 0);
}

/// Sequences are cut and experts spread, by what a run would not refuse.
#[test]
fn what_trains_has_every_axis() {
    let long = problem("mixtral-8x7b", "dgx-h100", 32, 32, 32768);
    let space = Space { keep: 50, ..space(32) };
    let all = jobs(&long, &space);
    let has = |cp, context, ep| all.iter().any(|j| (j.cp, j.context, j.ep) == (cp, context, ep));
    let (ring, heads) = (ContextMode::Ring, ContextMode::Heads);
    assert!(has(2, ring, 1) && has(2, heads, 8) && !has(1, heads, 1));
    let found = search(&long, &space, &|_, _| ()).unwrap();
    for f in found.best.iter().chain(&found.pareto) {
        let layout = Layout { expert_rows: ExpertRows::All, ..f.placement.layout.clone() };
        layout.validate(&long.shape.model, long.sequences, long.sequence).unwrap();
        check_mixture(&long.shape.model, &layout).unwrap();
    }
    assert!(found.best.iter().any(|f| f.placement.layout.ep > 1));
    // Other stacks are planned with rings alone.
    assert!(jobs(&long, &Space { trainable_only: false, ..space }).iter().all(|j| j.context == ring));
    // Sums over whole sequences, which no rank has where they are cut.
    let mut balanced = long.clone();
    let experts = balanced.shape.model.experts.as_mut().unwrap();
    experts.router.balance_loss = 0.01;
    let refused = search(&balanced, &space, &|_, _| ()).unwrap();
    assert!(refused.best.iter().all(|f| f.placement.layout.tp * f.placement.layout.cp == 1));
    assert!(refused.refused["experts are not trained so"] > 0);
}

/// Parameters are gathered inside a node, and only shards of gradients cross to the others, once a step.
#[test]
fn the_fastest_of_several_sizes_are_those_of_their_own_searches() {
    let sizes = [256, 96, 64, 8, 1];
    let problems: Vec<Problem> =
        sizes.iter().map(|n| problem("gpt3-13b", "dgx-superpod-h100", *n, 768, 2048)).collect();
    let found = fastest(&problems, &space(1), &[]).unwrap();
    for ((n, problem), found) in sizes.iter().zip(&problems).zip(&found) {
        let alone = search(problem, &space(*n), &|_, _| ()).ok();
        assert_eq!(*found, alone.and_then(|s| s.best.into_iter().next()), "{n} accelerators");
    }
    let good: Vec<Placement> = found.iter().flatten().map(|f| f.placement.clone()).collect();
    assert_eq!(fastest(&problems, &space(1), &good).unwrap(), found, "bounds change nothing");
    assert!(fastest(&problems[4..], &space(1), &[]).unwrap()[0].is_none(), "13B parameters do not fit one");
}

#[test]
fn a_search_from_good_layouts_finds_the_same() {
    let mut spared = 0;
    for (model, n, sequences, trainable_only) in
        [("gpt3-13b", 64, 256, true), ("gpt3-13b", 48, 768, true), ("mixtral-8x7b", 64, 256, false)]
    {
        let problem = problem(model, "dgx-superpod-h100", n, sequences, 2048);
        let space = Space { trainable_only, ..space(n) };
        let plain = search(&problem, &space, &|_, _| ()).unwrap();
        for good in [&plain.best[..1], &plain.best, &plain.pareto] {
            let good: Vec<Placement> = good.iter().map(|f| f.placement.clone()).collect();
            let found = search_from(&problem, &space, &good, &|_, _| ()).unwrap();
            assert_eq!((&found.best, &found.pareto), (&plain.best, &plain.pareto), "{model} on {n}");
            assert!(found.layouts_estimated <= plain.layouts_estimated);
            spared += plain.layouts_estimated - found.layouts_estimated;
        }
    }
    assert!(spared > 0);
}

#[test]
fn several_nodes_shard_inside_each() {
    let problem = problem("gpt3-6.7b", "dgx-h100", 128, 1024, 512);
    let layout = Layout { dp: 128, zero: Zero::Parameters, reduce: Reduce::Ring, ..Layout::default() };
    let whole = Placement::of(layout, NumberFormat::Bf16);
    assert!(groups(&problem, &whole).contains(&8));
    let step_s = |shard| {
        let placement = Placement { layout: Layout { shard, ..whole.layout.clone() }, ..whole.clone() };
        Estimator::new(&problem, NumberFormat::Bf16).unwrap().estimate(&placement).unwrap().step_s
    };
    let (over_all, inside) = (step_s(None), step_s(Some(8)));
    assert!(over_all > inside, "{over_all} s over all nodes, {inside} s inside each");
}

#[test]
fn the_front_is_sorted_and_undominated_and_the_best_leads_it() {
    let problem = problem("gpt3-13b", "dgx-a100", 64, 256, 2048);
    let found = search(&problem, &space(64), &|_, _| ()).unwrap();
    for pair in found.pareto.windows(2) {
        assert!(pair[0].estimate.step_s < pair[1].estimate.step_s);
        assert!(pair[0].estimate.memory.total() > pair[1].estimate.memory.total());
    }
    assert_eq!(found.pareto[0].estimate.step_s, found.best[0].estimate.step_s);
    assert!(found.best.windows(2).all(|p| p[0].estimate.step_s <= p[1].estimate.step_s));
}

#[test]
fn what_cannot_fit_says_which_bytes_and_how_many_would() {
    let problem = problem("gpt3-175b", "dgx-a100", 8, 64, 2048);
    let error = search(&problem, &space(8), &|_, _| ()).unwrap_err();
    let message = error.to_string();
    for part in ["no layout of gpt3-175b fits 8 x a100-80-sxm", "parameters", "optimiser", "of 80.0 GB"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(error.hint_text().unwrap().contains("accelerators would fit"));
}

#[test]
fn a_search_is_deterministic_and_reports_progress() {
    let problem = problem("gpt3-6.7b", "dgx-h100", 16, 128, 2048);
    let calls = AtomicUsize::new(0);
    let count = |_, _| {
        calls.fetch_add(1, Ordering::Relaxed);
    };
    let a = search(&problem, &space(16), &count).unwrap();
    let b = search(&problem, &space(16), &|_, _| ()).unwrap();
    assert_eq!(a.best, b.best);
    assert_eq!((a.layouts_estimated, a.layouts_pruned), (b.layouts_estimated, b.layouts_pruned));
    assert!(calls.load(Ordering::Relaxed) > 10);
}
