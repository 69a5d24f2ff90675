use std::ops::Range;
use std::path::{Path, PathBuf};

use spec::{Error, Result};

use crate::manifest::{Meta, PieceEntry, TensorEntry};
use crate::read::Checkpoint;
use crate::region::{Region, matrix};
use crate::save::{FileRecord, Outline, Saver};

/// File names have five digits for the rank.
const MAX_RANKS: usize = 99_999;

/// What [`reshard`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resharded {
    /// The checkpoint's directory.
    pub path: PathBuf,
    /// Data files: one for each rank that has a share.
    pub files: usize,
    /// Bytes of data files.
    pub bytes: u64,
}

/// Writes a checkpoint again as `ranks` files of equal share: `out_dir/step-00000123`, with the same tensors, step and
/// state.
///
/// The stored pieces are copied in the order in which they lie and cut where a share ends. So every chunk is read, checked
/// and written once, and no more than a few chunks are in memory.
///
/// # Errors
/// A user error when there are no or too many ranks, when `from` cannot be read or is damaged, or `out_dir` has a
/// checkpoint of that step already; a failure when writing fails, which leaves nothing behind.
pub fn reshard(from: &Path, out_dir: &Path, ranks: usize) -> Result<Resharded> {
    if !(1..=MAX_RANKS).contains(&ranks) {
        return Err(Error::user(format!("reshard for {ranks} ranks, expected 1 to {MAX_RANKS}"))
            .hint("give the number of files to write"));
    }
    let checkpoint = Checkpoint::open(from)?;
    let step = checkpoint.step();
    let shares = shares(&checkpoint, ranks);
    Saver::only(out_dir, step, |saver| {
        let mut records = Vec::with_capacity(shares.len());
        for (rank, share) in shares.iter().enumerate() {
            let outlines: Vec<Outline<'_>> = share.iter().map(Part::outline).collect();
            records.push(saver.write_streamed(rank, &outlines, |out| {
                let mut of_pieces = share.iter().filter_map(Part::bytes);
                of_pieces.try_for_each(|(file, bytes)| checkpoint.stream(file, bytes, out))
            })?);
        }
        let meta = Meta { world: ranks, ..checkpoint.manifest().meta.clone() };
        let (files, bytes) = (records.len(), records.iter().map(FileRecord::bytes).sum());
        Ok(Resharded { path: saver.commit_only(out_dir, records, meta)?, files, bytes })
    })
}

/// Consecutive elements of a stored piece, or a tensor that has no elements.
struct Part<'a> {
    tensor: &'a TensorEntry,
    from: Option<(&'a PieceEntry, Range<usize>)>,
    boxes: Vec<Region>,
}

impl<'a> Part<'a> {
    fn cut(tensor: &'a TensorEntry, piece: &'a PieceEntry, range: Range<usize>) -> Self {
        let boxes = match piece.region {
            whole if range.len() == whole.len() => vec![whole],
            Region::Range { start, .. } => vec![Region::range(start + range.start, range.len())],
            Region::Box { row0, rows, col0, cols } => {
                let matrix_cols = matrix(&tensor.shape).map_or(0, |(_, cols)| cols);
                Region::of_local_range(matrix_cols, (row0, rows, col0, cols), range.start, range.len())
            }
        };
        Part { tensor, from: Some((piece, range)), boxes }
    }

    fn outline(&self) -> Outline<'_> {
        let t = self.tensor;
        Outline { name: &t.name, kind: t.kind, shape: &t.shape, boxes: &self.boxes }
    }

    /// The file that holds it, and where.
    fn bytes(&self) -> Option<(usize, Range<u64>)> {
        let (piece, range) = self.from.as_ref()?;
        let at = |element: usize| piece.offset + (element * size_of::<f32>()) as u64;
        Some((piece.file, at(range.start)..at(range.end)))
    }
}

