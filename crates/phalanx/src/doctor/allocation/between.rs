//! What lies between nodes: clocks, bandwidth, latency.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use comm::{OpTag, World};
use serde::{Deserialize, Serialize};
use spec::Result;

use super::{Card, Finding};
use crate::doctor::Verdict;

/// Questions of one clock to another; the quickest answer is the best.
const ASKED: usize = 32;
/// Clocks that are set by a time service agree within milliseconds; further apart, journals tell another story.
const CLOCK_S: f64 = 0.05;
/// Messages that are measured, and how many are sent before an answer: a few seconds on a slow network.
const MESSAGE_BYTES: usize = 4 << 20;
const MESSAGES: usize = 16;
/// A link that is slower than this share of the others', or of the catalogue's, is worth a look.
const SLOW: f64 = 0.5;

const TAG: OpTag = OpTag(0);

/// From one node to the next.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Link {
    pub(super) to: String,
    pub(super) over: String,
    pub(super) bytes_per_s: f64,
    /// Of an empty message there.
    pub(super) latency_s: f64,
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Measures between `leaders`, one rank of each node. Collective over all ranks; a leader gets the link to the next one, and
/// its clock among its checks.
pub(super) fn measure(world: &World, leaders: &[usize], checks: &mut Vec<Finding>) -> Result<Option<Link>> {
    if leaders.len() < 2 {
        return Ok(None);
    }
    let me = leaders.iter().position(|l| *l == world.rank());
    for (node, leader) in leaders.iter().enumerate().skip(1) {
        if me == Some(0) {
            answer_clock(world, *leader)?;
        } else if me == Some(node) {
            checks.push(clock(ask_clock(world, leaders[0])?));
        }
    }
    let mut link = None;
    let n = leaders.len();
    // Neighbours on a ring in turns, so that nobody sends and receives at once; the last pair of an odd ring alone.
    for turn in 0..if n % 2 == 1 && n > 1 { 3 } else { 2 } {
        world.barrier()?;
        for (from, leader) in leaders.iter().enumerate() {
            let to = (from + 1) % n;
            let own_turn = if n % 2 == 1 && from == n - 1 { 2 } else { from % 2 };
            if own_turn != turn || (n == 2 && from == 1) {
                continue;
            }
            if me == Some(from) {
                link = Some(send(world, leaders[to])?);
            } else if me == Some(to) {
                receive(world, *leader)?;
            }
        }
    }
    world.barrier()?;
    Ok(link)
}

/// Offset of this clock from that of `peer`, and by how much it may be wrong: half of the quickest way there and back
/// (RFC 5905, section 8).
fn ask_clock(world: &World, peer: usize) -> Result<(f64, f64)> {
    let mut best = (0.0, f64::INFINITY);
    for _ in 0..ASKED {
        let asked_s = now_s();
        world.all().send(TAG, peer, 0, &[asked_s])?;
        let mut theirs = [0.0];
        world.all().recv(TAG, peer, 0, &mut theirs)?;
        let answered_s = now_s();
        let error_s = (answered_s - asked_s).abs() / 2.0;
        if error_s < best.1 {
            best = ((asked_s + answered_s) / 2.0 - theirs[0], error_s);
        }
    }
    Ok(best)
}

fn answer_clock(world: &World, peer: usize) -> Result<()> {
    for _ in 0..ASKED {
        world.all().recv(TAG, peer, 0, &mut [0.0f64])?;
        world.all().send(TAG, peer, 0, &[now_s()])?;
    }
    Ok(())
}

fn clock((offset_s, error_s): (f64, f64)) -> Finding {
    let is_off = offset_s.abs() - error_s > CLOCK_S;
    Finding {
        name: "clock offset".into(),
        verdict: if is_off { Verdict::Warn } else { Verdict::Ok },
        found: format!("{:+.3} ms against the first node, +- {:.3} ms", offset_s * 1e3, error_s * 1e3),
        why: "journals of several nodes are laid beside each other by their times".into(),
        hint: if is_off {
            "run chrony or systemd-timesyncd on every node, with one source".into()
        } else {
            String::new()
        },
    }
}

