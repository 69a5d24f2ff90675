//! The typed record of a run, and writers for the tools that people look at runs with.
//!
//! The journal is the one source: append-only JSON lines, one file per rank. TensorBoard event files, the Prometheus
//! page and the Perfetto trace are made from the same records. No function here reads a clock: times are arguments, in
//! microseconds since the Unix epoch.
//!
//! ```
//! use journal::{Journal, Record};
//! # fn main() -> spec::Result<()> {
//! # let run = tempfile::tempdir().unwrap();
//! let mut journal = Journal::open(run.path(), 0)?;
//! journal.write(&Record::Eval { time_us: 1, step: 10, loss: f64::NAN, average_loss: None, tokens: 4096 })?;
//!
//! let records = journal::read(&journal::path(run.path(), 0))?;
//! assert!(matches!(records[0], Record::Eval { step: 10, loss, .. } if loss.is_nan()));
//! # Ok(())
//! # }
//! ```

mod record;

mod read;
mod write;

pub mod ledger;

pub mod line;
pub mod tail;

pub mod perfetto;
pub mod prometheus;
pub mod tensorboard;

mod crc32c;
mod float;

pub use read::{Damage, Reader, files, open_file, read, read_sound};
pub use record::{Action, Cause, Lane, Record, Span, Step, Trouble};
pub use write::{Journal, path};
