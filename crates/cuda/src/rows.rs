//! Functions of rows that a program brings along: the host's, so rows go there and come back. Steps with them are not
//! recorded.

use bytemuck::Pod;
use half::bf16;
use kernels::{Pool, Storage};
use program::OpKind;
use spec::{DType, Result};
use train::Launch;

use crate::device::Cuda;
use crate::table::not_mine;

pub(crate) fn on_host(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    d.ask_host()?;
    if l.precision() == DType::Bf16 { run::<bf16>(d, l) } else { run::<f32>(d, l) }
}

fn run<T: Storage + Pod>(d: &mut Cuda, l: &Launch<'_>) -> Result<()> {
    let threads = || std::thread::available_parallelism().map_or(1, |n| n.get());
    let pool = d.host.take().unwrap_or_else(|| Pool::new(threads()));
    let fetch = |i: usize| -> Result<Vec<T>> {
        let mut rows = vec![T::zeroed(); l.input(i).len()];
        d.stream.download(d.at(l.input(i)), bytemuck::cast_slice_mut(&mut rows))?;
        Ok(rows)
    };
    let (n, x, cols) = (l.input(0).rows, fetch(0)?, l.output(0).cols);
    let mut out = vec![T::zeroed(); l.output(0).len()];
    let mut room = vec![0.0; kernels::row_fn_workspace_len(2 * l.input(0).cols, 2 * cols, pool.threads())];
    match *l.kind() {
        OpKind::Rows { of } => kernels::row_fn(&pool, of.forward, &x, &mut out, n, &mut room),
        OpKind::RowsGrad { of } => {
            kernels::row_fn_dx(&pool, of.backward, &x, &fetch(1)?, &mut out, n, &mut room);
        }
        _ => not_mine!(l),
    }
    d.host = Some(pool);
    d.stream.upload(d.at(l.output(0)), bytemuck::cast_slice(&out))
}
