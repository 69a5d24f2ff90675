//! `[[jitter]]`: how much single kernels vary, as data.

use spec::Result;

use super::{Entry, FACTOR_MAX, Reader, What};
use crate::clock::USUAL;
use crate::jitter::Distribution;

/// More than this is no jitter of kernels that are measured one by one.
const SPREAD_MAX: f64 = 2.0;

impl Reader<'_> {
    pub(super) fn jitter(&self, at: &str, e: &Entry) -> Result<What> {
        let whole = |x: f64| (x * USUAL as f64).round() as u64;
        let hint = "lognormal and exponential take spread, spike takes chance and factor";
        let number = |key: &str, n, min, max| self.number(at, key, n, min, max, hint).map(whole);
        let unused = |keys: &[(&str, bool)], name: &str| match keys.iter().find(|k| k.1) {
            Some((key, _)) => Err(self.error(at, &format!("{name} has no use for {key}"), hint)),
            None => Ok(()),
        };
        let of_spike = [("chance", e.chance.is_some()), ("factor", e.factor.is_some())];
        let distribution = match e.distribution.as_deref() {
            Some("lognormal") | None => {
                unused(&of_spike, "lognormal")?;
                Distribution::Lognormal { spread: number("spread", e.spread, 0.0, SPREAD_MAX)? }
            }
            Some("exponential") => {
                unused(&of_spike, "exponential")?;
                Distribution::Exponential { spread: number("spread", e.spread, 0.0, SPREAD_MAX)? }
            }
            Some("spike") => {
                unused(&[("spread", e.spread.is_some())], "spike")?;
                Distribution::Spike {
                    chance: number("chance", e.chance, 0.0, 1.0)?,
                    factor: number("factor", e.factor, 1.0, FACTOR_MAX)?,
                }
            }
            Some(other) => {
                let what = format!("distribution = \"{other}\"");
                return Err(self.error(at, &what, "expected lognormal, exponential or spike"));
            }
        };
        let everywhere = e.rank.is_none() && e.node.is_none();
        let ranks = if everywhere { 0..self.cluster.accelerators } else { self.ranks(at, e)? };
        Ok(What::Jitter(ranks, distribution))
    }
}
