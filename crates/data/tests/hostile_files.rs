//! Files that are not what they seem, or change while they are in use: an error that names them, never a signal or a wait.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data::{
    Epochs, IndexedDataset, IndexedWriter, Manifest, Source, TokenShards, TokenStream, TokenType, Tokenizer,
};
use spec::Error;

fn write(prefix: &Path, tokens: &[u32]) {
    let mut writer = IndexedWriter::create(prefix, TokenType::U16).unwrap();
    writer.push(tokens).unwrap();
    writer.end_document().unwrap();
    writer.finish().unwrap();
}

fn check<T>(result: Result<T, Error>, expected: &[&str]) {
    let error = result.err().expect("no error");
    for expected in expected {
        assert!(error.to_string().contains(expected), "{error}\nexpected: {expected}");
    }
    assert!(error.hint_text().is_some_and(|h| !h.is_empty()), "no hint: {error}");
}

fn pipe(path: &Path) -> PathBuf {
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    path.to_path_buf()
}

#[test]
fn a_file_that_shrinks_while_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    write(&prefix, &(0..40_000).map(|i| i % 1000).collect::<Vec<_>>());
    let source = Arc::new(Source::open(&prefix).unwrap());
    let stream = Epochs::new(source.clone(), 0..1, 64, 1, Some(1000)).unwrap();
    let mut out = vec![0; 65];
    stream.sample(0, &mut out).unwrap();
    let bin = data::bin_path(&prefix);
    let file = OpenOptions::new().write(true).open(&bin).unwrap();
    file.set_len(100).unwrap();
    let failed = (0..100).find_map(|i| stream.sample(i, &mut out).err()).expect("nobody noticed");
    check::<()>(Err(failed), &["data.bin was cut short while it was in use: 80000 bytes", "100 now"]);
    check(source.fingerprint(), &["data.bin"]);
    // The index is in memory; it may go.
    fs::write(data::idx_path(&prefix), b"").unwrap();
    assert_eq!(source.length(0), 40_000);
}

#[test]
fn pipes_devices_and_directories() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let fifo = pipe(&at("fifo"));
    check(Tokenizer::load(&fifo), &["fifo is a pipe, expected a file"]);
    check(Tokenizer::load(dir.path()), &["is a directory"]);
    check(Tokenizer::load(Path::new("/dev/zero")), &["/dev/zero is a device"]);
    check(TokenShards::open(std::slice::from_ref(&fifo)), &["fifo is a pipe"]);
    check(
        data::build(&data::BuildOptions::new(vec![fifo], at("out")), &trained(), &|_| {}),
        &["fifo is a pipe"],
    );
    let device = data::BuildOptions::new(vec!["/dev/zero".into()], at("out"));
    check(data::build(&device, &trained(), &|_| {}), &["/dev/zero is a device"]);

    write(&at("data"), &[1, 2, 3]);
    fs::remove_file(at("data.bin")).unwrap();
    pipe(&at("data.bin"));
    check(IndexedDataset::open(&at("data")), &["data.bin is a pipe"]);
    fs::rename(at("data.bin"), at("data.idx")).unwrap();
    check(IndexedDataset::open(&at("data")), &["data.idx is a pipe"]);
    pipe(&at("data.json"));
    check(Manifest::load(&at("data")), &["data.json is a pipe"]);
}

fn trained() -> Tokenizer {
    Tokenizer::train(["some text"], 260, &|_| {}).unwrap()
}

#[test]
fn a_pipe_in_a_folder_of_text_is_left_out_by_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("in")).unwrap();
    fs::write(dir.path().join("in/a.txt"), "text").unwrap();
    pipe(&dir.path().join("in/b.txt"));
    let options = data::BuildOptions::new(vec![dir.path().join("in")], dir.path().join("out"));
    let report = data::build(&options, &trained(), &|_| {}).unwrap();
    assert_eq!((report.manifest.documents, report.skipped.unreadable), (1, 1));
    assert!(report.skipped.messages[0].contains("b.txt is a pipe"), "{:?}", report.skipped.messages);
}

/// An index of `sequences` entries over a sparse file, with only the header and the last boundary written.
fn sparse_index(path: &Path, sequences: u64) {
    let mut file = File::create(path).unwrap();
    let mut header = b"MMIDIDX\0\0".to_vec();
    header.extend_from_slice(&1u64.to_le_bytes());
    header.push(8);
    header.extend_from_slice(&sequences.to_le_bytes());
    header.extend_from_slice(&(sequences + 1).to_le_bytes());
    file.write_all(&header).unwrap();
    file.seek(SeekFrom::Start(34 + 20 * sequences)).unwrap();
    file.write_all(&sequences.to_le_bytes()).unwrap();
}

#[test]
fn sparse_files_are_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    write(&prefix, &[1, 2, 3]);
    sparse_index(&data::idx_path(&prefix), 1 << 33);
    check(IndexedDataset::open(&prefix), &["data.idx", "nothing was ever written"]);
    sparse_index(&data::idx_path(&prefix), 1 << 13);
    check(IndexedDataset::open(&prefix), &["data.idx", "nothing was ever written"]);

    write(&prefix, &vec![7; 100_000]);
    let file = OpenOptions::new().write(true).open(data::bin_path(&prefix)).unwrap();
    file.set_len(0).unwrap();
    file.set_len(200_000).unwrap();
    check(IndexedDataset::open(&prefix), &["data.bin: 200000 bytes", "nothing was ever written from byte 0"]);
}

#[test]
fn ids_out_of_proportion() {
    let mut json: serde_json::Value = serde_json::from_slice(&trained().to_json().unwrap()).unwrap();
    for id in [1u64 << 20, u64::from(u32::MAX) - 1, u64::from(u32::MAX)] {
        json["model"]["vocab"]["a"] = id.into();
        let bytes = serde_json::to_vec(&json).unwrap();
        check(Tokenizer::from_bytes(&bytes), &[&format!("token id {id} in a file of {} bytes", bytes.len())]);
    }
    json["model"]["vocab"]["a"] = 70_000.into();
    assert_eq!(Tokenizer::from_bytes(&serde_json::to_vec(&json).unwrap()).unwrap().vocab_size(), 70_001);
}

#[test]
fn added_tokens_are_no_texts() {
    let mut json: serde_json::Value = serde_json::from_slice(&trained().to_json().unwrap()).unwrap();
    json["added_tokens"][0]["content"] = "x".repeat(5000).into();
    check(Tokenizer::from_bytes(&serde_json::to_vec(&json).unwrap()), &["an added token of 5000 bytes"]);
    // The library would panic about the decoder.
    json["added_tokens"][0]["content"] = "x".into();
    json["decoder"] = serde_json::json!({"type": "?"});
    let text = json.to_string().replace("\"?\"", "\"\\ud800\"");
    check(Tokenizer::from_bytes(text.as_bytes()), &["not a tokenizer.json"]);
}
