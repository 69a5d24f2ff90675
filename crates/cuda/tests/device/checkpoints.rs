//! A run goes on where another device left it.

use spec::{DType, Layout};

use crate::common::{first_difference, steps, weights};
use crate::{cpu, executor, gpu, models};

#[test]
fn from_cpu_to_gpu_and_back() {
    let (model, layout) = (&models()[1], Layout::default());
    let open = |device| executor(device, model, &layout, DType::Bf16, false);
    let dir = tempfile::tempdir().expect("a folder");
    let Some(gpu) = gpu() else { return };
    let mut first = open(cpu());
    steps(&mut first, model.vocab, 1, 3);
    first.save(dir.path(), 2, ckpt::Meta::default()).expect("saved");
    let newest = || {
        let path = ckpt::latest(dir.path()).expect("a folder").expect("a checkpoint");
        ckpt::Checkpoint::open(&path).expect("whole")
    };
    let mut second = open(Box::new(gpu));
    second.restore(&newest()).expect("restored");
    assert_eq!(first_difference(&weights(&first), &weights(&second)), None);
    let on_gpu = steps(&mut second, model.vocab, 3, 5);
    let on_cpu = steps(&mut first, model.vocab, 3, 5);
    for (a, b) in on_gpu.iter().zip(&on_cpu) {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-2, "{} against {}", a.loss, b.loss);
    }
    second.save(dir.path(), 4, ckpt::Meta::default()).expect("saved");
    let mut third = open(cpu());
    third.restore(&newest()).expect("restored");
    assert_eq!(first_difference(&weights(&second), &weights(&third)), None);
}
