//! Rules for the placed program of one rank.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::shapes::{self, Shape};
use super::{Rule, Violation};
use crate::buffer::{Buffer, BufferId, Home, View};
use crate::op::Op;
use crate::params::GroupId;
use crate::{Block, BlockWork, Program};

/// Every broken rule of a rank's program.
pub fn program(p: &Program) -> Vec<Violation> {
    let mut found = Vec::new();
    for b in &p.buffers {
        found.extend(outside(p, b).map(|what| Violation { rule: Rule::Operands, at: b.name.clone(), what }));
    }
    for op in p.blocks.iter().flat_map(|b| &b.ops) {
        found.extend(operands(p, op));
    }
    // The rest follows views to their bytes.
    if found.iter().any(|v| v.rule == Rule::Operands) {
        return found;
    }
    found.extend(ids(p));
    for timeline in timelines(p) {
        found.extend(order(p, &timeline));
        found.extend(given_up(p, &timeline));
        found.extend(shared(p, &timeline));
    }
    found.extend(statics(p));
    found
}

/// Blocks that run one after another over the same values: a chunk's passes, an evaluation, a generation.
type Timeline<'a> = Vec<&'a Block>;

fn timelines(p: &Program) -> Vec<Timeline<'_>> {
    let mut chunks: BTreeMap<usize, Timeline<'_>> = BTreeMap::new();
    let mut alone = Vec::new();
    for block in &p.blocks {
        match block.work {
            BlockWork::Train(_) => chunks.entry(block.chunk).or_default().push(block),
            // The same values as without reductions.
            BlockWork::TrainLast(_) => {}
            BlockWork::Evaluate | BlockWork::Generate | BlockWork::Tail | BlockWork::Average => {
                alone.push(vec![block]);
            }
        }
    }
    chunks.into_values().chain(alone).collect()
}

/// How a buffer leaves the region that it lies in.
fn outside(p: &Program, b: &Buffer) -> Option<String> {
    let statics = p.slot_regions.first().map_or(p.scratch_offset, |s| s.offset);
    let (offset, room) = match b.home {
        Home::Static { offset } => (offset, statics),
        Home::Slot { chunk, offset, .. } => (offset, p.slot_regions.get(chunk).map_or(0, |s| s.bytes)),
        Home::Scratch { offset, .. } => (offset, p.workspace_offset - p.scratch_offset),
        Home::MicroBatch { offset } => (offset + (p.micro_batches().max(1) - 1) * b.bytes(), statics),
    };
    let end = offset + b.bytes();
    (end > room).then(|| format!("ends at byte {end} of a region of {room}"))
}

fn operands(p: &Program, op: &Op) -> Option<Violation> {
    let broken = |rule, what| Some(Violation { rule, at: op.name.clone(), what });
    let views = || op.ins.iter().chain(&op.acc).chain(&op.outs).chain(op.grads.iter().map(|g| &g.levels));
    if let Some(v) = views().find(|v| v.buffer.0 as usize >= p.buffers.len()) {
        return broken(Rule::Operands, format!("buffer {} of {}", v.buffer.0, p.buffers.len()));
    }
    if let Some(v) = views().find(|v| v.row0 + v.rows > p.buffer(v.buffer).rows) {
        let b = p.buffer(v.buffer);
        return broken(
            Rule::Operands,
            format!("rows up to {} of {} with {}", v.row0 + v.rows, b.name, b.rows),
        );
    }
    let shape = |v: &View| {
        let b = p.buffer(v.buffer);
        Shape { rows: v.rows, cols: b.cols, dtype: b.dtype }
    };
    let shapes = |vs: &[View]| vs.iter().map(shape).collect::<Vec<_>>();
    let of = |g: GroupId| p.group(g);
    let grads = op.grads.iter().map(|g| Shape {
        rows: of(g.group).rows,
        cols: of(g.group).cols,
        dtype: p.buffer(g.levels.buffer).dtype,
    });
    let grads: Vec<Shape> = grads.collect();
    if let Err(what) = shapes::check(&op.kind, &shapes(&op.ins), &shapes(&op.outs), &grads) {
        return broken(Rule::Shapes, what);
    }
    overlap(p, op).and_then(|what| broken(Rule::SharedBytes, what))
}