/// Sends messages and waits for a word that all have come, then empty ones there and back.
fn send(world: &World, peer: usize) -> Result<Link> {
    let data = vec![1u8; MESSAGE_BYTES];
    let all = world.all();
    // One to warm up.
    all.send(TAG, peer, 0, &data)?;
    all.recv(TAG, peer, 0, &mut [0u8])?;
    let began = Instant::now();
    for _ in 0..MESSAGES {
        all.send(TAG, peer, 0, &data)?;
    }
    all.recv(TAG, peer, 0, &mut [0u8])?;
    let bytes_per_s = (MESSAGES * MESSAGE_BYTES) as f64 / began.elapsed().as_secs_f64();
    let mut latency_s = f64::INFINITY;
    for _ in 0..ASKED {
        let began = Instant::now();
        all.send(TAG, peer, 0, &[0u8])?;
        all.recv(TAG, peer, 0, &mut [0u8])?;
        latency_s = latency_s.min(began.elapsed().as_secs_f64() / 2.0);
    }
    let over = world.transport(peer).name().to_owned();
    Ok(Link { to: String::new(), over, bytes_per_s, latency_s })
}

fn receive(world: &World, peer: usize) -> Result<()> {
    let mut data = vec![0u8; MESSAGE_BYTES];
    let all = world.all();
    all.recv(TAG, peer, 0, &mut data)?;
    all.send(TAG, peer, 0, &[0u8])?;
    for _ in 0..MESSAGES {
        all.recv(TAG, peer, 0, &mut data)?;
    }
    all.send(TAG, peer, 0, &[0u8])?;
    for _ in 0..ASKED {
        all.recv(TAG, peer, 0, &mut [0u8])?;
        all.send(TAG, peer, 0, &[0u8])?;
    }
    Ok(())
}

/// Makes a finding of each link: against what the catalogue says of such a cluster, else against the other links.
pub(super) fn judge(cards: &mut [Card], expected: Option<(f64, &str)>) {
    let median = spec::stats::median(cards.iter().filter_map(|c| Some(c.link.as_ref()?.bytes_per_s)));
    for card in cards {
        let Some(link) = &card.link else { continue };
        let rate = format!("{:.2} GB/s, {:.0} us", link.bytes_per_s / 1e9, link.latency_s * 1e6);
        let (against, is_slow) = match expected {
            Some((most, name)) => {
                let share = link.bytes_per_s / most;
                let against = format!(
                    ", {:.0} % of {:.1} GB/s that the catalogue gives {name}",
                    share * 100.0,
                    most / 1e9
                );
                (against, share < SLOW)
            }
            None => (String::new(), link.bytes_per_s < SLOW * median),
        };
        let hint = match (is_slow, expected) {
            (false, _) => "",
            (true, None) => {
                "look at this node's and the next one's cables, ports and drivers: others are faster"
            }
            (true, Some(_)) => {
                "one connection was measured: name the fabric's interface with PHALANX_BIND, or use --transport mpi where \
                 the fabric needs it"
            }
        };
        card.checks.push(Finding {
            name: "to the next".into(),
            verdict: if is_slow { Verdict::Warn } else { Verdict::Ok },
            found: format!("{rate} to {} over {}{against}", link.to, link.over),
            why: "gradients cross this; a step waits for the slowest link".into(),
            hint: hint.into(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_counts_as_off_only_beyond_its_error() {
        let check = |offset_s, error_s, verdict| assert_eq!(clock((offset_s, error_s)).verdict, verdict);
        check(0.001, 0.0001, Verdict::Ok);
        check(-0.4, 0.001, Verdict::Warn);
        check(0.4, 0.38, Verdict::Ok);
    }

    #[test]
    fn a_slow_link_is_found_among_others_and_against_the_catalogue() {
        let card = |gb_per_s: f64| Card {
            node: "n".into(),
            ranks: 1,
            checks: vec![],
            link: Some(Link {
                to: "m".into(),
                over: "tcp".into(),
                bytes_per_s: gb_per_s * 1e9,
                latency_s: 2e-5,
            }),
        };
        let check = |rates: &[f64], expected: Option<(f64, &str)>, slow: &[bool]| {
            let mut cards: Vec<Card> = rates.iter().map(|r| card(*r)).collect();
            judge(&mut cards, expected);
            let found: Vec<bool> = cards.iter().map(|c| c.checks[0].verdict == Verdict::Warn).collect();
            assert_eq!(found, slow, "{cards:?}");
            assert!(
                cards.iter().all(|c| (c.checks[0].verdict == Verdict::Ok) == c.checks[0].hint.is_empty())
            );
        };
        check(&[10.0, 11.0, 4.0, 10.5], None, &[false, false, true, false]);
        check(&[10.0, 11.0], Some((45e9, "x")), &[true, true]);
        check(&[30.0], Some((45e9, "x")), &[false]);
        judge(&mut [], None);
    }
}
