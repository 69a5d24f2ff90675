//! The readers of other trainers' files, against damaged ones.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::blob::{Blob, FilePart, View};
use super::dcp::{self, Dcp};
use super::llmc::LlmC;
use crate::fuzz_test::harness::fuzz;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/dcp").join(name)
}

const WORDS: [&str; 12] = [
    "cos\nsystem\n",
    "cposix\nsystem\n",
    "ctorch\nSize\n",
    "ctorch.distributed.checkpoint.metadata\nMetadata\n",
    "ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n",
    "X\u{4}\0\0\0abcd",
    ")R",
    "h\0",
    "}(",
    "](",
    "../../x",
    "(h\u{1}h\u{1}t",
];

#[test]
fn fuzz_dcp_metadata() {
    let good = ["single", "sharded", "megatron/iter_0000500"]
        .map(|n| fs::read(golden(n).join(".metadata")).unwrap());
    fuzz("dcp-metadata", &good, &WORDS, |input| input, |input| dcp::parse(input, Path::new("d")).is_ok());
}

#[test]
fn fuzz_dcp() {
    // The whole way: a damaged `.metadata` beside sound files, opened and read.
    let dir = tempfile::tempdir().unwrap();
    for name in ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp", "__3_0.distcp"] {
        fs::copy(golden("sharded").join(name), dir.path().join(name)).unwrap();
    }
    let good = fs::read(golden("sharded/.metadata")).unwrap();
    let file = fs::File::create_new(dir.path().join(dcp::METADATA)).unwrap();
    fuzz(
        "dcp",
        &[good],
        &WORDS,
        |input| input,
        |input| {
            file.set_len(input.len() as u64).unwrap();
            file.write_all_at(input, 0).unwrap();
            let Ok(found) = Dcp::open(dir.path()) else { return false };
            found.tensors.iter().all(|t| found.read_raw(t).is_ok())
        },
    );
}

#[test]
fn fuzz_torch_save() {
    let data = fs::read(golden("single/__0_0.distcp")).unwrap();
    // The first archives of the file: each begins with the entry of its pickle.
    let starts: Vec<usize> =
        (0..data.len()).filter(|i| data[*i..].starts_with(b"PK\x03\x04\0\0\x08\x08")).collect();
    let is_first = |at: &&usize| data[**at + 30..].starts_with(b"archive/data.pkl");
    let firsts: Vec<usize> = starts.iter().filter(is_first).copied().collect();
    let good: Vec<Vec<u8>> = firsts.windows(2).map(|w| data[w[0]..w[1]].to_vec()).collect();
    let good: Vec<Vec<u8>> =
        good.into_iter().filter(|b| b.windows(7).any(|w| w == b"/data/0")).take(4).collect();
    assert_eq!(good.len(), 4);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let file = fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    let pickles: Vec<Vec<u8>> = good
        .iter()
        .map(|archive| {
            let start = archive.windows(3).position(|w| w == b"\x80\x02c").unwrap();
            let end = archive.windows(5).position(|w| w == b".PK\x07\x08").unwrap();
            archive[start..=end].to_vec()
        })
        .collect();
    fuzz("torch-save-pickle", &pickles, &WORDS, |input| input, |input| View::parse(input).is_ok());
    let words = ["PK\u{1}\u{2}", "PK\u{5}\u{6}", "PK\u{6}\u{7}", "archive/data/0", "cos\nsystem\n"];
    fuzz(
        "torch-save",
        &good,
        &words,
        |input| input,
        |input| {
            file.set_len(input.len() as u64).unwrap();
            file.write_all_at(input, 0).unwrap();
            Blob::read(&file, FilePart { at: 0, len: input.len() as u64 }).is_ok()
        },
    );
}

#[test]
fn fuzz_llmc() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let file = fs::File::create_new(&path).unwrap();
    fuzz(
        "llmc",
        &[super::tests::llmc(3), super::tests::llmc(5)],
        &[],
        |input| input,
        |input| {
            file.set_len(input.len() as u64).unwrap();
            file.write_all_at(input, 0).unwrap();
            LlmC::open(&path).is_ok_and(|f| f.tensors.iter().all(|t| f.stream(t, &mut |_| Ok(())).is_ok()))
        },
    );
}
