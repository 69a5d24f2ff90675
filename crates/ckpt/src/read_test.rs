//! Slices that any layout wrote, read by any other; damage named.

use proptest::prelude::*;

use super::*;
use crate::{Meta, Piece, Saver};

/// Saves one tensor of consecutive numbers, dealt out to ranks as the given regions.
fn save(dir: &Path, step: u64, shape: &[usize], ranks: &[Vec<Region>]) -> Result<PathBuf> {
    let (_, cols) = matrix(shape).unwrap();
    let all: Vec<f32> = (0..shape.iter().product::<usize>()).map(|i| i as f32).collect();
    let whole = Region::whole(shape);
    let mut records = Vec::new();
    for (rank, boxes) in ranks.iter().enumerate() {
        let mut data = Vec::new();
        for region in boxes {
            let mut part = vec![0.0; region.len()];
            for_each_copy(&whole, region, cols, |r| {
                part[r.to..r.to + r.len].copy_from_slice(&all[r.from..r.from + r.len]);
                Ok::<(), ()>(())
            })
            .unwrap();
            data.extend(part);
        }
        let kinds = Kind::ALL.map(|kind| Piece {
            name: "w",
            kind,
            global_shape: shape,
            boxes: boxes.clone(),
            data: &data,
        });
        let bytes = Saver::begin(dir, step)?.write_rank(rank, kinds)?.to_bytes();
        records.push(crate::FileRecord::from_bytes(&bytes)?);
    }
    // Records arrive in any order.
    records.reverse();
    Saver::commit(dir, step, records, Meta { world: ranks.len(), ..Meta::default() })
}

/// Cuts a box into `2^depth` boxes, alternating by the bits of `seed`.
fn cut(region: Region, depth: u32, seed: u64) -> Vec<Region> {
    let Region::Box { row0, rows, col0, cols } = region else { return vec![region] };
    if depth == 0 {
        return vec![region];
    }
    let (left, right) = if seed & 1 == 0 {
        let n = (seed >> 1) as usize % (rows + 1);
        (Region::rect(row0, n, col0, cols), Region::rect(row0 + n, rows - n, col0, cols))
    } else {
        let n = (seed >> 1) as usize % (cols + 1);
        (Region::rect(row0, rows, col0, n), Region::rect(row0, rows, col0 + n, cols - n))
    };
    [cut(left, depth - 1, seed >> 3), cut(right, depth - 1, seed >> 5)].concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_layout_reads_what_any_other_wrote(
        rows in 1usize..9, cols in 1usize..9, seed: u64, world in 1usize..5, ask: [usize; 4]
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut ranks = vec![Vec::new(); world];
        for (i, b) in cut(Region::rect(0, rows, 0, cols), 3, seed).into_iter().enumerate() {
            let Region::Box { row0, rows: r, col0, cols: c } = b else { unreachable!() };
            // Half of the boxes are dealt out as two flat ranges, as ZeRO does.
            let middle = r * c / 2;
            let half = |s, n| Region::of_local_range(cols, (row0, r, col0, c), s, n);
            if i % 2 == 0 {
                ranks[i % world].extend(half(0, middle));
                ranks[(i + 1) % world].extend(half(middle, r * c - middle));
            } else {
                ranks[i % world].push(b);
            }
        }
        let path = save(dir.path(), 1, &[rows, cols], &ranks).unwrap();
        let ckpt = Checkpoint::open(&path).unwrap();
        prop_assert_eq!(ckpt.verify().unwrap().files, world);
        let (row0, col0) = (ask[0] % rows, ask[1] % cols);
        let (r, c) = (ask[2] % (rows - row0) + 1, ask[3] % (cols - col0) + 1);
        let mut out = vec![-1.0; r * c];
        ckpt.read_box("w", Kind::ExpAvg, row0, r, col0, c, &mut out).unwrap();
        for (i, got) in out.into_iter().enumerate() {
            prop_assert_eq!(got as usize, (row0 + i / c) * cols + col0 + i % c);
        }
    }
}

fn one_rank(dir: &Path, step: u64) -> PathBuf {
    save(dir, step, &[3, 4], &[vec![Region::range(0, 12)]]).unwrap()
}

#[track_caller]
fn check_error<T: std::fmt::Debug>(result: Result<T>, what: &str, hint: &str) {
    let error = result.expect_err("must fail");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains(what), "{error}");
    assert!(error.hint_text().unwrap_or_default().contains(hint), "{:?}", error.hint_text());
}

