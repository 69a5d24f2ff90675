//! What is estimated is the program that trains: the folded template against the program compiled in full.

use plan::answer::program_memory;
use plan::calibration::PRIOR;
use plan::estimate::{Estimator, Problem};
use plan::placement::Placement;
use plan::shape::{Shape, Sizes, dense};
use plan::software::Software;
use plan::template::{Key, Section, Task, Template, tasks};
use program::{Program, Replication, Request};
use spec::{
    Catalog, ContextMode, DType, ExpertRows, Experts, Latent, Layout, ModelSpec, NumberFormat,
    PipelineSchedule, Recompute, Reduce, Zero,
};

fn model(gated: bool) -> ModelSpec {
    let sizes = Sizes {
        layers: 8,
        hidden: 512,
        ffn: 1536,
        heads: 8,
        kv_heads: 4,
        head_dim: 64,
        vocab: 4096,
        gated,
        tied: false,
    };
    dense("small", sizes)
}

/// A mixture with grouped queries, and one with latent attention, shared experts and two layers without experts.
fn mixtures() -> Vec<ModelSpec> {
    let experts = Experts {
        count: 16,
        top_k: 4,
        ffn: 256,
        shared_ffn: 0,
        dense_layers: 0,
        every: 1,
        router: Default::default(),
    };
    let shared = Experts { shared_ffn: 512, dense_layers: 2, ..experts };
    let latent = Latent { query_rank: Some(192), kv_rank: 64, nope_dim: 64, rope_dim: 32, value_dim: 64 };
    vec![
        ModelSpec { experts: Some(experts), ..model(true) },
        ModelSpec { experts: Some(shared), latent: Some(latent), kv_heads: 8, ..model(true) },
    ]
}

/// Layouts that cut sequences or spread experts, or both.
fn wide_layouts() -> Vec<Layout> {
    let (reduce, expert_rows) = (Reduce::Ring, ExpertRows::Even);
    let base = Layout { reduce, expert_rows, micro_batch: 2, ..Layout::default() };
    let mut out = Vec::new();
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        let base = Layout { recompute, ..base.clone() };
        out.push(Layout { dp: 4, ep: 4, ..base.clone() });
        out.push(Layout { cp: 2, ep: 2, pp: 2, ..base.clone() });
        out.push(Layout { tp: 2, ep: 1, ..base.clone() });
        out.push(Layout { cp: 4, context: ContextMode::Heads, ep: 4, ..base.clone() });
        out.push(Layout { cp: 2, context: ContextMode::Heads, tp: 2, ep: 4, pp: 2, ..base.clone() });
        out.push(Layout { dp: 2, cp: 2, tp: 2, ep: 8, pp: 2, sequence_parallel: true, ..base });
    }
    out
}

fn layouts() -> Vec<Layout> {
    let (reduce, expert_rows) = (Reduce::Ring, ExpertRows::Even);
    let base = Layout { reduce, expert_rows, micro_batch: 2, ..Layout::default() };
    let mut out = Vec::new();
    for recompute in [Recompute::None, Recompute::Selective, Recompute::Full] {
        out.push(Layout { recompute, ..base.clone() });
        out.push(Layout { recompute, tp: 2, ..base.clone() });
        out.push(Layout { recompute, tp: 4, sequence_parallel: true, pp: 2, ..base.clone() });
        let chunks = Layout { pp: 2, chunks: 2, schedule: PipelineSchedule::Interleaved, ..base.clone() };
        out.push(Layout { recompute, dp: 2, zero: Zero::Optimizer, ..chunks });
    }
    out
}

const SEQUENCE: usize = 256;

/// FLOPs, bytes and wire bytes of tasks, and how many there are.
fn sums<'a>(tasks: impl Iterator<Item = &'a Task>) -> [f64; 4] {
    let mut s = [0.0; 4];
    for t in tasks {
        s[3] += 1.0;
        match *t {
            Task::Gemm { m, n, k, batch, bytes, .. } => {
                s[0] += 2.0 * m * n * k * batch;
                s[1] += bytes;
            }
            Task::Attention { flops, bytes, .. } => {
                s[0] += flops;
                s[1] += bytes;
            }
            Task::Stream { bytes } => s[1] += bytes,
            Task::Talk { bytes, .. } => s[2] += bytes,
        }
    }
    s
}

fn section(s: &Section) -> [f64; 4] {
    sums(s.forward.iter().chain(&s.input).chain(&s.weight))
}

