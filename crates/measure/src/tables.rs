//! From what ops took to the tables of a calibration.

use std::collections::BTreeMap;

use machine::table::{Conditions, KernelKey, LinkKey, Message, Sample};
use machine::{LinkOp, kernel};
use serde::Deserialize;
use spec::stats::quantile;

use crate::record::{Recorded, Took};

/// What others take of the machine while it is measured is not its own noise.
const SPREAD_MAX: f64 = 0.25;
/// Share of the steps that nothing interrupts between two ops, however busy the machine.
const UNDISTURBED_SHARE: f64 = 0.05;

/// Measurements of one kernel at one shape.
#[derive(Default)]
struct Runs {
    work: f64,
    /// By block, op and micro-batch: what each step took.
    places: BTreeMap<(u32, u32, u32), Vec<Took>>,
}

/// All kernels measured so far, by key and the bits of their shape.
#[derive(Default)]
pub(crate) struct Measured {
    runs: BTreeMap<(KernelKey, [u64; 3]), Runs>,
    gaps: Vec<f64>,
}

impl Measured {
    /// Adds what the steps took; with `new_kinds`, only of kinds that were not measured before.
    pub(crate) fn keep(&mut self, (stepper, steps): &Recorded, at: Conditions, new_kinds: bool) {
        let p = &stepper.exec.program;
        let storage = p.precision.to_string();
        let before: Vec<String> = match new_kinds {
            true => self.runs.keys().map(|(k, _)| k.kind.clone()).collect(),
            false => Vec::new(),
        };
        for step in steps {
            for o in &step.ops {
                let op = &p.blocks[o.block as usize].ops[o.op as usize];
                let Some(k) = kernel(op, p).filter(|k| k.work > 0.0) else { continue };
                if before.iter().any(|b| b == k.kind) {
                    continue;
                }
                let key = KernelKey { kind: k.kind.to_owned(), storage: storage.clone(), at };
                let runs = self.runs.entry((key, k.shape.map(f64::to_bits))).or_default();
                runs.work = k.work;
                let took = Took { wall_s: o.took.wall_s, cpu_s: o.took.cpu_s / at.threads as f64 };
                runs.places.entry((o.block, o.op, o.micro_batch)).or_default().push(took);
            }
            self.gaps.push(step.gap_s);
        }
    }

    /// Seconds between two ops where nothing interrupts.
    pub(crate) fn op_gap_s(&mut self) -> f64 {
        quantile(&mut self.gaps, UNDISTURBED_SHARE)
    }

    /// Rates by kernel, and how far the upper quartile of what runs took lies above what they usually take.
    pub(crate) fn kernels(self) -> (BTreeMap<KernelKey, Vec<Sample>>, f64) {
        let mut kernels: BTreeMap<KernelKey, Vec<Sample>> = BTreeMap::new();
        let (mut all_slow, mut all_taken) = (0.0, 0.0);
        for ((key, shape), runs) in self.runs {
            let (mut slow, mut taken) = (0.0, 0.0);
            let places = runs.places.len() as f64;
            for (_, took) in runs.places {
                let mut wall: Vec<f64> = took.iter().map(|t| t.wall_s).collect();
                let mut cpu: Vec<f64> = took.iter().map(|t| t.cpu_s).collect();
                slow += quantile(&mut wall, 0.75) / places;
                taken += usual_s(&mut wall, &mut cpu) / places;
            }
            // Spans are of whole nanoseconds.
            let taken = taken.max(1e-9);
            (all_slow, all_taken) = (all_slow + slow, all_taken + taken);
            let sample = Sample { shape: shape.map(f64::from_bits), per_s: runs.work / taken };
            kernels.entry(key).or_default().push(sample);
        }
        no_faster_side_by_side(&mut kernels);
        (kernels, (all_slow / f64::max(all_taken, 1e-9) - 1.0).clamp(0.0, SPREAD_MAX))
    }
}

/// What an op usually takes: the clock's word, unless it is far above the work done, because something else had the
/// cores. The fastest runs would promise what a machine that others share seldom gives, and side by side they are the
/// ones in which the other ranks happened to rest.
fn usual_s(wall: &mut [f64], cpu: &mut [f64]) -> f64 {
    const FAR: f64 = 1.15;
    let (wall, cpu) = (quantile(wall, 0.5), quantile(cpu, 0.5));
    if cpu > 0.0 && wall > FAR * cpu { cpu } else { wall }
}

