use kernels::Storage;
use program::{Heads, Op};

use crate::exec::{Executor, Turn};

impl Executor {
    /// Appends the token's keys and values to the layer's cache and attends over all of it so far.
    pub(crate) fn attend_cache<T: Storage + bytemuck::Pod>(
        &self,
        op: &Op,
        h: Heads,
        layer: usize,
        turn: Turn,
    ) {
        let p = &self.program;
        let (Some(k), Some(v)) = (p.io.k_cache, p.io.v_cache) else {
            unreachable!("a program with a generation block has a cache")
        };
        let capacity = self.tables;
        let width = h.kv * h.dim;
        let layer_of = |id| layer * capacity * p.buffer(id).cols..(layer + 1) * capacity * p.buffer(id).cols;
        let qkv = self.at::<T>(op.ins[0], turn);
        let (keys, values) = (&mut self.whole::<T>(k)[layer_of(k)], &mut self.whole::<T>(v)[layer_of(v)]);
        let row = turn.position * width..(turn.position + 1) * width;
        let q_width = h.q * h.dim;
        keys[row.clone()].copy_from_slice(&qkv[q_width..q_width + width]);
        values[row].copy_from_slice(&qkv[q_width + width..q_width + 2 * width]);
        kernels::attention_decode(
            &self.pool,
            &qkv[..q_width],
            q_width,
            keys,
            values,
            &[turn.position + 1],
            self.at::<T>(op.outs[0], turn),
            capacity,
            h.q,
            h.kv,
            h.dim,
            1.0 / (h.dim as f32).sqrt(),
            self.workspace(),
        );
    }
}
