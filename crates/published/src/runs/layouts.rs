use plan::placement::{Order, Placement};
use plan::shape::Shape;
use plan::software::Software;
use spec::{Error, ExpertRows, Layout, NumberFormat, PipelineSchedule, Recompute, Reduce, Result, Zero};

use super::{Reader, Usable};

/// What a row's layout has to fit.
pub(crate) struct Problem<'a> {
    pub(crate) shape: &'a Shape,
    pub(crate) n: usize,
    pub(crate) sequences: usize,
    pub(crate) sequence: usize,
    pub(crate) format: NumberFormat,
    /// Cores of an accelerator, where software sees each.
    pub(crate) units: usize,
    pub(crate) software: &'a Software,
}

/// Micro-batches tried where none was published.
const MICRO_BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Chunks a stage tried where none was published.
const CHUNKS: [usize; 8] = [1, 2, 3, 4, 5, 6, 8, 12];

/// The layouts that agree with the row, and the accelerators of one slice if the machine is a torus in slices.
pub(crate) fn placements(
    r: &mut Reader<'_>,
    p: &Problem<'_>,
) -> Result<Usable<(Vec<Placement>, Option<usize>)>> {
    let torus = p.software.lineage == "maxtext";
    let (tp, pp) = (r.count("tp")?, r.count("pp")?);
    if (tp.is_none() || pp.is_none()) && !torus {
        return Ok(Err("tensor and pipeline parallelism not published".into()));
    }
    if tp.is_none() {
        r.assume("layout not published: sharded data parallelism with the best tensor parallelism");
    }
    let pp = pp.unwrap_or(1);
    let cp = r.count("cp")?.unwrap_or_else(|| context_from_notes(r.text("notes")));
    let ep = r.count("ep")?.unwrap_or(1);
    let zero = zero(r.text("zero_fsdp"), p.software);
    let published_dp = r.count("dp")?;
    let tps = match tp {
        Some(tp) => vec![chips(tp, product([tp, pp, cp, published_dp.unwrap_or(1)]), p)],
        None => vec![1, 2, 4, 8],
    };
    let recomputes = recomputes(r, p);
    let per_group = group_size(r.text("zero_fsdp"));
    // Sources count the context-parallel ranks that shard among them.
    let shard = |dp: usize| per_group.map(|group| (group / cp).max(1)).filter(|group| *group < dp);
    let slice = published_dp.filter(|_| torus).map(|slices| p.n / slices.clamp(1, p.n));
    let (mut out, mut refused) = (Vec::new(), String::new());
    for tp in tps {
        let dp = match replicas(p.n, [tp, pp, cp, ep], published_dp.filter(|_| !torus), per_group) {
            Ok(dp) => dp,
            Err(reason) => {
                refused = reason;
                continue;
            }
        };
        let share = p.sequences as f64 / dp as f64;
        for micro_batch in micro_batches(r, torus.then(|| product([tp, pp, cp])), (p.sequences, share))? {
            for chunks in chunks(r.count("vpp")?, pp, p, share / micro_batch as f64) {
                for &recompute in &recomputes {
                    let layout = Layout {
                        dp,
                        tp,
                        pp,
                        cp,
                        ep,
                        sequence_parallel: tp > 1 && sequence_parallel(r.text("sequence_parallel"), p, tp),
                        zero,
                        shard: shard(dp),
                        schedule: schedule_of(chunks),
                        chunks,
                        micro_batch,
                        recompute,
                        reduce: Reduce::Ring,
                        expert_rows: ExpertRows::Even,
                        ..Layout::default()
                    };
                    out.push(Placement { layout, format: p.format, order: Order::default() });
                }
            }
        }
    }
    if out.is_empty() {
        return Ok(Err(if refused.is_empty() { "no layout agrees with the row".into() } else { refused }));
    }
    if out.len() > 1 {
        r.assume("choices not published (micro-batch, chunks, recompute): the fastest that fits is taken");
    }
    Ok(Ok((out, slice)))
}

fn schedule_of(chunks: usize) -> PipelineSchedule {
    if chunks == 1 { PipelineSchedule::OneFOneB } else { PipelineSchedule::Interleaved }
}

/// As large as can be where it is no number: degrees come from a table.
fn product<const N: usize>(degrees: [usize; N]) -> usize {
    degrees.into_iter().fold(1, usize::saturating_mul)
}

/// A tensor degree in accelerators: some count an accelerator's cores, so that `all` axes multiply to those.
fn chips(tp: usize, all: usize, p: &Problem<'_>) -> usize {
    let cores = p.units > 1 && all == p.n * p.units && tp.is_multiple_of(p.units);
    if cores { tp / p.units } else { tp }
}

/// Replicas of a model on `n` accelerators; where their number was published it has to agree, if only as the number of
/// groups that shard.
fn replicas(
    n: usize,
    [tp, pp, cp, ep]: [usize; 4],
    published: Option<usize>,
    per_group: Option<usize>,
) -> Usable<usize> {
    let ranks = product([tp, pp, cp]);
    if !n.is_multiple_of(ranks) {
        return Err(format!("tp x pp x cp = {tp} x {pp} x {cp} does not divide {n} accelerators"));
    }
    let dp = n / ranks;
    let stage = n / pp;
    if !stage.is_multiple_of(ep) {
        return Err(format!("experts over {ep} ranks, but a stage has {stage}"));
    }
    match published {
        Some(said) if said != dp && said.saturating_mul(per_group.unwrap_or(1)) != dp => Err(format!(
            "dp = {said} published, but {n} accelerators over tp x pp x cp = {tp} x {pp} x {cp} leave {dp}"
        )),
        _ => Ok(dp),
    }
}

