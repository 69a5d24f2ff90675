//! Estimates of many kinds of layouts, digit by digit, under constants that no fit changes: whoever changes a formula sees
//! here what else it moves, and means it. The figures are the estimator's own; whether they are right is asked elsewhere
//! (`phalanx validate`, the doctests, `closed_form.rs`).

#[path = "../../../tests/pinned.rs"]
mod check;

use std::fmt::Write as _;

use check::check;
use plan::calibration::{Constants, PRIOR};
use plan::compute::{Chip, gemm_s, stream_s};
use plan::estimate::parts::{Piece, SectionParts, StepParts};
use plan::estimate::{Estimator, Problem, Updates};
use plan::network::{
    Collective, CommTime, Extent, Group, NetworkModel, Traffic, collective, dims_spanned, traffic,
};
use plan::pipeline::{Pipeline, Stage, makespan_s, uneven_s};
use plan::software::{ALL, Software};
use plan::{given, models};
use spec::{Catalog, NumberFormat, Optimizer, PipelineSchedule, Result};

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
    check("collectives", &found);
}

/// Products and attention on chips of every kind, by dims that fill their tiles, just not, or not at all.
#[test]
fn kernels_take_what_they_took() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let mut all = String::new();
    for name in [
        "dgx-v100",
        "dgx-a100",
        "dgx-h100",
        "dgx-b200",
        "mi300x-node",
        "gaudi2-node",
        "tpu-v5e-pod",
        "aws-trn2",
        "t4",
    ] {
        let accelerator = catalog.cluster(name, None).expect(name).accelerator;
        for format in NumberFormat::all() {
            let chip = match Chip::of(&accelerator, format) {
                Ok(chip) => chip,
                Err(e) => {
                    writeln!(all, "{name} {format}: {e} ({})", e.hint_text().unwrap_or_default()).unwrap();
                    continue;
                }
            };
            writeln!(all, "{name} {format}: {chip:.6?}, streams 1 GB in {:.6e}", stream_s(&chip, 1e9))
                .unwrap();
            if !matches!(format, NumberFormat::Bf16 | NumberFormat::Fp16 | NumberFormat::Fp8) {
                continue;
            }
            let dims = [
                (8192.0, 8192.0, 8192.0),
                (4096.0, 50257.0, 768.0),
                (100.0, 12288.0, 4096.0),
                (16.0, 8192.0, 8192.0),
            ];
            let odd = [
                (1.0, 1.0, 1.0),
                (257.0, 129.0, 65.0),
                (2049.0, 1600.0, 6400.0),
                (300.0, 96.0, 80.0),
                (64.0, 3000.0, 48.0),
            ];
            let none = [(0.0, 64.0, 64.0), (64.0, 0.0, 64.0), (64.0, 64.0, 0.0)];
            for (m, n, k) in dims.into_iter().chain(odd).chain(none) {
                let took = [0.0, 1e9].map(|bytes| format!("{:.6e}", gemm_s(&chip, m, n, k, bytes)));
                writeln!(all, "  {m} x {n} x {k}: {}", took.join(" ")).unwrap();
            }
            let passes = [(true, false), (true, true), (false, false), (false, true)];
            let rates = passes.map(|(tuned, backward)| {
                [(512.0, 64.0), (8192.0, 96.0), (8192.0, 128.0)]
                    .map(|(s, d)| format!("{:.6e}", chip.attention(tuned, s, d, backward)))
                    .join(" ")
            });
            writeln!(all, "  attention {}", rates.join(" ")).unwrap();
        }
    }
    check("kernels", &all);
}

