//! Each rule of the verifier catches a program that breaks it.

mod common;

use common::{build, model};
use program::verify::{Rule, Violation, accept, program, world};
use program::{Collective, Home, OpKind, Program};
use spec::{ContextMode, Layout, Zero};

fn one() -> Program {
    build(&model(2, true, false), &Layout { micro_batch: 2, ..Layout::default() }, 8, 0)
}

fn ranks(layout: &Layout) -> Vec<Program> {
    (0..layout.world()).map(|rank| build(&model(4, false, false), layout, 8, rank)).collect()
}

fn check(rule: Rule, found: &[Violation], at: &str) {
    assert!(
        found.iter().any(|v| v.rule == rule && v.at.contains(at)),
        "{rule:?} at {at} is not among {found:?}"
    );
}

/// The block and index of the first op of a kind.
fn first(p: &Program, kind: &str) -> (usize, usize) {
    let ops = p.blocks.iter().enumerate().flat_map(|(b, block)| (0..block.ops.len()).map(move |i| (b, i)));
    ops.into_iter().find(|(b, i)| p.blocks[*b].ops[*i].kind.name() == kind).expect("such an op")
}

/// Breaks a rank's program and expects the rule to say so.
fn broken(rule: Rule, at: &str, spoil: impl FnOnce(&mut Program)) {
    let mut p = one();
    assert_eq!(program(&p), []);
    spoil(&mut p);
    check(rule, &program(&p), at);
}

/// Breaks the programs of a world and expects the rule to say so.
fn broken_world(rule: Rule, at: &str, layout: &Layout, spoil: impl FnOnce(&mut [Program])) {
    let mut all = ranks(layout);
    assert_eq!(world(&all).1, []);
    spoil(&mut all);
    check(rule, &world(&all).1, at);
}

#[test]
fn operands_inside_their_buffers() {
    broken(Rule::Operands, "layers.0.attn.qkv", |p| {
        let (b, i) = first(p, "linear");
        p.blocks[b].ops[i].ins[0].row0 += 1;
    });
    broken(Rule::Operands, "moved", |p| {
        let last = p.buffers.len() - 1;
        p.buffers[last].name = "moved".into();
        p.buffers[last].home = Home::Scratch { offset: p.memory.scratch, alive: (0, 1) };
    });
    broken(Rule::Operands, "layers.0.attn.qkv", |p| {
        let (b, i) = first(p, "linear");
        p.blocks[b].ops[i].ins[0].buffer = program::BufferId(u32::MAX);
    });
}

#[test]
fn shapes_and_element_types() {
    for kind in ["linear", "norm", "attention", "rope", "swiglu", "xent", "linear_grad_input", "embed"] {
        broken(Rule::Shapes, "", |p| {
            let (b, i) = first(p, kind);
            let out = p.blocks[b].ops[i].outs[0].buffer;
            p.buffers[out.0 as usize].cols += 1;
        });
    }
    broken(Rule::Shapes, "layers.0.attn_norm", |p| {
        let (b, i) = first(p, "norm");
        let stats = p.blocks[b].ops[i].outs[1].buffer;
        p.buffers[stats.0 as usize].dtype = spec::DType::Bf16;
    });
    broken(Rule::Shapes, ".dw", |p| {
        let (b, i) = first(p, "linear_grad_weight");
        p.blocks[b].ops[i].grads.clear();
    });
}

/// Rows that are dealt by heads: parts of the right shape, and as many bytes from everybody.
#[test]
fn heads_are_dealt_in_equal_parts() {
    let layout = Layout { cp: 2, context: ContextMode::Heads, micro_batch: 2, ..Layout::default() };
    for kind in ["split_heads", "all_to_all", "join_heads"] {
        let mut p = ranks(&layout).remove(0);
        assert_eq!(program(&p), []);
        let (b, i) = first(&p, kind);
        let out = p.blocks[b].ops[i].outs[0].buffer;
        p.buffers[out.0 as usize].cols += 1;
        check(Rule::Shapes, &program(&p), "layers.0.attn.core");
    }
    broken_world(Rule::Messages, "layers.0.attn.core.in", &layout, |all| {
        let (b, i) = first(&all[1], "all_to_all");
        let comm = all[1].blocks[b].ops[i].comm.as_mut().expect("a message");
        comm.messages[1].elements /= 2;
    });
}

#[test]
fn nothing_is_read_before_it_is_written() {
    broken(Rule::ReadBeforeWrite, "layers.0.attn.qkv", |p| {
        let (b, i) = first(p, "linear");
        p.blocks[b].ops.swap(i, i - 1);
    });
    broken(Rule::ReadBeforeWrite, "", |p| {
        let (b, i) = first(p, "attention");
        p.blocks[b].ops.remove(i);
    });
}

#[test]
fn no_two_live_values_on_one_byte() {
    broken(Rule::SharedBytes, "", |p| {
        let (b, i) = first(p, "attention");
        let (qkv, o) = (p.blocks[b].ops[i].ins[0].buffer, p.blocks[b].ops[i].outs[0].buffer);
        let at = |id: program::BufferId| match p.buffer(id).home {
            Home::Scratch { offset, alive } | Home::Slot { offset, alive, .. } => (offset, alive),
            _ => unreachable!("activations are not static"),
        };
        let (offset, alive) = (at(qkv).0, at(o).1);
        p.buffers[o.0 as usize].home = Home::Scratch { offset, alive };
    });
    broken(Rule::SharedBytes, "", |p| {
        let home = p.buffer(p.group_buffers[0].exp_avg).home;
        let other = p.group_buffers[1].exp_avg_sq.expect("AdamW has two moments");
        p.buffers[other.0 as usize].home = home;
    });
}

