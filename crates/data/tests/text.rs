//! From text to tokens and back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use data::{
    BuildOptions, END_OF_DOCUMENT, Manifest, Source, StreamDecoder, Tokenizer, build, show, train_tokenizer,
};
use proptest::prelude::*;

/// Some lines of code-like text with what trips tokenizers: blanks, digits, accents, emoji, CRLF, tabs.
fn sample_text(lines: usize) -> String {
    let words =
        ["let", "fn", "größe", "naïve", "東京", "🦀", "x1", "12345", "é", "self.items", "don't", "    "];
    let ends = ["\n", ";\n", " {\n\n", "\r\n", "\n\t", "}\n"];
    let mut state = 1u32;
    let mut next = |n: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as usize % n
    };
    let mut text = String::new();
    for _ in 0..lines {
        for _ in 0..1 + next(9) {
            text.push_str(words[next(words.len())]);
            text.push_str([" ", "", "  ", "("][next(4)]);
        }
        text.push_str(ends[next(ends.len())]);
    }
    text
}

fn trained() -> &'static Tokenizer {
    static ONE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    ONE.get_or_init(|| Tokenizer::train([sample_text(2000)], 400, &|_| {}).unwrap())
}

/// GPT-2's pre-tokenizer, whose look-ahead reads beyond a token's end.
fn gpt2_like() -> Tokenizer {
    let text = String::from_utf8(trained().to_json().unwrap()).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["pre_tokenizer"] = serde_json::json!(
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
    );
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

#[test]
fn training_does_not_depend_on_order_or_threads() {
    let text = sample_text(800);
    let parts: Vec<&str> = text.split_inclusive('\n').collect();
    let hash = |threads: usize, parts: Vec<&str>| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| Tokenizer::train(parts, 350, &|_| {}).unwrap().hash().unwrap())
    };
    let one = hash(1, parts.clone());
    assert_eq!(one, hash(3, parts.clone()));
    assert_eq!(one, hash(2, parts.into_iter().rev().collect()));
}

#[test]
fn vocabulary_and_special_tokens() {
    let t = trained();
    assert_eq!(t.vocab_size(), 400);
    assert_eq!(t.eod(), Some(0));
    // A document that quotes the end token does not end there; a prompt that contains it does.
    let quoted = format!("a {END_OF_DOCUMENT} b");
    let plain = t.encode(&quoted).unwrap();
    assert!(!plain.contains(&0));
    assert_eq!(t.decode(&plain), quoted);
    assert!(t.encode_prompt(&quoted).unwrap().contains(&0));
    assert_eq!(t.decode(&[0, 0]), "");
    assert_eq!(t.decode(&[9_999_999]), "");
}

#[test]
fn saved_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/tokenizer.json");
    trained().save(&path).unwrap();
    let loaded = Tokenizer::load(&path).unwrap();
    let text = sample_text(50);
    assert_eq!(loaded.encode(&text).unwrap(), trained().encode(&text).unwrap());
    assert_eq!(loaded.hash().unwrap(), trained().hash().unwrap());
    assert_eq!(fs::read_dir(dir.path().join("deep")).unwrap().count(), 1);
}

#[test]
fn long_text_encodes_as_its_lines_do() {
    // Long enough for several pieces; the reference cuts where no byte-level pre-tokenizer joins.
    let text = sample_text(9000);
    for tokenizer in [trained(), &gpt2_like()] {
        let whole = tokenizer.encode(&text).unwrap();
        assert!(text.len() > 200_000 && tokenizer.decode(&whole) == text);
        let prompt = tokenizer.encode_prompt(&text).unwrap(); // not cut at all
        assert_eq!(whole, prompt);
    }
}

fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) {
    let mut stream = StreamDecoder::new(tokenizer);
    let mut text = String::new();
    for &id in ids {
        text.push_str(&stream.push(id));
    }
    text.push_str(&stream.finish());
    assert_eq!(text, tokenizer.decode(ids));
}

/// A tokenizer of the SentencePiece kind: spaces as U+2581, unknown characters as bytes.
fn sentencepiece_like() -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".into(), 0.into());
    vocab.insert("</s>".into(), 1.into());
    for byte in 0..=255u32 {
        vocab.insert(format!("<0x{byte:02X}>"), (byte + 2).into());
    }
    for (i, token) in ["▁", "a", "b", "▁a", "ab", "▁ab"].iter().enumerate() {
        vocab.insert((*token).into(), (258 + i).into());
    }
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]]}
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

