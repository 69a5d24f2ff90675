use std::fs;

use super::*;
use crate::{Checkpoint, Piece, diff, verify};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/dcp").join(name)
}

/// Imports a golden checkpoint and compares it with the numbers that its maker counted into it.
fn check(name: &str, format: Format, step: u64, expected: &[(&str, Kind, &[usize])]) -> Imported {
    let dir = tempfile::tempdir().unwrap();
    let done = import(&golden(name), dir.path(), None).unwrap();
    assert_eq!((done.format, done.tensors, done.whole), (format, expected.len(), false));
    verify(&done.path).unwrap();
    let found = Checkpoint::open(&done.path).unwrap();
    assert_eq!(found.step(), step);
    for (name, kind, shape) in expected {
        assert_eq!(found.tensor(name, *kind).unwrap().shape, *shape, "{name}");
        let scale = match kind {
            Kind::Param => 1.0,
            Kind::ExpAvg => 0.5,
            Kind::ExpAvgSq => 0.25,
            Kind::Ema => unreachable!("PyTorch's own states have none"),
        };
        let n = shape.iter().product();
        let mut all = vec![0.0; n];
        found.read_regions(name, *kind, &[Region::range(0, n)], &mut all).unwrap();
        let right: Vec<f32> = match *name {
            "turned" => (0..12).map(|i| (i % 3 * 4 + i / 3) as f32).collect(),
            "part_of_a_storage" => vec![13.0, 14.0, 19.0, 20.0],
            "scalar" => vec![2.5],
            _ => (0..n).map(|i| i as f32 * scale).collect(),
        };
        assert_eq!(all, right, "{name}");
    }
    done
}

const STATE: [(&str, &[usize]); 4] =
    [("embed.weight", &[7, 4]), ("layers.0.w", &[6, 5]), ("layers.0.b", &[5]), ("stack", &[3, 2, 4])];

fn state() -> Vec<(&'static str, Kind, &'static [usize])> {
    let kinds = [Kind::Param, Kind::ExpAvg, Kind::ExpAvgSq];
    STATE.iter().flat_map(|(name, shape)| kinds.map(|kind| (*name, kind, *shape))).collect()
}

#[test]
fn what_one_process_of_pytorch_saved_is_read() {
    let mut expected = state();
    let more: [(&str, &[usize]); 5] = [
        ("turned", &[4, 3]),
        ("half", &[5]),
        ("part_of_a_storage", &[2, 2]),
        ("scalar", &[]),
        ("none", &[0, 3]),
    ];
    expected.extend(more.map(|(name, shape)| (name, Kind::Param, shape)));
    let done = check("single", Format::Dcp, 0, &expected);
    assert_eq!(done.notes.len(), 1, "{:?}", done.notes);
    for left in ["ids", "lr", "note.a"] {
        assert!(done.notes[0].contains(left), "{:?}", done.notes);
    }
}

#[test]
fn what_four_processes_of_pytorch_saved_is_read() {
    assert_eq!(check("sharded", Format::Dcp, 0, &state()).notes, [""; 0]);
}

#[test]
fn a_container_of_megatron_is_read() {
    let expected: [(&str, Kind, &[usize]); 3] = [
        ("decoder.layers.mlp.linear_fc1.weight", Kind::Param, &[2, 4, 3]),
        ("embedding.word_embeddings.weight", Kind::Param, &[6, 3]),
        ("embedding.word_embeddings.weight", Kind::ExpAvg, &[6, 3]),
    ];
    check("megatron", Format::Megatron, 500, &expected);
    check("megatron/iter_0000500", Format::Megatron, 500, &expected);
}

