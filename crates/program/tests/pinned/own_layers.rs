//! Layers that do not come from a model's shape, and what programs are asked for.

use std::fmt::Write as _;

use program::{Emitter, Loss, Mode, Program, Recipe, Request, Role, RowFn, ValueId};
use spec::{DType, Layout, Recompute};

use crate::check::check;
use crate::common::model;
use crate::figures;

fn twice(x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = 2.0 * x);
}

fn twice_back(dy: &[f32], _: &[f32], dx: &mut [f32]) {
    twice(dy, dx);
}

/// Buffers and groups that hold nothing, and bytes that are said.
fn empty(p: &Program) -> String {
    let buffers = p.buffers.iter().filter(|b| b.is_empty()).count();
    let groups = p.groups.iter().filter(|g| g.is_empty()).count();
    let said: u64 =
        p.blocks.iter().flat_map(|b| &b.ops).filter_map(|op| op.comm.as_ref()).map(|c| c.bytes()).sum();
    format!(
        "{buffers} of {} buffers and {groups} of {} groups are empty, {said} B said",
        p.buffers.len(),
        p.groups.len()
    )
}

/// Layers of one's own: functions of rows beside the model's layers, and a model whose parameters no op uses.
#[test]
fn layers_of_ones_own_change_only_on_purpose() {
    let of = RowFn { name: "twice", forward: twice, backward: twice_back };
    assert!(of == RowFn { backward: |_, _, _| (), ..of } && of != RowFn { name: "thrice", ..of });
    let layer = |e: &mut Emitter<'_>, i: usize, x: ValueId| {
        let (hidden, tp) = (e.model().hidden, e.layout().tp);
        let rows = e.rows(of, &format!("layers.{i}.twice.{tp}"), x, hidden);
        let y = e.layer(i, x);
        e.add(&format!("layers.{i}.sum"), y, rows)
    };
    let (m, mut all) = (model(2, true, false), String::new());
    for layout in [
        Layout::default(),
        Layout { tp: 2, sequence_parallel: true, recompute: Recompute::Selective, ..Layout::default() },
    ] {
        let request = Request {
            model: &m,
            layout: &layout,
            sequence: 16,
            sequences: 8,
            precision: DType::F32,
            rank: layout.world() - 1,
            mode: Mode::Train,
            loss: Loss::OneSequence,
            recipe: Recipe::default(),
        };
        let program = Program::of_layers(&request, &layer, &|_, _| 640).expect("a program");
        writeln!(all, "{}; {}", figures(&program), empty(&program)).unwrap();
        let refused =
            Program::of_layers(&request, &|_, _, x| x, &|_, _| 640).expect_err("no op uses its parameters");
        writeln!(all, "{refused} ({})", refused.hint_text().unwrap_or_default()).unwrap();
        let generates = Request {
            mode: Mode::Generate { positions: 9 },
            sequences: 1,
            layout: &Layout::default(),
            rank: 0,
            ..request
        };
        let found = Program::of_layers(&generates, &|_, _, x| x, &|_, _| 0);
        writeln!(
            all,
            "{:?}, {}",
            found.map(|p| empty(&p)).map_err(|e| e.to_string()),
            generates.mode.positions()
        )
        .unwrap();
        let spread = Request { layout: &Layout { dp: 2, ..Layout::default() }, sequences: 2, ..generates };
        writeln!(all, "{}", Program::build(&spread, &|_, _| 0).expect_err("one rank generates alone"))
            .unwrap();
    }
    check("own_layers", &all);
}

/// What a run asks for, and what roles are.
#[test]
fn requests_and_roles_change_only_on_purpose() {
    let mut all = String::new();
    let learned = model(2, true, true);
    let set = [
        "model.preset=tiny-gpt2",
        "model.vocab=300",
        "batch.sequence=8",
        "optim.kind=muon",
        "data.attend=documents",
        "train.z_loss=1e-4",
        "train.precision=bf16",
    ];
    let run = spec::RunSpec::load(None, &set.map(str::to_owned), &spec::RunSpec::no_files).expect("a run");
    let request = Request { model: &learned, ..Request::of(&run, 3) };
    let Request { sequence, sequences, precision, rank, mode, loss, recipe, .. } = request;
    writeln!(all, "{sequence} {sequences} {precision} {rank} {mode:?} {loss:?} {recipe:?}").unwrap();
    writeln!(all, "{}", Program::build(&request, &|_, _| 0).expect_err("positions that begin anew nowhere"))
        .unwrap();
    let roles = [
        Role::Embedding,
        Role::Positions,
        Role::AttentionNorm,
        Role::QueryKeyValue,
        Role::QueryNorm,
        Role::KeyNorm,
        Role::Sinks,
        Role::AttentionOut,
        Role::LatentDown,
        Role::QueryLatentNorm,
        Role::KeyValueLatentNorm,
        Role::QueryUp,
        Role::KeyValueUp,
        Role::MlpNorm,
        Role::Up,
        Role::Down,
        Role::SharedUp,
        Role::SharedDown,
        Role::Router,
        Role::ExpertUp,
        Role::ExpertDown,
        Role::FinalNorm,
        Role::Head,
    ];
    for role in roles {
        let is =
            [role.is_norm(), role.is_residual_out(), role.is_hidden_matrix(), role.is_expert()].map(u8::from);
        writeln!(all, "{role:?} {is:?}").unwrap();
    }
    check("asked", &all);
}