/// Pipelines whose ends differ from the stages between, and chunks that differ from each other.
#[test]
fn pipelines_take_what_they_took() {
    let stage = |forward_s, backward_s| Stage { forward_s, backward_s };
    let (even, long, short) = (stage(1.0, 2.25), stage(1.5, 3.5), stage(0.25, 0.75));
    let schedules = [
        (PipelineSchedule::Gpipe, 1.0),
        (PipelineSchedule::OneFOneB, 1.0),
        (PipelineSchedule::ZeroBubble, 1.0),
        (PipelineSchedule::Interleaved, 2.0),
        (PipelineSchedule::Interleaved, 5.0),
    ];
    let mut all = String::new();
    for (schedule, chunks) in schedules {
        for stages in [1.0, 2.0, 3.0, 4.0, 16.0] {
            for (first, middle, mean, last) in [
                (even, even, even, even),
                (long, even, even, short),
                (short, even, even, long),
                (even, long, even, short),
                (short, long, even, even),
            ] {
                let times = [1.0, 4.0, 64.0].map(|micro_batches| {
                    let p = Pipeline {
                        schedule,
                        stages,
                        chunks,
                        micro_batches,
                        first,
                        middle,
                        mean,
                        last,
                        weight_s: 0.375,
                    };
                    format!("{:.6}", makespan_s(&p))
                });
                let parts = [first, middle, mean, last].map(|s| s.both_s().to_string());
                writeln!(
                    all,
                    "{schedule:?} x{chunks} {stages} stages of {}: {}",
                    parts.join(" "),
                    times.join(" ")
                )
                .unwrap();
            }
        }
    }
    for (stages, chunks) in [(2, 2), (2, 3), (4, 2), (4, 3)] {
        let virtuals: Vec<Stage> = (0..stages * chunks)
            .map(|v| stage(1.0 + 0.25 * (v % 3) as f64, 2.0 + 0.5 * ((v * 7) % 5) as f64))
            .collect();
        let times =
            [1, 2, 3, 4, 7, 20].map(|groups| format!("{:.6}", uneven_s(stages, groups * stages, &virtuals)));
        writeln!(all, "{stages} x {chunks} uneven: {}", times.join(" ")).unwrap();
    }
    check("pipelines", &all);
}

/// Groups on a machine: where they lie, and digests of what they put on links and how long that takes.
fn groups_on(cluster: &spec::Cluster) -> String {
    let whats = [Collective::AllReduce, Collective::AllGather, Collective::AllToAll, Collective::Send];
    let groups = [
        (1, 1),
        (2, 1),
        (3, 1),
        (4, 1),
        (2, 4),
        (2, 3),
        (4, 4),
        (4, 16),
        (8, 8),
        (16, 2),
        (64, 1),
        (64, 64),
        (512, 8),
    ];
    let net = NetworkModel::of(cluster);
    let mut all = format!("{net:?}\n");
    for (size, stride) in groups {
        let span = Extent::of(cluster, &net, Group { size, stride });
        let put: Vec<String> = whats
            .iter()
            .flat_map(|what| [0.0, 3e6].map(|bytes| traffic(&net, *what, &span, size, bytes)))
            .map(|t| traffic_text(&t))
            .collect();
        let of = |what, bytes| collective(cluster, &net, what, Group { size, stride }, bytes);
        let bounds: Vec<String> = whats
            .iter()
            .flat_map(|what| [0.0, 1e5, 1e10].map(|bytes| of(*what, bytes)))
            .map(|t| format!("{:?} {:.4e} {:.4e}", t.bound, t.seconds, t.wire_bytes))
            .collect();
        let digests = [put.join(" "), bounds.join(", ")].map(digest);
        writeln!(
            all,
            "  {size} by {stride}: {span:.6?}; {:016x} {:016x} {}",
            digests[0], digests[1], bounds[2]
        )
        .unwrap();
    }
    all
}

/// Where groups lie, and what they put on links: on machines as they are, tapered, and without links between rails.
#[test]
fn groups_lie_where_they_lay() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let mut all = String::new();
    for name in [
        "dgx-superpod-h100-64su",
        "mi300x-node",
        "tpu-v4-pod",
        "tpu-v5e-pod",
        "hf-h100",
        "meta-24k-roce",
        "frontier",
        "gb200-nvl72",
    ] {
        let whole = catalog.cluster(name, None).expect(name);
        let (mut tapered, mut rail) = (whole.clone(), whole.clone());
        for tier in &mut tapered.scale_out.tiers {
            tier.oversubscription *= 3.0;
        }
        rail.scale_out.topology = spec::cluster::FabricTopology::RailOnly;
        for (kind, cluster) in [("", whole), (" tapered", tapered), (" by rail", rail)] {
            writeln!(all, "{name}{kind}: {}", groups_on(&cluster)).unwrap();
        }
    }
    for extents in [vec![4, 4, 4], vec![16, 16], vec![1, 8], vec![2, 3, 5]] {
        for (stride, members) in
            [(1, 1), (1, 2), (1, 4), (1, 5), (2, 2), (2, 8), (4, 4), (4, 16), (16, 4), (3, 7)]
        {
            let spanned: Vec<(usize, usize)> = dims_spanned(&extents, stride, members).collect();
            writeln!(all, "{extents:?} {stride} {members}: {spanned:?}").unwrap();
        }
    }
    check("groups", &all);
}

