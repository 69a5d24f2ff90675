//! Programs of which one thing is wrong, and what the verifier says of them: every operand of every kind of op, homes,
//! lives, orders and messages.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use program::verify::{Violation, program, world};
use program::{BufferId, Collective, GradOut, Home, Mode, Op, Program, Recipe, Request, View};
use spec::hash::fnv1a;
use spec::{DType, Layout, ModelSpec, Optimizer, PipelineSchedule, Recompute, Zero};

use crate::check::check;
use crate::{models, rarer_models};

fn model(name: &str) -> ModelSpec {
    models().into_iter().chain(rarer_models()).find(|(n, _)| *n == name).expect("a model").1
}

fn build(model: &ModelSpec, layout: &Layout, rank: usize, mode: Mode, recipe: Recipe) -> Program {
    let (precision, loss) = (DType::Bf16, program::Loss::OneSequence);
    let sequences = if mode == Mode::Train { 8 } else { 1 };
    let request = Request { model, layout, sequence: 16, sequences, precision, rank, mode, loss, recipe };
    Program::build(&request, &|_, _| 640).expect("a legal layout")
}

/// Programs that have ops of every kind together.
fn sound() -> Vec<Program> {
    let one = Layout::default;
    let train = |name, layout, recipe| build(&model(name), &layout, 0, Mode::Train, recipe);
    let plain = Recipe::default();
    let muon = Recipe { optimizer: Optimizer::Muon, documents: true, ..plain };
    let wide = Layout { tp: 2, dp: 2, zero: Zero::Parameters, sequence_parallel: true, ..one() };
    let spread = Layout { ep: 2, dp: 2, ..one() };
    let generate = |name| build(&model(name), &one(), 0, Mode::Generate { positions: 12 }, plain);
    vec![
        train("llama", Layout { micro_batch: 2, ..one() }, plain),
        train("tied", wide.clone(), muon),
        train("gpt2", Layout { tp: 2, ..one() }, plain),
        train("latent", Layout { recompute: Recompute::Full, ..one() }, plain),
        train("moe", spread.clone(), Recipe { z_loss: 1e-4, ..plain }),
        train("sinks", Layout { dp: 2, zero: Zero::Optimizer, ..one() }, plain),
        train("shared", Layout { tp: 2, ep: 2, ..one() }, plain),
        train("windows", Layout { cp: 2, zero: Zero::Gradients, ..one() }, plain),
        train("tied", Layout { pp: 2, schedule: PipelineSchedule::ZeroBubble, ..one() }, plain),
        generate("llama"),
        generate("latent"),
    ]
}

/// One line of ways in which a thing was spoiled: how often each rule is broken then, what is said first, and a digest of
/// all that is said.
#[derive(Default)]
struct Verdicts {
    counts: String,
    said: Vec<String>,
}

impl Verdicts {
    fn add(&mut self, how: &str, found: Vec<Violation>) {
        let mut rules: BTreeMap<String, usize> = BTreeMap::new();
        for v in &found {
            *rules.entry(format!("{:?}", v.rule)).or_default() += 1;
        }
        let rules: Vec<String> = rules.iter().map(|(rule, n)| format!("{rule} {n}")).collect();
        write!(self.counts, "{how}: {}; ", rules.join(" ")).unwrap();
        let mut said: Vec<String> = found.iter().map(ToString::to_string).collect();
        said.sort();
        self.said.extend(said);
    }

    fn line(self) -> String {
        let first = self.said.first().cloned().unwrap_or_default();
        format!("{}{:016x} {first}", self.counts, fnv1a(self.said.join("\n").bytes()))
    }
}

fn operands(op: &mut Op) -> Vec<&mut View> {
    let grads = op.grads.iter_mut().map(|g: &mut GradOut| &mut g.levels);
    op.ins.iter_mut().chain(&mut op.acc).chain(&mut op.outs).chain(grads).collect()
}

/// Ways to spoil operand `n` of an op.
fn spoil_operand(p: &mut Program, (b, i): (usize, usize), n: usize, how: &str) {
    let op = &mut p.blocks[b].ops[i];
    let view = operands(op).remove(n);
    let buffer = view.buffer.0 as usize;
    match how {
        "rows-1" => view.rows -= 1,
        "rows+1" => view.rows += 1,
        "row0+1" => view.row0 += 1,
        "cols+1" => p.buffers[buffer].cols += 1,
        "cols-1" => p.buffers[buffer].cols -= 1,
        "dtype" => p.buffers[buffer].dtype = DType::F64,
        _ => view.buffer = BufferId(u32::try_from(p.buffers.len()).expect("few")),
    }
}

