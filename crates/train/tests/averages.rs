//! Averages of weights over steps: the same bits in every layout that keeps those of the weights, evaluated in their place
//! and put back.

mod common;

use std::collections::BTreeMap;

use ckpt::Kind;
use comm::World;
use common::{PLAIN, SEQUENCE, executor_of, fill, first_difference, inputs, model, steps, weights};
use program::{Mode, Recipe, Request};
use spec::{DType, Layout, ModelSpec, Optimizer, Zero};
use train::{Executor, Mesh, StepInputs};

const SEQUENCES: usize = 8;
const KEPT: Recipe = Recipe { ema: true, ..PLAIN };

/// What a run of six steps leaves.
#[derive(PartialEq, Debug)]
struct Left {
    /// Losses of the weights, of their average, and of the weights again.
    evals: [f64; 3],
    /// Bits of all that a checkpoint holds, by kind and name.
    saved: BTreeMap<String, Vec<u32>>,
}

fn run(m: &ModelSpec, recipe: Recipe, layout: &Layout, precision: DType) -> Left {
    let dir = tempfile::tempdir().expect("a folder");
    let worlds = World::threads(layout.world()).expect("ranks");
    let evals: Vec<[f64; 3]> = std::thread::scope(|scope| {
        let rank = |world: World| {
            let dir = dir.path();
            move || {
                let rank = world.rank();
                let mesh = Mesh::new(world, layout).expect("groups");
                let request = Request {
                    model: m,
                    layout,
                    sequence: SEQUENCE,
                    sequences: SEQUENCES,
                    precision,
                    rank,
                    mode: Mode::Train,
                    loss: Default::default(),
                    recipe,
                };
                let mut exec = Executor::new(&request, 1, mesh, false).expect("a program");
                exec.initialise(m, 11).expect("weights");
                for k in 1..=6 {
                    let valid = fill(&mut exec, m.vocab, k);
                    exec.step(&StepInputs { ema: 0.75, ..inputs(k, valid) }).expect("a step");
                }
                fill(&mut exec, m.vocab, 9);
                let mut eval = || exec.evaluate().expect("evaluated");
                let first = eval();
                exec.swap_average().expect("swapped");
                let average = exec.evaluate().expect("evaluated");
                exec.swap_average().expect("swapped back");
                let evals = [first, average, exec.evaluate().expect("evaluated")];
                exec.save(dir, 6, ckpt::Meta::default()).expect("saved");
                evals
            }
        };
        let ranks: Vec<_> = worlds.into_iter().map(|world| scope.spawn(rank(world))).collect();
        ranks.into_iter().map(|r| r.join().expect("a rank")).collect()
    });
    assert!(evals.iter().all(|e| *e == evals[0]), "all ranks say the same");
    let path = ckpt::latest(dir.path()).expect("a folder").expect("a checkpoint");
    let checkpoint = ckpt::Checkpoint::open(&path).expect("whole");
    let mut saved = BTreeMap::new();
    for t in &checkpoint.manifest().tensors {
        let mut out = vec![0.0; t.shape.iter().product()];
        let all = [ckpt::Region::range(0, out.len())];
        checkpoint.read_regions(&t.name, t.kind, &all, &mut out).expect("a tensor");
        saved.insert(format!("{} {}", t.kind, t.name), out.into_iter().map(f32::to_bits).collect());
    }
    Left { evals: evals[0], saved }
}

