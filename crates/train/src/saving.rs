//! A checkpoint that is written while training goes on: the step loop waits for a copy in memory only.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Instant;

use ckpt::{Kind, Piece, Region, Saver};
use spec::{Error, Result};

use crate::exec::Executor;

/// Where a copy of a tensor's share lies in the buffer, and what it is.
struct Copied {
    name: String,
    kind: Kind,
    shape: Vec<usize>,
    boxes: Vec<Region>,
    end: usize,
}

/// A rank's share of a checkpoint on its way to the disk.
pub struct Saving {
    /// Gives the buffer back, and what was written.
    thread: JoinHandle<(Vec<f32>, Result<Vec<u8>>)>,
    pub(crate) dir: PathBuf,
    pub(crate) step: u64,
    pub(crate) meta: ckpt::Meta,
    pub(crate) began: Instant,
    /// How long the step loop waited.
    pub stall_s: f64,
}

impl Saving {
    /// Copies the rank's share into `buffer` and begins to write it. `None` if there is no memory for the copy, or no
    /// thread: then it has to be written at once.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn begin(
        exec: &Executor,
        mut buffer: Vec<f32>,
        dir: PathBuf,
        step: u64,
        meta: ckpt::Meta,
    ) -> Result<Option<Saving>> {
        let began = Instant::now();
        let state = exec.state()?;
        buffer.clear();
        if buffer.try_reserve_exact(state.pieces().map(|p| p.data.len()).sum()).is_err() {
            return Ok(None);
        }
        let mut copied = Vec::new();
        for piece in state.pieces() {
            buffer.extend_from_slice(piece.data);
            copied.push(Copied {
                name: piece.name.to_owned(),
                kind: piece.kind,
                shape: piece.global_shape.to_vec(),
                boxes: piece.boxes,
                end: buffer.len(),
            });
        }
        let (rank, into) = (exec.program.rank, dir.clone());
        let write = move || {
            let mut start = 0;
            let pieces: Vec<Piece<'_>> = copied
                .iter()
                .map(|c| Piece {
                    name: &c.name,
                    kind: c.kind,
                    global_shape: &c.shape,
                    boxes: c.boxes.clone(),
                    data: &buffer[std::mem::replace(&mut start, c.end)..c.end],
                })
                .collect();
            let written = Saver::begin(&into, step).and_then(|saver| saver.write_rank(rank, pieces));
            (buffer, written.map(|record| record.to_bytes()))
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
        let stall_s = began.elapsed().as_secs_f64();
        Ok(thread.ok().map(|thread| Saving { thread, dir, step, meta, began, stall_s }))
    }

    /// Whether this rank's share is written, or has failed to be.
    pub fn is_written(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for this rank's share; gives the buffer back, and the record of what was written.
    ///
    /// # Errors
    /// The record is an error if the share could not be written.
    pub fn join(self) -> (Vec<f32>, Result<Vec<u8>>) {
        let lost = |_| (Vec::new(), Err(Error::failure("the thread that wrote the checkpoint has failed")));
        self.thread.join().unwrap_or_else(lost)
    }
}