/// The template of a layout against the programs of every stage's first rank, one micro-batch of each pass.
fn check_fold(model: &ModelSpec, layout: &Layout) {
    let t = Template::build(&Shape::from_model(model.clone()), &Key::of(layout, SEQUENCE)).unwrap();
    let (embed, layer, head) = (section(&t.embed), section(&t.layer), section(&t.head));
    let expert = t.expert_layer.as_ref().map_or([0.0; 4], section);
    let with = model.expert_layers() as f64;
    let without = model.layers as f64 - with;
    let folded: Vec<f64> =
        (0..4).map(|i| embed[i] + without * layer[i] + with * expert[i] + head[i]).collect();

    let mut whole = [0.0; 4];
    let (mut params, mut expert_params) = (0, 0);
    for stage in 0..layout.pp {
        let request = Request {
            model,
            layout,
            sequence: SEQUENCE,
            sequences: 8 * layout.dp,
            precision: DType::Bf16,
            rank: stage * layout.stage_ranks(),
            mode: program::Mode::Train,
            loss: program::Loss::OneSequence,
            recipe: Default::default(),
        };
        let p = Program::build(&request, &|_, _| 0).unwrap();
        let first = p.schedule.iter().filter(|item| item.micro_batch == 0);
        let ops = first.flat_map(|item| &p.blocks[item.block].ops);
        let all: Vec<Task> = ops.flat_map(|op| tasks(&p, op)).collect();
        for (sum, x) in whole.iter_mut().zip(sums(all.iter())) {
            *sum += x;
        }
        for g in &p.groups {
            match g.replication {
                Replication::Data => params += g.len(),
                Replication::Expert => expert_params += g.len(),
            }
        }
    }
    for i in [0, 2, 3] {
        assert!((folded[i] - whole[i]).abs() <= 1e-9 * whole[i], "{layout:?}: {folded:?} against {whole:?}");
    }
    // At the seam between stages a gradient arrives instead of being accumulated: bytes differ by that.
    assert!((folded[1] / whole[1] - 1.0).abs() < 0.02, "{layout:?}: {folded:?} against {whole:?}");
    let of = |f: &dyn Fn(&Section) -> f64| {
        without * f(&t.layer) + if with > 0.0 { with * t.expert_layer.as_ref().map_or(0.0, f) } else { 0.0 }
    };
    assert_eq!(of(&|s| s.params) + t.embed.params + t.head.params, params as f64, "{layout:?}");
    assert_eq!(if with > 0.0 { of(&|s| s.expert_params) } else { 0.0 }, expert_params as f64, "{layout:?}");
}

#[test]
fn the_folded_template_adds_up_to_the_whole_program() {
    for gated in [false, true] {
        for layout in layouts() {
            check_fold(&model(gated), &layout);
        }
    }
}

#[test]
fn so_do_experts_latents_and_parts_of_sequences() {
    for model in mixtures() {
        for layout in wide_layouts() {
            check_fold(&model, &layout);
        }
    }
    for layout in wide_layouts() {
        check_fold(&model(true), &Layout { ep: 1, ..layout });
    }
}

/// The closed form that the search uses against the bytes that the program places.
#[test]
fn memory_in_closed_form_follows_the_placed_program() {
    for layout in layouts() {
        // The program keeps as many slots of each chunk as are ever filled, at different times: more than all together.
        let tolerance = if layout.chunks > 1 { 0.05 } else { 0.02 };
        check_closed_form(model(true), layout, tolerance);
    }
    for model in mixtures() {
        // A mean layer stands for stages with and without experts.
        let tolerance = if model.expert_layers() < model.layers { 0.1 } else { 0.03 };
        for layout in wide_layouts() {
            check_closed_form(model.clone(), layout, tolerance);
        }
    }
}

fn check_closed_form(model: ModelSpec, layout: Layout, tolerance: f64) {
    let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(16)).unwrap();
    let problem = Problem {
        shape: Shape::from_model(model),
        cluster,
        software: Software::named("phalanx").unwrap(),
        constants: PRIOR,
        sequence: SEQUENCE,
        sequences: 16,
        optimizer: Default::default(),
    };
    let placement = Placement::of(layout, NumberFormat::Bf16);
    let placed = program_memory(&problem, &placement).unwrap() as f64;
    let memory = Estimator::new(&problem, NumberFormat::Bf16).unwrap().estimate(&placement).unwrap().memory;
    let closed = memory.total() - memory.framework;
    assert!(
        (closed / placed - 1.0).abs() < tolerance,
        "{:?}: {closed:e} against {placed:e} {memory:?}",
        placement.layout
    );
}
