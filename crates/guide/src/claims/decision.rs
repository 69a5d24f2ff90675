//! The decision framework: compute, utilisation, what owning takes.

use economics::own::break_even;
use spec::{EntryKind, Measure, Result};

use super::{
    Ask, DAY_S, DGX_H100, FLOPS_PER_PARAM, GUIDE_RATE, H100, HOURS, HOURS_OF_YEAR, LLAMA_405B, TERA, chip,
    exact, rent,
};
use crate::facts::{Facts, Found};
use crate::verdict::{Rule, Stated};

pub(crate) const CLAIMS: &[Ask] = &[
    ("training takes 6 FLOP a parameter and token: 4.2e22 for 7B on 1T", flops),
    ("at 300 TFLOP/s that is about 130 GPU-days", gpu_days),
    ("an H100 trains at about 300 TFLOP/s", rate),
    ("owning pays above 70 % utilisation, below it the cloud is almost always cheaper", utilisation),
    ("a GPU takes 700 W at full load", power),
    ("a cluster of 1,000 GPUs costs $30M in hardware", hardware),
    ("it costs $3M to $5M a year to run", running),
    ("inference costs are falling fast", inference),
    ("failures are handled by checkpoints and elastic training", failures),
];

/// The guide's example and its cluster.
const PARAMS: f64 = 7e9;
const TOKENS: f64 = 1e12;
const GPUS: f64 = 1000.0;

fn flops(f: &mut Facts<'_>) -> Result<Found> {
    let model = f.model("llama2-7b")?;
    f.arithmetic();
    let counted = model.flops_per_token(4096.0, true) * TOKENS;
    Ok(Found::new()
        .reads("by 6 N D", exact(FLOPS_PER_PARAM * PARAMS * TOKENS), "FLOP", Stated::Exactly(42e21))
        .shows("counted for Llama 2 7B with its attention, sequences of 4,096", exact(counted), "FLOP"))
}

fn gpu_days(f: &mut Facts<'_>) -> Result<Found> {
    f.arithmetic();
    let seconds = FLOPS_PER_PARAM * PARAMS * TOKENS / GUIDE_RATE;
    let hours = seconds / HOURS;
    let stated = 130.0;
    Ok(Found::new()
        .reads("", exact(seconds / DAY_S), "GPU-days", Stated::About(stated))
        .shows("", exact(hours), "GPU-hours")
        .shows("at $2.50 an hour", exact(hours * 2.5), "$")
        .shows(
            "would be needed for 130 days",
            exact(seconds * GUIDE_RATE / TERA / (stated * DAY_S)),
            "TFLOP/s a GPU",
        ))
}

fn rate(f: &mut Facts<'_>) -> Result<Found> {
    let answer = f.planned(LLAMA_405B)?;
    let peak = chip(f, H100, "peak.bf16", TERA)?.value;
    let best = &answer.best[0];
    let of = |step_s: f64| best.mfu * best.step_s / step_s * peak;
    let range = Measure { value: of(best.step_s), low: of(best.step_high_s), high: of(best.step_low_s) };
    f.arithmetic();
    Ok(Found::new()
        .reads("in Llama 3.1 405B on 16,384, planned", range, "TFLOP/s", Stated::AtLeast(300.0))
        .shows("of peak are the 300", exact(100.0 * 300.0 / peak), "%")
        .note("on the low side"))
}

/// Own machines written off over four years, with what they take a year, against rents from the catalogue and the guide.
fn utilisation(f: &mut Facts<'_>) -> Result<Found> {
    const YEARS: f64 = 4.0;
    let network = f.number(EntryKind::Ownership, "typical", "network_share")?.value;
    let servers = GPUS / 8.0 * f.number(EntryKind::Node, DGX_H100, "price")?.value;
    let whole = servers / (1.0 - network);
    let hyperscaler = rent(f, "aws-p5", "on_demand")?.value;
    f.arithmetic();
    let mut found = Found::by(Rule::Everywhere);
    for (purchase, yearly, whose) in
        [(30e6, 4e6, "its own figures"), (whole, 5e6, "servers with their network")]
    {
        for rent in [2.0, 2.5, 4.0, hyperscaler] {
            let percent = 100.0 * break_even(purchase / YEARS + yearly, 0.0, GPUS as usize, rent);
            found = found.reads(
                format!("by {whose} against ${rent:.2}/h"),
                exact(percent),
                "%",
                Stated::About(70.0),
            );
        }
    }
    Ok(found.note("no constant: own cost over rent"))
}