/// Others at work make no kernel faster: where it seems so, the rank alone was disturbed less.
fn no_faster_side_by_side(kernels: &mut BTreeMap<KernelKey, Vec<Sample>>) {
    let alone: BTreeMap<KernelKey, Vec<Sample>> =
        kernels.iter().filter(|(k, _)| k.at.beside == 1).map(|(k, s)| (k.clone(), s.clone())).collect();
    for (key, samples) in kernels.iter_mut().filter(|(k, _)| k.at.beside > 1) {
        let at = Conditions { beside: 1, ..key.at };
        let Some(alone) = alone.get(&KernelKey { at, ..key.clone() }) else { continue };
        for sample in samples {
            let same = alone.iter().find(|a| a.shape == sample.shape);
            sample.per_s = same.map_or(sample.per_s, |a| sample.per_s.min(a.per_s));
        }
    }
}

/// One operation between ranks and its time, as `phalanx bench collectives --json` prints it.
#[derive(Clone, Debug, Deserialize)]
pub struct Collective {
    /// Its name.
    pub op: String,
    /// Whether its buffers were in shared memory, as those of programs are.
    pub shared: bool,
    /// Bytes of the whole buffer.
    pub bytes: f64,
    /// Lower quartile of its time, microseconds.
    pub quartile_us: f64,
}

/// Adds what was measured between `ranks` over `transport` to the links' tables.
pub(crate) fn keep_links(
    links: &mut BTreeMap<LinkKey, Vec<Message>>,
    transport: &str,
    ranks: usize,
    found: Vec<Collective>,
) {
    for c in found {
        let kept = LinkOp::ALL.iter().any(|op| op.name() == c.op);
        if c.shared && kept && c.bytes > 0.0 && c.quartile_us > 0.0 {
            let key = LinkKey { transport: transport.to_owned(), op: c.op, ranks };
            links.entry(key).or_default().push(Message { bytes: c.bytes, s: c.quartile_us / 1e6 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disturbed_repetitions_do_not_count() {
        assert_eq!(usual_s(&mut [9.0, 8.0], &mut [4.0, 4.0]), 4.0, "never undisturbed");
        assert_eq!(usual_s(&mut [4.2, 4.5, 9.9], &mut [4.0, 4.1, 4.6]), 4.5);
        assert_eq!(usual_s(&mut [9.0], &mut [0.0]), 9.0, "no word on the work");
    }

    #[test]
    fn a_kernel_beside_others_is_never_faster_than_alone() {
        let key = |beside| KernelKey {
            kind: "norm".into(),
            storage: "f32".into(),
            at: Conditions { threads: 1, beside },
        };
        let sample = |rows, per_s| Sample { shape: [rows, 1.0, 1.0], per_s };
        let mut kernels = BTreeMap::from([
            (key(1), vec![sample(8.0, 4e9), sample(16.0, 5e9)]),
            (key(2), vec![sample(8.0, 6e9), sample(16.0, 3e9), sample(32.0, 9e9)]),
        ]);
        no_faster_side_by_side(&mut kernels);
        let rates: Vec<f64> = kernels[&key(2)].iter().map(|s| s.per_s).collect();
        assert_eq!(rates, [4e9, 3e9, 9e9]);
        assert_eq!(kernels[&key(1)][0].per_s, 4e9);
    }

    #[test]
    fn links_are_kept_where_programs_use_them() {
        let found = |op: &str, shared, bytes| Collective { op: op.into(), shared, bytes, quartile_us: 2.0 };
        let mut links = BTreeMap::new();
        keep_links(
            &mut links,
            "shm",
            4,
            vec![
                found("send", true, 8.0),
                found("send", false, 8.0),
                found("barrier", true, 8.0),
                found("send", true, 0.0),
            ],
        );
        let key = LinkKey { transport: "shm".into(), op: "send".into(), ranks: 4 };
        assert_eq!(links, BTreeMap::from([(key, vec![Message { bytes: 8.0, s: 2e-6 }])]));
    }
}