/// An output that overlaps another operand of the same op, other than in place.
fn overlap(p: &Program, op: &Op) -> Option<String> {
    let range = |v: &View| {
        let b = p.buffer(v.buffer);
        let row = b.cols * b.dtype.bytes();
        let (region, offset) = match b.home {
            Home::Static { offset } => (0, offset),
            Home::Slot { chunk, offset, .. } => (1 + chunk, offset),
            Home::Scratch { offset, .. } => (usize::MAX, offset),
            Home::MicroBatch { .. } => return (0, 0, 0),
        };
        (region, offset + v.row0 * row, offset + (v.row0 + v.rows) * row)
    };
    let meets = |a: (usize, usize, usize), b: (usize, usize, usize)| a.0 == b.0 && a.1 < b.2 && b.1 < a.2;
    let outs: Vec<&View> = op.outs.iter().chain(op.grads.iter().map(|g| &g.levels)).collect();
    for (i, a) in outs.iter().enumerate() {
        let name = &p.buffer(a.buffer).name;
        if let Some(b) = outs[..i].iter().find(|b| meets(range(a), range(b))) {
            return Some(format!("outputs {name} and {} overlap", p.buffer(b.buffer).name));
        }
        for v in op.ins.iter().filter(|v| meets(range(a), range(v))) {
            if range(v) != range(a) || !op.kind.in_place() {
                return Some(format!("output {name} overwrites input {}", p.buffer(v.buffer).name));
            }
        }
    }
    None
}

fn ids(p: &Program) -> Vec<Violation> {
    let mut names: HashMap<u64, &str> = HashMap::new();
    let mut found = Vec::new();
    for block in &p.blocks {
        let mut here: HashMap<u64, &str> = HashMap::new();
        for op in &block.ops {
            let same =
                here.insert(op.id.0, &op.name).or(names.insert(op.id.0, &op.name).filter(|n| *n != op.name));
            if let Some(other) = same {
                let what = format!("shares id {:014x} with {other} in {}", op.id.0, block.name);
                found.push(Violation { rule: Rule::UniqueIds, at: op.name.clone(), what });
            }
        }
    }
    found
}

fn alive(home: Home) -> Option<(usize, usize)> {
    match home {
        Home::Slot { alive, .. } | Home::Scratch { alive, .. } => Some(alive),
        Home::Static { .. } | Home::MicroBatch { .. } => None,
    }
}

/// Reads of bytes that no op has written yet.
///
/// Bytes are told apart by their home: what is written in place lies where its input lay.
fn order(p: &Program, timeline: &Timeline<'_>) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut written: HashSet<(usize, usize, usize)> = HashSet::new();
    let place = |home| match home {
        Home::Slot { chunk, offset, alive } => Some((1 + chunk, offset, alive.0)),
        Home::Scratch { offset, alive } => Some((usize::MAX, offset, alive.0)),
        Home::Static { .. } | Home::MicroBatch { .. } => None,
    };
    for op in timeline.iter().flat_map(|b| &b.ops) {
        let mut broken = |v: &View, what: &str| {
            let what = format!("{} {what}", p.buffer(v.buffer).name);
            found.push(Violation { rule: Rule::ReadBeforeWrite, at: op.name.clone(), what });
        };
        for v in op.ins.iter().chain(&op.acc) {
            let home = place(p.buffer(v.buffer).home);
            if home.is_some_and(|h| !written.contains(&h)) {
                broken(v, "is read before it is written");
            }
        }
        let writes = op.outs.iter().chain(op.grads.iter().map(|g| &g.levels));
        written.extend(writes.filter_map(|v| place(p.buffer(v.buffer).home)));
    }
    found
}

