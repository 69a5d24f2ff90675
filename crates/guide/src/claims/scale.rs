//! How large, how much, how dear: the guide's opening.

use spec::{EntryKind, Measure, Result};

use super::{
    Ask, DAY_S, DGX_H100, FLOPS_PER_PARAM, GIGA, GUIDE_RATE, H100, HOURS, LLAMA_405B, TERA, YEAR_DAYS, chip,
    exact, rent, size,
};
use crate::facts::{Case, Facts, Found};
use crate::verdict::{Rule, Stated};

pub(crate) const CLAIMS: &[Ask] = &[
    ("frontier clusters have 100,000 GPUs and more", frontier_size),
    ("frontier training needs exaflops", exaflops),
    ("a frontier model of 2024 cost a billion dollars and more to train", frontier_cost),
    ("InfiniBand is what mainly joins GPUs", infiniband),
    ("GPT-4 took about 25,000 A100 for 90 to 100 days", gpt4),
    ("an A100 costs about $10,000", a100),
    ("a DGX H100 of 8 GPUs costs about $300,000", dgx),
    ("70B parameters on one GPU take years", one_gpu),
    ("AI is bound by memory bandwidth (HBM3, 3.35 TB/s), not by compute", bound),
];

const EXA: f64 = 1e18;

fn frontier_size(f: &mut Facts<'_>) -> Result<Found> {
    let largest = size(f, "xai-colossus")?;
    Ok(Found::new()
        .reads("H100 in Colossus of 2024", exact(largest), "GPUs", Stated::AtLeast(1e5))
        .shows("at Meta, where Llama 3.1 405B was trained", exact(size(f, "meta-24k-roce")?), "GPUs")
        .shows("in Azure's Eagle", exact(size(f, "azure-eagle")?), "GPUs")
        .note("of the largest only: 405B used 16,384 GPUs"))
}

fn exaflops(f: &mut Facts<'_>) -> Result<Found> {
    let rate = |f: &mut Facts<'_>, accelerators: f64, chip_name: &str| -> Result<Measure> {
        Ok(chip(f, chip_name, "peak.bf16", EXA)?.scaled(accelerators))
    };
    let gpt4 = f.number(EntryKind::Trained, "gpt-4", "accelerators")?.value;
    let small = rate(f, gpt4, "a100-80-sxm")?;
    let colossus = size(f, "xai-colossus")?;
    let large = rate(f, colossus, H100)?;
    let work = f.number(EntryKind::Trained, "gpt-4", "work")?;
    f.arithmetic();
    Ok(Found::new()
        .reads("of dense BF16 in 25,000 A100", small, "EFLOP/s", Stated::Order(1.0))
        .reads("in 100,000 H100", large, "EFLOP/s", Stated::Order(1.0))
        .shows("of work in GPT-4, by estimate", work, "FLOP")
        .note("one to two orders of magnitude more as a rate; as work, seven"))
}

fn frontier_cost(f: &mut Facts<'_>) -> Result<Found> {
    let mut found = Found::new();
    for (run, key, of) in [
        ("llama3-405b", "cost_amortised", "for Llama 3.1 405B, the share of the machine used up"),
        ("llama3-405b", "cost_rented", "for the same, rented"),
        ("llama3-405b", "cost_bought", "for the same, the machine bought whole"),
        ("gpt-4", "cost_rented", "for GPT-4, rented"),
        ("gemini-1-ultra", "cost_rented", "for Gemini 1.0 Ultra, rented"),
    ] {
        found = found.reads(of, f.number(EntryKind::Trained, run, key)?, "$", Stated::AtLeast(1e9));
    }
    let hours = gpu_hours(f)?;
    let list = rent(f, "aws-p5-2024", "on_demand")?;
    Ok(found
        .shows("for 405B at AWS's list price of 2024, by our plan", exact(hours * list.value), "$")
        .shows("rented for Grok 3, of 2025", f.number(EntryKind::Trained, "grok-3", "cost_rented")?, "$"))
}

/// GPU-hours of Llama 3.1 405B as planned.
fn gpu_hours(f: &mut Facts<'_>) -> Result<f64> {
    let answer = f.planned(LLAMA_405B)?;
    let days = answer.best.first().and_then(|c| c.train_days).unwrap_or_default();
    Ok(days * DAY_S / HOURS * LLAMA_405B.accelerators as f64)
}

