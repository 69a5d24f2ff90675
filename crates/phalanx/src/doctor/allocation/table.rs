//! The findings of all nodes as one table: what nodes have alike is said once.

use std::fmt::Write as _;

use super::{Card, Finding};
use crate::doctor::Verdict;

/// Nodes that are named one by one.
const NAMED: usize = 8;

/// A check over all nodes: who found what, in the order of nodes.
struct Row<'a> {
    name: &'a str,
    found: Vec<(&'a Finding, Vec<&'a str>)>,
    nodes: usize,
}

pub(super) fn text(cards: &[Card]) -> String {
    let mut out = String::new();
    let ranks: usize = cards.iter().map(|c| c.ranks).sum();
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{} nodes, {ranks} ranks: {}", cards.len(), names(cards.iter().map(|c| &*c.node)));
    for row in rows(cards) {
        row.write(&mut out);
    }
    let all = || cards.iter().flat_map(|c| &c.checks);
    let count = |v| all().filter(|c| c.verdict == v).count();
    let (ok, warn, bad) = (count(Verdict::Ok), count(Verdict::Warn), count(Verdict::Bad));
    let _ = writeln!(out, "{} checks: {ok} ok, {warn} to look at, {bad} bad", all().count());
    out
}

/// Checks in the order in which they are first met; findings that are alike together.
fn rows(cards: &[Card]) -> Vec<Row<'_>> {
    let mut rows: Vec<Row<'_>> = Vec::new();
    for card in cards {
        for check in &card.checks {
            let at = rows.iter().position(|r| r.name == check.name).unwrap_or_else(|| {
                rows.push(Row { name: &check.name, found: Vec::new(), nodes: 0 });
                rows.len() - 1
            });
            let row = &mut rows[at];
            row.nodes += 1;
            match row.found.iter_mut().find(|(other, _)| *other == check) {
                Some((_, nodes)) => nodes.push(&card.node),
                None => row.found.push((check, vec![&card.node])),
            }
        }
    }
    rows
}

impl Row<'_> {
    fn write(mut self, out: &mut String) {
        self.found.sort_by_key(|(check, _)| std::cmp::Reverse(check.verdict));
        let nodes = self.nodes;
        for (check, on) in &self.found {
            let on = if on.len() == nodes { format!("all {nodes}") } else { names(on.iter().copied()) };
            let _ = writeln!(out, "{:<4} {:<16} {}  [{on}]", check.verdict.name(), self.name, check.found);
            if check.verdict > Verdict::Ok {
                let _ = writeln!(out, "     {:<16} why: {}", "", check.why);
                let _ = writeln!(out, "     {:<16} do:  {}", "", check.hint);
            }
        }
    }
}

fn names<'a>(nodes: impl Iterator<Item = &'a str>) -> String {
    let all: Vec<&str> = nodes.collect();
    let more = all.len().saturating_sub(NAMED);
    let shown = all[..all.len() - more].join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(name: &str, verdict: Verdict, found: &str) -> Finding {
        let hint = if verdict > Verdict::Ok { "mend it" } else { "" };
        Finding {
            name: name.into(),
            verdict,
            found: found.into(),
            why: "it matters".into(),
            hint: hint.into(),
        }
    }

    #[test]
    fn nodes_that_are_alike_share_a_line() {
        let card = |node: &str, files: &str, verdict| Card {
            node: node.into(),
            ranks: 2,
            checks: vec![finding("open files", verdict, files), finding("clock", Verdict::Ok, "tsc")],
            link: None,
        };
        let cards = [
            card("n1", "4096", Verdict::Ok),
            card("n2", "64", Verdict::Warn),
            card("n3", "4096", Verdict::Ok),
        ];
        assert_eq!(
            text(&cards),
            "3 nodes, 6 ranks: n1, n2, n3\n\
             warn open files       64  [n2]\n                      why: it matters\n                      do:  mend it\n\
             ok   open files       4096  [n1, n3]\n\
             ok   clock            tsc  [all 3]\n\
             6 checks: 5 ok, 1 to look at, 0 bad\n"
        );
    }

    #[test]
    fn many_nodes_are_counted() {
        let all: Vec<String> = (0..11).map(|i| format!("n{i}")).collect();
        assert_eq!(names(all.iter().map(String::as_str)), "n0, n1, n2, n3, n4, n5, n6, n7 and 3 more");
    }
}
