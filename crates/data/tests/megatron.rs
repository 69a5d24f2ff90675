//! Orders and files equal to those that Megatron-LM's own code makes (`golden/megatron_order.py`).

use std::sync::Arc;

use data::{
    Blend, GptDataset, IndexedDataset, IndexedWriter, Mt19937, Source, Split, TokenStream, TokenType,
    blend_len, blend_parts, numpy_shuffle,
};
use serde_json::Value;

fn golden(section: &str) -> Vec<Value> {
    let text = include_str!("golden/megatron_order.json");
    let all: Value = serde_json::from_str(text).unwrap();
    match &all[section] {
        Value::Array(cases) => cases.clone(),
        other => vec![other.clone()],
    }
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect()
}

/// `sum((i + 1) * v[i]) mod (2^61 - 1)`, as the script has it.
fn checksum(values: impl IntoIterator<Item = u64>) -> u64 {
    const MODULUS: u128 = (1 << 61) - 1;
    let sum = values.into_iter().zip(1u128..).fold(0, |sum, (v, i)| (sum + i * u128::from(v)) % MODULUS);
    sum as u64
}

/// A dataset whose tokens count up from 0, modulo 65,536.
fn dataset_of(lengths: &[u64]) -> (tempfile::TempDir, Arc<Source>) {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("data");
    let mut writer = IndexedWriter::create(&prefix, TokenType::U16).unwrap();
    let mut next = 0;
    for &length in lengths {
        let tokens: Vec<u32> = (next..next + length).map(|t| (t % 65536) as u32).collect();
        writer.push(&tokens).unwrap();
        writer.end_document().unwrap();
        next += length;
    }
    writer.finish().unwrap();
    let source = Source::open(&prefix).unwrap();
    (dir, Arc::new(source))
}

#[test]
fn orders() {
    for case in golden("orders") {
        let lengths = numbers(&case["lengths"]);
        let (_dir, source) = dataset_of(&lengths);
        let split = case["first"].as_u64().unwrap() as usize..case["last"].as_u64().unwrap() as usize;
        let documents = split.len();
        let sequence = case["sequence"].as_u64().unwrap() as usize;
        let seed = case["seed"].as_u64().unwrap() as u32;
        let set = GptDataset::new(source, split, sequence, case["samples"].as_u64(), seed).unwrap();
        assert_eq!(set.len(), case["rows"].as_u64().unwrap());

        let entries = set.epochs() as usize * documents;
        let document: Vec<u64> = (0..entries).map(|i| u64::from(set.document_index(i))).collect();
        let sample: Vec<u64> = (0..=set.len())
            .flat_map(|i| {
                let (document, offset) = set.sample_index(i);
                [document, offset]
            })
            .collect();
        let shuffle: Vec<u64> = (0..set.len()).map(|i| set.shuffle_index(i)).collect();
        if !case["shuffle_index"].is_null() {
            assert_eq!(document, numbers(&case["document_index"]));
            let rows: Vec<u64> = case["sample_index"].as_array().unwrap().iter().flat_map(numbers).collect();
            assert_eq!(sample, rows);
            assert_eq!(shuffle, numbers(&case["shuffle_index"]));
        }
        let sums = [checksum(document.clone()), checksum(sample.clone()), checksum(shuffle.clone())];
        assert_eq!(sums.to_vec(), numbers(&case["checksums"]));

        // What is read follows from the indices: joined documents from the sample's row on.
        let starts: Vec<u64> = lengths.iter().scan(0, |s, l| Some(std::mem::replace(s, *s + l))).collect();
        let joined: Vec<u32> = document
            .iter()
            .flat_map(|&d| {
                (starts[d as usize]..starts[d as usize] + lengths[d as usize]).map(|t| (t % 65536) as u32)
            })
            .collect();
        let mut out = vec![0; sequence + 1];
        for i in (0..set.len()).step_by(1 + set.len() as usize / 200) {
            set.sample(i, &mut out).unwrap();
            let from = shuffle[i as usize] as usize * sequence;
            assert_eq!(out, joined[from..=from + sequence]);
        }
    }
}