#[test]
fn streams_of_other_tokenizers() {
    let tokenizer = sentencepiece_like();
    assert_eq!(tokenizer.eod(), Some(1));
    for text in ["ab a b", "a é b", "🦀ab", "ab\nab  a"] {
        let ids = tokenizer.encode(text).unwrap();
        check_stream(&tokenizer, &ids);
        assert_eq!(tokenizer.decode(&ids), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_text_comes_back(text in "\\PC{0,80}|[ \n\r\ta-c0-9é🦀]{0,200}") {
        let ids = trained().encode(&text).unwrap();
        prop_assert_eq!(trained().decode(&ids), text);
    }

    /// Whatever ids a model produces, the stream prints what decoding them at once prints.
    #[test]
    fn streams_print_what_decoding_prints(ids in proptest::collection::vec(0u32..402, 0..60)) {
        check_stream(trained(), &ids);
    }
}

struct Corpus {
    dir: tempfile::TempDir,
}

impl Corpus {
    fn new() -> Corpus {
        let dir = tempfile::tempdir().unwrap();
        let corpus = Corpus { dir };
        for i in 0..30 {
            corpus.write(&format!("in/sub{}/f{i:02}.txt", i % 3), sample_text(20 + 13 * i).as_bytes());
        }
        corpus.write("in/empty.txt", b"");
        corpus.write("in/binary.dat", &[0xff, 0, 0xfe]);
        corpus.write("in/.hidden", b"not seen");
        corpus
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn files(prefix: &Path) -> Vec<Vec<u8>> {
    [data::bin_path(prefix), data::idx_path(prefix), Manifest::path(prefix), data::tokenizer_path(prefix)]
        .iter()
        .map(|p| fs::read(p).unwrap())
        .collect()
}

#[test]
fn a_directory_becomes_a_dataset() {
    let corpus = Corpus::new();
    let mut options = BuildOptions::new(vec![corpus.path("in")], corpus.path("out/data"));
    let calls = Mutex::new((0, 0));
    let report = build(&options, trained(), &|p| {
        let mut last = calls.lock().unwrap();
        *last = (p.done_bytes.max(last.0), p.total_bytes);
    })
    .unwrap();
    let (done, total) = *calls.lock().unwrap();
    assert!(done == total && total > 0, "{done} of {total}");
    assert_eq!(report.manifest.documents, 30);
    assert_eq!((report.skipped.not_utf8, report.skipped.empty, report.skipped.unreadable), (1, 1, 0));
    assert_eq!(fs::read_dir(corpus.path("out")).unwrap().count(), 4, "a temporary file stayed");
    assert_eq!(Manifest::load(&options.prefix).unwrap(), report.manifest);

    // Every document is the tokens of its file, in path order, with the end token behind.
    let source = Source::open(&options.prefix).unwrap();
    let mut paths: Vec<PathBuf> =
        (0..30).map(|i| corpus.path(&format!("in/sub{}/f{i:02}.txt", i % 3))).collect();
    paths.sort();
    for (i, path) in paths.iter().enumerate() {
        let mut expected = trained().encode(&fs::read_to_string(path).unwrap()).unwrap();
        expected.push(0);
        let mut found = vec![0; source.length(i)];
        source.read(i, 0, &mut found).unwrap();
        assert_eq!(found, expected, "{}", path.display());
    }

    // The same bytes from any number of threads.
    let first = files(&options.prefix);
    for threads in [1, 3] {
        options.prefix = corpus.path(&format!("out{threads}/data"));
        options.threads = Some(threads);
        build(&options, trained(), &|_| {}).unwrap();
        assert!(files(&options.prefix) == first, "{threads} threads");
    }

    let summary = show(&source, Some(trained())).unwrap();
    assert_eq!((summary.documents, summary.tokens), (30, report.manifest.tokens));
    assert_eq!(summary.counted_tokens, summary.tokens);
    assert_eq!(summary.lengths.histogram.iter().map(|b| b.sequences).sum::<u64>(), 30);
    assert!((summary.unigram_entropy_nats - report.manifest.unigram_entropy_nats).abs() < 1e-12);
    assert_eq!(summary.max_token, report.manifest.max_token);
    let text = fs::read_to_string(&paths[0]).unwrap();
    assert!(text.starts_with(summary.first_text.unwrap().trim_end_matches('\u{fffd}')));
}

#[test]
fn building_again_replaces_and_never_reads_itself() {
    let corpus = Corpus::new();
    let options = BuildOptions::new(vec![corpus.path("in")], corpus.path("in/data"));
    build(&options, trained(), &|_| {}).unwrap();
    let first = files(&options.prefix);
    build(&options, trained(), &|_| {}).unwrap();
    assert!(files(&options.prefix) == first);
}

#[test]
fn large_files_are_streamed_to_the_same_tokens() {
    let corpus = Corpus::new();
    // Beyond the size that is read at once, with characters across the borders of blocks.
    let mut text = sample_text(9000).repeat(18);
    text.push('é');
    assert!(text.len() > 4 << 20);
    let path = corpus.write("large.txt", text.as_bytes());
    let options = BuildOptions::new(vec![path], corpus.path("out/data"));
    let report = build(&options, trained(), &|_| {}).unwrap();
    assert_eq!((report.manifest.documents, report.manifest.text_bytes), (1, text.len() as u64));
    let source = Source::open(&options.prefix).unwrap();
    let mut found = vec![0; source.length(0)];
    source.read(0, 0, &mut found).unwrap();
    assert_eq!(found.pop(), Some(0));
    assert!(found == trained().encode(&text).unwrap());

    // Invalid at the very end: left out as a whole.
    let mut bytes = text.into_bytes();
    bytes.push(0xc3);
    let path = corpus.write("broken.txt", &bytes);
    let good = corpus.write("good.txt", b"fine");
    let options = BuildOptions::new(vec![path, good], corpus.path("out/other"));
    let report = build(&options, trained(), &|_| {}).unwrap();
    assert_eq!((report.manifest.documents, report.skipped.not_utf8), (1, 1));
    assert_eq!(report.manifest.text_bytes, 4);
}

#[test]
fn json_lines() {
    let corpus = Corpus::new();
    let lines = "{\"id\": 1, \"text\": \"first \\u00e9\"}\n\n{\"text\": \"\"}\r\n{\"text\": \"second\"}";
    let path = corpus.write("a.jsonl", lines.as_bytes());
    let mut options = BuildOptions::new(vec![path], corpus.path("out/data"));
    options.append_end = false;
    let report = build(&options, trained(), &|_| {}).unwrap();
    assert_eq!((report.manifest.documents, report.skipped.empty), (2, 1));
    assert_eq!(report.manifest.end_of_document, None);
    let source = Source::open(&options.prefix).unwrap();
    let text = |i: usize| {
        let mut ids = vec![0; source.length(i)];
        source.read(i, 0, &mut ids).unwrap();
        trained().decode(&ids)
    };
    assert_eq!((text(0).as_str(), text(1).as_str()), ("first é", "second"));
}

#[test]
fn long_text_can_be_cut_into_documents() {
    let corpus = Corpus::new();
    let path = corpus.write("one.txt", sample_text(3000).as_bytes());
    let mut options = BuildOptions::new(vec![path.clone()], corpus.path("out/data"));
    options.document_bytes = Some(4096);
    let report = build(&options, trained(), &|_| {}).unwrap();
    let expected = fs::metadata(&path).unwrap().len() / 4096;
    let found = report.manifest.documents;
    assert!((expected / 2..=expected + 1).contains(&found), "{found} documents, about {expected} expected");
}

#[test]
fn a_tokenizer_learns_from_a_spread_sample() {
    let corpus = Corpus::new();
    let options = BuildOptions::new(vec![corpus.path("in/**/*.txt")], corpus.path("out/data"));
    let calls = AtomicUsize::new(0);
    let count = |_| {
        calls.fetch_add(1, Ordering::Relaxed);
    };
    let sampled = train_tokenizer(&options, 300, 20_000, &count).unwrap();
    assert_eq!(sampled.vocab_size(), 300);
    assert!(calls.load(Ordering::Relaxed) > 2);
    let again = train_tokenizer(&options, 300, 20_000, &|_| {}).unwrap();
    assert_eq!(sampled.hash().unwrap(), again.hash().unwrap());
    assert_ne!(
        sampled.hash().unwrap(),
        train_tokenizer(&options, 300, 1 << 30, &|_| {}).unwrap().hash().unwrap()
    );
}
