use plan::placement::{Order, Placement};
use plan::shape::Shape;
use plan::software::Software;
use spec::{Layout, NumberFormat, PipelineSchedule, Recompute, Reduce, Result, Zero};

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
    // Some count an accelerator's cores.
    let units = p.units.max(1);
    let all = tp.unwrap_or(1) * pp * cp * r.count("dp")?.unwrap_or(1);
    let tp = tp
        .map(|tp| if units > 1 && all == p.n * units && tp.is_multiple_of(units) { tp / units } else { tp });
    let tps = tp.map_or_else(|| vec![1, 2, 4, 8], |tp| vec![tp]);
    let recomputes = recomputes(r, p.software);
    let mut out = Vec::new();
    let mut slice = None;
    let mut refused = String::new();
    for tp in tps {
        let model_ranks = tp * pp * cp;
        if !p.n.is_multiple_of(model_ranks) {
            refused = format!("tp x pp x cp = {tp} x {pp} x {cp} does not divide {} accelerators", p.n);
            continue;
        }
        let dp = p.n / model_ranks;
        let per_group = group_size(r.text("zero_fsdp"));
        if let Some(published) = r.count("dp")?
            && published != dp
            && published * per_group.unwrap_or(1) != dp
            && !torus
        {
            refused = format!(
                "dp = {published} published, but {} accelerators over tp x pp x cp = {tp} x {pp} x {cp} leave {dp}",
                p.n
            );
            continue;
        }
        if torus && let Some(slices) = r.count("dp")? {
            slice = Some(p.n / slices.clamp(1, p.n));
        }
        let share = p.sequences as f64 / dp as f64;
        let micro_batches: Vec<usize> = match r.count("micro_batch")? {
            // MaxText counts sequences for each device of a replica, and takes them all at once.
            Some(m) if torus => {
                vec![(m * model_ranks).min((share as usize).max(1))]
            }
            Some(m) => vec![m],
            None => MICRO_BATCHES.into_iter().filter(|m| *m as f64 <= share.max(1.0)).collect(),
        };
        for &micro_batch in &micro_batches {
            for chunks in chunks(r.count("vpp")?, pp, p, share / micro_batch as f64) {
                for &recompute in &recomputes {
                    let layout = Layout {
                        dp,
                        tp,
                        pp,
                        sequence_parallel: tp > 1 && sequence_parallel(r.text("sequence_parallel"), p, tp),
                        zero,
                        schedule: if chunks > 1 {
                            PipelineSchedule::Interleaved
                        } else {
                            PipelineSchedule::OneFOneB
                        },
                        chunks,
                        stage_layers: Vec::new(),
                        micro_batch,
                        recompute,
                        reduce: Reduce::Ring,
                        cp,
                        ep,
                    };
                    let shard = per_group.unwrap_or(dp * cp).min(dp * cp);
                    out.push(Placement { layout, shard, format: p.format, order: Order::default() });
                }
            }
        }
    }
    let _ = p.sequence;
    if out.is_empty() {
        return Ok(Err(if refused.is_empty() { "no layout agrees with the row".into() } else { refused }));
    }
    if out.len() > 1 {
        r.assume("choices not published (micro-batch, chunks, recompute): the fastest that fits is taken");
    }
    Ok(Ok((out, slice)))
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
    } else if t.contains("zero-1") {
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

fn recomputes(r: &Reader<'_>, software: &Software) -> Vec<Recompute> {
    match r.text("recompute") {
        "full" | "qkv_proj_offloaded" | "selective (qkv_proj_offloaded)" => vec![Recompute::Full],
        "none" => vec![Recompute::None],
        t if t.starts_with("selective") => vec![Recompute::Selective],
        _ if software.name.starts_with("megatron-core") => {
            vec![Recompute::None, Recompute::Selective, Recompute::Full]
        }
        "custom" => vec![Recompute::None, Recompute::Selective, Recompute::Full],
        _ => vec![Recompute::Selective, Recompute::Full],
    }
}

fn chunks(published: Option<usize>, pp: usize, p: &Problem<'_>, micro_batches: f64) -> Vec<usize> {
    if pp == 1 {
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
