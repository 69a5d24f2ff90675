//! Layers emitted by hand: the model's own emitted so are the model, functions of rows bring derivatives that hold, and
//! no bit depends on the layout.

mod common;

use comm::World;
use common::{SEQUENCE, STEPS, fill, inputs, model, weights, with_rows};
use program::{Emitter, Layer, Loss, Mode, Request, Role, ValueId};
use spec::{DType, Layout, ModelSpec, PipelineSchedule, Recompute, Zero};
use train::{Cpu, Executor, Mesh, StepOutputs};

const SEQUENCES: usize = 8;

type Left = (Vec<StepOutputs>, Vec<u32>);

/// Trains under a layout, a thread for each rank; outputs, and all weights that rank 0 holds, as bits.
fn train(
    m: &ModelSpec,
    layout: &Layout,
    precision: DType,
    layer: &(dyn Fn(&mut Emitter<'_>, usize, ValueId) -> ValueId + Sync),
) -> Left {
    let worlds = World::threads(layout.world()).expect("ranks");
    let left: Vec<Left> = std::thread::scope(|scope| {
        let ranks: Vec<_> = worlds
            .into_iter()
            .map(|world| {
                scope.spawn(move || {
                    let rank = world.rank();
                    let mesh = Mesh::new(world, layout).expect("groups");
                    let request = request(m, layout, precision, rank);
                    let layer: Layer<'_> = layer;
                    let mut exec =
                        Executor::of_layers(Box::new(Cpu::new(1)), &request, layer, mesh).expect("a program");
                    exec.initialise(m, 11).expect("weights");
                    let outputs = (1..=STEPS).map(|k| {
                        let valid = fill(&mut exec, m.vocab, k);
                        exec.step(&inputs(k, valid)).expect("a step")
                    });
                    (outputs.collect(), weights(&exec).into_values().flatten().collect())
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    });
    left.into_iter().next().expect("rank 0")
}

fn request<'a>(model: &'a ModelSpec, layout: &'a Layout, precision: DType, rank: usize) -> Request<'a> {
    let (mode, loss) = (Mode::Train, Loss::default());
    Request {
        model,
        layout,
        sequence: SEQUENCE,
        sequences: SEQUENCES,
        precision,
        rank,
        mode,
        loss,
        recipe: Default::default(),
    }
}

#[test]
fn the_models_own_layer_emitted_by_hand_is_the_model() {
    let (m, layout) = (model(2, false, false), Layout::default());
    let own = train(&m, &layout, DType::F32, &|e, i, x| e.layer(i, x));
    let mut exec =
        Executor::new(&request(&m, &layout, DType::F32, 0), 1, Mesh::alone(), false).expect("a program");
    exec.initialise(&m, 11).expect("weights");
    let outputs = common::steps(&mut exec, m.vocab, 1, STEPS + 1);
    assert_eq!(own, (outputs, weights(&exec).into_values().flatten().collect()));
}

#[test]
fn a_function_of_rows_trains_as_the_kernel_that_it_repeats() {
    let (m, layout) = (model(2, false, false), Layout::default());
    let kernel = train(&m, &layout, DType::F32, &|e, i, x| e.layer(i, x));
    let rows = train(&m, &layout, DType::F32, &with_rows);
    for (a, b) in kernel.0.iter().zip(&rows.0) {
        assert!((a.loss - b.loss).abs() < 1e-5 * a.loss, "{} and {}", a.loss, b.loss);
        assert!(
            (a.grad_norm - b.grad_norm).abs() < 1e-4 * a.grad_norm,
            "{} and {}",
            a.grad_norm,
            b.grad_norm
        );
    }
}

#[test]
fn no_bit_of_own_layers_depends_on_the_layout() {
    let m = model(4, false, false);
    for precision in [DType::F32, DType::Bf16] {
        let one = train(&m, &Layout::default(), precision, &with_rows);
        let recomputed = Layout { recompute: Recompute::Selective, micro_batch: 2, ..Layout::default() };
        for layout in [
            recomputed,
            Layout { dp: 2, zero: Zero::Gradients, ..Layout::default() },
            Layout { dp: 4, recompute: Recompute::Full, ..Layout::default() },
        ] {
            let many = train(&m, &layout, precision, &with_rows);
            assert_eq!(many.0, one.0, "{layout:?} in {precision}");
        }
        let staged = Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..Layout::default() };
        assert_eq!(train(&m, &staged, precision, &with_rows).0, one.0, "pp in {precision}");
        let cut = train(&m, &Layout { tp: 2, ..Layout::default() }, precision, &with_rows);
        for (a, b) in one.0.iter().zip(&cut.0) {
            let tolerance = if precision == DType::F32 { 1e-5 } else { 2e-2 };
            assert!(
                (a.loss - b.loss).abs() < tolerance * a.loss,
                "tp in {precision}: {} and {}",
                a.loss,
                b.loss
            );
        }
    }
}

#[test]
fn a_layer_that_leaves_a_parameter_out_is_refused_by_its_name() {
    let (m, layout) = (model(1, false, false), Layout::default());
    let only_attention = |e: &mut Emitter<'_>, i: usize, x: ValueId| {
        let h = e.norm(Role::AttentionNorm, "norm", x);
        let o = e.grouped_queries(&format!("layers.{i}.attn"), h);
        e.row_parallel(Role::AttentionOut, "out", o, x)
    };
    let request = request(&m, &layout, DType::F32, 0);
    let refused = Executor::of_layers(Box::new(Cpu::new(1)), &request, &only_attention, Mesh::alone()).err();
    let said = refused.expect("a refusal").to_string();
    assert!(said.contains("layers.0.mlp_norm.weight"), "{said}");
}
