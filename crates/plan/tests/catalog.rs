//! Every platform and node of the catalogue can be planned for, and the answers are sane.

use plan::answer::{Question, plan};
use plan::calibration::Calibration;
use plan::models;
use plan::shape::Shape;
use spec::{Catalog, EntryKind};

/// Largest job asked for: enough for the model's state on the smallest accelerators, few enough to be quick.
const ACCELERATORS: usize = 64;
/// Bytes of state for each parameter, and what must be left for activations.
const ROOM: f64 = 2.0 * 18.0;

fn question(catalog: &Catalog, name: &str) -> Question {
    let whole = catalog.cluster(name, None).unwrap();
    // A bare node is as many nodes as are asked for, where a fabric joins them.
    let n = if catalog.get(EntryKind::Platform, name).is_ok() {
        whole.accelerators.min(ACCELERATORS)
    } else {
        whole.accelerators_max.min(ACCELERATORS)
    };
    // Racks of 72 come whole.
    let n = if whole.per_node == 72 { 72 } else { n };
    let cluster = catalog.cluster(name, Some(n)).unwrap();
    let shape = |name: &str| Shape::find(name).unwrap().unwrap();
    let format = cluster.accelerator.sixteen_bit();
    let room = cluster.accelerator.memory_bytes.value * n as f64;
    let model = ["gpt3-13b", "gpt3-6.7b", "gpt3-1.3b"];
    let fitting = model.into_iter().map(shape).find(|s| s.params() * ROOM < room).expect("a model that fits");
    Question {
        shape: fitting,
        cluster,
        software: None,
        format,
        sequence: 2048,
        sequences: 8 * n,
        tokens: None,
        keep: 1,
        trainable_only: false,
        strategy: None,
        optimizer: Default::default(),
    }
}

#[test]
fn every_platform_and_node_has_a_plan_within_reason() {
    let catalog = Catalog::builtin().unwrap();
    let calibration = Calibration::builtin().unwrap();
    let mut planned = 0;
    for kind in [EntryKind::Platform, EntryKind::Node] {
        for listed in catalog.list(Some(kind)) {
            let name = &listed.name;
            let q = question(&catalog, name);
            let tokens = (q.sequence * q.sequences) as f64;
            let flops = q.shape.flops_per_token(q.sequence as f64, true) * tokens;
            let peak = q.cluster.accelerator.peak(q.format).unwrap().value * q.cluster.accelerators as f64;
            let answer = plan(q, &calibration, &|_, _| ()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let best = &answer.best[0];
            assert!((0.02..0.8).contains(&best.mfu), "{name}: mfu {}", best.mfu);
            assert!(best.step_s > flops / peak, "{name}: {} under the roofline", best.step_s);
            let storage = answer.storage.unwrap_or_else(|| panic!("{name}: storage unknown"));
            assert!(storage.stall.is_some() && storage.write.value > 0.0, "{name}: {storage:?}");
            assert!(storage.write.low <= storage.write.value && storage.write.value <= storage.write.high);
            planned += 1;
        }
    }
    assert!(planned > 80, "{planned}");
}

#[test]
fn both_lists_of_models_are_planned_for() {
    let calibration = Calibration::builtin().unwrap();
    let catalog = Catalog::builtin().unwrap();
    for known in models::all().unwrap() {
        let shape = models::find(&known.name).unwrap();
        if shape.params() > 20e9 || shape.model.kv_heads == 0 {
            continue;
        }
        let q = Question {
            sequence: shape.model.max_positions().min(1024),
            sequences: 64,
            shape,
            ..question(&catalog, "dgx-h200")
        };
        let answer = plan(q, &calibration, &|_, _| ()).unwrap_or_else(|e| panic!("{}: {e}", known.name));
        assert!(answer.best[0].fits && answer.best[0].step_s > 0.0, "{}", known.name);
    }
}
