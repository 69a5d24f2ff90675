//! Data that is missing, damaged or does not fit: one message with what, where and a hint.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data::{
    Batches, BuildOptions, GptDataset, IndexedDataset, IndexedWriter, Source, TokenShards, TokenType,
    Tokenizer,
};
use spec::{Error, Kind};

fn write(prefix: &Path, kind: TokenType, documents: &[&[u32]]) {
    let mut writer = IndexedWriter::create(prefix, kind).unwrap();
    for tokens in documents {
        writer.push(tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
}

fn is_users(error: &Error, expected: &str) {
    assert!(error.to_string().contains(expected), "{error}\nexpected: {expected}");
    assert_eq!(error.kind(), Kind::User, "{error}");
    assert!(error.hint_text().is_some_and(|h| !h.is_empty()), "no hint: {error}");
}

/// Opens a good dataset after `damage` to its two files.
fn check(damage: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>), expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("my.data");
    write(&prefix, TokenType::U16, &[&[1, 2, 3], &[4, 5]]);
    let (bin_path, idx_path) = (data::bin_path(&prefix), data::idx_path(&prefix));
    let (mut bin, mut idx) = (fs::read(&bin_path).unwrap(), fs::read(&idx_path).unwrap());
    damage(&mut bin, &mut idx);
    fs::write(&bin_path, bin).unwrap();
    fs::write(&idx_path, idx).unwrap();
    let error = IndexedDataset::open(&prefix).err().expect("damage goes unnoticed");
    assert!(error.to_string().contains("my.data"), "{error}");
    is_users(&error, expected);
}

#[test]
fn damaged_indices() {
    check(|_, idx| idx[0] = b'X', "not a Megatron index: starts with \"XMIDIDX");
    check(|_, idx| idx[9] = 2, "index version 2, expected 1");
    check(|_, idx| idx[17] = 7, "floating point");
    check(|_, idx| idx[17] = 99, "unknown token type code 99");
    check(|_, idx| idx.truncate(20), "cut short: 20 bytes");
    check(|_, idx| idx.truncate(80), "cut short: 80 bytes, but 2 sequences");
    check(|_, idx| idx.clear(), "empty file");
    check(|_, idx| idx.push(0), "wrong length");
    check(|_, idx| idx[18] = 200, "cut short");
    check(|_, idx| idx[18..26].fill(255), "cut short");
    check(|_, idx| idx[34..38].copy_from_slice(&(-1i32).to_le_bytes()), "sequence 0 has length -1");
    check(|_, idx| idx[34] = 2, "sequence 1 starts at byte 6, but the lengths before it end at byte 4");
    check(|_, idx| idx[58] = 1, "document boundary 0 is 1");
    check(|_, idx| idx[66] = 9, "document boundary 2 is 2, after 9");
    check(|_, idx| idx[74] = 1, "document boundaries end at 1, but there are 2 sequences");
}

#[test]
fn damaged_tokens() {
    check(|bin, _| bin.truncate(9), "cut short: 9 bytes, but the index lists 5 u16 tokens (10 bytes)");
    check(|bin, _| bin.push(0), "longer than its index: 11 bytes");
    check(|bin, _| bin.clear(), "empty file");
}

#[test]
fn every_cut_and_flip_of_an_index_is_an_error_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    write(&prefix, TokenType::U16, &[&[1, 2, 3], &[4, 5], &[6]]);
    let path = data::idx_path(&prefix);
    let good = fs::read(&path).unwrap();
    for length in 0..good.len() {
        fs::write(&path, &good[..length]).unwrap();
        assert!(IndexedDataset::open(&prefix).is_err(), "cut at {length}");
    }
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            // Another split of the same tokens, or another name for the same width, cannot be told from the files.
            if let Ok(set) = IndexedDataset::open(&prefix) {
                let total: usize = (0..set.sequences()).map(|i| set.length(i)).sum();
                assert_eq!(total as u64, set.tokens(), "byte {at} bit {bit}");
            }
        }
    }
}

