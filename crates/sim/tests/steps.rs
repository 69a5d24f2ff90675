//! Played steps against the closed form, against published times, and folded against unfolded.

use plan::calibration::Calibration;
use plan::estimate::Problem;
use plan::given;
use plan::models;
use plan::software::Software;
use sim::Rehearsal;
use sim::clock::USUAL;
use sim::jitter::{Distribution, Jitter};
use sim::world::{Disturbed, Flap, Folding, Mark, StorageUse, Window};
use spec::{Catalog, NumberFormat};

fn problem(
    model: &str,
    cluster: &str,
    accelerators: usize,
    software: &str,
    batch: (usize, usize),
) -> Problem {
    let shape = models::find(model).unwrap();
    let cluster = Catalog::builtin().unwrap().cluster(cluster, Some(accelerators)).unwrap();
    let software = Software::named(software).unwrap();
    let family = &cluster.accelerator.family.name;
    let constants =
        Calibration::builtin().unwrap().constants(family, &cluster.accelerator.name, "bf16", &software);
    Problem {
        shape,
        cluster,
        software,
        constants,
        sequence: batch.1,
        sequences: batch.0,
        optimizer: Default::default(),
    }
}

fn rehearsal<'a>(problem: &'a Problem, layout: &str) -> Rehearsal<'a> {
    let given = given::parse(layout, problem, NumberFormat::Bf16).unwrap();
    Rehearsal::new(problem, &given.placement).unwrap()
}

/// Slow enough to be seen, on the ports of all.
fn storage() -> StorageUse {
    StorageUse { read_rate: 2e9, write_rate: 1e9, read_bytes: 3e6, write_bytes: 4e7, shares_ports: true }
}

fn rehearse(problem: &Problem, layout: &str, disturbed: &Disturbed, folding: Folding) -> (f64, sim::Step) {
    let rehearsal = rehearsal(problem, layout);
    (rehearsal.predicted_s(), rehearsal.play(disturbed, folding).unwrap())
}

/// Played and predicted times of a layout, and the first over the second less one.
fn against(case: (&str, &str, usize, &str, (usize, usize), &str)) -> (f64, f64, f64) {
    let (model, cluster, n, software, batch, layout) = case;
    let p = problem(model, cluster, n, software, batch);
    let (predicted, step) = rehearse(&p, layout, &Disturbed::default(), Folding::Folded);
    (step.step_s, predicted, step.step_s / predicted - 1.0)
}

/// Where messages meet nobody and nothing has to hide behind a neighbour that is too short, adding up and playing agree.
#[test]
fn undisturbed_steps_take_what_the_closed_form_says() {
    let check = |model: &str, cluster: &str, n, software: &str, batch, layout: &str| {
        let (played, predicted, off) = against((model, cluster, n, software, batch, layout));
        assert!(
            off.abs() < 0.01,
            "{cluster} {software} {layout}: {played} for {predicted}, {:+.2} %",
            100.0 * off
        );
    };
    for layout in [
        "tp=8,pp=8",
        "tp=4,pp=16",
        "tp=8,pp=8,recompute=full",
        "tp=8,pp=4,zero=0",
        "tp=8,pp=8,schedule=gpipe",
    ] {
        let layout = format!("micro_batch=1,{layout}");
        check("gpt3-175b", "dgx-a100", 128, "megatron-2022", (128, 2048), &layout);
        check("gpt3-175b", "dgx-h100", 512, "megatron-2021", (1024, 2048), &layout);
    }
    check("gpt3-175b", "dgx-a100", 512, "megatron-2021", (512, 2048), "tp=8,pp=8,chunks=3,micro_batch=1");
    for layout in ["zero=3,micro_batch=1", "zero=3,micro_batch=2,recompute=full"] {
        check("llama3-8b", "dgx-h100", 64, "fsdp-2023", (512, 8192), layout);
        check("llama3-8b", "mi300x-node", 8, "fsdp-2023", (512, 8192), layout);
        check("llama3-70b", "tpu-v5p-pod", 256, "maxtext-2025", (512, 8192), layout);
    }
    check("llama3-8b", "dgx-h100", 64, "megatron-core-2024", (512, 8192), "tp=4,micro_batch=1");
    check("llama3-405b", "dgx-h100", 1024, "megatron-core-2024", (512, 8192), "tp=8,pp=16,micro_batch=1");
    for layout in ["cp=2,context=heads,micro_batch=1", "cp=4,context=heads,micro_batch=1"] {
        check("llama3-8b", "dgx-h100", 64, "megatron-core-2024", (512, 8192), layout);
    }
    // Heads dealt beside tensor and pipeline parallelism, where no product runs beside a message.
    for layout in ["tp=2,pp=2,cp=2", "tp=2,pp=4,cp=2", "tp=4,pp=4,cp=2", "tp=8,pp=4,cp=2"] {
        let layout = format!("{layout},context=heads,micro_batch=1");
        check("llama3-8b", "dgx-h100", 64, "megatron-2022", (512, 8192), &layout);
        check("llama3-70b", "dgx-h100", 256, "megatron-2022", (512, 8192), &layout);
    }
    for layout in ["pp=4,micro_batch=1", "pp=8,micro_batch=1,zero=0", "micro_batch=1,zero=1"] {
        check("llama3-8b", "dgx-h100", 64, "megatron-core-2024", (512, 8192), layout);
    }
}