/// A checkpoint of two ranks with all kinds.
fn checkpoint(dir: &Path) -> PathBuf {
    let mut records = Vec::new();
    for rank in 0..2 {
        let data: Vec<f32> = (0..12).map(|i| (i + 100 * rank) as f32 / 3.0).collect();
        let pieces = Kind::ALL.into_iter().flat_map(|kind| {
            let columns = vec![Region::rect(0, 4, 3 * rank, 3)];
            let range = vec![Region::range(12 * rank, 12)];
            let piece = |name, global_shape, boxes| Piece { name, kind, global_shape, boxes, data: &data };
            [piece("layers.0.attn.q.weight", &[4, 6][..], columns), piece("norm", &[24], range)]
        });
        let record = Saver::begin(dir, 7).unwrap().write_rank(rank, pieces.collect::<Vec<_>>()).unwrap();
        records.push(record);
    }
    let state = serde_json::json!({ "next_sample": 12, "x": 0.1 });
    Saver::commit(dir, 7, records, Meta { tokens: 9, fingerprint: "f".into(), world: 2, state }).unwrap()
}

#[test]
fn an_export_comes_back_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let from = Checkpoint::open(&checkpoint(&dir.path().join("a"))).unwrap();
    let out = dir.path().join("dcp");
    assert_eq!(export_dcp(&from, &out).unwrap().tensors, 8 + 2 + 1);
    let done = import(&out, &dir.path().join("b"), Some(Format::Dcp)).unwrap();
    assert!(done.whole && done.notes.is_empty(), "{:?}", done.notes);
    assert!(done.path.ends_with("step-00000007"));
    assert!(diff(from.path(), &done.path).unwrap().bit_equal());
    let expected = Meta { world: 1, ..from.manifest().meta.clone() };
    assert_eq!(Checkpoint::open(&done.path).unwrap().manifest().meta, expected);

    let again = export_dcp(&from, &out).unwrap_err();
    assert!(again.to_string().contains("not empty"), "{again}");
    let again = import(&out, &dir.path().join("b"), None).unwrap_err();
    assert!(again.to_string().contains("is there already"), "{again}");
}

/// Weights of llm.c with 2 layers and 16 channels, elements counted from 0.
pub(super) fn llmc(version: i32) -> Vec<u8> {
    let header = [20_240_326, version, 8, 5, 2, 4, 16, 8];
    let mut file: Vec<u8> = header.iter().flat_map(|n: &i32| n.to_le_bytes()).collect();
    file.resize(1024, 0);
    let elements = (8 + 8) * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16;
    for i in 0..elements {
        match version {
            3 => file.extend((i as f32).to_le_bytes()),
            _ => file.extend(half::bf16::from_f32(i as f32).to_le_bytes()),
        }
    }
    file
}

#[test]
fn weights_of_llmc_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for version in [3, 5] {
        let path = dir.path().join(format!("model_{version}.bin"));
        fs::write(&path, llmc(version)).unwrap();
        let done = import(&path, &dir.path().join(version.to_string()), None).unwrap();
        assert_eq!((done.format, done.tensors), (Format::LlmC, 2 + 2 * 16 + 2));
        let found = Checkpoint::open(&done.path).unwrap();
        // Embeddings with padding, then each kind of all layers.
        let (embeddings, norms, qkv) = (16 * 16, 2 * 2 * 16, 3 * 16 * 16);
        for (name, shape, first) in [
            ("embed.weight", vec![5, 16], 0),
            ("pos_embed.weight", vec![8, 16], 8 * 16),
            ("layers.1.attn_norm.weight", vec![16], embeddings + 16),
            ("layers.0.attn_norm.bias", vec![16], embeddings + 2 * 16),
            ("layers.0.attn.k.weight", vec![16, 16], embeddings + norms + 16 * 16),
            ("layers.1.attn.v.weight", vec![16, 16], embeddings + norms + qkv + 2 * 16 * 16),
            ("final_norm.bias", vec![16], 16 * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 16),
        ] {
            let mut one = [0.0];
            assert_eq!(found.tensor(name, Kind::Param).unwrap().shape, shape, "{name}");
            found.read_regions(name, Kind::Param, &[Region::range(0, 1)], &mut one).unwrap();
            let exact = first as f32;
            let expected = if version == 3 { exact } else { half::bf16::from_f32(exact).to_f32() };
            assert_eq!(one[0], expected, "{name} of version {version}");
        }
    }
}