/// Uses of buffers at ops that they are not alive at: there their bytes may be another's.
fn given_up(p: &Program, timeline: &Timeline<'_>) -> Vec<Violation> {
    let mut found = Vec::new();
    for (at, op) in timeline.iter().flat_map(|b| &b.ops).enumerate() {
        let grads = op.grads.iter().map(|g| &g.levels);
        for v in op.ins.iter().chain(&op.acc).chain(&op.outs).chain(grads) {
            let b = p.buffer(v.buffer);
            if let Some((birth, death)) =
                alive(b.home).filter(|(birth, death)| !(*birth..=*death).contains(&at))
            {
                let what =
                    format!("{} is used by op {at}, and has bytes from op {birth} to op {death}", b.name);
                found.push(Violation { rule: Rule::GivenUp, at: op.name.clone(), what });
            }
        }
    }
    found
}

/// Buffers of one timeline that are alive together and share bytes without being one another's alias.
fn shared(p: &Program, timeline: &Timeline<'_>) -> Vec<Violation> {
    let mut ids: Vec<BufferId> = Vec::new();
    for op in timeline.iter().flat_map(|b| &b.ops) {
        let grads = op.grads.iter().map(|g| &g.levels);
        ids.extend(op.ins.iter().chain(&op.acc).chain(&op.outs).chain(grads).map(|v| v.buffer));
    }
    ids.sort_unstable();
    ids.dedup();
    let mut regions: BTreeMap<usize, Vec<&Buffer>> = BTreeMap::new();
    for b in ids.iter().map(|id| p.buffer(*id)).filter(|b| !b.is_empty()) {
        match b.home {
            Home::Slot { chunk, .. } => regions.entry(chunk).or_default().push(b),
            Home::Scratch { .. } => regions.entry(usize::MAX).or_default().push(b),
            Home::Static { .. } | Home::MicroBatch { .. } => {}
        }
    }
    let mut found = Vec::new();
    for mut list in regions.into_values() {
        list.sort_by_key(|b| alive(b.home));
        found.extend(meetings(&list));
    }
    found
}

/// Pairs that share bytes, of buffers in the order of their births: only those still alive are looked at.
fn meetings(list: &[&Buffer]) -> Vec<Violation> {
    let offset = |b: &Buffer| match b.home {
        Home::Slot { offset, .. } | Home::Scratch { offset, .. } => offset,
        Home::Static { offset } | Home::MicroBatch { offset } => offset,
    };
    let mut found = Vec::new();
    // By first byte; those alive together do not overlap, so a neighbour on either side is all that can be met.
    let mut now: BTreeMap<usize, &Buffer> = BTreeMap::new();
    let mut deaths: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for &b in list {
        let Some((birth, death)) = alive(b.home) else { continue };
        let over: Vec<usize> = deaths.range(..birth).map(|d| *d.0).collect();
        for at in over.iter().flat_map(|d| deaths.remove(d).unwrap_or_default()) {
            now.remove(&at);
        }
        let (start, end) = (offset(b), offset(b) + b.bytes());
        let before = now.range(..=start).next_back().filter(|(at, n)| *at + n.bytes() > start);
        let met = before.or_else(|| now.range(start..end).next());
        match met {
            Some((_, other)) if other.home != b.home => {
                let what = format!("shares bytes with {} while both are alive", other.name);
                found.push(Violation { rule: Rule::SharedBytes, at: b.name.clone(), what });
            }
            Some(_) => {}
            None => {
                now.insert(start, b);
                deaths.entry(death).or_default().push(start);
            }
        }
    }
    found
}

/// Static buffers that overlap: only a sum lies inside the partial sums before it.
fn statics(p: &Program) -> Vec<Violation> {
    let at = |b: &Buffer| match b.home {
        Home::Static { offset } => Some((offset, offset + b.bytes())),
        _ => None,
    };
    let mut list: Vec<(usize, usize, &Buffer)> =
        p.buffers.iter().filter(|b| !b.is_empty()).filter_map(|b| at(b).map(|(s, e)| (s, e, b))).collect();
    list.sort_by_key(|(start, end, _)| (*start, std::cmp::Reverse(*end)));
    let mut found = Vec::new();
    let mut open: Option<(usize, &Buffer)> = None;
    for (start, end, b) in list {
        match open {
            Some((until, outer)) if start < until => {
                if end != until {
                    let what = format!("shares bytes with {}", outer.name);
                    found.push(Violation { rule: Rule::SharedBytes, at: b.name.clone(), what });
                }
            }
            _ => open = Some((end, b)),
        }
    }
    found
}
