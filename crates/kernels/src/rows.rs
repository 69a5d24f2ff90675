//! Functions of rows that a program brings along.

use crate::pool::{Parts, Pool};
use crate::storage::Storage;

/// Elements of f32 work space for rows of `in_` and `out` columns; [`row_fn_dx`] takes `in_` twice.
pub fn row_fn_workspace_len(in_: usize, out: usize, threads: usize) -> usize {
    threads * (in_ + out)
}

/// `y = f(x)` for each of `n` rows: `x [n, in]`, `y [n, out]`. `f` gets and gives f32, whatever rows are kept in.
pub fn row_fn<T: Storage>(
    pool: &Pool,
    f: fn(&[f32], &mut [f32]),
    x: &[T],
    y: &mut [T],
    n: usize,
    ws: &mut [f32],
) {
    let (in_, out) = (x.len() / n.max(1), y.len() / n.max(1));
    assert_eq!((x.len(), y.len()), (n * in_, n * out));
    let (y, ws) = (Parts::new(y), Parts::new(ws));
    pool.rows(n, in_ + out, &|rows, thread| {
        // SAFETY: tasks have disjoint rows, and threads work space of their own.
        let (y, ws) = unsafe {
            (
                y.part(rows.start * out..rows.end * out),
                ws.part(thread * (in_ + out)..(thread + 1) * (in_ + out)),
            )
        };
        let (from, to) = ws.split_at_mut(in_);
        for (r, row) in rows.enumerate() {
            load(&x[row * in_..(row + 1) * in_], from);
            f(from, to);
            store(to, &mut y[r * out..(r + 1) * out]);
        }
    });
}

/// `dx = f(dy, x)` for each of `n` rows: `dy [n, out]`, `x [n, in]`.
pub fn row_fn_dx<T: Storage>(
    pool: &Pool,
    f: fn(&[f32], &[f32], &mut [f32]),
    dy: &[T],
    x: &[T],
    dx: &mut [T],
    n: usize,
    ws: &mut [f32],
) {
    let (in_, out) = (x.len() / n.max(1), dy.len() / n.max(1));
    assert_eq!((x.len(), dx.len(), dy.len()), (n * in_, n * in_, n * out));
    let each = 2 * in_ + out;
    let (dx, ws) = (Parts::new(dx), Parts::new(ws));
    pool.rows(n, each, &|rows, thread| {
        // SAFETY: as above.
        let (dx, ws) = unsafe {
            (dx.part(rows.start * in_..rows.end * in_), ws.part(thread * each..(thread + 1) * each))
        };
        let (dy32, ws) = ws.split_at_mut(out);
        let (x32, dx32) = ws.split_at_mut(in_);
        for (r, row) in rows.enumerate() {
            load(&dy[row * out..(row + 1) * out], dy32);
            load(&x[row * in_..(row + 1) * in_], x32);
            f(dy32, x32, dx32);
            store(dx32, &mut dx[r * in_..(r + 1) * in_]);
        }
    });
}

fn load<T: Storage>(from: &[T], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.one());
}

fn store<T: Storage>(from: &[f32], to: &mut [T]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = T::of(*from));
}