/// Chunks of different numbers of layers wait for each other at every turn.
#[test]
fn uneven_chunks_take_what_the_planner_says() {
    let check = |software: &str, layout: &str| {
        let layout = format!("tp=8,micro_batch=1,{layout}");
        let (played, predicted, off) =
            against(("llama3-405b", "dgx-superpod-h100-64su", 2048, software, (2048, 8192), &layout));
        assert!(off.abs() < 0.03, "{software} {layout}: {played} for {predicted}, {:+.2} %", 100.0 * off);
    };
    for layout in [
        "pp=16,chunks=5",
        "pp=16,chunks=6",
        "pp=16,chunks=6,recompute=full",
        "pp=8,chunks=11",
        "pp=32,chunks=3",
    ] {
        check("megatron-core-2024", layout);
        check("phalanx", layout);
    }
}

/// Larger differences, each for a reason: products beside a message are shorter than it, where the closed form lets all
/// products of a pass hide all of its messages; stages of few layers wait for each other's messages; rows that weight
/// gradients need again arrive beside a whole product, where the closed form has the first piece of every message show.
#[test]
fn what_hides_behind_its_neighbours_alone_shows_more() {
    let check = |model: &str, n, layout: &str, low: f64, high: f64| {
        let (played, predicted, off) =
            against((model, "dgx-h100", n, "megatron-core-2024", (512, 8192), layout));
        assert!((low..high).contains(&off), "{layout}: {played} for {predicted}, {:+.2} %", 100.0 * off);
    };
    check("llama3-70b", 256, "tp=8,pp=4,chunks=5,micro_batch=1", 0.01, 0.02);
    check("llama3-70b", 256, "tp=8,pp=4,cp=2,micro_batch=1", 0.01, 0.03);
    // The first piece is half of a message; heads have no part in it.
    check("llama3-8b", 64, "tp=2,pp=4,micro_batch=1", -0.02, -0.01);
    check("llama3-8b", 64, "tp=2,pp=4,cp=2,context=heads,micro_batch=1", -0.02, -0.01);
}

/// Products that messages are copied beside save less than they hide; gathers that are taken apart hide nothing.
#[test]
fn products_beside_copies_are_slower() {
    let step_s = |overlaps: bool, gathers: bool, tax: f64| {
        let mut p = problem("llama3-8b", "dgx-h100", 64, "torchtitan", (512, 8192));
        p.software.overlap_tp = overlaps;
        p.software.overlap_tp_gathers = gathers;
        p.software.overlap_tp_tax = tax;
        rehearse(&p, "tp=4,zero=0,micro_batch=2", &Disturbed::default(), Folding::Folded).1.step_s
    };
    let (apart, free) = (step_s(false, true, 0.0), step_s(true, true, 0.0));
    let saved = |tax: f64| (apart - step_s(true, true, tax)) / (apart - free);
    // Where messages are longer than the products beside them, these have ended.
    let (third, half) = (saved(0.28), saved(0.5));
    assert!((0.72..0.82).contains(&third) && (0.5..0.62).contains(&half), "{third} {half}");
    let scatters = step_s(true, false, 0.0);
    assert!(free < 0.99 * scatters && scatters < 0.99 * apart, "{free} {scatters} {apart}");
}

fn varying(seed: u64) -> Jitter {
    Jitter { distribution: Distribution::Lognormal { spread: USUAL / 10 }, seed }
}

