//! One line of a journal as a view reads it: fast for steps, and never an error for what a newer version wrote.

use serde::Deserialize;

use crate::record::{Record, Step};

/// What a line is.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// A record other than the two below.
    Record(Record),
    /// A rank's ops of a step: long, and parsed only when they are looked at.
    Spans {
        /// The step.
        step: u64,
    },
    /// Which samples were drawn: the ledger's business.
    Drawn,
    /// A kind that this version does not know.
    Unknown(String),
    /// No record, and why.
    Damaged(String),
}

/// Parses a line, with or without its newline.
///
/// ```
/// use journal::line::{Line, parse};
/// assert_eq!(parse(br#"{"kind":"dance","tune":3}"#), Line::Unknown("dance".into()));
/// assert!(matches!(parse(b"{"), Line::Damaged(_)));
/// ```
pub fn parse(line: &[u8]) -> Line {
    // Writers put the kind first; a line in another order takes the longer way below. Without the tag serde fills fields
    // as they come instead of collecting them first.
    if line.starts_with(STEP) {
        return match serde_json::from_slice::<Step>(line) {
            Ok(step) => Line::Record(Record::Step(step)),
            Err(e) => Line::Damaged(e.to_string()),
        };
    }
    if line.starts_with(SPANS) {
        return spans_step(line)
            .map_or_else(|| Line::Damaged("spans of no step".to_owned()), |step| Line::Spans { step });
    }
    if line.starts_with(DRAWN) {
        return Line::Drawn;
    }
    match serde_json::from_slice::<Record>(line) {
        Ok(Record::Spans { step, .. }) => Line::Spans { step },
        Ok(Record::Drawn { .. }) => Line::Drawn,
        Ok(record) => Line::Record(record.current()),
        Err(e) => match serde_json::from_slice::<Kind>(line) {
            Ok(Kind { kind }) if !KINDS.contains(&kind.as_str()) => Line::Unknown(kind),
            _ => Line::Damaged(e.to_string()),
        },
    }
}

const STEP: &[u8] = br#"{"kind":"step","#;
pub(crate) const SPANS: &[u8] = br#"{"kind":"spans","#;
const DRAWN: &[u8] = br#"{"kind":"drawn","#;

/// All kinds of [`Record`], which a test holds to it.
const KINDS: [&str; 16] = [
    "run_started",
    "step",
    "drawn",
    "eval",
    "sample",
    "checkpoint",
    "resumed",
    "recovered",
    "accepted",
    "spans",
    "trouble",
    "verified",
    "straggler",
    "warning",
    "finished",
    "failed",
];

#[derive(Deserialize)]
struct Kind {
    kind: String,
}

/// The step in the head of a line of spans, `{"kind":"spans","rank":1,"step":2,`.
pub(crate) fn spans_step(head: &[u8]) -> Option<u64> {
    const KEY: &[u8] = b"\"step\":";
    let head = &head[..head.len().min(96)];
    let at = head.windows(KEY.len()).position(|w| w == KEY)? + KEY.len();
    let digits = head[at..].iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&head[at..at + digits]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::step;

    fn line(record: &Record) -> Vec<u8> {
        serde_json::to_vec(record).expect("a record is plain data")
    }

    #[test]
    fn the_fast_way_reads_what_the_long_one_reads() {
        let Record::Step(_) = step(1, 0.5) else { unreachable!() };
        for mut record in [step(1, 0.5), step(2, f64::INFINITY), step(u64::MAX, -0.0)] {
            for waits in [BTreeMap::new(), BTreeMap::from([("tp".to_owned(), 0.25)])] {
                if let Record::Step(Step { waits_s, exposed_comm_s, mfu, expert_counts, .. }) = &mut record {
                    *expert_counts = (!waits.is_empty()).then(|| vec![vec![3, 0]]);
                    *waits_s = waits;
                    *exposed_comm_s = Some(0.5);
                    *mfu = None;
                }
                assert_eq!(parse(&line(&record)), Line::Record(record.clone()));
                let long = serde_json::from_slice::<Record>(&line(&record)).expect("a record");
                assert_eq!(long, record);
            }
        }
        let other_order = br#"{"step":1,"kind":"eval","time_us":3,"loss":1.5,"tokens":4}"#;
        let eval = Record::Eval { time_us: 3, step: 1, loss: 1.5, average_loss: None, tokens: 4 };
        assert_eq!(parse(other_order), Line::Record(eval));
    }

    #[test]
    fn long_and_new_lines_are_known_for_what_they_are() {
        let spans = Record::Spans { rank: 7, step: 12, spans: Vec::new() };
        assert_eq!(parse(&line(&spans)), Line::Spans { step: 12 });
        let drawn =
            Record::Drawn { begun_us: Some(5), session: 1, step: 12, samples: vec![(0, 4)], tokens_xxh3: 1 };
        assert_eq!(parse(&line(&drawn)), Line::Drawn);
        assert_eq!(parse(br#"{"kind":"shrunk","to":3}"#), Line::Unknown("shrunk".into()));
        for damaged in
            ["", "{", "null", r#"{"kind":"step","step":1}"#, r#"{"kind":"spans","#, r#"{"kind":"eval"}"#]
        {
            assert!(matches!(parse(damaged.as_bytes()), Line::Damaged(_)), "{damaged}");
        }
    }

    #[test]
    fn every_kind_is_listed() {
        // serde names all that it knows.
        let error = serde_json::from_str::<Record>(r#"{"kind":"?"}"#).expect_err("no such kind").to_string();
        let named: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
        assert_eq!(named, KINDS, "{error}");
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes: Vec<u8>, cut in 0usize..200) {
            parse(&bytes);
            let whole = line(&step(3, 1.0));
            let cut = &whole[..cut.min(whole.len())];
            prop_assert!(cut.len() == whole.len() || matches!(parse(cut), Line::Damaged(_)));
        }
    }
}