#[test]
fn missing_files() {
    let dir = tempfile::tempdir().unwrap();
    is_users(&Source::open(&dir.path().join("nothing")).err().unwrap(), "nothing.idx");
    is_users(&Source::open(&dir.path().join("*.bin")).err().unwrap(), "no file matches");
    is_users(&Source::open(dir.path()).err().unwrap(), "without token shards");
    let prefix = dir.path().join("half");
    write(&prefix, TokenType::U16, &[&[1]]);
    fs::remove_file(data::bin_path(&prefix)).unwrap();
    is_users(&Source::open(&prefix).err().unwrap(), "half.bin");
}

#[test]
fn a_dataset_without_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("none");
    let mut writer = IndexedWriter::create(&prefix, TokenType::U16).unwrap();
    writer.end_document().unwrap();
    assert!(writer.finish().is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something half-written stayed");
}

fn shard(path: &Path, magic: u32, version: u32, tokens: &[u32], width: usize) -> PathBuf {
    let mut bytes = vec![0; 1024];
    for (at, word) in [magic, version, tokens.len() as u32].into_iter().enumerate() {
        bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
    }
    bytes.extend(tokens.iter().flat_map(|t| t.to_le_bytes()[..width].to_vec()));
    fs::write(path, bytes).unwrap();
    path.to_path_buf()
}

#[test]
fn shards() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    shard(&at("train_000.bin"), 20240520, 1, &[1, 2, 50256], 2);
    shard(&at("train_001.bin"), 20240520, 1, &[4], 2);
    shard(&at("val.bin"), 20240520, 1, &[5, 6], 2);
    for path in [at("train_*.bin"), at("train_000.bin"), dir.path().to_path_buf()] {
        let source = Source::open(&path).unwrap();
        let mut out = [0; 2];
        source.read(0, 1, &mut out).unwrap();
        assert_eq!(out, [2, 50256], "{}", source.name());
    }
    assert_eq!(Source::open(dir.path()).unwrap().tokens(), 6);
    let wide = shard(&at("llama.bin"), 20240801, 7, &[128_000, 1], 4);
    let source = Source::open(&wide).unwrap();
    assert_eq!(source.token_type(), TokenType::U32);
    is_users(&source.check_vocab(128_000).unwrap_err(), "llama.bin: token 0 has id 128000");

    let refused = |path: PathBuf, expected: &str| {
        is_users(&TokenShards::open(&[path]).err().unwrap(), expected);
    };
    refused(shard(&at("a"), 20240520, 2, &[1], 2), "version 2 under magic 20240520, expected 1");
    refused(shard(&at("a"), 20240522, 1, &[1], 2), "evaluation file");
    refused(shard(&at("a"), 7, 1, &[1], 2), "magic 7");
    refused(shard(&at("a"), 20240801, 7, &[1, 2], 2), "cut short");
    refused(shard(&at("a"), 20240520, 1, &[], 2), "wrong length");
    is_users(
        &TokenShards::open(&[at("val.bin"), wide]).err().unwrap(),
        "holds u32 tokens, the shards before it u16",
    );
}

#[test]
fn ids_beyond_the_vocabulary() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    let mut tokens: Vec<u32> = (0..5000).map(|i| i % 100).collect();
    tokens[4321] = 100;
    write(&prefix, TokenType::U16, &[&[1, 2], &tokens]);
    let source = Arc::new(Source::open(&prefix).unwrap());
    source.check_vocab(101).unwrap();
    let error = source.check_vocab(100).unwrap_err();
    is_users(&error, "data.bin: token 4323 has id 100, but the model's vocabulary has 100 entries");

    // The same is found when the sample is drawn, had the check been skipped.
    let set = GptDataset::new(source, 1..2, 10, None, 0).unwrap().with_vocab(100);
    let batches = Batches::new(set, 1).unwrap();
    let mut out = [0; 11];
    let found: Vec<Error> = (0..batches.steps()).filter_map(|k| batches.read(k, 0, &mut out).err()).collect();
    assert_eq!(found.len(), 1);
    is_users(&found[0], "token 4323 has id 100");
}

