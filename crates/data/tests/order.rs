//! The trainer's order: complete, without repetition, and independent of who reads it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use data::{
    Batches, Epochs, GptDataset, IndexedWriter, Order, Source, Split, StreamOptions, TokenStream, TokenType,
    open_streams,
};
use proptest::prelude::*;

/// Documents whose tokens count up, so that a token tells where it lies.
fn write(prefix: &Path, lengths: &[usize]) {
    let mut writer = IndexedWriter::create(prefix, TokenType::I32).unwrap();
    let mut next = 0;
    for &length in lengths {
        writer.push(&(next..next + length as u32).collect::<Vec<_>>()).unwrap();
        writer.end_document().unwrap();
        next += length as u32;
    }
    writer.finish().unwrap();
}

fn source(lengths: &[usize]) -> (tempfile::TempDir, Arc<Source>) {
    let dir = tempfile::tempdir().unwrap();
    write(&dir.path().join("data"), lengths);
    let source = Source::open(&dir.path().join("data")).unwrap();
    (dir, Arc::new(source))
}

fn samples(stream: &impl TokenStream, range: std::ops::Range<u64>) -> Vec<Vec<u32>> {
    range
        .map(|i| {
            let mut out = vec![0; stream.sequence() + 1];
            stream.sample(i, &mut out).unwrap();
            out
        })
        .collect()
}

#[test]
fn an_epoch_uses_each_token_once() {
    let lengths: Vec<usize> = (0..200).map(|i| i * 37 % 50).collect();
    let (_dir, source) = source(&lengths);
    let tokens: usize = lengths.iter().sum();
    let set = GptDataset::new(source, 0..200, 16, None, 5).unwrap();
    assert_eq!(set.len(), ((tokens - 1) / 16) as u64);
    let mut seen = HashMap::new();
    for sample in samples(&set, 0..set.len()) {
        for token in &sample[..16] {
            *seen.entry(*token).or_insert(0) += 1;
        }
    }
    assert!(seen.values().all(|&n| n == 1));
    assert_eq!(seen.len(), set.len() as usize * 16);
}

#[test]
fn longer_runs_start_with_the_same_samples() {
    let (_dir, source) = source(&[40, 7, 90, 33]);
    let endless = Epochs::new(source.clone(), 0..4, 8, 3, None).unwrap();
    let one = GptDataset::new(source.clone(), 0..4, 8, None, 3).unwrap();
    let per_epoch = endless.samples_per_epoch();
    assert_eq!(per_epoch, one.len());
    assert_eq!(samples(&endless, 0..per_epoch), samples(&one, 0..per_epoch));
    // Epoch 5 is the one-epoch order under seed 3 + 5, however one gets there.
    let fifth = GptDataset::new(source, 0..4, 8, None, 8).unwrap();
    assert_eq!(samples(&endless, 5 * per_epoch..6 * per_epoch), samples(&fifth, 0..per_epoch));
    // Back again, and across the border between two epochs.
    assert_eq!(samples(&endless, 0..1), samples(&one, 0..1));
    assert_eq!(samples(&endless, per_epoch - 1..per_epoch), samples(&one, per_epoch - 1..per_epoch));
    assert_eq!(endless.len(), u64::MAX);
}

#[test]
fn threads_read_what_one_reads() {
    let (_dir, source) = source(&[100, 200, 300]);
    let stream = Epochs::new(source, 0..3, 10, 1, None).unwrap();
    let expected = samples(&stream, 0..400);
    std::thread::scope(|scope| {
        for start in 0..4u64 {
            let (stream, expected) = (&stream, &expected);
            scope.spawn(move || {
                let mut out = [0; 11];
                for i in (start..400).step_by(4) {
                    stream.sample(i, &mut out).unwrap();
                    assert_eq!(out[..], expected[i as usize]);
                }
            });
        }
    });
}

fn options(parts: &[(PathBuf, f64)], order: Order, train_samples: u64) -> StreamOptions {
    StreamOptions {
        parts: parts.to_vec(),
        split: Split::parse("90,10,0").unwrap(),
        sequence: 8,
        seed: 1,
        vocab: Some(100_000),
        train_samples,
        valid_samples: 12,
        order,
    }
}

