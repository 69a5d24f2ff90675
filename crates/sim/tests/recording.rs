//! Critical paths and timelines of steps that were kept.

use plan::calibration::Calibration;
use plan::estimate::Problem;
use plan::software::Software;
use plan::{given, models};
use sim::clock::USUAL;
use sim::world::{Disturbed, Folding, Mark};
use sim::{PathLink, Rehearsal, Shares};
use spec::{Catalog, NumberFormat};

fn problem(model: &str, software: &str) -> Problem {
    let shape = models::find(model).unwrap();
    let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(32)).unwrap();
    let software = Software::named(software).unwrap();
    let family = &cluster.accelerator.family.name;
    let constants =
        Calibration::builtin().unwrap().constants(family, &cluster.accelerator.name, "bf16", &software);
    Problem {
        shape,
        cluster,
        software,
        constants,
        sequence: 1024,
        sequences: 64,
        optimizer: Default::default(),
    }
}

/// More than happens in any of these steps.
const ALL: usize = 10_000_000;

fn slow(rank: usize, mark: Mark) -> Disturbed {
    let mut out = Disturbed::default();
    out.ranks.insert(rank, mark);
    out
}

/// From 0 to the end of the step, each link where the one before ends.
fn check_path(path: &[PathLink], step_s: f64) {
    assert_eq!(path[0].from_s, 0.0);
    for pair in path.windows(2) {
        assert_eq!(pair[0].to_s, pair[1].from_s, "{pair:?}");
        assert!(pair[0].from_s < pair[0].to_s, "{pair:?}");
    }
    assert_eq!(path.last().unwrap().to_s, step_s);
}

#[test]
fn critical_paths_have_no_gaps_and_keeping_changes_nothing() {
    let layouts = [
        ("llama3-8b", "megatron-core-2024", "tp=2,pp=4,micro_batch=1"),
        ("llama3-8b", "megatron-core-2024", "tp=2,pp=2,cp=2,chunks=2,micro_batch=2"),
        ("llama3-8b", "fsdp-2023", "tp=2,zero=3,micro_batch=1"),
        ("llama3-8b", "phalanx", "tp=2,pp=2,schedule=zero-bubble,micro_batch=1"),
        ("mixtral-8x7b", "megatron-core-2024", "tp=2,ep=8,micro_batch=1"),
    ];
    let marks = [
        Disturbed::default(),
        slow(5, Mark { speed: USUAL * 2 / 3, ..Mark::default() }),
        slow(9, Mark { port: USUAL / 20, ..Mark::default() }),
    ];
    for (model, software, layout) in layouts {
        let p = problem(model, software);
        let given = given::parse(layout, &p, NumberFormat::Bf16).unwrap();
        let rehearsal = Rehearsal::new(&p, &given.placement).unwrap();
        for disturbed in &marks {
            let kept = rehearsal.record(disturbed, Folding::Folded, ALL).unwrap();
            assert_eq!(kept.step(), &rehearsal.play(disturbed, Folding::Folded).unwrap(), "{layout}");
            check_path(&kept.critical_path(), kept.step().step_s);
        }
    }
}

/// A rank that is much slower than all others, or whose port is, is where the time goes.
#[test]
fn critical_paths_lead_through_what_is_slow() {
    let p = problem("llama3-8b", "megatron-core-2024");
    let given = given::parse("tp=2,pp=4,micro_batch=1", &p, NumberFormat::Bf16).unwrap();
    let rehearsal = Rehearsal::new(&p, &given.placement).unwrap();
    let path = |disturbed: &Disturbed| {
        let kept = rehearsal.record(disturbed, Folding::Folded, ALL).unwrap();
        (kept.critical_path(), kept.step().step_s)
    };
    let (links, step_s) = path(&slow(13, Mark { speed: USUAL / 3, ..Mark::default() }));
    let ranks = Shares::of(&links).by_rank;
    assert_eq!(ranks[0].0, 13, "{ranks:?}");
    assert!(ranks[0].1 > 0.7 * step_s, "{ranks:?} of {step_s}");
    let (links, step_s) = path(&slow(13, Mark { port: USUAL / 1000, ..Mark::default() }));
    let Shares { by_what: whats, by_rank: ranks } = Shares::of(&links);
    assert_eq!(ranks[0].0, 13, "{ranks:?}");
    let said: f64 = whats.iter().filter(|w| w.0.contains("messages")).map(|w| w.1).sum();
    assert!(said > 0.5 * step_s, "{whats:?} of {step_s}");
}

/// A rank's main stream is never idle without a reason, and its bars add up to what it spent.
#[test]
fn timelines_are_whole() {
    let p = problem("llama3-8b", "megatron-core-2024");
    let given = given::parse("tp=2,pp=4,micro_batch=1", &p, NumberFormat::Bf16).unwrap();
    let rehearsal = Rehearsal::new(&p, &given.placement).unwrap();
    let kept = rehearsal.record(&Disturbed::default(), Folding::Unfolded, ALL).unwrap();
    for rank in [0, 13, 31] {
        let bars = kept.timeline(rank);
        let own: Vec<_> = bars.iter().filter(|b| !b.is_message).collect();
        assert_eq!(own[0].from_s, 0.0);
        assert!(own.windows(2).all(|w| w[0].to_s == w[1].from_s));
        assert_eq!(sim::clock::ticks(own.last().unwrap().to_s), kept.step().ends.of(rank));
        assert!(bars.iter().any(|b| b.is_message));
    }
}

/// A step in which too much happens is played like any other.
#[test]
fn what_is_too_much_is_not_kept() {
    let p = Problem { sequences: 2048, ..problem("llama3-8b", "megatron-core-2024") };
    let given = given::parse("tp=2,pp=4,micro_batch=1", &p, NumberFormat::Bf16).unwrap();
    let rehearsal = Rehearsal::new(&p, &given.placement).unwrap();
    let short = rehearsal.record(&Disturbed::default(), Folding::Folded, 1000).unwrap();
    assert!(!short.is_kept() && short.critical_path().is_empty() && short.timeline(0).is_empty());
    assert_eq!(short.step(), &rehearsal.play(&Disturbed::default(), Folding::Folded).unwrap());
}

/// Told to stop, it says how far it came.
#[test]
fn stopped_steps_are_not_whole() {
    let p = Problem { sequences: 2048, ..problem("llama3-8b", "megatron-core-2024") };
    let given = given::parse("tp=2,pp=4,micro_batch=1", &p, NumberFormat::Bf16).unwrap();
    let play = |stop: bool| {
        let stop = std::sync::atomic::AtomicBool::new(stop);
        let rehearsal = Rehearsal::new(&p, &given.placement).unwrap().until(&stop);
        rehearsal.play(&Disturbed::default(), Folding::Folded).unwrap()
    };
    let (stopped, whole) = (play(true), play(false));
    assert!(whole.is_whole && !stopped.is_whole);
    assert!(0.0 < stopped.step_s && stopped.step_s < whole.step_s && stopped.events < whole.events);
}