/// Ranks whose kernels are drawn are all played, and wait for whoever is last: a step takes longer the more of them there
/// are, though no rank is slower than another on the mean.
#[test]
fn jitter_costs_by_how_many_wait_for_each_other() {
    let p = problem("llama3-8b", "dgx-h100", 32, "megatron-core-2024", (64, 1024));
    let with = |layout: &str, seed: u64, of: usize| {
        let mut disturbed = Disturbed::default();
        for rank in 0..of {
            let mark = Mark { jitter: vec![varying(1000 * seed + rank as u64)], ..Mark::default() };
            disturbed.ranks.insert(rank, mark);
        }
        rehearse(&p, layout, &disturbed, Folding::Folded).1
    };
    let layout = "tp=8,pp=1,zero=0,micro_batch=1";
    let step_s = |of: usize| with(layout, 1, of).step_s;
    let steps = [0, 1, 8, 32].map(step_s);
    assert!(steps[3] > steps[1] && steps[3] > 1.01 * steps[0], "{steps:?}");
    assert_eq!(with(layout, 1, 32).classes, 32);
    // One rank unfolds its own group and the ranks in its place of the others.
    assert!((3..32).contains(&with(layout, 1, 1).classes), "{}", with(layout, 1, 1).classes);
    assert_eq!(with(layout, 1, 32).step_s, with(layout, 1, 32).step_s);
    assert_ne!(with(layout, 1, 32).step_s, with(layout, 2, 32).step_s);
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
    let mut flap = Disturbed::default();
    let every = Flap { from: 0, every: 50_000_000_000, length: 20_000_000_000, share: USUAL / 50 };
    flap.ranks.insert(3, Mark { flap: Some(every), ..Mark::default() });
    let storage = Disturbed { storage: Some(USUAL / 2), ..Disturbed::default() };
    let mut jitter = Disturbed::default();
    jitter.ranks.insert(6, Mark { jitter: vec![varying(6)], ..Mark::default() });
    vec![Disturbed::default(), slow, link, pause, tier, flap, storage, jitter]
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
            let rehearsal = match i % 2 {
                0 => rehearsal(&p, layout).with_storage(storage()),
                _ => rehearsal(&p, layout),
            };
            let folded = rehearsal.play(disturbed, Folding::Folded).unwrap();
            let unfolded = rehearsal.play(disturbed, Folding::Unfolded).unwrap();
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

/// A step waits for the next one's tokens if they take longer than it; less storage, longer; a checkpoint beside it takes
/// bytes of the ports from messages.
#[test]
fn storage_is_shared_by_all_who_read() {
    let p = problem("llama3-8b", "dgx-h100", 32, "megatron-core-2024", (64, 1024));
    let layout = "tp=2,pp=4,micro_batch=1";
    let play = |storage: StorageUse, disturbed: &Disturbed| {
        rehearsal(&p, layout).with_storage(storage).play(disturbed, Folding::Folded).unwrap()
    };
    let usual = Disturbed::default();
    let bare = rehearsal(&p, layout).play(&usual, Folding::Folded).unwrap();
    let none = StorageUse { write_bytes: 0.0, shares_ports: false, ..storage() };
    assert_eq!(play(none, &usual).step_s, bare.step_s);
    // 32 ranks at 2 GB/s share, so that the last byte comes when the whole step's bytes have passed.
    let slow = StorageUse { read_bytes: bare.step_s * 2.0 * 2e9 / 32.0, ..none };
    let step = play(slow, &usual);
    assert!((step.step_s / (2.0 * bare.step_s) - 1.0).abs() < 1e-6, "{} {}", step.step_s, bare.step_s);
    assert!(step.spent.storage_s > 0.0);
    let half = Disturbed { storage: Some(USUAL / 2), ..Disturbed::default() };
    assert!((play(slow, &half).step_s / (4.0 * bare.step_s) - 1.0).abs() < 1e-6);
    let burst = StorageUse { write_rate: 32.0 * 50e9, write_bytes: 50e9, shares_ports: true, ..none };
    assert!(play(burst, &usual).step_s > 1.001 * bare.step_s);
}

/// A port that comes and goes slows what crosses it, the less it carries the more; a flap that takes nothing away costs
/// nothing.
#[test]
fn flapping_ports_slow_what_crosses_them() {
    let p = problem("llama3-8b", "dgx-h100", 32, "megatron-core-2024", (64, 1024));
    let with = |mark: Mark| {
        let mut disturbed = Disturbed::default();
        disturbed.ranks.insert(3, mark);
        rehearse(&p, "tp=2,pp=4,micro_batch=1", &disturbed, Folding::Folded).1.step_s
    };
    let every = |share| Flap { from: 0, every: 200_000_000, length: 100_000_000, share };
    let flap = |share| with(Mark { flap: Some(every(share)), ..Mark::default() });
    assert_eq!(flap(USUAL), with(Mark::default()));
    let (half, tenth) = (flap(USUAL / 2), flap(USUAL / 10));
    assert!(with(Mark::default()) < half && half < tenth, "{half} {tenth}");
    // Less than if it were always so.
    assert!(tenth < with(Mark { port: USUAL / 10, ..Mark::default() }));
}
