//! Bits that may not change: two runs, any number of threads, any split of the batch, recompute, stop and resume.

mod common;

use common::{executor, fill, first_difference, inputs, model, steps, weights};
use spec::{DType, Layout, Recompute};

fn check(what: &str, precision: DType, layout: &Layout, threads: usize) {
    for (tied, gpt2) in [(false, false), (true, false), (true, true)] {
        let m = model(2, tied, gpt2);
        let mut reference = executor(&m, &Layout::default(), 8, precision, 1);
        let mut other = executor(&m, layout, 8, precision, threads);
        let a = steps(&mut reference, m.vocab, 1, 5);
        let b = steps(&mut other, m.vocab, 1, 5);
        assert_eq!(a, b, "{what}: losses and norms, tied {tied}, gpt2 {gpt2}, {precision}");
        if let Some(difference) = first_difference(&weights(&reference), &weights(&other)) {
            panic!("{what}, tied {tied}, gpt2 {gpt2}, {precision}: {difference}");
        }
    }
}

#[test]
fn do_not_depend_on_the_run_or_the_threads() {
    for threads in [1, 2, 3] {
        check(&format!("{threads} threads"), DType::F32, &Layout::default(), threads);
    }
    check("3 threads", DType::Bf16, &Layout::default(), 3);
}

#[test]
fn do_not_depend_on_the_accumulation_split() {
    for micro_batch in [2, 4, 8] {
        let layout = Layout { micro_batch, ..Layout::default() };
        check(&format!("micro_batch {micro_batch}"), DType::F32, &layout, 2);
        check(&format!("micro_batch {micro_batch}"), DType::Bf16, &layout, 2);
    }
}

#[test]
fn do_not_depend_on_the_split_of_an_odd_batch() {
    let m = model(1, false, false);
    let run = |micro_batch| {
        let mut e = executor(&m, &Layout { micro_batch, ..Layout::default() }, 12, DType::F32, 2);
        (steps(&mut e, m.vocab, 1, 4), weights(&e))
    };
    let reference = run(1);
    for micro_batch in [3, 6, 12] {
        assert!(run(micro_batch) == reference, "micro_batch {micro_batch} of a batch of 12");
    }
}

#[test]
fn do_not_depend_on_recompute() {
    for recompute in [Recompute::Selective, Recompute::Full] {
        for micro_batch in [1, 4] {
            let layout = Layout { recompute, micro_batch, ..Layout::default() };
            check(&format!("{recompute:?}"), DType::F32, &layout, 1);
        }
    }
    check("full", DType::Bf16, &Layout { recompute: Recompute::Full, ..Layout::default() }, 1);
}

#[test]
fn survive_a_checkpoint_at_any_step() {
    for precision in [DType::F32, DType::Bf16] {
        let m = model(2, true, false);
        let mut straight = executor(&m, &Layout::default(), 4, precision, 1);
        steps(&mut straight, m.vocab, 1, 6);
        for stop in 1..5 {
            let dir = tempfile::tempdir().expect("a folder");
            let mut first = executor(&m, &Layout { micro_batch: 2, ..Layout::default() }, 4, precision, 2);
            steps(&mut first, m.vocab, 1, stop + 1);
            let state = first.state().expect("on this machine");
            let path =
                ckpt::Saver::save(dir.path(), stop, state.pieces(), ckpt::Meta::default()).expect("saved");
            let mut second = executor(&m, &Layout::default(), 4, precision, 1);
            second.restore(&ckpt::Checkpoint::open(&path).expect("a checkpoint")).expect("restored");
            steps(&mut second, m.vocab, stop + 1, 6);
            assert_eq!(first_difference(&weights(&straight), &weights(&second)), None, "stopped at {stop}");
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_leaves_the_weights_alone() {
    let m = model(1, false, false);
    let mut exec = executor(&m, &Layout::default(), 4, DType::F32, 1);
    exec.set_params(&mut |_, out| {
        out.fill(f32::NAN);
        Ok(())
    })
    .expect("set");
    let before = weights(&exec);
    let valid = fill(&mut exec, m.vocab, 1);
    let error = exec.step(&inputs(1, valid)).expect_err("the loss is NaN");
    assert_eq!(error.to_string(), "step 1: loss is NaN; the weights were not updated");
    assert_eq!(error.exit_code(), 1);
    assert_eq!(first_difference(&before, &weights(&exec)), None);
}