fn power(f: &mut Facts<'_>) -> Result<Found> {
    let node = f.number(EntryKind::Node, DGX_H100, "power")?.scaled(1.0 / 8.0);
    let pue = f.number(EntryKind::Ownership, "typical", "pue")?;
    f.arithmetic();
    Ok(Found::new()
        .reads("of the chip", chip(f, H100, "power", 1.0)?, "W", Stated::Exactly(700.0))
        .shows("of the node's for each GPU", node, "W")
        .shows("with its cooling", node.scaled(pue.value), "W"))
}

fn hardware(f: &mut Facts<'_>) -> Result<Found> {
    let servers = f.number(EntryKind::Node, DGX_H100, "price")?.scaled(GPUS / 8.0);
    let share = f.number(EntryKind::Ownership, "typical", "network_share")?.value;
    f.arithmetic();
    let stated = Stated::About(30e6);
    Ok(Found::new()
        .reads("for 125 servers at their usual price", exact(servers.value), "$", stated)
        .reads("with their network, storage extra", exact(servers.value / (1.0 - share)), "$", stated)
        .shows("for the cheapest servers seen, alone", exact(servers.low), "$"))
}

fn running(f: &mut Facts<'_>) -> Result<Found> {
    let mut of = |key| f.number(EntryKind::Ownership, "typical", key).map(|m| m.value);
    let (load, pue, over_chip) = (of("load")?, of("pue")?, of("power_factor")?);
    let price = f.number(EntryKind::Grid, "us", "price")?.value;
    let chip_kw = chip(f, H100, "power", 1e3)?.value;
    f.arithmetic();
    let full = GPUS * chip_kw * over_chip * pue * HOURS_OF_YEAR * price;
    Ok(Found::by(Rule::Undisclosed)
        .shows("of it is electricity at the usual load", exact(full * load), "$")
        .shows("at full load", exact(full), "$")
        .note("plausible; staff, space and support make the rest and are nowhere published"))
}

fn inference(f: &mut Facts<'_>) -> Result<Found> {
    let (old, new) = (rent(f, "aws-p5-2024", "on_demand")?.value, rent(f, "aws-p5", "on_demand")?.value);
    f.arithmetic();
    Ok(Found::by(Rule::NothingStated).shows(
        "less is an H100's rent at AWS since 2025-06",
        exact(100.0 * (1.0 - new / old)),
        "%",
    ))
}

fn failures(f: &mut Facts<'_>) -> Result<Found> {
    let llama = f.number(EntryKind::Failure, "llama3-405b", "rate")?.value;
    let rsc = f.number(EntryKind::Failure, "rsc-1", "rate")?.value;
    f.arithmetic();
    let days = |rate: f64, nodes: f64| 1.0 / (rate * nodes) / DAY_S;
    let nodes = GPUS / 8.0;
    let thousand = Measure { value: days(llama, nodes), low: days(rsc, nodes), high: days(llama, nodes) };
    let large = days(llama, LLAMA_405B.accelerators as f64 / 8.0) * 24.0;
    Ok(Found::by(Rule::NothingStated)
        .shows("between failures of 1,000 H100", thousand, "days")
        .shows("between those of 16,384", exact(large), "h")
        .shows(
            "failures of 1,000 nodes in a day",
            Measure { value: 1e3 * DAY_S * llama, low: 1e3 * DAY_S * llama, high: 1e3 * DAY_S * rsc },
            "",
        )
        .note("the guide gives no rate"))
}