/// All elements dealt out in the order of the files; shares differ by one element at most. Ranks without any have none.
fn shares(checkpoint: &Checkpoint, ranks: usize) -> Vec<Vec<Part<'_>>> {
    let tensors = &checkpoint.manifest().tensors;
    let mut stored: Vec<(&TensorEntry, &PieceEntry)> =
        tensors.iter().flat_map(|t| t.pieces.iter().map(move |p| (t, p))).collect();
    stored.retain(|(_, piece)| !piece.region.is_empty());
    stored.sort_by_key(|(_, piece)| (piece.file, piece.offset));
    let total: usize = stored.iter().map(|(_, piece)| piece.region.len()).sum();
    // With fewer elements than ranks some would have none.
    let ranks = ranks.min(total.max(1));
    let end_of = |rank: usize| ((total as u128) * (rank as u128 + 1) / ranks as u128) as usize;

    let mut share: Vec<Part<'_>> = tensors
        .iter()
        .filter(|t| t.pieces.iter().all(|p| p.region.is_empty()))
        .map(|tensor| Part { tensor, from: None, boxes: Vec::new() })
        .collect();
    let (mut shares, mut done) = (Vec::with_capacity(ranks), 0);
    for (tensor, piece) in stored {
        let (len, mut at) = (piece.region.len(), 0);
        while at < len {
            let end = end_of(shares.len());
            let n = (len - at).min(end - done);
            share.push(Part::cut(tensor, piece, at..at + n));
            (at, done) = (at + n, done + n);
            if done == end {
                shares.push(std::mem::take(&mut share));
            }
        }
    }
    if total == 0 {
        shares.push(share);
    }
    shares
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;
    use crate::{Kind, Piece, diff, verify};

    /// Tensors of `shapes`, dealt out to `world` ranks by columns, and the columns' second half as ranges.
    fn save(dir: &Path, shapes: &[Vec<usize>], world: usize) -> PathBuf {
        let mut records = Vec::new();
        for rank in 0..world {
            let mut held = Vec::new();
            for (i, shape) in shapes.iter().enumerate() {
                let (rows, cols) = matrix(shape).unwrap();
                let (col0, end) = (rank * cols / world, (rank + 1) * cols / world);
                let local = rows * (end - col0);
                let mut boxes = vec![Region::rect(0, rows, col0, end - col0)];
                if i % 2 == 1 {
                    let part =
                        |start, len| Region::of_local_range(cols, (0, rows, col0, end - col0), start, len);
                    boxes = [part(0, local / 2), part(local / 2, local - local / 2)].concat();
                }
                let data: Vec<f32> = (0..local).map(|x| (1000 * rank + 100 * i + x) as f32).collect();
                held.push((format!("t{i}"), shape, boxes, data));
            }
            let pieces = Kind::ALL.into_iter().flat_map(|kind| {
                held.iter().map(move |(name, global_shape, boxes, data)| Piece {
                    name,
                    kind,
                    global_shape,
                    boxes: boxes.clone(),
                    data,
                })
            });
            records.push(Saver::begin(dir, 3).unwrap().write_rank(rank, pieces).unwrap());
        }
        let state = serde_json::json!({ "next_sample": 12 });
        Saver::commit(dir, 3, records, Meta { tokens: 9, fingerprint: "f".into(), world, state }).unwrap()
    }

    fn shape() -> impl Strategy<Value = Vec<usize>> {
        prop_oneof![Just(vec![]), prop::collection::vec(0usize..9, 1..4)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_changes_but_the_files(
            shapes in prop::collection::vec(shape(), 1..5), world in 1usize..5, ranks in 1usize..9, back in 1usize..4
        ) {
            let dir = tempfile::tempdir().unwrap();
            let from = save(&dir.path().join("a"), &shapes, world);
            let b = reshard(&from, &dir.path().join("b"), ranks).unwrap();
            let c = reshard(&b.path, &dir.path().join("c"), back).unwrap();
            let original = Checkpoint::open(&from).unwrap();
            for (done, world) in [(b, ranks), (c, back)] {
                prop_assert!(diff(&from, &done.path).unwrap().bit_equal());
                let found = verify(&done.path).unwrap();
                prop_assert_eq!((found.files, found.bytes), (done.files, done.bytes));
                let copy = Checkpoint::open(&done.path).unwrap();
                let expected = Meta { world, ..original.manifest().meta.clone() };
                prop_assert_eq!(&copy.manifest().meta, &expected);
                // Shares differ by one element at most.
                let mut shares = vec![0; done.files];
                let pieces = copy.manifest().tensors.iter().flat_map(|t| &t.pieces);
                pieces.for_each(|p| shares[p.file] += p.region.len());
                let most = shares.iter().max().unwrap();
                let total: usize = shares.iter().sum();
                prop_assert_eq!(done.files, world.min(total.max(1)));
                prop_assert!(shares.iter().all(|n| n + 1 >= *most), "{:?}", shares);
            }
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let from = save(&a, &[vec![40, 30], vec![7]], 2);
        let check = |to: &Path, ranks, what: &str| {
            let error = reshard(&from, to, ranks).expect_err("refused");
            assert_eq!(error.exit_code(), 2, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        };
        check(&b, 0, "reshard for 0 ranks");
        check(&b, 100_000, "expected 1 to 99999");
        check(&a, 3, "step-00000003 is there already");
        let file = from.join("rank-00001.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, bytes).unwrap();
        check(&b, 2, "rank-00001.safetensors is damaged in chunk 0");
        assert_eq!(fs::read_dir(&b).unwrap().count(), 0, "nothing is left behind");
    }
}