#[track_caller]
fn check_refused(from: &Path, format: Option<Format>, what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let error = import(from, dir.path(), format).expect_err("refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    assert!(error.to_string().contains(what), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn what_is_damaged_or_hostile_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path();
    let metadata = fs::read(golden("single/.metadata")).unwrap();
    let data = fs::read(golden("single/__0_0.distcp")).unwrap();
    let check = |metadata: &[u8], data: &[u8], what: &str| {
        fs::write(bad.join(".metadata"), metadata).unwrap();
        fs::write(bad.join("__0_0.distcp"), data).unwrap();
        check_refused(bad, None, what);
    };
    check(
        b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R.",
        &data,
        "opcode 0x63 at byte 2: the name system of os is not on",
    );
    check(
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        &data,
        "opcode 0x93 at byte 18: the name eval of builtins",
    );
    check(b"\x80\x02]\x81.", &data, "opcode 0x81 at byte 3");
    check(b"(S'ls'\nios\nsystem\n.", &data, "opcode 0x53 at byte 1: this opcode is not read");
    check(b"\x80\x09.", &data, "protocol 9");
    // Containers that cost more than they take: refused before they fill the memory.
    let lists =
        [&b"\x80\x02]"[..], &[&b"("[..], &b"]".repeat(1000), b"e"].concat().repeat(100), b"."].concat();
    check(&lists, &data, "more objects than such a file has");
    check(&[&b"\x80\x02"[..], &b"]".repeat(10_000)].concat(), &data, "more than 8192 values wait");
    check(&[&b"\x80\x02"[..], &b"(".repeat(10_000)].concat(), &data, "more than 8192 marks");
    check(b"\x80\x04N.", &data, "it is no metadata of a checkpoint");
    check(&metadata[..metadata.len() - 2], &data, "cut short");
    check(&metadata, &data[..data.len() - 1], "is cut short");
    let swap = |from: &[u8], to: &[u8]| {
        let at = metadata.windows(from.len()).position(|w| w == from).unwrap();
        [&metadata[..at], to, &metadata[at + from.len()..]].concat()
    };
    check(&swap(b"__0_0.distcp", b"../../etc/pw"), &data, "a file \"../../etc/pw\", expected a plain name");
    check(&swap(b"__0_0.distcp", b"__1_0.distcp"), &data, "__1_0.distcp");
    let numbers: Vec<u8> = [1.0f32, 2.0, 3.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    for (found, what) in [
        (&numbers[..], "archive/data/0 is damaged: checksum"),
        (b"_rebuild_tensor_v2", "archive/data.pkl is damaged: checksum"),
        (b"PK\x01\x02", "the directory of its archive is damaged"),
        (b"PK\x05\x06", "does not end as an archive"),
    ] {
        let mut wrong = data.clone();
        let all = (0..data.len()).filter(|i| data[*i..].starts_with(found));
        all.for_each(|at| wrong[at + 2] ^= 0x10);
        check(&metadata, &wrong, what);
    }
    check_refused(&golden("single"), Some(Format::Megatron), "is of format dcp, not megatron");
    check_refused(&golden(""), None, "holds no .metadata");
    check_refused(&golden("single/__0_0.distcp"), None, "is of no format that is read");

    let path = bad.join("model.bin");
    for (at, value, what) in [
        (4, 4, "version 4"),
        (16, 3, "its header says"),
        (16, -1, "layers -1"),
        (28, 4, "no model is like that"),
    ] {
        let mut file = llmc(3);
        file[at..at + 4].copy_from_slice(&i32::to_le_bytes(value));
        fs::write(&path, file).unwrap();
        check_refused(&path, None, what);
    }
}