#[test]
fn operands_of_every_kind_are_asked_for() {
    let mut all = String::new();
    let mut seen = BTreeSet::new();
    for p in sound() {
        assert_eq!(program(&p), []);
        for b in 0..p.blocks.len() {
            for i in 0..p.blocks[b].ops.len() {
                let op = &p.blocks[b].ops[i];
                let (name, ins, outs, grads) = (op.name.clone(), op.ins.len(), op.outs.len(), op.grads.len());
                let count = ins + usize::from(op.acc.is_some()) + outs + grads;
                if !seen.insert((op.kind.name(), ins, outs, grads, op.acc.is_some())) {
                    continue;
                }
                writeln!(all, "{} {name} of {ins}, {outs}, {grads}", op.kind.name()).unwrap();
                for n in 0..count {
                    let mut verdicts = Verdicts::default();
                    for how in ["rows-1", "rows+1", "row0+1", "cols+1", "cols-1", "dtype", "nowhere"] {
                        let mut bad = p.clone();
                        let view = *operands(&mut bad.blocks[b].ops[i])[n];
                        let empty = view.rows == 0 || p.buffer(view.buffer).cols == 0;
                        if empty && how.ends_with("-1") {
                            continue;
                        }
                        spoil_operand(&mut bad, (b, i), n, how);
                        verdicts.add(how, program(&bad));
                    }
                    writeln!(all, "  {n} {}", verdicts.line()).unwrap();
                }
                let mut verdicts = Verdicts::default();
                for how in ["no input", "no last input", "no output", "twice out", "no gradient"] {
                    let mut bad = p.clone();
                    let op = &mut bad.blocks[b].ops[i];
                    match how {
                        "no input" if ins > 0 => drop(op.ins.remove(0)),
                        "no last input" if ins > 1 => drop(op.ins.pop()),
                        "no output" if outs > 0 => drop(op.outs.remove(0)),
                        "twice out" if outs > 0 => op.outs.push(op.outs[0]),
                        "no gradient" if grads > 0 => op.grads.clear(),
                        _ => continue,
                    }
                    verdicts.add(how, program(&bad));
                }
                writeln!(all, "  {}", verdicts.line()).unwrap();
            }
        }
    }
    check("spoiled_operands", &all);
}

/// Buffers moved by a line, put onto another's place, alive a little longer or shorter.
#[test]
fn homes_and_lives_are_held() {
    let mut all = String::new();
    for (k, p) in sound().into_iter().enumerate().filter(|(k, _)| [0, 1, 4, 8].contains(k)) {
        let stride = 1 + p.buffers.len() / 60;
        for i in (0..p.buffers.len()).step_by(stride) {
            let name = &p.buffers[i].name;
            let mut verdicts = Verdicts::default();
            for how in ["up", "down", "next", "longer", "shorter", "later", "earlier", "away"] {
                let mut bad = p.clone();
                let other = p.buffers[(i + 1) % p.buffers.len()].home;
                let room = p.memory.total;
                match (&mut bad.buffers[i].home, how) {
                    (home, "next") => *home = other,
                    (Home::Static { offset } | Home::MicroBatch { offset }, "up") => *offset += 64,
                    (Home::Static { offset }, "down") if *offset >= 64 => *offset -= 64,
                    (Home::Static { offset } | Home::MicroBatch { offset }, "away") => *offset = room,
                    (Home::Slot { offset, .. } | Home::Scratch { offset, .. }, "up") => *offset += 64,
                    (Home::Slot { offset, .. } | Home::Scratch { offset, .. }, "down") if *offset >= 64 => {
                        *offset -= 64
                    }
                    (Home::Slot { offset, .. } | Home::Scratch { offset, .. }, "away") => *offset = room,
                    (Home::Slot { alive, .. } | Home::Scratch { alive, .. }, "longer") => alive.1 += 1,
                    (Home::Slot { alive, .. } | Home::Scratch { alive, .. }, "shorter")
                        if alive.1 > alive.0 =>
                    {
                        alive.1 -= 1
                    }
                    (Home::Slot { alive, .. } | Home::Scratch { alive, .. }, "later")
                        if alive.1 > alive.0 =>
                    {
                        alive.0 += 1
                    }
                    (Home::Slot { alive, .. } | Home::Scratch { alive, .. }, "earlier") if alive.0 > 0 => {
                        alive.0 -= 1
                    }
                    _ => continue,
                }
                verdicts.add(how, program(&bad));
            }
            writeln!(all, "{k} {name} {}", verdicts.line()).unwrap();
        }
    }
    check("spoiled_homes", &all);
}