#[test]
fn a_whole_tensor_is_plain_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(one_rank(dir.path(), 1).join("rank-00000.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("w").unwrap().shape(), [3, 4]);
    assert_eq!(theirs.tensor("exp_avg_sq.w").unwrap().dtype(), safetensors::Dtype::F32);
}

#[test]
fn every_flipped_byte_is_found() {
    let dir = tempfile::tempdir().unwrap();
    one_rank(dir.path(), 1);
    let path = one_rank(dir.path(), 2);
    let file = path.join("rank-00000.safetensors");
    let good = fs::read(&file).unwrap();
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 0x10;
        fs::write(&file, &bad).unwrap();
        let ckpt = Checkpoint::open(&path).unwrap();
        check_error(ckpt.verify(), "rank-00000.safetensors is damaged in chunk 0", "step-00000001");
        let read = ckpt.read_box("w", Kind::Param, 0, 1, 0, 1, &mut [0.0]);
        check_error(read, "damaged in chunk 0", "step-00000001");
    }
}

#[test]
fn what_is_cut_or_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    one_rank(dir.path(), 1);
    let path = one_rank(dir.path(), 2);
    let file = path.join("rank-00000.safetensors");
    let good = fs::read(&file).unwrap();
    fs::write(&file, &good[..good.len() - 1]).unwrap();
    check_error(Checkpoint::open(&path), "is cut short", "step-00000001");
    fs::remove_file(&file).unwrap();
    check_error(Checkpoint::open(&path), "rank-00000.safetensors", "step-00000001");
    fs::write(path.join(MANIFEST), "{").unwrap();
    check_error(Checkpoint::open(&path), "manifest.json is damaged", "step-00000001");
    fs::remove_file(path.join(MANIFEST)).unwrap();
    check_error(Checkpoint::open(&path), "manifest.json", "");
    // With nothing older there is no hint.
    let first = dir.path().join("step-00000001");
    fs::write(first.join(MANIFEST), "{").unwrap();
    assert_eq!(Checkpoint::open(&first).unwrap_err().hint_text(), None);
}

#[test]
fn wrong_questions_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let ckpt = Checkpoint::open(&one_rank(dir.path(), 1)).unwrap();
    check_error(ckpt.read_box("v", Kind::Param, 0, 1, 0, 1, &mut [0.0]), "has no param v", "");
    check_error(ckpt.read_box("w", Kind::Param, 2, 2, 0, 1, &mut [0.0; 2]), "rows 2..4", "");
    let short = ckpt.read_box("w", Kind::Param, 0, 1, 0, 4, &mut [0.0]).unwrap_err();
    assert_eq!(short.exit_code(), 1, "a wrong buffer is our own fault");
}

#[test]
fn commit_refuses_gaps_and_overlaps() {
    let dir = tempfile::tempdir().unwrap();
    let whole = || vec![Region::range(0, 12)];
    for (ranks, what) in [
        (vec![vec![Region::range(0, 11)]], "1 of 12 elements are written nowhere"),
        (
            vec![whole(), whole()],
            "written twice: elements 0..12 in rank-00000.safetensors and elements 0..12 in rank-00001",
        ),
        (vec![vec![Region::range(3, 10)]], "reach outside"),
    ] {
        let error = save(dir.path(), 1, &[3, 4], &ranks).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
    assert_eq!(dir::list(dir.path()).unwrap(), []);
}

#[test]
fn chunks_end_inside_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let shape = [1100, 1000];
    let halves = [vec![Region::rect(0, 1100, 0, 300)], vec![Region::rect(0, 1100, 300, 700)]];
    let path = save(dir.path(), 1, &shape, &halves).unwrap();
    let ckpt = Checkpoint::open(&path).unwrap();
    let found = ckpt.verify().unwrap();
    assert!((17_600_000..17_601_000).contains(&found.bytes), "{found:?}");
    assert_eq!(found.chunks, 2 + 3);
    let mut all = vec![0.0; 1_100_000];
    ckpt.read_box("w", Kind::ExpAvgSq, 0, 1100, 0, 1000, &mut all).unwrap();
    assert!(all.iter().enumerate().all(|(i, x)| *x == i as f32));
    // A flip in the last chunk is found there, and reads elsewhere still work.
    let file = path.join("rank-00001.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    let ckpt = Checkpoint::open(&path).unwrap();
    check_error(ckpt.verify(), "damaged in chunk 2 (bytes 8388608..", "");
    ckpt.read_box("w", Kind::Param, 0, 10, 0, 1000, &mut [0.0; 10_000]).unwrap();
}