/// Constants of which none is one, or like another.
const UNLIKE: Constants =
    Constants { gemm: 0.91, attention: 0.83, stream: 0.71, network: 0.87, experts: 0.77, ..PRIOR };

fn digest(text: String) -> u64 {
    spec::hash::fnv1a(text.bytes())
}

fn traffic_text(t: &Traffic) -> String {
    format!("{:.5e}/{:.5e}/{:.5e}", t.latency_s, t.inside_bytes, t.outside_bytes)
}

/// A step taken apart, in digits: what replicas say, what happens once, and the pieces of its sections.
fn parts_text(parts: &StepParts) -> [String; 2] {
    let r = &parts.replicas;
    let once = format!(
        "{:?} {:?} {} {} {:.5e} {} {:.6e} {:.3e} {:.3e} {:.6e} {} {:.5e} {}",
        r.dense,
        r.experts,
        r.grad_bytes,
        r.gathered_bytes,
        r.buckets,
        r.tax,
        parts.optimizer_s,
        parts.once_s,
        parts.launch_s,
        parts.slowest_node,
        parts.micro_batches,
        parts.tied_params,
        traffic_text(&parts.boundary)
    );
    let pieces = |list: &[Piece]| -> String {
        let of = |piece: &Piece| match piece {
            Piece::Gemm { product_s, cast_s } => product_s + 2.0 * cast_s,
            Piece::Attention { seconds } => 3.0 * seconds,
            Piece::Stream { seconds } => 5.0 * seconds,
            Piece::Talk { traffic: t, .. } => {
                7.0 * t.latency_s + 1e-9 * t.inside_bytes + 3e-9 * t.outside_bytes
            }
        };
        format!("{:.6e}", list.iter().map(of).sum::<f64>())
    };
    let sections = [&parts.embed, &parts.layer, &parts.expert_layer, &parts.head].map(|s| {
        let reads =
            [s.reads.forward, s.reads.backward, s.reads.input, s.expert_reads.forward, s.expert_reads.weight];
        let passes = [&s.forward, &s.input, &s.weight].map(|p| pieces(p));
        let (params, experts) = (s.params, s.expert_params);
        format!(
            "{passes:?} {:?} {:.4?} {:.5?} {params:.5e} {experts:.5e} {reads:.1?}",
            s.kernels, s.members, s.far_s
        )
    });
    [once, sections.join(" | ")]
}

/// What else is asked of an estimator than an estimate.
fn asked(case: &str, problem: &Problem, format: NumberFormat) -> Result<String> {
    let placement = given::parse(case, problem, format)?.placement;
    let mut estimator = Estimator::new(problem, format)?;
    let shared = estimator.shared(&placement)?;
    let estimate = estimator.estimate_shared(&placement, &shared);
    let bound = estimator.bound(&placement, &shared);
    let parts = estimator.parts(&placement)?;
    let numbers = |list: &[(&str, f64)]| -> String {
        let shown =
            list.iter().filter(|f| f.1 != 0.0).map(|(name, x)| format!("{}={x:.6e}", name.replace(' ', "_")));
        shown.collect::<Vec<_>>().join(" ")
    };
    let stage = |s: &Stage| format!("{:.5e}+{:.5e}", s.forward_s, s.backward_s);
    let p = estimator.pipeline(&placement)?;
    let stages = [&p.first, &p.middle, &p.mean, &p.last].map(stage).join(" ");
    let virtuals: Vec<String> = estimator.virtuals(&placement)?.iter().map(stage).collect();
    let mut said = Vec::new();
    for at in [0, placement.layout.pp / 2, placement.layout.pp - 1] {
        for s in estimator.replicas_say(&placement, at)? {
            said.push(format!(
                "{at} {:?}{:?}{:?} {:.6e}x{}",
                s.replication, s.among, s.what, s.bytes, s.times
            ));
        }
    }
    let templates = estimator.templates();
    assert_eq!(templates.len(), 1);
    let again = Estimator::new(problem, format)?.with_templates(templates).estimate(&placement)?;
    assert_eq!(again, estimate, "templates folded before change nothing");
    let [once, sections] = parts_text(&parts).map(digest);
    let b = &estimate.breakdown;
    Ok(format!(
        "{} {} fits {} step={:.6e} mfu={:.6e} {} {}\n  bound {:.6e} {:.6e}; {stages}, {:.5e}; {:016x} {:016x} {once:016x} {:?} {sections:016x}",
        b.pace().name(),
        b.bound(),
        estimate.fits,
        estimate.step_s,
        estimate.mfu,
        numbers(&b.parts()),
        numbers(&estimate.memory.parts()),
        bound.0,
        bound.1,
        p.weight_s,
        digest(virtuals.join(" ")),
        digest(said.join(" | ")),
        parts.virtual_layers
    ))
}