#[test]
fn order_and_ids_are_held() {
    let mut all = String::new();
    for (k, p) in sound().into_iter().enumerate().filter(|(k, _)| [0, 3, 4, 8, 9].contains(k)) {
        for b in 0..p.blocks.len() {
            let ops = p.blocks[b].ops.len();
            for i in (0..ops).step_by(1 + ops / 9) {
                let name = p.blocks[b].ops[i].name.clone();
                let mut verdicts = Verdicts::default();
                for how in ["swap", "remove", "again", "id", "renamed"] {
                    let mut bad = p.clone();
                    let list = &mut bad.blocks[b].ops;
                    match how {
                        "swap" => list.swap(i, (i + 1) % ops),
                        "remove" => drop(list.remove(i)),
                        "again" => list.insert(i, list[i].clone()),
                        "id" => list[i].id = list[(i + 1) % ops].id,
                        _ => list[i].name.push('x'),
                    }
                    verdicts.add(how, program(&bad));
                }
                writeln!(all, "{k} {b} {name} {}", verdicts.line()).unwrap();
            }
        }
    }
    check("spoiled_order", &all);
}

/// What one rank of a world says otherwise than the others.
#[test]
fn messages_are_held() {
    let one = Layout::default;
    let worlds = [
        ("llama", Layout { dp: 2, zero: Zero::Optimizer, ..one() }),
        ("tied", Layout { dp: 4, shard: Some(2), zero: Zero::Parameters, ..one() }),
        ("tied", Layout { pp: 2, tp: 2, ..one() }),
        ("llama", Layout { pp: 2, chunks: 2, schedule: PipelineSchedule::Interleaved, ..one() }),
        ("llama", Layout { cp: 2, ..one() }),
        ("moe", Layout { ep: 2, dp: 2, ..one() }),
    ];
    let mut all = String::new();
    for (name, layout) in worlds {
        let model = model(name);
        let ranks: Vec<Program> = (0..layout.world())
            .map(|rank| build(&model, &layout, rank, Mode::Train, Recipe::default()))
            .collect();
        let (checked, found) = world(&ranks);
        writeln!(all, "{name} {layout:?}: {checked:?}").unwrap();
        assert_eq!(found, []);
        let talks: Vec<(usize, usize)> = ranks[1]
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(b, block)| (0..block.ops.len()).map(move |i| (b, i)))
            .filter(|(b, i)| ranks[1].blocks[*b].ops[*i].comm.is_some())
            .collect();
        for (b, i) in talks.iter().copied().step_by(1 + talks.len() / 12) {
            let op = ranks[1].blocks[b].ops[i].name.clone();
            let mut verdicts = Verdicts::default();
            for how in ["more", "other", "silent", "gone", "what", "again"] {
                let mut bad = ranks.clone();
                let ops = &mut bad[1].blocks[b].ops;
                let comm = ops[i].comm.as_mut().expect("it talks");
                match how {
                    "more" if !comm.messages.is_empty() => comm.messages[0].elements += 1,
                    "other" if !comm.messages.is_empty() => comm.messages[0].dtype = DType::F64,
                    "what" => {
                        comm.what = if comm.what == Collective::Ring {
                            Collective::AllReduce
                        } else {
                            Collective::Ring
                        }
                    }
                    "silent" => ops[i].comm = None,
                    "gone" => drop(ops.remove(i)),
                    "again" => ops.insert(i, ops[i].clone()),
                    _ => continue,
                }
                verdicts.add(how, world(&bad).1);
            }
            writeln!(all, "  {op} {}", verdicts.line()).unwrap();
        }
        let mut verdicts = Verdicts::default();
        for how in ["reversed", "shorter", "no tail"] {
            let mut bad = ranks.clone();
            match how {
                "reversed" => bad[1].schedule.reverse(),
                "shorter" => drop(bad[1].schedule.pop()),
                _ => bad[1].tail = bad[1].eval[0],
            }
            verdicts.add(how, world(&bad).1);
        }
        verdicts.add("one rank less", world(&ranks[..ranks.len() - 1]).1);
        writeln!(all, "  {}", verdicts.line()).unwrap();
    }
    check("spoiled_messages", &all);
}