/// Gives its own number and the sample's.
struct Part(u32);

impl TokenStream for Part {
    fn sample(&self, index: u64, out: &mut [u32]) -> spec::Result<()> {
        out.copy_from_slice(&[self.0, index as u32]);
        Ok(())
    }

    fn len(&self) -> u64 {
        u64::MAX
    }

    fn sequence(&self) -> usize {
        1
    }
}

#[test]
fn blends() {
    for case in golden("blends") {
        let weights: Vec<f64> =
            case["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).collect();
        let target = case["target"].as_u64().unwrap();
        assert_eq!(blend_parts(&weights, target), numbers(&case["parts"]));
        let size = blend_len(&weights, target);
        assert_eq!(size, case["size"].as_u64().unwrap());
        let part = |(i, &w): (usize, &f64)| (Box::new(Part(i as u32)) as Box<dyn TokenStream>, w);
        let blend = Blend::new(weights.iter().enumerate().map(part).collect(), size).unwrap();
        let entries: Vec<(u64, u64)> =
            (0..size).map(|i| blend.entry(i)).map(|(part, sample)| (part as u64, sample)).collect();
        let first: Vec<u64> = entries.iter().take(32).map(|e| e.0).collect();
        assert_eq!(first, numbers(&case["first_ids"]), "{weights:?}");
        let sums = [checksum(entries.iter().map(|e| e.0)), checksum(entries.iter().map(|e| e.1))];
        assert_eq!(sums.to_vec(), numbers(&case["checksums"]), "{weights:?}");
    }
}

#[test]
fn splits() {
    for case in golden("splits") {
        let text = case["split"].as_str().unwrap();
        let sequences = case["sequences"].as_u64().unwrap() as usize;
        let ranges = Split::parse(text).unwrap().ranges(sequences);
        for (range, expected) in ranges.iter().zip(case["ranges"].as_array().unwrap()) {
            let [start, end] = numbers(expected)[..] else { panic!("a range has two ends") };
            let is_empty = start == end;
            assert!(
                if is_empty { range.is_empty() } else { *range == (start as usize..end as usize) },
                "{text} of {sequences}: {range:?}, expected {start}..{end}"
            );
        }
    }
}

#[test]
fn shuffles() {
    for case in golden("shuffles") {
        let n = case["n"].as_u64().unwrap();
        let mut state = Mt19937::new(case["seed"].as_u64().unwrap() as u32);
        let sums: Vec<u64> = (0..2)
            .map(|_| {
                let mut items: Vec<u64> = (0..n).collect();
                numpy_shuffle(&mut state, &mut items);
                checksum(items)
            })
            .collect();
        assert_eq!(sums, numbers(&case["checksums"]));
    }
}

#[test]
fn files_have_megatrons_bytes() {
    let case = &golden("written")[0];
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("written");
    let mut writer = IndexedWriter::create(&prefix, TokenType::U16).unwrap();
    let documents: Vec<Vec<u64>> = case["documents"].as_array().unwrap().iter().map(numbers).collect();
    for document in &documents {
        let tokens: Vec<u32> = document.iter().map(|&t| t as u32).collect();
        writer.push(&tokens).unwrap();
        writer.end_document().unwrap();
    }
    writer.finish().unwrap();
    for (path, key) in [(data::bin_path(&prefix), "bin"), (data::idx_path(&prefix), "idx")] {
        let hex: String = std::fs::read(path).unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, case[key].as_str().unwrap(), "{key}");
    }
    let set = IndexedDataset::open(&prefix).unwrap();
    assert_eq!((set.documents(), set.tokens()), (4, 6));
    assert_eq!((0..4).map(|i| set.length(i)).collect::<Vec<_>>(), [3, 0, 1, 2]);
    let mut last = [0; 2];
    set.read(3, 0, &mut last).unwrap();
    assert_eq!(last, [7, 8]);
}