/// A written layout drawn by `pick` for a model of so many layers.
fn drawn_case(pick: &mut dyn FnMut(&[usize]) -> usize, layers: usize) -> String {
    let (tp, cp, pp) = (pick(&[1, 1, 2, 4, 8]), pick(&[1, 1, 1, 2, 4]), pick(&[1, 1, 2, 4, 8]));
    let mut case =
        format!("tp={tp},cp={cp},pp={pp},micro_batch={},zero={}", pick(&[1, 2]), pick(&[0, 1, 1, 2, 3]));
    let chunks = if pp > 1 { pick(&[1, 1, 2, 3, 4]) } else { 1 };
    for (key, value) in [("ep", pick(&[1, 1, 2, 8])), ("chunks", chunks), ("shard", pick(&[1, 1, 1, 2, 4]))] {
        if value > 1 {
            write!(case, ",{key}={value}").unwrap();
        }
    }
    if chunks == 1 {
        case += ["", ",schedule=gpipe", ",schedule=zero-bubble"][pick(&[0, 0, 1, 2])];
    }
    let virtuals = pp * chunks;
    if layers >= 2 * virtuals && virtuals > 1 && pick(&[0, 0, 0, 1]) == 1 {
        // A layer less in front, the rest behind.
        let mut each = vec![layers / virtuals; virtuals];
        each[0] -= 1;
        each[virtuals - 1] += 1 + layers % virtuals;
        let each: Vec<String> = each.iter().map(usize::to_string).collect();
        write!(case, ",stage_layers={}", each.join("/")).unwrap();
    }
    case += ["", ",recompute=selective", ",recompute=full"][pick(&[0, 0, 1, 2])];
    case += ["", ",sequence_parallel=false", ",order=tp-cp-pp-dp"][pick(&[0, 0, 1, 2])];
    case
}

/// What a draw seldom meets: model, machine, accelerators, stack, format, layout.
const RARE: [&str; 12] = [
    "llama3-8b dgx-h100 64 phalanx bf16 tp=1,dp=64,zero=3,schedule=zero-bubble",
    "llama3-8b dgx-h100 64 phalanx bf16 tp=2,pp=4,dp=8,zero=3,schedule=zero-bubble",
    "gpt2 dgx-h100 64 phalanx fp32 tp=1,pp=2,dp=32,zero=2,micro_batch=1",
    "gpt3-1.3b dgx-h100 16 nanotron-2025 bf16 tp=2,pp=1,dp=8,zero=0",
    "gpt2 dgx-h100 16 nanotron-2024 bf16 tp=2,pp=2,dp=4,stage_layers=5/7,zero=1",
    "gpt2 dgx-h100 16 nanotron-2025 bf16 tp=2,pp=2,dp=4,chunks=2,zero=0",
    "gpt2 dgx-h100 16 nanotron-2025 bf16 tp=1,pp=4,dp=4,schedule=gpipe,zero=1,recompute=full",
    "deepseek-v3 hf-h100 256 megatron-core-2026 bf16 tp=1,ep=64,pp=4,dp=64,zero=1,micro_batch=2",
    "gpt3-175b hf-h100 256 megatron-core-2026 bf16 tp=16,dp=16,zero=0",
    "mixtral-8x7b tpu-v5p-pod 64 maxtext-2025 bf16 tp=1,ep=8,dp=64,zero=3",
    "llama3-8b aws-p5 64 deepspeed-zero3 fp32 zero=3,dp=64",
    "mixtral-8x7b dgx-h100 64 phalanx fp8 tp=2,ep=4,dp=32,zero=1,shard=8",
];

