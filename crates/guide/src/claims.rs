//! The claims in the order of the guide, in our words, each with the function that answers it.

mod decision;
mod hardware;
mod platforms;
mod prices;
mod scale;
mod training;

use spec::{EntryKind, Measure, Result};

use crate::facts::{Case, Facts, Found};

/// A claim and who answers it.
pub(crate) type Ask = (&'static str, fn(&mut Facts<'_>) -> Result<Found>);

/// All of them.
pub(crate) fn all() -> impl Iterator<Item = Ask> {
    let sections: [&'static [Ask]; 6] = [
        scale::CLAIMS,
        platforms::CLAIMS,
        hardware::CLAIMS,
        training::CLAIMS,
        prices::CLAIMS,
        decision::CLAIMS,
    ];
    sections.into_iter().flatten().copied()
}

const HOURS: f64 = 3600.0;
const DAY_S: f64 = 86_400.0;
const YEAR_DAYS: f64 = 365.25;
const HOURS_OF_YEAR: f64 = 8760.0;
const BITS: f64 = 8.0;
const GIGA: f64 = 1e9;
const TERA: f64 = 1e12;

/// The rate that the guide computes with, and the training FLOPs of a parameter and token (Kaplan et al. 2020).
const GUIDE_RATE: f64 = 300.0 * TERA;
const FLOPS_PER_PARAM: f64 = 6.0;

/// The GPU that the guide means by H100, and its node.
const H100: &str = "h100-sxm5";
const DGX_H100: &str = "dgx-h100";

/// Llama 3.1 405B as it was published: 16,384 H100, 2,048 sequences of 8,192 tokens (arXiv 2407.21783, table 4).
const LLAMA_405B: Case<'static> = Case {
    model: "llama3-405b",
    cluster: "meta-24k-roce",
    accelerators: 16_384,
    sequence: 8192,
    sequences: 2048,
    tokens: Some(15.6e12),
    layout: "tp=8,pp=16,chunks=8,micro_batch=1,zero=1",
};

/// A number of an accelerator, in units of `per`.
fn chip(f: &mut Facts<'_>, name: &str, key: &str, per: f64) -> Result<Measure> {
    Ok(f.number(EntryKind::Accelerator, name, key)?.scaled(1.0 / per))
}

/// Accelerators of a machine.
fn size(f: &mut Facts<'_>, platform: &str) -> Result<f64> {
    let cluster = f.cluster(platform, None)?;
    for key in ["nodes", "accelerators"] {
        // The one that the platform states is a source.
        if f.catalog.get(EntryKind::Platform, platform)?.number(key).is_some() {
            f.number(EntryKind::Platform, platform, key)?;
        }
    }
    Ok(cluster.accelerators as f64)
}

/// Rent of one accelerator for an hour; what is rented by the node is shared out.
fn rent(f: &mut Facts<'_>, price: &str, key: &str) -> Result<Measure> {
    let rent = f.number(EntryKind::Price, price, key)?;
    let by_node = f.catalog.get(EntryKind::Price, price)?.number(key).is_some_and(|q| q.unit == "USD/node-h");
    if !by_node {
        return Ok(rent);
    }
    Ok(rent.scaled(1.0 / f.number(EntryKind::Price, price, "node_accelerators")?.value))
}

fn exact(x: f64) -> Measure {
    Measure::exact(x)
}