#[test]
fn streams_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let parts = [(dir.path().join("a"), 1.0), (dir.path().join("b"), 3.0)];
    write(&parts[0].0, &[50; 20]);
    write(&parts[1].0, &[33; 40]);
    for order in [Order::Endless, Order::Megatron] {
        let one = open_streams(&options(&parts[..1], order, 30)).unwrap();
        assert!(one.train.len() >= 30);
        assert_eq!((one.train_tokens, one.valid_tokens), (900, 100));
        assert_eq!(one.valid.unwrap().len(), 12);
        let both = open_streams(&options(&parts, order, 1000)).unwrap();
        assert_eq!(both.train.len(), 1000);
        assert_eq!(both.valid.unwrap().len(), 12);
        assert_ne!(both.fingerprint, one.fingerprint);
    }
    // A prolonged blend starts with the same samples when its parts have no end.
    let stream = |samples| Arc::new(open_streams(&options(&parts, Order::Endless, samples)).unwrap().train);
    let (short, long) = (stream(40), stream(4000));
    let mut out = [[0; 9]; 2];
    for i in 0..40 {
        short.sample(i, &mut out[0]).unwrap();
        long.sample(i, &mut out[1]).unwrap();
        assert_eq!(out[0], out[1]);
    }
    // Too few documents for a held-out share is told, not refused.
    write(&dir.path().join("c"), &[500]);
    let lone = open_streams(&options(&[(dir.path().join("c"), 1.0)], Order::Endless, 10)).unwrap();
    assert!(lone.valid.is_none());
    assert!(lone.valid_missing.unwrap().contains("is empty"));
}

#[test]
fn the_fingerprint_names_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let print = |name: &str, lengths: &[usize]| {
        write(&dir.path().join(name), lengths);
        Source::open(&dir.path().join(name)).unwrap().fingerprint().unwrap()
    };
    let a = print("a", &[5, 6]);
    assert_eq!(a, print("b", &[5, 6]));
    assert_ne!(a, print("c", &[6, 5]));
    assert_ne!(a, print("d", &[5, 7]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the ranks and micro-batches, a step's sequences are the same set in the same places.
    #[test]
    fn steps_do_not_depend_on_ranks(
        lengths in proptest::collection::vec(0usize..60, 1..30),
        sequence in 1usize..20,
        seed: u32,
        per_rank in 1u64..4,
    ) {
        prop_assume!(lengths.iter().sum::<usize>() > sequence);
        let (_dir, source) = source(&lengths);
        let stream = Epochs::new(source, 0..lengths.len(), sequence, seed, None).unwrap();
        let global = 12 * per_rank;
        let batches = Batches::new(stream, global).unwrap();
        let step = 3;
        let whole = samples(batches.stream(), step * global..(step + 1) * global);
        for ranks in [1, 2, 3, 4, 6, 12] {
            let share = global / ranks;
            for sequence_at in 0..global {
                let (rank, within) = (sequence_at / share, sequence_at % share);
                let mut out = vec![0; sequence + 1];
                batches.read(step, rank * share + within, &mut out).unwrap();
                prop_assert_eq!(&out, &whole[sequence_at as usize]);
            }
        }
    }

    /// The stored rows and the walk between them equal Megatron's loop over all samples.
    #[test]
    fn rows_equal_the_plain_loop(
        lengths in proptest::collection::vec(0usize..40, 1..60),
        sequence in 1usize..50,
        samples in 1u64..100,
        seed: u32,
    ) {
        prop_assume!(lengths.iter().sum::<usize>() > sequence);
        let (_dir, source) = source(&lengths);
        let set = GptDataset::new(source, 0..lengths.len(), sequence, Some(samples), seed).unwrap();
        prop_assert!(set.len() >= samples);
        let length = |position: usize| lengths[set.document_index(position) as usize] as i64;
        let (mut position, mut offset) = (0usize, 0i64);
        prop_assert_eq!(set.sample_index(0), (0, 0));
        for row in 1..=set.len() {
            let mut remaining = sequence as i64 + 1;
            while remaining > 0 {
                let left = length(position) - offset;
                remaining -= left;
                if remaining <= 0 {
                    offset += remaining + left - 1;
                } else {
                    position += 1;
                    offset = 0;
                }
            }
            prop_assert_eq!(set.sample_index(row), (position as u64, offset as u64));
        }
    }
}