#[test]
fn bits_do_not_depend_on_the_layout() {
    let over = |dp, pp, zero| Layout { dp, pp, zero, ..Layout::default() };
    let layouts = [
        over(2, 1, Zero::Off),
        over(2, 1, Zero::Optimizer),
        over(4, 1, Zero::Gradients),
        over(2, 2, Zero::Parameters),
        Layout { shard: Some(2), ..over(4, 1, Zero::Optimizer) },
        Layout { micro_batch: 2, ..over(1, 2, Zero::Off) },
    ];
    for (m, recipe, precision) in [
        (model(4, true, false), KEPT, DType::F32),
        (model(4, false, true), KEPT, DType::Bf16),
        (model(4, false, false), Recipe { optimizer: Optimizer::Muon, ..KEPT }, DType::F32),
    ] {
        let alone = run(&m, recipe, &Layout::default(), precision);
        assert_eq!(alone.evals[0], alone.evals[2], "the weights are back where they were");
        assert_ne!(alone.evals[0], alone.evals[1]);
        let plain = run(&m, Recipe { ema: false, ..recipe }, &Layout::default(), precision);
        assert!(plain.saved.iter().all(|(name, bits)| alone.saved[name] == *bits), "no weight is moved");
        for layout in &layouts {
            let got = run(&m, recipe, layout, precision);
            assert_eq!(got.evals, alone.evals, "under {layout:?}");
            if let Some(name) = alone.saved.keys().find(|name| got.saved.get(*name) != alone.saved.get(*name))
            {
                panic!("{name} under {layout:?} in {precision}");
            }
        }
    }
}

#[test]
fn tensor_parallel_within_tolerance() {
    let m = model(4, true, false);
    let alone = run(&m, KEPT, &Layout::default(), DType::F32);
    let got = run(&m, KEPT, &Layout { tp: 2, dp: 2, zero: Zero::Optimizer, ..Layout::default() }, DType::F32);
    for (a, b) in got.evals.iter().zip(alone.evals) {
        assert!((a / b - 1.0).abs() < 1e-5, "{a} against {b}");
    }
}

/// What is evaluated is the average itself, and a run that goes on from a checkpoint goes on with it.
#[test]
fn the_average_is_what_is_evaluated_and_it_goes_on() {
    for precision in [DType::F32, DType::Bf16] {
        let m = model(2, true, false);
        let one = || executor_of(KEPT, &m, &Layout::default(), (SEQUENCES, precision, 2));
        let mut straight = one();
        steps(&mut straight, m.vocab, 1, 7);
        let mut first = one();
        steps(&mut first, m.vocab, 1, 4);
        let dir = tempfile::tempdir().expect("a folder");
        let state = first.state().expect("on this machine");
        let path = ckpt::Saver::save(dir.path(), 3, state.pieces(), ckpt::Meta::default()).expect("saved");
        let checkpoint = ckpt::Checkpoint::open(&path).expect("a checkpoint");
        let mut second = one();
        second.restore(&checkpoint).expect("restored");
        steps(&mut second, m.vocab, 4, 7);
        assert_eq!(first_difference(&weights(&straight), &weights(&second)), None);

        // The average in the weights' place is what a model of these weights is.
        fill(&mut straight, m.vocab, 9);
        straight.swap_average().expect("swapped");
        second.swap_average().expect("swapped");
        let average = weights(&straight);
        assert_eq!(first_difference(&average, &weights(&second)), None);
        let loss = straight.evaluate().expect("evaluated");
        let mut plain = executor_of(Recipe::default(), &m, &Layout::default(), (SEQUENCES, precision, 1));
        plain
            .set_params(&mut |part, out| {
                out.iter_mut().zip(&average[&part.name]).for_each(|(x, bits)| *x = f32::from_bits(*bits));
                Ok(())
            })
            .expect("weights");
        fill(&mut plain, m.vocab, 9);
        assert_eq!(plain.evaluate().expect("evaluated"), loss);
        assert!(checkpoint.tensor("embed.weight", Kind::Ema).is_ok());
        let mut kept = one();
        let without = ckpt::Saver::save(
            &dir.path().join("plain"),
            3,
            plain.state().expect("on this machine").pieces(),
            ckpt::Meta::default(),
        );
        let without = ckpt::Checkpoint::open(&without.expect("saved")).expect("a checkpoint");
        let e = kept.restore(&without).expect_err("the average is not there");
        assert!(e.to_string().contains("ema"), "{e}");
    }
}
