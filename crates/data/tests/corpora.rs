//! The files that people have: told by their content, read as they are, or refused by name.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use data::{BuildOptions, BuildReport, Source, TextOptions, TextSource, Tokenizer, TokenizerChoice, build};
use spec::Error;

static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::train(["first and second, third or fourth"], 280, &|_| {}).unwrap());

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join("in").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn build(&self, input: &Path, text: TextOptions) -> Result<(Vec<String>, BuildReport), Error> {
        let mut options = BuildOptions::new(vec![input.to_owned()], self.0.path().join("out/data"));
        options.append_end = false;
        options.text = text;
        let report = build(&options, &TOKENIZER, &|_| {})?;
        let source = Source::open(&options.prefix)?;
        let document = |i: usize| {
            let mut ids = vec![0; source.length(i)];
            source.read(i, 0, &mut ids).unwrap();
            TOKENIZER.decode(&ids)
        };
        Ok(((0..source.sequences()).map(document).collect(), report))
    }
}

fn field(name: &str) -> TextOptions {
    TextOptions { field: Some(name.to_owned()), ..TextOptions::default() }
}

/// What the file becomes, named by itself.
fn check(name: &str, content: &[u8], expected: &[&str]) {
    let folder = Folder::new();
    let path = folder.write(name, content);
    let (documents, report) =
        folder.build(&path, TextOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(documents, expected, "{name}");
    assert_eq!(report.manifest.warnings, Vec::<String>::new());
}

fn refused(error: Result<(Vec<String>, BuildReport), Error>, what: &str, hint: &str) {
    let Err(error) = error else { panic!("no error") };
    assert!(error.to_string().contains(what), "{error}\nexpected: {what}");
    assert!(error.hint_text().is_some_and(|h| h.contains(hint)), "{error}: {:?}", error.hint_text());
    assert_eq!(error.exit_code(), 2, "{error}");
}

fn gz(text: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(text).unwrap();
    out.finish().unwrap()
}

fn zst(text: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
}

const LINES: &[u8] = b"{\"text\": \"first\"}\n{\"text\": \"second\"}\n";
const BOM: &[u8] = b"\xef\xbb\xbf";

#[test]
fn json_is_told_by_content() {
    for name in ["data.json", "a.JSONL", "a.jsonl", "a.NdJson", "data.txt", "part-00000"] {
        check(name, LINES, &["first", "second"]);
        check(name, &[BOM, LINES].concat(), &["first", "second"]);
        check(name, &LINES.repeat(2)[..LINES.len() + 17], &["first", "second", "first"]);
    }
    check(
        "data.json",
        b"[{\"text\": \"first\"},\n {\"text\": \"second\", \"id\": [1]}]\n",
        &["first", "second"],
    );
    check("data.json", b"[\"first\",\"second\"]", &["first", "second"]);
    check("data.json", b"{\n  \"text\": \"first\"\n}\n{\n  \"text\": \"second\"\n}\n", &["first", "second"]);
    // What is not made of documents is one; where it is named as JSON, that may be a wrong field.
    let folder = Folder::new();
    let package = b"{\n  \"name\": \"x\"\n}\n";
    let path = folder.write("package.json", package);
    let (documents, _) = folder.build(path.parent().unwrap(), TextOptions::default()).unwrap();
    assert_eq!(documents, [String::from_utf8_lossy(package)]);
    refused(
        folder.build(&path, TextOptions::default()),
        "package.json:1: no field \"text\", found name",
        "--field",
    );
    check("a.txt", b"[1] a list", &["[1] a list"]);
    check("a.txt", &[BOM, b"first"].concat(), &["first"]);
    // Larger than what the shape is told by.
    let long = "and or ".repeat(30_000);
    check(
        "data.json",
        format!("{{\"id\": 1, \"text\": \"{long}\"}}\n{{\"text\": \"b\"}}\n").as_bytes(),
        &[&long, "b"],
    );
    check("data.json", format!("[{{\"text\": \"{long}\"}}, {{\"text\": \"b\"}}]").as_bytes(), &[&long, "b"]);
}

#[test]
fn packed_text() {
    let long = b"first and second\n".repeat(400_000);
    for pack in [gz, zst] {
        let ending = if pack(b"")[0] == 0x1f { "gz" } else { "zst" };
        check(&format!("data.json.{ending}"), &pack(LINES), &["first", "second"]);
        check(&format!("a.txt.{ending}"), &pack(b"first"), &["first"]);
        check(
            &format!("a.jsonl.{ending}"),
            &[pack(LINES), pack(LINES)].concat(),
            &["first", "second", "first", "second"],
        );
        check(&format!("renamed-{ending}"), &pack(LINES), &["first", "second"]);
        check(&format!("long.{ending}"), &pack(&long), &[std::str::from_utf8(&long).unwrap()]);
        let folder = Folder::new();
        let whole = pack(LINES);
        let cut = folder.write(&format!("cut.jsonl.{ending}"), &whole[..whole.len() - 6]);
        assert!(folder.build(&cut, TextOptions::default()).is_err());
    }
    // A skippable frame in front, as some packers write.
    check(
        "a.jsonl.zst",
        &[b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec(), zst(LINES)].concat(),
        &["first", "second"],
    );
}

#[test]
fn other_formats_are_refused_by_name() {
    let folder = Folder::new();
    let check = |name: &str, content: &[u8], what: &str, hint: &str| {
        refused(folder.build(&folder.write(name, content), TextOptions::default()), what, hint);
    };
    check("a.parquet", b"PAR1xxxxPAR1", "a.parquet is a Parquet file", "to_json");
    check("a.xz", b"\xfd7zXZ\0xx", "compressed with xz", "unpack");
    check("a.zip", b"PK\x03\x04xxxx", "a zip archive", "unpack");
    fs::remove_dir_all(folder.0.path().join("in")).unwrap();
    folder.write("a.parquet", b"PAR1xxxxPAR1");
    let all = folder.0.path().join("in");
    refused(folder.build(&all, TextOptions::default()), "a.parquet is a Parquet file", "");
    folder.write("b.txt", b"first");
    let (documents, report) = folder.build(&all, TextOptions::default()).unwrap();
    assert_eq!((documents.as_slice(), report.skipped.unreadable), (&["first".to_owned()][..], 1));
}

#[test]
fn the_field_means_something_or_is_refused() {
    let folder = Folder::new();
    let lines = folder.write("a.json", b"{\"body\": \"first\"}\n{\"body\": \"second\"}\n");
    let (documents, _) = folder.build(&lines, field("body")).unwrap();
    assert_eq!(documents, ["first", "second"]);
    refused(
        folder.build(&lines, TextOptions::default()),
        "a.json:1: no field \"text\", found body",
        "--field",
    );
    let array = folder.write("b.json", b"[{\"body\": \"first\"}]");
    assert_eq!(folder.build(&array, field("body")).unwrap().0, ["first"]);
    refused(folder.build(&array, TextOptions::default()), "b.json:1: no field \"text\"", "--field");
    let text = folder.write("c.txt", b"first");
    refused(folder.build(&text, field("body")), "field \"body\" was asked for", "leave --field");
}

#[test]
fn bad_documents_are_named_or_skipped() {
    let folder = Folder::new();
    let skip = || TextOptions { skip_bad: true, ..TextOptions::default() };
    let check = |name: &str, content: &[u8], what: &str, expected: &[&str], bad: u64| {
        let path = folder.write(name, content);
        refused(folder.build(&path, TextOptions::default()), what, "--skip-bad");
        let (documents, report) = folder.build(&path, skip()).unwrap();
        assert_eq!(
            (documents.iter().map(String::as_str).collect::<Vec<_>>(), report.manifest.bad_documents),
            (expected.to_vec(), bad)
        );
        let warnings = report.manifest.warnings.join("\n");
        assert!(
            warnings.contains(&format!("left out {bad} bad documents")) && warnings.contains(what),
            "{warnings}"
        );
    };
    check(
        "a.jsonl",
        b"{\"text\": \"first\"}\n{\"text\": \n{\"text\": \"second\"}\n{}\n",
        "a.jsonl:2: not JSON",
        &["first", "second"],
        2,
    );
    check("b.jsonl", b"{\"text\": \"first\"}\n\xff\n", "b.jsonl:2: not JSON", &["first"], 1);
    check(
        "c.json",
        b"[{\"text\": \"first\"},\n{\"text\": 1},\n{\"text\": \"second\"}]",
        "c.json:2: field \"text\" is a number",
        &["first", "second"],
        1,
    );
    check(
        "d.json",
        b"[{\"text\": \"first\"},\n{\"text\": \"se",
        "d.json:2: the file ends inside a document",
        &["first"],
        1,
    );
    let nothing = folder.write("e.jsonl", b"{}\n");
    refused(folder.build(&nothing, skip()), "no text in the input", "JSON lines");
}

#[test]
fn what_a_folder_leaves_out_is_said_by_name() {
    let folder = Folder::new();
    for i in 0..7 {
        folder.write(&format!("latin{i}.txt"), b"caf\xe9");
    }
    folder.write("a.txt", b"first and second, third or fourth");
    let all = folder.0.path().join("in");
    let (_, report) = folder.build(&all, TextOptions::default()).unwrap();
    let warning = &report.manifest.warnings[0];
    assert!(warning.starts_with("left out 7 inputs not UTF-8: ") && warning.ends_with(", ..."), "{warning}");
    assert!(
        warning.contains("latin0.txt") && warning.contains("latin4.txt") && !warning.contains("latin5.txt")
    );

    // Prepared data says it as well, from the cache too.
    for cached in [false, true] {
        let cache = folder.0.path().join("cache");
        let source = TextSource::Paths(vec![all.clone()]);
        let train = TokenizerChoice::Train { vocab_size: 260 };
        let prepared = data::prepare(&cache, &source, &train, &|_| {}).unwrap();
        assert_eq!((prepared.cached, &prepared.manifest.warnings[0]), (cached, warning));
    }
}

#[test]
fn prepared_data_follows_the_options() {
    let folder = Folder::new();
    let path = folder.write("a.jsonl", b"{\"text\": \"first\", \"body\": \"second\"}\n{}\n");
    let prepare = |options: &TextOptions| {
        let source = TextSource::Paths(vec![path.clone()]);
        data::prepare_with(
            &folder.0.path().join("cache"),
            &source,
            &TokenizerChoice::Train { vocab_size: 260 },
            options,
            &|_| {},
        )
    };
    let error = prepare(&TextOptions::default()).unwrap_err();
    assert!(error.to_string().contains("a.jsonl:2: no field \"text\""), "{error}");
    let text = TextOptions { skip_bad: true, ..TextOptions::default() };
    let body = TextOptions { field: Some("body".into()), ..text.clone() };
    let (a, b) = (prepare(&text).unwrap(), prepare(&body).unwrap());
    assert_eq!((a.documents, b.documents, a.manifest.bad_documents), (1, 1, 1));
    assert!(a.prefix != b.prefix && prepare(&body).unwrap().cached);
    let end = prepare(&TextOptions { end: Some("<none>".into()), ..text }).unwrap_err();
    assert!(end.to_string().contains("no token \"<none>\""), "{end}");
}
