//! Every platform and node of the catalogue can be planned for, and the answers are sane.

use plan::answer::{Question, plan};
use plan::calibration::Calibration;
use plan::models;
use plan::shape::Shape;
use spec::{Catalog, EntryKind, NumberFormat};

/// Largest job asked for: enough for the model's state on the smallest accelerators, few enough to be quick.
const ACCELERATORS: usize = 64;
/// Bytes of state for each parameter, and what must be left for activations.
const ROOM: f64 = 2.0 * 18.0;

fn question(catalog: &Catalog, name: &str) -> Question {
    let whole = catalog.cluster(name, None).unwrap();
    // A bare node is as many nodes as are asked for.
    let n = if catalog.get(EntryKind::Platform, name).is_ok() {
        whole.accelerators.min(ACCELERATORS)
    } else {
        ACCELERATORS
    };
    // Racks of 72 come whole.
    let n = if whole.per_node == 72 { 72 } else { n };
    let cluster = catalog.cluster(name, Some(n)).unwrap();
    let shape = |name: &str| Shape::find(name).unwrap().unwrap();
    let room = cluster.accelerator.memory_bytes.value * n as f64;
    let model = ["gpt3-13b", "gpt3-6.7b", "gpt3-1.3b"];
    let fitting = model.into_iter().map(shape).find(|s| s.params() * ROOM < room).expect("a model that fits");
    Question {
        shape: fitting,
        cluster,
        software: None,
        format: NumberFormat::Bf16,
        sequence: 2048,
        sequences: 8 * n,
        tokens: None,
        keep: 1,
        trainable_only: false,
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
fn clusters_answer_to_the_names_people_type() {
    let catalog = Catalog::builtin().unwrap();
    let check = |typed: &str, name: &str| {
        let cluster = catalog.cluster(typed, None).unwrap_or_else(|e| panic!("{typed}: {e}"));
        assert_eq!(cluster.name, name, "{typed}");
    };
    check("dgx superpod h100", "dgx-superpod-h100");
    check("SuperPOD-H100", "dgx-superpod-h100");
    check("DGX SuperPOD GB200 8SU", "dgx-superpod-gb200-8su");
    check("superpod-a100-7su", "dgx-superpod-a100-7su");
    check("dgx_superpod_b200_1su", "dgx-superpod-b200-1su");
    check("colossus", "xai-colossus");
    check("nd-h100-v5", "azure-nd-h100-v5");
    check("ND96isr-H100-v5", "azure-nd-h100-v5");
    check("a3-mega", "gcp-a3-mega");
    check("p4d.24xlarge", "aws-p4d");
    check("p5", "aws-p5");
    check("p5e", "aws-p5e");
    check("p5en.48xlarge", "aws-p5en");
    check("p6-b200", "aws-p6-b200");
    check("trn1", "aws-trn1");
    check("trn2", "aws-trn2");
    check("RSC", "meta-rsc");
    check("meta-24k", "meta-24k-roce");
    check("coreweave", "coreweave-h100");
    check("Lambda", "lambda-h100");
    check("ironwood-pod", "tpu-v7x-pod");
    check("v5p-pod", "tpu-v5p-pod");
    check("eagle", "azure-eagle");
    check("azure-openai", "azure-openai-2020");
    check("gb200-nvl72", "gb200-nvl72");
    let suggests = |typed: &str, near: &str| {
        let error = catalog.cluster(typed, None).unwrap_err();
        assert!(error.hint_text().unwrap().contains(near), "{typed}: {:?}", error.hint_text());
    };
    suggests("h100 superpod", "superpod-h100");
    suggests("collosus", "colossus");
    suggests("tpu v5p", "tpu-v5p");
    suggests("nd-h100-v6", "nd-h100-v5");
    suggests("dgx-superpod-h100-65su", "dgx-superpod-h100-64su");
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