#[test]
fn nothing_is_used_after_its_bytes_were_given_up() {
    let lives =
        |p: &mut Program, id: program::BufferId, change: fn((usize, usize)) -> (usize, usize)| match &mut p
            .buffers[id.0 as usize]
            .home
        {
            Home::Scratch { alive, .. } | Home::Slot { alive, .. } => *alive = change(*alive),
            _ => unreachable!("activations are not static"),
        };
    // Queries, keys and values are last read by attention's gradient: without a word to the verifier their bytes could
    // be another's by then.
    broken(Rule::GivenUp, "layers.0.attn", |p| {
        let (b, i) = first(p, "attention");
        let qkv = p.blocks[b].ops[i].ins[0].buffer;
        lives(p, qkv, |(birth, death)| (birth, death - 1));
    });
    broken(Rule::GivenUp, "layers.0.attn", |p| {
        let (b, i) = first(p, "attention");
        let o = p.blocks[b].ops[i].outs[0].buffer;
        lives(p, o, |(birth, death)| (birth + 1, death));
    });
    // Bytes that another buffer was given in between.
    broken(Rule::GivenUp, "", |p| {
        let (b, i) = first(p, "attention");
        let (qkv, o) = (p.blocks[b].ops[i].ins[0].buffer, p.blocks[b].ops[i].outs[0].buffer);
        lives(p, qkv, |(birth, _)| (birth, birth));
        let Home::Scratch { offset, .. } = p.buffer(qkv).home else {
            unreachable!("one micro-batch in flight")
        };
        match &mut p.buffers[o.0 as usize].home {
            Home::Scratch { offset: at, .. } => *at = offset,
            _ => unreachable!("one micro-batch in flight"),
        }
    });
}

#[test]
fn ids_tell_ops_apart() {
    broken(Rule::UniqueIds, "layers.0.attn_norm", |p| {
        let id = p.blocks[0].ops[0].id;
        p.blocks[0].ops[1].id = id;
    });
}

#[test]
fn members_of_a_group_say_the_same() {
    let layout = Layout { dp: 2, zero: Zero::Optimizer, ..Layout::default() };
    broken_world(Rule::Messages, "grads.bucket0.reduce", &layout, |all| {
        let (b, i) = first(&all[1], "reduce_grads");
        all[1].blocks[b].ops[i].comm.as_mut().expect("a message").messages[0].elements += 1;
    });
    broken_world(Rule::Messages, "grads.bucket0.reduce", &layout, |all| {
        let (b, i) = first(&all[1], "reduce_grads");
        all[1].blocks[b].ops[i].comm.as_mut().expect("a message").what = Collective::AllReduce;
    });
    // Owners of one shard in two groups: an element more, or a sum that only one of them takes part in.
    let groups = Layout { dp: 4, shard: Some(2), ..layout.clone() };
    broken_world(Rule::Messages, "grads.bucket0.owners", &groups, |all| {
        let ops = &mut all[1].blocks.last_mut().expect("a tail").ops;
        let owners = ops.iter_mut().find(|op| op.name == "grads.bucket0.owners").expect("a sum over owners");
        owners.comm.as_mut().expect("a message").messages[0].elements += 1;
    });
    broken_world(Rule::Deadlock, "rank 3", &groups, |all| {
        all[1].blocks.last_mut().expect("a tail").ops.retain(|op| op.name != "grads.bucket0.owners");
    });
    let pipeline = Layout { pp: 2, ..Layout::default() };
    broken_world(Rule::Messages, "rank 1", &pipeline, |all| {
        let (b, i) = first(&all[1], "recv");
        all[1].blocks[b].ops[i].comm.as_mut().expect("a message").messages[0].elements -= 1;
    });
    broken_world(Rule::Messages, "rank 0", &pipeline, |all| {
        let (b, i) = first(&all[1], "recv");
        all[1].blocks[b].ops.remove(i);
    });
}

#[test]
fn no_rank_waits_for_ever() {
    let tensor = Layout { tp: 2, ..Layout::default() };
    broken_world(Rule::Deadlock, "rank 0", &tensor, |all| {
        let (b, i) = first(&all[0], "all_reduce");
        all[0].blocks[b].ops.remove(i);
    });
    let pipeline = Layout { pp: 2, ..Layout::default() };
    broken_world(Rule::Deadlock, "rank 1", &pipeline, |all| {
        let (b, i) = first(&all[0], "send");
        all[0].blocks[b].ops.remove(i);
    });
    // A schedule that takes a micro-batch back before it went out.
    broken_world(Rule::Deadlock, "rank 0", &pipeline, |all| all[0].schedule.reverse());
}

#[test]
fn what_is_found_first_is_said_and_how_much_more() {
    let found = ["is short", "is long", "is none"].map(|what| Violation {
        rule: Rule::Shapes,
        at: "layers.0".to_owned(),
        what: what.to_owned(),
    });
    accept("emit", &[]).expect("nothing was found");
    let said = |n: usize| accept("emit", &found[..n]).expect_err("something was").to_string();
    assert_eq!(said(1), "the program is wrong after emit: layers.0: is short (Shapes)");
    assert_eq!(said(3), "the program is wrong after emit: layers.0: is short (Shapes), and 2 more");
}

/// The rule for values, before bytes are given, is kept by the passes; a second writer shows in a placed program as two
/// outputs on one place.
#[test]
fn one_writer() {
    broken(Rule::SharedBytes, "", |p| {
        let (b, i) = first(p, "norm");
        let out = p.blocks[b].ops[i].outs[0];
        p.blocks[b].ops[i].outs.push(out);
    });
    assert!(matches!(one().blocks[0].ops[0].kind, OpKind::Embed { .. }));
}