#[test]
fn rare_layouts_take_what_they_took() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let mut all = String::new();
    for case in RARE {
        let words: Vec<&str> = case.split(' ').collect();
        let [model, machine, n, stack, format, layout] = words[..] else { panic!("{case}: six words") };
        let format = NumberFormat::parse(format).expect("a format");
        for optimizer in [Optimizer::AdamW, Optimizer::Muon] {
            let problem = Problem {
                shape: models::find(model).expect("a model"),
                cluster: catalog.cluster(machine, n.parse().ok()).expect(machine),
                software: Software::named(stack).expect("a stack"),
                constants: UNLIKE,
                sequence: 2048,
                sequences: 768,
                optimizer: Updates { rule: optimizer, average: false },
            };
            let found = asked(layout, &problem, format).unwrap_or_else(|e| panic!("{case}: {e}"));
            writeln!(all, "{case} {optimizer:?}\n  {found}").unwrap();
        }
    }
    check("rare", &all);
}

/// Layouts drawn by a counter for stacks, models and machines of every kind; those that are refused are left out.
#[test]
fn drawn_layouts_take_what_they_took() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let machines = [
        ("dgx-h100", 64),
        ("dgx-a100", 16),
        ("tpu-v5p-pod", 64),
        ("aws-p3dn", 32),
        ("mi300x-node", 8),
        ("hf-h100", 128),
        ("gb200-nvl72", 72),
    ];
    let names = ["gpt2", "llama3-8b", "mixtral-8x7b", "gpt2-xl", "qwen3-0.6b", "deepseek-v3", "bloom-176b"];
    let mut shapes = names.map(|name| models::find(name).expect("a model")).to_vec();
    // Rows of heads that no tensor unit likes.
    let mut odd = shapes[0].clone();
    (odd.model.name, odd.model.heads, odd.model.kv_heads, odd.model.head_dim) = ("odd".into(), 8, 8, 100);
    shapes.push(odd);
    let mut all = String::new();
    let mut count = 0;
    for i in 0..700u64 {
        let mut state = spec::random::mix(i);
        let mut pick = |of: &[usize]| {
            state = spec::random::mix(state);
            of[(state >> 20) as usize % of.len()]
        };
        let (machine, n) = machines[pick(&[0, 0, 1, 2, 3, 4, 5, 6])];
        let shape = &shapes[pick(&[0, 1, 1, 2, 2, 3, 4, 5, 6, 7])];
        // The last one is this program's own.
        let software = &ALL[pick(&(0..ALL.len() + 4).collect::<Vec<_>>()).min(ALL.len() - 1)];
        let format = [NumberFormat::Bf16, NumberFormat::Fp16, NumberFormat::Fp8, NumberFormat::Fp32]
            [pick(&[0, 0, 0, 1, 2, 2, 3])];
        let case = drawn_case(&mut pick, shape.model.layers);
        let problem = Problem {
            shape: shape.clone(),
            cluster: catalog.cluster(machine, Some(n)).expect(machine),
            software: software.clone(),
            constants: UNLIKE,
            sequence: [1024, 4096][pick(&[0, 1])],
            sequences: 64 * pick(&[1, 3]),
            optimizer: Updates {
                rule: [Optimizer::AdamW, Optimizer::Muon][pick(&[0, 0, 1])],
                average: false,
            },
        };
        let Ok(found) = asked(&case, &problem, format) else { continue };
        count += 1;
        let Problem { sequence, sequences, optimizer, .. } = &problem;
        writeln!(
            all,
            "{} {machine} {n} {} {format} {optimizer:?} {sequences}x{sequence} {case}\n  {found}",
            shape.model.name, software.name
        )
        .unwrap();
    }
    assert!(count > 100, "{count} of the layouts drawn are legal");
    check("drawn_steps", &all);
}
