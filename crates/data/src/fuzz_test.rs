//! The parsers of data's files, against damaged ones.

#[path = "../../../tests/fuzz.rs"]
mod harness;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use harness::{fuzz, fuzz_within};

use crate::input::{Body, Input, Item, Reader, TextOptions};
use crate::json::json_text;
use crate::pieces::Cut;
use crate::{BuildOptions, IndexedDataset, IndexedWriter, Manifest, Source, TokenType, Tokenizer};

#[global_allocator]
static ALLOCATOR: harness::Counting = harness::Counting;

/// A file whose content is replaced for each input.
struct Rewritten(File);

impl Rewritten {
    fn create(path: &Path) -> Rewritten {
        Rewritten(File::create(path).unwrap())
    }

    fn put(&self, input: &[u8]) {
        self.0.set_len(input.len() as u64).unwrap();
        self.0.write_all_at(input, 0).unwrap();
    }
}

fn write(prefix: &Path, kind: TokenType, documents: &[&[u32]]) -> Vec<u8> {
    let mut writer = IndexedWriter::create(prefix, kind).unwrap();
    for tokens in documents {
        writer.push(tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
    fs::read(crate::idx_path(prefix)).unwrap()
}

/// Opens, and reads what can be read.
fn reads(source: Result<Source, spec::Error>) -> bool {
    let Ok(source) = source else { return false };
    let mut out = [0; 4];
    for sequence in 0..source.sequences().min(8) {
        let count = source.length(sequence).min(4);
        source.read(sequence, 0, &mut out[..count]).unwrap();
    }
    source.fingerprint().unwrap();
    let _ = source.check_vocab(5);
    crate::show(&source, None).is_ok()
}

#[test]
fn fuzz_idx() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    let good = [
        write(&prefix, TokenType::I32, &[&[1, 2, 3], &[], &[4, 5]]),
        write(&prefix, TokenType::U16, &[&[1, 2, 3], &[4, 5, 6, 7, 8, 9, 10]]),
        write(&prefix, TokenType::I32, &[&[1], &[2], &[3], &[4, 5]]),
    ];
    let file = Rewritten::create(&crate::idx_path(&prefix));
    fuzz(
        "idx",
        &good,
        &["\u{1}\0\0\0\0\0\0\0", "\0\0\0\0"],
        |input| input,
        |input| {
            file.put(input);
            reads(IndexedDataset::open(&prefix).map(Source::Indexed))
        },
    );
}

#[test]
fn fuzz_shards() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("shard.bin");
    let shard = |magic: u32, version: u32, tokens: &[u8], count: u32| {
        let mut bytes = vec![0; 1024];
        for (at, word) in [magic, version, count].into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes.extend_from_slice(tokens);
        bytes
    };
    let good =
        [shard(20_240_520, 1, &[1, 0, 2, 0, 3, 0], 3), shard(20_240_801, 7, &[1, 0, 0, 0, 9, 9, 1, 0], 2)];
    let file = Rewritten::create(&path);
    fuzz(
        "shards",
        &good,
        &[],
        |input| input,
        |input| {
            file.put(input);
            reads(Source::open(&path))
        },
    );
}

