//! Steps done again by threads of this process, one for each rank.

use std::collections::BTreeMap;
use std::path::Path;

use comm::World;
use program::Request;
use spec::{Context, Error, Result, RunSpec};

use super::Try;
use super::history::History;
use crate::cpu::Cpu;
use crate::documents::attend;
use crate::exec::Executor;
use crate::mesh::Mesh;
use crate::run_dir::RunDir;
use crate::trainer::{load_step, open_data, step_inputs};
use crate::trouble::Limits;

/// More named differences than these are counted.
const NAMED_MAX: usize = 4;

/// What came of it on one rank.
struct Done {
    /// Loss and norm of each step.
    outputs: BTreeMap<u64, (f64, f64)>,
    /// Hashes of what this rank would save, by parameter, after the last step if it updated.
    own: Option<BTreeMap<String, u64>>,
}

/// Steps done again.
pub(super) struct Redone {
    layout: String,
    ranks: Vec<Done>,
    pub(super) steps: u64,
}

impl Redone {
    pub(super) fn new(
        run: &RunSpec,
        dir: &RunDir,
        history: &History,
        from: Option<&Path>,
        threads: usize,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Redone> {
        run.validate_layout(&run.layout)?;
        let world = run.layout.world();
        let worlds = World::threads(world)?;
        let each = (threads / world).max(1);
        let ranks: Result<Vec<Done>> = std::thread::scope(|scope| {
            let spawn = |world: World| {
                let rank = world.rank();
                scope.spawn(move || {
                    let done = Mesh::new(world, &run.layout).and_then(|mesh| {
                        let device = Box::new(Cpu::new(each));
                        let exec = Executor::on(device, &Request::of(run, rank), mesh, false)?;
                        again(exec, run, dir, history, from, progress)
                    });
                    done.context(format!("rank {rank}"))
                })
            };
            let ranks: Vec<_> = worlds.into_iter().map(spawn).collect();
            let lost = |_| Err(Error::failure("a thread that did the step again has failed"));
            ranks.into_iter().map(|r| r.join().unwrap_or_else(lost)).collect()
        });
        let ranks = ranks?;
        let l = &run.layout;
        let axes =
            [("dp", l.dp), ("tp", l.tp), ("pp", l.pp), ("cp", l.cp), ("ep", l.ep), ("zero", l.zero as usize)];
        let mut axes: Vec<String> = axes
            .iter()
            .filter(|(k, n)| *n > usize::from(*k != "zero"))
            .map(|(k, n)| format!("{k}={n}"))
            .collect();
        axes.extend(l.deals_heads().then(|| "context=heads".to_owned()));
        let layout = if axes.is_empty() { "one rank".to_owned() } else { axes.join(",") };
        let steps = ranks.first().map_or(0, |r| r.outputs.len() as u64);
        Ok(Redone { layout, ranks, steps })
    }

    /// Compares with what was recorded.
    pub(super) fn held_to(self, history: &History) -> Try {
        let outputs = &self.ranks[0].outputs;
        let differs = |step: &u64| {
            let (was, is) = (history.outputs.get(step)?, outputs.get(step)?);
            let mut what = Vec::new();
            for (name, was, is) in [("loss", was.0, is.0), ("gradient norm", was.1, is.1)] {
                // The payload of a NaN is not recorded.
                if was.to_bits() != is.to_bits() && !(was.is_nan() && is.is_nan()) {
                    what.push(format!("{name} {was:?} was {is:?} here"));
                }
            }
            (!what.is_empty()).then_some((*step, what))
        };
        let mut found = outputs.keys().find_map(differs);
        let all = |ranks: &[Done]| -> Option<u64> {
            let own = ranks.iter().map(|r| r.own.as_ref()).collect::<Option<Vec<_>>>()?;
            Some(own.into_iter().flat_map(BTreeMap::values).fold(0, |sum: u64, s| sum.wrapping_add(*s)))
        };
        let hash = all(&self.ranks);
        let hash = hash.map(|h| format!("{h:016x}"));
        if let (Some(looked), Some(hash)) = (history.looked(), &hash)
            && *hash != looked.hash
        {
            let mut named = self.named(history);
            let (_, what) = found.get_or_insert((history.step, Vec::new()));
            what.append(&mut named);
        }
        let (loss, grad_norm) = outputs.get(&history.step).copied().unwrap_or((f64::NAN, f64::NAN));
        let (differs_at, differs_in) = found.map_or((None, Vec::new()), |(step, what)| (Some(step), what));
        let layout = self.layout;
        Try { layout, loss, grad_norm, hash, differs_at, differs_in }
    }

    /// Which parameters are other, and on which rank they were recorded.
    fn named(&self, history: &History) -> Vec<String> {
        let Some(looked) = history.looked() else { return Vec::new() };
        let (was, mut is) = (looked.by_name(), BTreeMap::<&str, u64>::new());
        for (name, sum) in self.ranks.iter().filter_map(|r| r.own.as_ref()).flatten() {
            let all = is.entry(name.as_str()).or_default();
            *all = all.wrapping_add(*sum);
        }
        let other: Vec<&str> =
            was.iter().filter(|(n, sum)| is.get(*n) != Some(sum)).map(|(n, _)| *n).collect();
        let of = |name: &str| {
            let saved = looked.own.iter().filter(|(_, own)| own.contains_key(name));
            // In the same layout it is known whose part of it is other.
            let same = self.ranks.len() == looked.own.len();
            let theirs = |rank: usize| self.ranks[rank].own.as_ref().and_then(|own| own.get(name));
            let whose = saved.filter(|(rank, own)| !same || theirs(**rank) != own.get(name));
            let ranks: Vec<String> = whose.map(|(rank, _)| rank.to_string()).collect();
            format!("{name}, saved by rank {}", ranks.join(", "))
        };
        let mut named: Vec<String> = other.iter().take(NAMED_MAX).map(|n| of(n)).collect();
        if other.len() > NAMED_MAX {
            named.push(format!("and {} more of {} parameters", other.len() - NAMED_MAX, was.len()));
        }
        named
    }
}

fn again(
    mut exec: Executor,
    run: &RunSpec,
    dir: &RunDir,
    history: &History,
    from: Option<&Path>,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Done> {
    let prepared = crate::text::tokens_of(run, dir);
    if prepared.is_none() && crate::text::source(run).is_some() {
        return Err(Error::user(format!("the tokens that {} was trained on are gone", dir.path().display()))
            .hint(
                "put them back beside the run, in cache/; the same text and tokenizer make the same tokens",
            ));
    }
    let streams = open_data(run, prepared.as_ref())?;
    attend(&mut exec, run, prepared.as_ref())?;
    exec.set_tables(&run.model)?;
    let mut done = 0;
    match from {
        Some(path) => {
            let checkpoint = ckpt::Checkpoint::open(path)?;
            exec.restore(&checkpoint).context(format!("go on from {}", path.display()))?;
            done = checkpoint.step();
        }
        None => exec.initialise(&run.model, run.train.seed)?,
    }
    let mut sample = vec![0; run.batch.sequence + 1];
    let mut outputs = BTreeMap::new();
    let mut updated = true;
    for step in (done + 1..=history.step).filter(|step| !history.is_left_out(*step)) {
        load_step(&mut exec, run, streams.train.as_ref(), step - 1, &mut sample)?;
        let inputs = step_inputs(run, step, false, false);
        let (out, bad) = exec.attempt(&inputs, &Limits::NONE)?;
        outputs.insert(step, (out.loss, out.grad_norm));
        if exec.mesh.rank() == 0 {
            progress(step, history.step);
        }
        updated = bad.is_none();
        if !updated {
            break;
        }
        exec.update_weights(&inputs, &out)?;
    }
    let own = updated.then(|| exec.held().map(|held| held.own)).transpose()?;
    Ok(Done { outputs, own })
}
