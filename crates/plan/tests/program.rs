//! What is priced is the program that trains: the folded template against the program compiled in full.

use plan::answer::program_memory;
use plan::calibration::PRIOR;
use plan::mesh::Mesh;
use plan::price::{Pricer, Problem};
use plan::shape::{Shape, Sizes, dense};
use plan::software::Software;
use plan::template::{Key, Section, Task, Template, task};
use program::{Program, Request};
use spec::{Catalog, DType, Layout, ModelSpec, NumberFormat, PipelineSchedule, Recompute, Reduce, Zero};

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

fn layouts() -> Vec<Layout> {
    let base = Layout { reduce: Reduce::Ring, micro_batch: 2, ..Layout::default() };
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

#[test]
fn the_folded_template_adds_up_to_the_whole_program() {
    for gated in [false, true] {
        let model = model(gated);
        for layout in layouts() {
            let key = Key {
                tp: layout.tp,
                cp: 1,
                ep: 1,
                sequence_parallel: layout.sequence_parallel,
                micro_batch: layout.micro_batch,
                recompute: layout.recompute,
                whole_layers: false,
                stops_early: false,
                unfused_attention: false,
                sequence: SEQUENCE,
            };
            let t = Template::build(&Shape::from_model(model.clone()), &key).unwrap();
            let (embed, layer, head) = (section(&t.embed), section(&t.layer), section(&t.head));
            let folded: Vec<f64> = (0..4).map(|i| embed[i] + 8.0 * layer[i] + head[i]).collect();

            // The whole program: every stage's first rank, one micro-batch of each pass.
            let mut whole = [0.0; 4];
            for stage in 0..layout.pp {
                let request = Request {
                    model: &model,
                    layout: &layout,
                    sequence: SEQUENCE,
                    sequences: 8 * layout.dp,
                    precision: DType::Bf16,
                    rank: stage * layout.dp * layout.tp,
                    cache: 0,
                };
                let p = Program::build(&request, &|_, _| 0).unwrap();
                let first = p.schedule.iter().filter(|item| item.micro_batch == 0);
                let ops = first.flat_map(|item| &p.blocks[item.block].ops);
                let tasks: Vec<Task> = ops.filter_map(|op| task(&p, op)).collect();
                for (sum, x) in whole.iter_mut().zip(sums(tasks.iter())) {
                    *sum += x;
                }
            }
            for i in [0, 2, 3] {
                assert!(
                    (folded[i] - whole[i]).abs() <= 1e-9 * whole[i],
                    "{layout:?}: {folded:?} against {whole:?}"
                );
            }
            // At the seam between stages a gradient arrives instead of being accumulated: bytes differ by that.
            assert!((folded[1] / whole[1] - 1.0).abs() < 0.02, "{layout:?}: {folded:?} against {whole:?}");
        }
    }
}

/// The closed form that the search uses against the bytes that the program places.
#[test]
fn memory_in_closed_form_follows_the_placed_program() {
    let model = model(true);
    let cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(8)).unwrap();
    let software = Software::named("phalanx").unwrap();
    let problem = Problem {
        shape: Shape::from_model(model),
        cluster,
        software,
        constants: PRIOR,
        sequence: SEQUENCE,
        sequences: 16,
    };
    for layout in layouts() {
        let mesh = Mesh::of(layout, NumberFormat::Bf16);
        let placed = program_memory(&problem, &mesh).unwrap() as f64;
        let memory = Pricer::new(&problem, NumberFormat::Bf16).unwrap().price(&mesh).unwrap().memory;
        let closed = memory.total() - memory.framework;
        assert!(
            (closed / placed - 1.0).abs() < 0.12,
            "{:?}: {closed:e} against {placed:e} {memory:?}",
            mesh.layout
        );
    }
}