/// Micro-batches to try, of `share` sequences for each replica; on a torus of `model_ranks` accelerators a replica.
fn micro_batches(
    r: &Reader<'_>,
    model_ranks: Option<usize>,
    (sequences, share): (usize, f64),
) -> Result<Vec<usize>> {
    let published = r.count("micro_batch")?;
    if let Some(m) = published.filter(|m| *m > sequences) {
        return Err(Error::user(format!(
            "{}:{}: micro_batch = {m} is more than the {sequences} sequences of the global batch",
            r.path, r.row.line
        ))
        .hint("micro_batch counts sequences that a replica takes at once"));
    }
    Ok(match (published, model_ranks) {
        // MaxText counts sequences for each device of a replica, and takes them all at once.
        (Some(m), Some(ranks)) => vec![m.saturating_mul(ranks).min((share as usize).max(1))],
        (Some(m), None) => vec![m],
        (None, _) => MICRO_BATCHES.into_iter().filter(|m| *m as f64 <= share.max(1.0)).collect(),
    })
}

/// MaxText's recipes say so in words.
fn context_from_notes(notes: &str) -> usize {
    let after = notes.split("ici_context_parallelism ").nth(1).unwrap_or_default();
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    // Counted in devices, two a chip.
    digits.parse::<usize>().map_or(1, |devices| (devices / 2).max(1))
}

fn zero(text: &str, software: &Software) -> Zero {
    let t = text.to_ascii_lowercase();
    if t.contains("dist. optimizer") {
        // Megatron's sharded optimiser scatters once a step, whatever the sources call it.
        Zero::Optimizer
    } else if t.contains("zero-2") || t.contains("shard-grad-op") {
        Zero::Gradients
    } else if t.contains("zero-3") || t.starts_with("fsdp") {
        Zero::Parameters
    } else if t.contains("zero-1") || t.contains("zero1") {
        Zero::Optimizer
    } else if t.is_empty() && software.fsdp {
        Zero::Parameters
    } else if t.is_empty()
        && (software.name.starts_with("megatron-core") || software.name.starts_with("nemo"))
    {
        Zero::Optimizer
    } else {
        Zero::Off
    }
}

/// `FSDP group 64`, `FSDP 16 per slice`, `ZeRO-1 within node (8)`, `ZeRO-1 within 4`.
fn group_size(text: &str) -> Option<usize> {
    if !["group", "per slice", "within"].iter().any(|w| text.contains(w)) {
        return None;
    }
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .filter_map(|word| word.parse().ok())
        .next_back()
}

fn sequence_parallel(text: &str, p: &Problem<'_>, tp: usize) -> bool {
    match text {
        "yes" => true,
        "no" => false,
        _ => p.software.sequence_parallel && p.sequence.is_multiple_of(tp),
    }
}

fn recomputes(r: &Reader<'_>, p: &Problem<'_>) -> Vec<Recompute> {
    let software = p.software;
    match r.text("recompute") {
        "full" | "qkv_proj_offloaded" | "selective (qkv_proj_offloaded)" => vec![Recompute::Full],
        "none" => vec![Recompute::None],
        t if t.starts_with("selective") => vec![Recompute::Selective],
        // Megatron-Bridge's recipes for mixtures name modules or nothing to recompute, never layers (`recompute_modules` in
        // `scripts/performance/configs` of NVIDIA-NeMo/Megatron-Bridge, v0.1.0rc4 to v0.5.0).
        _ if r.text("id").starts_with("mbridge") && p.shape.expert_layers() > 0 => {
            vec![Recompute::None, Recompute::Selective]
        }
        _ if software.name.starts_with("megatron-core") => {
            vec![Recompute::None, Recompute::Selective, Recompute::Full]
        }
        // Off unless asked for.
        _ if software.lineage == "nanotron" => vec![Recompute::None],
        "custom" => vec![Recompute::None, Recompute::Selective, Recompute::Full],
        _ => vec![Recompute::Selective, Recompute::Full],
    }
}

fn chunks(published: Option<usize>, pp: usize, p: &Problem<'_>, micro_batches: f64) -> Vec<usize> {
    // Its pipelines do not interleave.
    if pp == 1 || (published.is_none() && p.software.lineage == "nanotron") {
        return vec![1];
    }
    if let Some(chunks) = published {
        return vec![chunks];
    }
    let layers = p.shape.model.layers;
    // Interleaving wants whole rounds of stages; layers are spread evenly, but for the first and last stage.
    let rounds = (micro_batches / pp as f64).fract() == 0.0;
    let even = |c: usize| layers.is_multiple_of(c * pp) || (layers + 2).is_multiple_of(c * pp);
    let fits = |c: &usize| *c == 1 || (rounds && c * pp <= layers + 2 && even(*c));
    CHUNKS.into_iter().filter(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sharding_is_read_from_the_words_of_the_sources() {
        let core = Software::named("megatron-core-2024").unwrap();
        let check = |text: &str, stage: Zero, group: Option<usize>| {
            assert_eq!((zero(text, &core), group_size(text)), (stage, group), "{text}");
        };
        check("FSDP full-shard (ZeRO-3)", Zero::Parameters, None);
        check("dist. optimizer / DDP", Zero::Optimizer, None);
        check("ZeRO-1 within node (8)", Zero::Optimizer, Some(8));
        check("ZeRO-1 within 4", Zero::Optimizer, Some(4));
        check("ZeRO-1 over all DP", Zero::Optimizer, None);
        check("FSDP group 64", Zero::Parameters, Some(64));
        check("FSDP 16 per slice", Zero::Parameters, Some(16));
        check("FSDP shard-grad-op (ZeRO-2)", Zero::Gradients, None);
        check("none", Zero::Off, None);
        check("", Zero::Optimizer, None);
    }
}
