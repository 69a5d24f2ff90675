//! Checkpoints that any layout can write and any other layout can read, and Hugging Face models both ways.
//!
//! A checkpoint is a directory `step-00000123/`: one safetensors file per writing rank, each holding *slices* of
//! logical tensors, and `manifest.json`, which says which slice lies where, carries a checksum per chunk of every file
//! and is the commit point. Everything is written into a temporary sibling, synced, and renamed, so a crash at any
//! moment leaves either the old state or the new one. Where checkpoints are named by a URL (`s3://bucket/prefix`) the same
//! lies in an object store, and a create-only put of the manifest is the commit.
//!
//! ```
//! use ckpt::{Checkpoint, Kind, Meta, Piece, Region, Saver};
//! # fn main() -> spec::Result<()> {
//! # let run = tempfile::tempdir().unwrap();
//! let dir = run.path();
//! let weight = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]; // 2 rows, 3 columns
//!
//! // Rank 0 holds the first row, rank 1 the second.
//! let mut records = Vec::new();
//! for rank in 0..2 {
//!     let saver = Saver::begin(dir, 123)?;
//!     let half = Piece {
//!         name: "head.weight",
//!         kind: Kind::Param,
//!         global_shape: &[2, 3],
//!         boxes: vec![Region::range(3 * rank, 3)],
//!         data: &weight[3 * rank..][..3],
//!     };
//!     records.push(saver.write_rank(rank, [half])?);
//! }
//! Saver::commit(dir, 123, records, Meta::default())?;
//!
//! // Another layout reads the last two columns.
//! let checkpoint = Checkpoint::open(&ckpt::latest(dir)?.expect("one was saved"))?;
//! let mut columns = [0.0f32; 4];
//! checkpoint.read_box("head.weight", Kind::Param, 0, 2, 1, 2, &mut columns)?;
//! assert_eq!(columns, [2.0, 3.0, 5.0, 6.0]);
//! # Ok(())
//! # }
//! ```

mod region;

mod manifest;

#[cfg(feature = "object-store")]
mod bucket;
#[cfg(not(feature = "object-store"))]
#[path = "bucket_absent.rs"]
mod bucket;
mod dir;
mod disk;
mod input;
mod place;
mod read;
mod save;
mod save_bucket;

mod reshard;
mod tools;

mod header;
pub mod hf;
pub mod torch;

pub use dir::{is_checkpoint, keep, latest, list, remove, superfluous};
pub use manifest::{FileEntry, Kind, Manifest, Meta, PieceEntry, TensorEntry};
pub use place::is_url;
pub use read::{Checkpoint, Verified};
pub use region::{Region, Run, for_each_copy};
pub use reshard::{Resharded, reshard};
pub use save::{FileRecord, Piece, Saver};
pub use save_bucket::{get_beside, put_beside};
pub use tools::{Difference, Listing, TensorDifference, TensorListing, diff, ls, verify};

#[cfg(test)]
mod crash_test;

#[cfg(test)]
mod fuzz_test;

#[cfg(all(test, feature = "object-store"))]
mod bucket_test;

// Tensor bytes on disk are little-endian (safetensors); buffers are written and read without swapping.
const _: () = assert!(cfg!(target_endian = "little"), "checkpoints need a little-endian machine");
