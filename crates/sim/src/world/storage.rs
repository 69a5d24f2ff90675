//! Storage as a resource: what all ranks read and write shares its rates, and the ports if they lead there.

use super::paths::{Path, of_usual, whole};
use crate::clock::USUAL;
use crate::play::Kind;

/// What a step reads and writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StorageUse {
    /// Bytes per second that all ranks together can read.
    pub read_rate: f64,
    /// And write.
    pub write_rate: f64,
    /// Bytes of tokens that each rank reads for the next step.
    pub read_bytes: f64,
    /// Bytes of a checkpoint that each rank writes meanwhile; 0 where none is due.
    pub write_bytes: f64,
    /// Whether these bytes cross the ports between nodes; else storage has a network of its own.
    pub shares_ports: bool,
}

/// It, with what bytes cross on their way.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    pub(crate) read_bytes: f64,
    pub(crate) write_bytes: f64,
    /// By class: reading, writing.
    paths: Vec<[[Vec<Path>; 2]; 2]>,
}

impl Storage {
    /// Adds the storage's two links to `capacity`. Ranks of a class read alike, so each counts as many as it has.
    pub(super) fn new(
        u: &StorageUse,
        left: Option<u64>,
        ports: &[[usize; 2]],
        counts: &[usize],
        capacity: &mut Vec<u64>,
    ) -> Self {
        let share = of_usual(left.unwrap_or(USUAL));
        let reads = capacity.len();
        capacity.extend([whole(u.read_rate * share), whole(u.write_rate * share)]);
        let path = |link: usize, port: usize, count: usize| {
            let mut uses = vec![(link, count as u64)];
            uses.extend(u.shares_ports.then_some((port, 1)));
            [Vec::new(), vec![Path { uses, limit: u64::MAX, share: 1.0 }]]
        };
        let of = |(ports, count): (&[usize; 2], &usize)| {
            [path(reads, ports[1], *count), path(reads + 1, ports[0], *count)]
        };
        let paths = ports.iter().zip(counts).map(of).collect();
        Storage { read_bytes: u.read_bytes, write_bytes: u.write_bytes, paths }
    }
}

impl super::World {
    /// What a class's bytes to or from storage cross.
    pub(crate) fn storage_paths(&self, class: usize, kind: Kind) -> &[Vec<Path>; 2] {
        const NONE: &[Vec<Path>; 2] = &[Vec::new(), Vec::new()];
        self.storage.as_ref().map_or(NONE, |s| &s.paths[class][usize::from(matches!(kind, Kind::Write(_)))])
    }
}
