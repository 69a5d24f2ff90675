use std::fs::{self, OpenOptions};
use std::io::Write;

use super::*;
use crate::record::tests::step;

fn text(record: &Record) -> String {
    serde_json::to_string(record).expect("a record is plain data") + "\n"
}

/// What a look gives: steps, and how it ended.
fn look(tail: &mut Tail) -> (Vec<u64>, Look) {
    let mut steps = Vec::new();
    let ended = tail.look(u64::MAX, &mut |found| match found.line {
        Line::Record(Record::Step(crate::Step { step, .. })) => steps.push(step),
        other => panic!("{other:?}"),
    });
    (steps, ended.expect("a readable file"))
}

#[test]
fn what_is_being_written_is_read_once_it_is_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let mut tail = Tail::whole(path.clone());
    assert_eq!(look(&mut tail), (vec![], Look::Gone));
    let mut file = File::create(&path).expect("a file");
    assert_eq!(look(&mut tail), (vec![], Look::AtEnd));
    for i in 1..4 {
        let line = text(&step(i, 0.5));
        file.write_all(&line.as_bytes()[..30]).expect("write");
        assert_eq!(look(&mut tail), (vec![], Look::AtEnd));
        file.write_all(&line.as_bytes()[30..]).expect("write");
        assert_eq!(look(&mut tail), (vec![i], Look::AtEnd));
        assert_eq!(look(&mut tail), (vec![], Look::AtEnd));
    }
}

#[test]
fn a_torn_end_that_is_cut_off_and_written_over_is_no_damage() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let (first, second) = (text(&step(1, 0.5)), text(&step(2, 0.5)));
    fs::write(&path, format!("{first}{}", &second[..40])).expect("write");
    let mut tail = Tail::whole(path.clone());
    assert_eq!(look(&mut tail), (vec![1], Look::AtEnd));
    let file = OpenOptions::new().append(true).open(&path).expect("the file");
    file.set_len(first.len() as u64).expect("cut");
    (&file).write_all(text(&step(3, 0.5)).as_bytes()).expect("write");
    assert_eq!(look(&mut tail), (vec![3], Look::AtEnd));
}

#[test]
fn a_file_that_is_shorter_another_or_gone_begins_anew() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let write = |steps: &[u64]| {
        let lines: String = steps.iter().map(|s| text(&step(*s, 0.5))).collect();
        fs::write(&path, lines).expect("write");
    };
    write(&[1, 2, 3]);
    let mut tail = Tail::whole(path.clone());
    assert_eq!(look(&mut tail), (vec![1, 2, 3], Look::AtEnd));
    write(&[1]);
    assert_eq!(look(&mut tail), (vec![], Look::Restarted));
    assert_eq!(look(&mut tail), (vec![1], Look::AtEnd));
    fs::rename(&path, dir.path().join("old")).expect("move");
    write(&[7, 8]);
    assert_eq!(look(&mut tail), (vec![], Look::Restarted));
    assert_eq!(look(&mut tail), (vec![7, 8], Look::AtEnd));
    fs::remove_file(&path).expect("remove");
    assert_eq!(look(&mut tail), (vec![], Look::Restarted));
    assert_eq!(look(&mut tail), (vec![], Look::Gone));
}

#[test]
fn lines_longer_than_memory_allows_are_passed_over() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let long = format!(
        "{{\"kind\":\"spans\",\"rank\":0,\"step\":5,\"spans\":[{}]}}\n",
        " ".repeat(LINE_BYTES_MAX + BLOCK_BYTES)
    );
    let first = text(&step(1, 0.5));
    fs::write(&path, format!("{first}{long}{}", text(&step(2, 0.5)))).expect("write");
    let mut tail = Tail::whole(path);
    let mut found = Vec::new();
    tail.look(u64::MAX, &mut |f| found.push(f)).expect("a readable file");
    assert!(tail.block.capacity() <= LINE_BYTES_MAX + 2 * BLOCK_BYTES);
    assert_eq!(found.len(), 3);
    assert_eq!(found[1].line, Line::Spans { step: 5 });
    assert_eq!((found[1].offset, found[1].len), (first.len() as u64, long.len() as u64));
    assert_eq!(found[2].line, Line::Record(step(2, 0.5)));
}

#[test]
fn the_end_and_samples_of_a_long_file() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let lines: Vec<String> = (1..=5000).map(|s| text(&step(s, 0.5))).collect();
    fs::write(&path, lines.concat()).expect("write");
    let bytes: u64 = lines[4990..].iter().map(|l| l.len() as u64).sum();
    for (back, first) in [(bytes, 4991), (bytes - 1, 4992), (u64::MAX, 1)] {
        let (steps, _) = look(&mut Tail::end(path.clone(), back));
        assert_eq!((steps[0], steps[steps.len() - 1]), (first, 5000), "{back}");
    }
    let steps: Vec<u64> = sample(&path, 100)
        .expect("a readable file")
        .into_iter()
        .map(|r| match r {
            Record::Step(crate::Step { step, .. }) => step,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!((steps.len(), steps[0]), (100, 1));
    assert!(steps.windows(2).all(|w| (45..=55).contains(&(w[1] - w[0]))), "{steps:?}");
    // A short file is not given twice.
    fs::write(&path, lines[..3].concat()).expect("write");
    assert_eq!(sample(&path, 100).expect("a readable file")[..], [step(1, 0.5), step(3, 0.5)]);
}

#[test]
fn a_budget_bounds_a_look() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("j");
    let lines: String = (1..=5000).map(|s| text(&step(s, 0.5))).collect();
    fs::write(&path, &lines).expect("write");
    let mut tail = Tail::whole(path);
    let (mut steps, mut looks) = (0, 0);
    loop {
        looks += 1;
        let ended = tail.look(1, &mut |_| steps += 1).expect("a readable file");
        if ended == Look::AtEnd {
            break;
        }
        assert_eq!(ended, Look::More);
    }
    assert_eq!(steps, 5000);
    assert!(looks > 2, "{looks}");
    assert_eq!(tail.progress(), (lines.len() as u64, lines.len() as u64));
}