fn tokenizers() -> Vec<Vec<u8>> {
    let trained = Tokenizer::train(["some text to learn from, text and more text"], 270, &|_| {}).unwrap();
    let small = |model: &str, rest: &str| {
        format!(r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{{"id": 0, "content": "<s>",
            "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
            "normalizer": {{"type": "Sequence", "normalizers": [{{"type": "NFC"}}, {{"type": "Lowercase"}}]}},
            "pre_tokenizer": {rest}, "post_processor": null, "decoder": null, "model": {model}}}"#)
        .into_bytes()
    };
    vec![
        trained.to_json().unwrap(),
        small(
            r#"{"type": "BPE", "dropout": null, "unk_token": "<s>", "continuing_subword_prefix": null, "end_of_word_suffix":
                null, "fuse_unk": true, "byte_fallback": false, "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]}"#,
            r#"{"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true}"#,
        ),
        small(
            r#"{"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["a", -1.5], ["ab", -2.0]], "byte_fallback": false}"#,
            r#"{"type": "Split", "pattern": {"Regex": "a+|\\s+(?!\\S)|\\s+"}, "behavior": "Isolated", "invert": false}"#,
        ),
        small(
            r#"{"type": "WordLevel", "vocab": {"<s>": 0, "a": 1}, "unk_token": "<s>"}"#,
            r#"{"type": "Whitespace"}"#,
        ),
    ]
}

/// The library keeps a vocabulary as two maps, merges as a third, and twice while it reads them; a regular expression of
/// a few characters may take 10 MiB, where it ends by itself.
const TOKENIZER_BYTES: (usize, usize) = (64, 64 << 20);

#[test]
fn fuzz_tokenizer() {
    let words = [
        "\"vocab\":{",
        "\"merges\":[",
        "\"id\":4294967294",
        "\"a b\",",
        "[\"a\",\"b\"],",
        "\"type\":\"BPE\",",
        "\"special\":true",
        "(?=",
        "\\\\p{L}",
        "{1,3}",
        "\"dropout\":0.5",
        "\"unk_id\":9",
    ];
    fuzz_within(
        TOKENIZER_BYTES,
        "tokenizer",
        &tokenizers(),
        &words,
        |input| input,
        |input| {
            let Ok(tokenizer) = Tokenizer::from_bytes(input) else { return false };
            let _ = tokenizer.encode("ab a text\n<s>");
            tokenizer.fingerprint().is_ok()
        },
    );
}

#[test]
fn fuzz_manifest() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("a.txt");
    fs::write(&text, "some text").unwrap();
    let tokenizer = Tokenizer::train(["some text"], 257, &|_| {}).unwrap();
    let options = BuildOptions::new(vec![text], dir.path().join("data"));
    crate::build(&options, &tokenizer, &|_| {}).unwrap();
    let good = fs::read(Manifest::path(&options.prefix)).unwrap();
    let file = Rewritten::create(&Manifest::path(&options.prefix));
    fuzz(
        "data-manifest",
        &[good],
        &["\"warnings\":[\"\"],", "\"text_key\":\"0\""],
        |input| input,
        |input| {
            file.put(input);
            Manifest::load(&options.prefix).is_ok()
        },
    );
}

/// Reads a file of text as a build does, on this thread.
fn reads_text(input: &Input, options: &TextOptions, cut: Cut) -> bool {
    let mut texts = 0;
    let emit = |item: Item| {
        texts += match item.body {
            Body::Text(text) => text.len(),
            Body::Json { bytes, strings, .. } => {
                json_text(&bytes, options.field(), strings).map_or(0, |t| t.len())
            }
            Body::Nothing => 0,
        };
        true
    };
    let mut reader = Reader { emit, cut, options, skipped: crate::Skipped::default() };
    reader.read_all(std::slice::from_ref(input)).is_ok() && texts > 0
}

fn check_corpus(bytes: (usize, usize), name: &str, file: &str, good: &[Vec<u8>]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file);
    let rewritten = Rewritten::create(&path);
    let words = ["{\"text\": \"a\"}\n", "[", "\"text\"", "]", "\n", "\\", "\u{feff}", "{\"text\":\n"];
    let mut count = 0u64;
    fuzz_within(
        bytes,
        name,
        good,
        &words,
        |input| input,
        |input| {
            rewritten.put(input);
            count += 1;
            let input = Input {
                path: path.clone().into(),
                bytes: input.len() as u64,
                is_named: count.is_multiple_of(2),
            };
            let options = TextOptions { skip_bad: count.is_multiple_of(3), ..TextOptions::default() };
            let cuts = [Cut::Exact(4), Cut::Whole, Cut::Documents { document_bytes: 16, piece_bytes: 4 }];
            reads_text(&input, &options, cuts[count as usize % 3])
        },
    );
}

const LINES: &[u8] = b"{\"text\": \"first\"}\n{\"text\": \"second \\u00e9\", \"id\": [1, {\"a\": null}]}\n";

#[test]
fn fuzz_corpus() {
    let good = [
        LINES.to_vec(),
        b"[{\"text\": \"first\"},\n \"second\", {\"text\": \"third ] \\\"\"}]".to_vec(),
        "plain text; with lines\nand words \u{e9}\n".as_bytes().to_vec(),
        b"{\n \"text\": \"first\"\n}\n{}".to_vec(),
    ];
    check_corpus((16, 512 << 10), "corpus", "a.json", &good);
}

/// gzip packs a run of one byte 1,032 times; a line of it is held once as it came and once as text.
const PACKED_BYTES: (usize, usize) = (2 * 1032, 16 << 20);

#[test]
fn fuzz_packed() {
    use std::io::Write;
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gz.write_all(LINES).unwrap();
    let zst = ruzstd::encoding::compress_to_vec(LINES, ruzstd::encoding::CompressionLevel::Fastest);
    check_corpus(PACKED_BYTES, "packed", "a.jsonl", &[gz.finish().unwrap(), zst]);
}