#[test]
fn negative_ids() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    write(&prefix, TokenType::I32, &[&[1, 2, 3]]);
    let path = data::bin_path(&prefix);
    let mut bin = fs::read(&path).unwrap();
    bin[4..8].copy_from_slice(&(-2i32).to_le_bytes());
    fs::write(&path, bin).unwrap();
    is_users(&Source::open(&prefix).unwrap().check_vocab(10).unwrap_err(), "token 1 has id -2");
}

#[test]
fn too_little_data() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    write(&prefix, TokenType::U16, &[&[1, 2, 3], &[4, 5]]);
    let source = Arc::new(Source::open(&prefix).unwrap());
    let open = |split, sequence| GptDataset::new(source.clone(), split, sequence, Some(10), 0);
    let error = open(0..2, 5).err().unwrap();
    is_users(&error, "the split has 5 tokens, but one sample of sequence 5 takes 6");
    assert!(error.hint_text().unwrap().contains("at most 4"));
    is_users(&open(0..2, 0).err().unwrap(), "a sequence of 0 tokens");
    is_users(&open(2..2, 1).err().unwrap(), "is empty");
    is_users(&GptDataset::new(source.clone(), 0..2, 4, Some(u64::MAX), 0).err().unwrap(), "need an index of");
    let one = open(0..2, 4).unwrap();
    is_users(&Batches::new(one, 0).err().unwrap(), "a global batch of 0");
}

#[test]
fn writing_ids_that_do_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = IndexedWriter::create(&dir.path().join("data"), TokenType::U16).unwrap();
    let error = writer.push(&[1, 65536]).unwrap_err();
    assert!(error.to_string().contains("token 1 of document 0 is 65536"), "{error}");
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something half-written stayed");
}

#[test]
fn building_from_bad_text() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::train(["some text to learn from"], 260, &|_| {}).unwrap();
    let build = |name: &str, content: &[u8]| {
        let text = dir.path().join(name);
        fs::write(&text, content).unwrap();
        let options = BuildOptions::new(vec![text], dir.path().join("out/data"));
        let error = data::build(&options, &tokenizer, &|_| {}).expect_err("a bad text was built");
        let left = fs::read_dir(dir.path().join("out")).map_or(0, |d| d.count());
        assert_eq!(left, 0, "something half-written stayed after {error}");
        error
    };
    is_users(
        &build("a.jsonl", b"{\"text\": \"fine\"}\n{\"text\": 3}\n"),
        "a.jsonl:2: field \"text\" is a number",
    );
    is_users(&build("a.jsonl", b"\n{\"body\": \"x\"}\n"), "a.jsonl:2: no field \"text\", found body");
    is_users(&build("a.jsonl", b"{\"text\""), "a.jsonl:1: not JSON at column 7");
    is_users(&build("a.jsonl", b"[1]"), "a.jsonl:1: an array, expected an object");
    is_users(&build("a.txt", b""), "no text in the input");
    is_users(&build("a.txt", b"\xff\xff"), "1 files are not UTF-8");
    let missing = BuildOptions::new(vec![dir.path().join("missing")], dir.path().join("out/data"));
    is_users(&data::build(&missing, &tokenizer, &|_| {}).err().unwrap(), "missing");
}

#[test]
fn unwritable_output() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("a.txt");
    fs::write(&text, "text").unwrap();
    let tokenizer = Tokenizer::train(["text"], 257, &|_| {}).unwrap();
    // A file where a directory is needed refuses everybody, the superuser too.
    let options = BuildOptions::new(vec![text.clone()], text.join("data"));
    let error = data::build(&options, &tokenizer, &|_| {}).err().unwrap();
    assert!(error.to_string().contains("a.txt"), "{error}");
}

#[test]
fn bad_tokenizers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    is_users(&Tokenizer::load(&path).err().unwrap(), "read tokenizer");
    fs::write(&path, "{").unwrap();
    is_users(&Tokenizer::load(&path).err().unwrap(), "not a tokenizer.json");
    is_users(&Tokenizer::train(["x"], 100, &|_| {}).err().unwrap(), "a tokenizer of 100 entries");
    assert!(Tokenizer::train([""], 300, &|_| {}).is_err());
}
