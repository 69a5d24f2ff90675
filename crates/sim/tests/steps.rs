//! Played steps against the closed form, against published times, and folded against unfolded.

use plan::answer::default_batch;
use plan::calibration::Calibration;
use plan::estimate::Problem;
use plan::given;
use plan::models;
use plan::software::Software;
use sim::Rehearsal;
use sim::clock::USUAL;
use sim::world::{Disturbed, Folding, Mark, Window};
use spec::{Catalog, NumberFormat};

fn problem(model: &str, cluster: &str, accelerators: usize, software: &str, batch: (usize, usize)) -> Problem {
    let shape = models::find(model).unwrap();
    let cluster = Catalog::builtin().unwrap().cluster(cluster, Some(accelerators)).unwrap();
    let software = Software::named(software).unwrap();
    let family = &cluster.accelerator.family.name;
    let constants =
        Calibration::builtin().unwrap().constants(family, &cluster.accelerator.name, "bf16", &software);
    Problem { shape, cluster, software, constants, sequence: batch.1, sequences: batch.0 }
}

fn rehearse(problem: &Problem, layout: &str, disturbed: &Disturbed, folding: Folding) -> (f64, sim::Step) {
    let given = given::parse(layout, problem, NumberFormat::Bf16).unwrap();
    let rehearsal = Rehearsal::new(problem, &given.placement).unwrap();
    (rehearsal.predicted_s(), rehearsal.play(disturbed, folding).unwrap())
}

#[test]
fn undisturbed_steps_take_what_the_closed_form_says() {
    let mut out = String::new();
    for (model, cluster, n, software, batch, layout) in [
        ("gpt3-175b", "dgx-a100", 64, "megatron-2022", (64, 2048), "tp=8,pp=8,micro_batch=1,recompute=full"),
        ("gpt3-175b", "dgx-a100", 512, "megatron-2021", (512, 2048), "tp=8,pp=8,micro_batch=1,recompute=full"),
        ("llama3-8b", "dgx-h100", 64, "megatron-core-2024", (512, 8192), "tp=4,pp=1,micro_batch=1"),
        ("llama3-8b", "dgx-h100", 64, "fsdp-2023", (512, 8192), "zero=3,micro_batch=1"),
        ("llama3-405b", "dgx-h100", 1024, "megatron-core-2024", (512, 8192), "tp=8,pp=16,micro_batch=1"),
        ("llama3-70b", "dgx-h100", 256, "megatron-core-2024", (512, 8192), "tp=8,pp=4,chunks=5,micro_batch=1"),
        ("llama3-70b", "dgx-h100", 256, "phalanx", (512, 8192), "tp=8,pp=4,micro_batch=1,schedule=zero-bubble"),
        ("llama3-70b", "dgx-h100", 256, "megatron-core-2024", (512, 8192), "tp=8,pp=4,cp=2,micro_batch=1"),
        ("mixtral-8x7b", "dgx-h100", 64, "megatron-core-2024", (512, 4096), "tp=2,ep=8,micro_batch=1"),
        ("llama3-70b", "tpu-v5p-pod", 256, "maxtext-2025", (512, 8192), "zero=3,micro_batch=1"),
    ] {
        let p = problem(model, cluster, n, software, batch);
        let (predicted, step) = rehearse(&p, layout, &Disturbed::default(), Folding::Folded);
        out += &format!("{model} {cluster} {n} {software} {layout}: {predicted:.4} played {:.4} {:+.2} % {} classes {} events {:?}\n",
            step.step_s, 100.0 * (step.step_s / predicted - 1.0), step.classes, step.events, step.spent);
    }
    println!("{out}");
}

fn marks() -> Vec<Disturbed> {
    let mut slow = Disturbed::default();
    slow.ranks.insert(5, Mark { speed: USUAL * 3 / 4, ..Mark::default() });
    let mut link = slow.clone();
    link.ranks.insert(9, Mark { port: USUAL / 3, ..Mark::default() });
    let mut pause = Disturbed::default();
    let window = Window { from: 100_000_000_000, to: 300_000_000_000, speed: 0 };
    pause.ranks.insert(0, Mark { windows: vec![window], ..Mark::default() });
    let mut tier = Disturbed::default();
    tier.tiers.insert((0, 1), USUAL / 2);
    vec![Disturbed::default(), slow, link, pause, tier]
}

/// Every rank ends at the same picosecond, whether ranks alike are played once or each.
#[test]
fn folded_ranks_end_when_unfolded_ones_do() {
    let check = |cluster: &str, n: usize, software: &str, layout: &str, model: &str| {
        let mut p = problem(model, cluster, n, software, (64, 1024));
        if cluster == "meta-24k-roce" {
            // Small enough to leave a tier that is narrower above.
            p.cluster.scale_out.tiers[0].oversubscription = 3.0;
        }
        for (i, disturbed) in marks().iter().enumerate() {
            let (_, folded) = rehearse(&p, layout, disturbed, Folding::Folded);
            let (_, unfolded) = rehearse(&p, layout, disturbed, Folding::Unfolded);
            assert_eq!(unfolded.classes, n);
            assert!(folded.classes < n, "{layout} {i}: {} classes", folded.classes);
            let pairs = folded.ends.all().zip(unfolded.ends.all());
            let differ: Vec<(usize, (u64, u64))> = pairs.enumerate().filter(|(_, (a, b))| a != b).collect();
            assert!(differ.is_empty(), "{cluster} {layout}, disturbance {i}: {:?}", differ.first());
        }
    };
    check("dgx-h100", 32, "megatron-core-2024", "tp=2,pp=4,micro_batch=1", "llama3-8b");
    check("dgx-h100", 32, "megatron-core-2024", "tp=2,pp=2,chunks=2,micro_batch=2", "llama3-8b");
    check("dgx-h100", 32, "fsdp-2023", "tp=2,zero=3,micro_batch=1", "llama3-8b");
    check("dgx-h100", 32, "phalanx", "tp=2,pp=2,schedule=zero-bubble,micro_batch=1", "llama3-8b");
    check("meta-24k-roce", 64, "megatron-core-2024", "tp=2,pp=4,micro_batch=1", "llama3-8b");
    check("meta-24k-roce", 64, "megatron-core-2024", "tp=2,pp=2,cp=2,micro_batch=1", "llama3-8b");
    check("dgx-h100", 32, "megatron-core-2024", "tp=2,ep=8,micro_batch=1", "mixtral-8x7b");
    check("tpu-v5p-pod", 64, "maxtext-2025", "tp=4,zero=3,micro_batch=1", "llama3-8b");
}

#[test]
fn batches_are_the_usual_ones() {
    assert_eq!(default_batch(&models::find("llama3-8b").unwrap()).1, 8192);
}