fn infiniband(f: &mut Facts<'_>) -> Result<Found> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for (platform, title) in [
        ("dgx-superpod-h100", "SuperPOD"),
        ("azure-eagle", "Azure"),
        ("meta-rsc", "Meta RSC"),
        ("coreweave-h100", "CoreWeave"),
        ("meta-24k-roce", "Meta's cluster of Llama 3.1"),
        ("xai-colossus", "xAI Colossus"),
        ("aws-p5-ultracluster", "AWS"),
        ("tpu-v5p-pod", "Google TPU"),
    ] {
        let cluster = f.cluster(platform, None)?;
        if matches!(cluster.scale_up.kind, spec::cluster::ScaleUpKind::Torus { .. }) {
            without.push(format!("{title} (links of its own)"));
            continue;
        }
        match f.text(EntryKind::Fabric, &cluster.scale_out.fabric, "technology")? {
            "infiniband" => with.push(title.to_owned()),
            other => without.push(format!("{title} ({other})")),
        }
    }
    Ok(Found::new().says(format!("InfiniBand: {}", with.join(", ")), "InfiniBand", !with.is_empty()).says(
        format!("not: {}", without.join(", ")),
        "InfiniBand",
        without.is_empty(),
    ))
}

fn gpt4(f: &mut Facts<'_>) -> Result<Found> {
    let count = f.number(EntryKind::Trained, "gpt-4", "accelerators")?;
    let took = f.number(EntryKind::Trained, "gpt-4", "took")?;
    let work = f.number(EntryKind::Trained, "gpt-4", "work")?;
    let peak = chip(f, "a100-80-sxm", "peak.bf16", 1.0)?.value;
    f.arithmetic();
    let share = |seconds: f64| 100.0 * work.value / (count.value * seconds * peak);
    let mfu = Measure { value: share(took.value), low: share(took.high), high: share(took.low) };
    Ok(Found::by(Rule::Undisclosed)
        .shows("as reported, not disclosed", count, "A100")
        .shows("of peak would make the 2.1e25 FLOP that others estimate", mfu, "%")
        .note("OpenAI has not said; the figures agree with each other"))
}

fn a100(f: &mut Facts<'_>) -> Result<Found> {
    let stated = Stated::About(10_000.0);
    Ok(Found::new()
        .reads("by 2023 to 2025", f.number(EntryKind::Price, "buy-a100", "purchase")?, "$", stated)
        .read("2020", "as listed", f.number(EntryKind::Price, "buy-a100-2020", "purchase")?, "$", stated))
}

fn dgx(f: &mut Facts<'_>) -> Result<Found> {
    let price = f.number(EntryKind::Node, DGX_H100, "price")?;
    Ok(Found::new().reads("by date and seller", price, "$", Stated::About(300_000.0)))
}

fn one_gpu(f: &mut Facts<'_>) -> Result<Found> {
    let mut found = Found::new();
    for (model, tokens, of) in
        [("llama2-70b", 2e12, "for 2T tokens at 300 TFLOP/s"), ("llama3-70b", 15e12, "for 15T tokens")]
    {
        let work = FLOPS_PER_PARAM * f.model(model)?.params() * tokens;
        f.arithmetic();
        let years = work / GUIDE_RATE / DAY_S / YEAR_DAYS;
        found = found.reads(of, exact(years), "years", Stated::AtLeast(1.0));
    }
    let alone = f.planned(Case {
        model: "llama2-70b",
        cluster: DGX_H100,
        accelerators: 1,
        sequence: 4096,
        sequences: 1,
        tokens: None,
        layout: "tp=1,pp=1,dp=1,micro_batch=1",
    })?;
    let takes = alone.best.first().map_or(0.0, |c| c.memory_bytes / GIGA);
    Ok(found
        .shows("would be needed on that GPU", exact(takes), "GB")
        .shows("are there", chip(f, H100, "memory", GIGA)?, "GB")
        .note("understated: generations rather than years, and it does not fit"))
}

fn bound(f: &mut Facts<'_>) -> Result<Found> {
    let bandwidth = chip(f, H100, "memory_bandwidth", 1.0)?;
    let ridge = chip(f, H100, "peak.bf16", 1.0)?.value / bandwidth.value;
    let answer = f.planned(LLAMA_405B)?;
    let (m, layout) = (&answer.question.shape.model, &answer.best[0].layout);
    // A product of t tokens with a k x n matrix does 2 t k n FLOP and moves t k + k n + t n numbers of two bytes.
    let intensity = |t: f64, k: f64, n: f64| t * k * n / (t * k + k * n + t * n);
    let (k, n) = (m.hidden as f64, m.ffn as f64 / layout.tp as f64);
    let training = intensity((layout.micro_batch * answer.question.sequence) as f64, k, n);
    let decode = intensity(1.0, k, n);
    let b = &answer.best[0].breakdown;
    let streams = 100.0 * b.stream_s / answer.best[0].step_s;
    f.arithmetic();
    Ok(Found::new()
        .reads("of HBM3 on an H100", bandwidth.scaled(1.0 / TERA), "TB/s", Stated::Exactly(3.35))
        .and()
        .says(
            format!("training 405B: products of {training:.0} FLOP a byte, above the ridge of {ridge:.0}"),
            "bandwidth-bound",
            training < ridge,
        )
        .says(
            format!("decoding one sequence: {decode:.1} FLOP a byte, below it"),
            "bandwidth-bound",
            decode < ridge,
        )
        .shows("of a step of 405B goes to kernels that stream through memory", exact(streams), "%"))
}
