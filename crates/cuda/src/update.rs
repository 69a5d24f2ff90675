//! The end of a step: the norm of gradients and the optimiser, one launch for all tensors.

use std::collections::HashMap;

use program::{NORM_CHUNK, OpKind};
use spec::{DType, Result};
use train::Launch;

use crate::device::Cuda;
use crate::driver::{Memory, Stream};
use crate::module::{Geometry, Params};
use crate::table::not_mine;

/// Elements of a block that updates.
const UPDATE_CHUNK: usize = 4096;

/// Tables on the card of the tensors that a launch goes over, by what is in them.
///
/// A recorded launch reads the table that lay there when it was recorded: so tables are made while calls run one by one,
/// never change, and stay.
#[derive(Default)]
pub(crate) struct Tables(HashMap<Vec<u64>, Memory>);

impl Tables {
    /// Where a table lies; `None` for a new one if none may be `made`.
    fn place(&mut self, stream: &Stream, words: &[u64], made: bool) -> Result<Option<u64>> {
        if let Some(memory) = self.0.get(words) {
            return Ok(Some(memory.base));
        }
        if !made {
            return Ok(None);
        }
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let memory = Memory::new(bytes.len())?;
        stream.upload(memory.base, &bytes)?;
        let base = memory.base;
        self.0.insert(words.to_vec(), memory);
        Ok(Some(base))
    }
}

/// Sums squares by chunk, so that their total does not depend on who held what.
pub(crate) fn grad_norm(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let all = l.output(0);
    d.stream.fill(d.at(all), 0, all.bytes())?;
    let (mut words, mut count, mut blocks) = (Vec::new(), 0, 0);
    for i in (0..l.inputs()).filter(|i| !l.input(*i).is_empty()) {
        let (x, sums) = (l.input(i), l.output(i + 1));
        words.extend([d.at(x), d.at(sums), x.len() as u64, blocks as u64]);
        count += 1;
        blocks += x.len().div_ceil(NORM_CHUNK);
    }
    if let Some(table) = d.table(&words)? {
        let params = Params::new().with(table).with(count);
        return d.start("sum_squares_all", Geometry::line(blocks, 256), params);
    }
    words.chunks(4).try_for_each(|w| {
        let params = Params::new().with(w[0]).with(w[1]).with(w[2]);
        d.start("sum_squares", Geometry::line((w[2] as usize).div_ceil(NORM_CHUNK), 256), params)
    })
}

/// One tensor's update, which waits for those of the others.
#[derive(Clone, Copy)]
struct Update {
    w: u64,
    m: u64,
    v: u64,
    grad: u64,
    /// 0 if the weights are the parameter.
    param: u64,
    len: usize,
    decay: bool,
}

/// Updates that came one after another and are not on the stream yet.
#[derive(Default)]
pub(crate) struct Updates(Vec<Update>);

impl Updates {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Keeps an update until the next call that is none: see [`flush`]. Outside of stretches each is put on the stream by
/// itself.
pub(crate) fn adamw(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let OpKind::AdamW { decay, .. } = *l.kind() else { not_mine!(l) };
    let grad = l.input(0);
    if !grad.is_empty() {
        let at = |i: usize| d.at(l.output(i));
        let (w, param) = if l.precision() == DType::Bf16 { (at(3), at(0)) } else { (at(0), 0) };
        let update = Update { w, m: at(1), v: at(2), grad: d.at(grad), param, len: grad.len(), decay };
        d.updates.0.push(update);
    }
    if d.is_in_stretch() { Ok(()) } else { flush(d) }
}

/// Moves an average towards its weights, or lets them change places.
pub(crate) fn average(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let out = |d: &Cuda, i: usize| d.at(l.output(i));
    let len = l.output(0).len();
    let (name, params) = match l.kind() {
        OpKind::Average { .. } => {
            ("average", Params::new().with(out(d, 0)).with(d.at(l.input(0))).with(d.numbers()))
        }
        OpKind::SwapAverage { .. } if l.precision() == DType::F32 => {
            ("swap_average_f32", Params::new().with(out(d, 0)).with(out(d, 1)))
        }
        OpKind::SwapAverage { .. } => {
            ("swap_average_bf16", Params::new().with(out(d, 0)).with(out(d, 1)).with(out(d, 2)))
        }
        _ => not_mine!(l),
    };
    let grid = len.div_ceil(4 * 256).min(1 << 16);
    d.start(name, Geometry::line(grid, 256), params.with(len as i64))
}

/// Puts the updates that wait on the stream, as one launch. Whatever else goes there, and whoever reads the arena, must
/// come after it.
pub(crate) fn flush(d: &mut Cuda) -> Result<()> {
    let updates = std::mem::take(&mut d.updates.0);
    if updates.is_empty() {
        return Ok(());
    }
    let (mut words, mut blocks) = (Vec::new(), 0);
    let together = if updates.len() > 1 { updates.as_slice() } else { &[] };
    for u in together {
        let Update { w, m, v, grad, param, len, decay } = *u;
        words.extend([w, m, v, grad, param, len as u64, blocks as u64, u64::from(decay)]);
        blocks += len.div_ceil(UPDATE_CHUNK);
    }
    let numbers = d.numbers();
    if !together.is_empty()
        && let Some(table) = d.table(&words)?
    {
        let params = Params::new().with(table).with(updates.len() as i32).with(numbers);
        return d.start("adamw_all", Geometry::line(blocks, 256), params);
    }
    updates.iter().try_for_each(|u| {
        let params = Params::new();
        let params = if u.param == 0 { params } else { params.with(u.param) };
        let params = params.with(u.w).with(u.m).with(u.v).with(u.grad).with(numbers);
        let params = params.with(u.len as i64).with(i32::from(u.decay));
        let name = if u.param == 0 { "adamw_f32" } else { "adamw_bf16" };
        d.start(name, Geometry::line(u.len.div_ceil(4 * 256).clamp(1, 1 << 16), 256), params)
    })
}

impl Cuda {
    /// Where a table of these words lies on the card; `None` if it would have to be made within a recording.
    pub(crate) fn table(&mut self, words: &[u64]) -> Result<Option<u64>> {
        let made = !self.is_recording();
        self.tables.place(&self.stream, words, made)
    }
}
