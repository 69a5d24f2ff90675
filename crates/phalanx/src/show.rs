//! `phalanx program show`: a rank's program as text.

use std::fmt::Write;

use program::{Buffer, Home, Op, Program, View};

/// Everything about a program on a page: what it computes, in which order, where the bytes go.
pub(crate) fn render(p: &Program, ops: bool) -> String {
    let mut s = String::new();
    summary(&mut s, p).and_then(|()| memory(&mut s, p)).expect("writing to a string");
    for block in &p.blocks {
        let flops: u64 = block.ops.iter().map(|o| o.cost.flops).sum();
        writeln!(s, "\nblock {}  {} ops, {}", block.name, block.ops.len(), flop(flops)).expect("string");
        if ops {
            for op in &block.ops {
                line(&mut s, p, op).expect("string");
            }
        }
    }
    s
}

fn summary(s: &mut String, p: &Program) -> std::fmt::Result {
    let l = &p.layout;
    let params: usize = p.groups.iter().map(program::ParamGroup::len).sum();
    writeln!(
        s,
        "rank {} of {}: dp {} tp {} pp {}",
        p.rank,
        l.world(),
        p.coords.dp,
        p.coords.tp,
        p.coords.pp
    )?;
    writeln!(
        s,
        "layout dp={} tp={} pp={} zero={} micro_batch={} sequence={} sequences={} ({} here), {}",
        l.dp,
        l.tp,
        l.pp,
        u8::from(l.zero),
        l.micro_batch,
        p.sequence,
        p.sequences,
        p.local_sequences,
        p.precision
    )?;
    if l.cp > 1 {
        let how = if l.deals_heads() { " with heads dealt" } else { "" };
        writeln!(s, "sequences over {} ranks{how}, this is number {}", l.cp, p.coords.cp)?;
    }
    if l.ep > 1 {
        writeln!(s, "experts over {} ranks, this is number {}", l.ep, p.coords.ep(l))?;
    }
    writeln!(s, "parameters {params} in {} groups, {} gradient buckets", p.groups.len(), p.buckets.len())?;
    let order: Vec<String> =
        p.schedule.iter().map(|i| format!("{}:{}", p.blocks[i.block].name, i.micro_batch)).collect();
    let shown = order.len().min(24);
    let more = if order.len() > shown { format!(" ... ({} in all)", order.len()) } else { String::new() };
    writeln!(s, "schedule {}{more} {}", order[..shown].join(" "), p.blocks[p.tail].name)
}

fn memory(s: &mut String, p: &Program) -> std::fmt::Result {
    let m = &p.memory;
    writeln!(s, "\nmemory")?;
    let rows = [
        ("parameters", m.params),
        ("master weights", m.master),
        ("gradients", m.grads),
        ("moments", m.moments),
        ("average of weights", m.average),
        ("inputs, tables, sums", m.other),
        ("activations in flight", m.slots),
        ("scratch and activations", m.scratch),
        ("kernel work space", m.workspace),
        ("other sizes of the batch", m.ramp),
        ("total", m.total),
    ];
    let optional = ["average of weights", "other sizes of the batch"];
    for (name, bytes) in rows.into_iter().filter(|(name, bytes)| *bytes > 0 || !optional.contains(name)) {
        writeln!(s, "  {name:<24} {:>14}  {:>10}", bytes, binary(bytes))?;
    }
    if m.grads > m.params && p.layout.zero < spec::Zero::Gradients {
        writeln!(
            s,
            "  gradients take {:.1} times the parameters: with partial sums of the fixed tree over a batch's sequences, \
             which makes bits the same under every layout",
            m.grads as f64 / m.params as f64
        )?;
    }
    if m.scratch_bound > 0 {
        let over = 100.0 * (m.scratch as f64 / m.scratch_bound as f64 - 1.0);
        writeln!(
            s,
            "  scratch is {over:.1} % above the most that is ever alive at once ({})",
            binary(m.scratch_bound)
        )?;
    }
    Ok(())
}

fn line(s: &mut String, p: &Program, op: &Op) -> std::fmt::Result {
    let views = |vs: &[View]| vs.iter().map(|v| view(p, v)).collect::<Vec<_>>().join(", ");
    let acc = op.acc.map(|v| format!(" + {}", view(p, &v))).unwrap_or_default();
    let mut outs = views(&op.outs);
    for g in &op.grads {
        if !outs.is_empty() {
            outs.push_str(", ");
        }
        write!(outs, "grad {}", p.group(g.group).name)?;
    }
    writeln!(
        s,
        "  {:014x} {:<34} {:<19} {:>11} {:>10}  {}{acc} -> {outs}",
        op.id.0,
        op.name,
        op.kind.name(),
        if op.cost.flops > 0 { flop(op.cost.flops) } else { String::new() },
        binary(op.cost.bytes as usize),
        views(&op.ins),
    )
}

fn view(p: &Program, v: &View) -> String {
    let b: &Buffer = p.buffer(v.buffer);
    let rows =
        if v.rows == b.rows { String::new() } else { format!(" rows {}..{}", v.row0, v.row0 + v.rows) };
    let place = match b.home {
        Home::Static { offset } => format!("@{offset:#x}"),
        Home::Slot { offset, alive, .. } => format!("@slot+{offset:#x} alive {}..{}", alive.0, alive.1),
        Home::Scratch { offset, alive } => format!("@scratch+{offset:#x} alive {}..{}", alive.0, alive.1),
        Home::MicroBatch { .. } => "@batch".to_owned(),
    };
    format!("{}[{}x{} {}]{rows} {place}", b.name, b.rows, b.cols, b.dtype)
}

/// Bytes with a binary prefix.
pub(crate) fn binary(bytes: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut x = bytes as f64;
    let mut unit = 0;
    while x >= 1024.0 && unit + 1 < units.len() {
        x /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{x:.1} {}", units[unit]) }
}

/// FLOPs with a decimal prefix.
fn flop(flops: u64) -> String {
    let units = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"];
    let mut x = flops as f64;
    let mut unit = 0;
    while x >= 1000.0 && unit + 1 < units.len() {
        x /= 1000.0;
        unit += 1;
    }
    format!("{x:.1} {}", units[unit])
}
