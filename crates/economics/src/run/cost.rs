//! What a run is paid by, and where the money goes.

use serde::Serialize;
use spec::{Catalog, Cluster, Result};

use super::{Ask, grid, independent};
use crate::failures::{ACCELERATORS_PER_NODE, JobFailures};
use crate::goodput::Goodput;
use crate::own::{self, Ownership};
use crate::price::{self, Commitment, Quote};
use crate::{Bill, HOURS_PER_YEAR, Spread};

/// Share of the time that owned machines work, as others keep theirs: 83 and 85 % of RSC-1 and RSC-2 (arXiv 2410.21680).
const OWNED_UTILISATION: f64 = 0.84;

/// What is paid by.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Basis {
    /// Rent.
    Rent(Box<Quote>),
    /// The run's share of machines of one's own.
    Own(Box<Owned>),
}

/// Machines of one's own as a run pays for them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Owned {
    /// Everything that owning takes.
    pub ownership: Ownership,
    /// Share of the time that the machines work for anybody.
    pub utilisation: f64,
    /// Dollars for an hour of an accelerator in use.
    pub usd_per_accelerator_h: Spread,
}

/// How a run is paid.
#[derive(Clone, Debug)]
pub struct Paid {
    /// Rent or ownership.
    pub basis: Basis,
}

impl Paid {
    /// Rent where a price is given or the platform has one; else a share of owning the machines where their price is
    /// known; else the rent of the same accelerator elsewhere. `None` where nobody knows any.
    pub(super) fn by(
        catalog: &Catalog,
        cluster: &Cluster,
        ask: &Ask,
        assumptions: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        let asked = ask.price.price.is_some() || ask.price.commitment.is_some();
        let own = || -> Result<Self> {
            let entry = ask.ownership.as_deref().unwrap_or(own::TYPICAL);
            let ownership =
                Ownership::of(catalog, cluster, entry, grid(catalog, ask.price.region.as_deref()))?;
            let utilisation = OWNED_UTILISATION;
            let usd_per_accelerator_h = ownership.usd_per_accelerator_h(utilisation);
            Ok(Paid { basis: Basis::Own(Box::new(Owned { ownership, utilisation, usd_per_accelerator_h })) })
        };
        let known = cluster.node_price_usd.is_some();
        if ask.owned || (!asked && cluster.price.is_none() && known) {
            assumptions.push(format!(
                "owned: the run's share of machines that work {:.0} % of the time",
                100.0 * OWNED_UTILISATION
            ));
            return own().map(Some);
        }
        let quote = match price::quote(catalog, cluster, &ask.price, ask.today) {
            Ok(quote) => quote,
            Err(e) if asked || cluster.price.is_some() => return Err(e),
            Err(e) => {
                assumptions.push(format!("no cost: {e}"));
                return Ok(own().ok());
            }
        };
        assumptions.push(format!(
            "price: {} of {} ({})",
            quote.commitment.name(),
            quote.provider.as_deref().unwrap_or(&quote.name),
            quote.date
        ));
        assumptions.extend(quote.age_note(ask.today)?);
        assumptions.extend(quote.notes.iter().cloned());
        Ok(Some(Paid { basis: Basis::Rent(Box::new(quote)) }))
    }

    /// How often a rented node is taken back, in events an hour.
    pub(super) fn taken_back_per_node_h(&self) -> Option<Spread> {
        match &self.basis {
            Basis::Rent(quote) => quote.interruptions_per_node_h,
            Basis::Own(_) => None,
        }
    }

    /// What is paid for beside the job's own accelerators: the rest of nodes that are billed whole, and the spare nodes of
    /// capacity that is bound for a term, where nobody brings another node for a broken one.
    pub(super) fn held(
        &self,
        accelerators: usize,
        failures: &JobFailures,
        assumptions: &mut Vec<String>,
    ) -> Held {
        let nodes = failures.spares.nodes;
        match &self.basis {
            Basis::Own(_) => {
                assumptions.push("spare nodes are part of what is owned: its bill has them".to_owned());
                Held::default()
            }
            Basis::Rent(quote) => {
                let rest = quote.billed(accelerators) - accelerators;
                if rest > 0 {
                    assumptions.push(format!(
                        "billed in nodes of {}: {} accelerators for {accelerators}",
                        quote.billed_in,
                        accelerators + rest
                    ));
                }
                let bound = matches!(
                    quote.commitment,
                    Commitment::Reserved1y | Commitment::Reserved3y | Commitment::CapacityBlock
                );
                let spare = if bound { quote.billed(nodes * ACCELERATORS_PER_NODE as usize) } else { 0 };
                if spare > 0 {
                    assumptions.push(format!("{spare} spare accelerators are rented beside the job's: broken nodes of a term are not replaced at once"));
                } else if nodes > 0 {
                    assumptions.push(
                        "no spare nodes are billed: who rents by the hour gets another node for a broken one"
                            .to_owned(),
                    );
                }
                Held { rest_of_nodes: rest, spare }
            }
        }
    }

    /// The bill of a job that runs for `hours`: rent by what the time goes to, ownership by what is owned.
    pub(super) fn bill(&self, accelerators: usize, held: Held, hours: Spread, goodput: &Goodput) -> Bill {
        match &self.basis {
            Basis::Rent(quote) => {
                let each = independent(quote.usd_per_accelerator_h, hours);
                let of = |n: usize| each.scaled(n as f64);
                let usd = of(accelerators);
                let name = |n: &str| if n == "useful" { "training".to_owned() } else { n.to_owned() };
                let taken = goodput.terms.iter().filter(|t| t.share > 0.0);
                let parts = taken.map(|t| (name(t.name), usd.scaled(t.share)));
                let beside = [("rest of whole nodes", held.rest_of_nodes), ("spare nodes", held.spare)];
                let beside = beside.into_iter().filter(|b| b.1 > 0).map(|(name, n)| (name.to_owned(), of(n)));
                Bill::of(parts.chain(beside))
            }
            Basis::Own(owned) => {
                let share = hours.scaled(1.0 / (HOURS_PER_YEAR * owned.utilisation));
                let parts = owned.ownership.yearly_parts(owned.utilisation);
                Bill::of(parts.into_iter().map(|(name, usd)| (name, independent(usd, share))))
            }
        }
    }
}

/// Accelerators paid for beside those of the job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Held {
    /// Of nodes that are billed whole.
    pub rest_of_nodes: usize,
    /// That stand by for broken ones.
    pub spare: usize,
}
