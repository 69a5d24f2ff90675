//! `phalanx doctor` as the ranks of an allocation: every node is looked at, and what lies between them, in one table.
//!
//! One rank of each node looks at its machine. Then nodes set their clocks against the first one's, and each sends to the
//! next: all nodes in a ring, neighbours in turns, so that a slow link shows at both of its ends. Rank 0 gathers and prints.

mod between;
mod table;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;
use spec::{Context, Error, Result};

use super::{Check, Verdict};
use crate::args::Doctor;
use crate::output;
use crate::ranks::{MEET_TIMEOUT, Rank};

use between::Link;

/// A rank, and where it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    /// The node's number by the launcher, and what identifies its machine: ranks with both alike are neighbours.
    node: usize,
    host: String,
    /// What people call it.
    name: String,
}

/// A check as it was written down on another node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Finding {
    name: String,
    verdict: Verdict,
    found: String,
    why: String,
    #[serde(rename = "do", default, skip_serializing_if = "String::is_empty")]
    hint: String,
}

impl From<Check> for Finding {
    fn from(c: Check) -> Finding {
        Finding { name: c.name.into(), verdict: c.verdict, found: c.found, why: c.why.into(), hint: c.hint }
    }
}

/// What one node found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Card {
    node: String,
    ranks: usize,
    checks: Vec<Finding>,
    link: Option<Link>,
}

/// Looks at all nodes of the job that this process is a rank of; the exit code is that of the worst finding, on rank 0.
pub(super) fn run(args: &Doctor, rank: Rank) -> Result<u8> {
    let expected = args.cluster.as_ref().map(|name| expected(name, args)).transpose()?;
    let places = places(&rank)?;
    let nodes = nodes(&places);
    let me = rank.env.rank;
    let own = nodes.iter().position(|ranks| ranks[0] == me);
    let identity = format!("doctor {} {}", args.transport, args.cluster.as_deref().unwrap_or_default());
    // Before the ranks meet: no deadline of theirs runs while disks are measured.
    let mut checks: Vec<Finding> = own.map_or_else(Vec::new, |_| local(args));
    let world = rank.world(&identity, crate::train::choice(&args.transport), MEET_TIMEOUT)?;
    let leaders: Vec<usize> = nodes.iter().map(|ranks| ranks[0]).collect();
    world.barrier()?;
    let link = between::measure(&world, &leaders, &mut checks)?;
    if let Some(own) = own {
        let link = link.map(|l| Link { to: places[leaders[(own + 1) % leaders.len()]].name.clone(), ..l });
        let card = Card { node: places[me].name.clone(), ranks: nodes[own].len(), checks, link };
        set(&rank, &card_key(&rank, me), &card)?;
    }
    world.barrier()?;
    drop(world);
    let code = if me == 0 { report(args, &rank, &leaders, expected)? } else { 0 };
    rank.leave()?;
    Ok(code)
}

/// Bytes per second that one connection of a node can have at best.
pub(super) fn expected(name: &str, args: &Doctor) -> Result<f64> {
    let cluster = crate::files::catalog(&args.catalog)?.cluster(name, None)?;
    let out = &cluster.scale_out;
    if out.bytes_per_s.value <= 0.0 {
        return Err(Error::user(format!("--cluster {name}: no fabric joins its nodes")));
    }
    Ok(out.bytes_per_s.value * out.efficiency.value)
}

/// What one machine is looked at for.
fn local(args: &Doctor) -> Vec<Finding> {
    let mut all = super::machine();
    match super::disk::checks(&args.dir) {
        Ok(disk) => all.extend(disk),
        Err(e) => all.push(
            Check::ok("disk", e.to_string(), "runs are to lie there, on every node at the same path")
                .amiss(Verdict::Bad, e.hint_text().unwrap_or("make it there, or name another with --dir")),
        ),
    }
    all.into_iter().map(Finding::from).collect()
}

fn card_key(rank: &Rank, of: usize) -> String {
    format!("{}/doctor/card/{of}", rank.env.session)
}

fn set(rank: &Rank, key: &str, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::failure(format!("write {key}: {e}")))?;
    rank.store().set(key, text)
}

fn get<T: for<'a> Deserialize<'a>>(rank: &Rank, key: &str) -> Result<T> {
    let bytes = rank.store().get(key, MEET_TIMEOUT)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::failure(format!("read {key}: {e}")))
}

/// Where each rank runs.
fn places(rank: &Rank) -> Result<Vec<Place>> {
    let key = |of: usize| format!("{}/doctor/place/{of}", rank.env.session);
    let host = comm::host_id();
    let name = std::env::var("SLURMD_NODENAME").ok().filter(|n| !n.is_empty());
    let name = name.unwrap_or_else(|| host.split('/').next().unwrap_or("?").to_owned());
    set(rank, &key(rank.env.rank), &Place { node: rank.env.node, host, name })?;
    let keys: Vec<String> = (0..rank.env.world).map(key).collect();
    rank.store().wait(&keys, MEET_TIMEOUT).context("wait for the other ranks to say where they run")?;
    let mut places: Vec<Place> = keys.iter().map(|key| get(rank, key)).collect::<Result<_>>()?;
    // Nodes that go by one name (several of one machine) are told apart by their numbers.
    let mut of_name: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for place in &places {
        of_name.entry(place.name.clone()).or_default().push(place.node);
    }
    for place in &mut places {
        if of_name[&place.name].iter().any(|node| *node != place.node) {
            place.name = format!("{}#{}", place.name, place.node);
        }
    }
    Ok(places)
}

/// The ranks of each node, in order of the first.
fn nodes(places: &[Place]) -> Vec<Vec<usize>> {
    let mut nodes: Vec<Vec<usize>> = Vec::new();
    for (rank, place) in places.iter().enumerate() {
        let same = |ranks: &&mut Vec<usize>| {
            let first = &places[ranks[0]];
            (first.node, &first.host) == (place.node, &place.host)
        };
        match nodes.iter_mut().find(same) {
            Some(ranks) => ranks.push(rank),
            None => nodes.push(vec![rank]),
        }
    }
    nodes
}

fn report(args: &Doctor, rank: &Rank, leaders: &[usize], expected: Option<f64>) -> Result<u8> {
    let mut cards: Vec<Card> =
        leaders.iter().map(|leader| get(rank, &card_key(rank, *leader))).collect::<Result<_>>()?;
    between::judge(&mut cards, expected.zip(args.cluster.as_deref()));
    let worst = cards.iter().flat_map(|c| &c.checks).map(|c| c.verdict).max().unwrap_or(Verdict::Ok);
    output::print(&match args.json {
        true => json!({ "verdict": worst, "nodes": cards }).to_string(),
        false => table::text(&cards),
    });
    Ok(u8::from(worst == Verdict::Bad))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_sorted_by_node() {
        let place = |node, host: &str| Place { node, host: host.into(), name: host.into() };
        let check = |places: &[Place], expected: &[&[usize]]| assert_eq!(nodes(places), expected);
        check(&[place(0, "a"), place(0, "a"), place(1, "b"), place(1, "b")], &[&[0, 1], &[2, 3]]);
        // A launcher that numbers no nodes, and several nodes of one machine.
        check(&[place(0, "a"), place(0, "b"), place(0, "a")], &[&[0, 2], &[1]]);
        check(&[place(0, "a"), place(1, "a")], &[&[0], &[1]]);
    }
}
