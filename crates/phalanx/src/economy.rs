//! The run and its money beside a plan: flags to questions, answers to JSON.

pub(crate) mod text;

use std::path::PathBuf;
use std::time::SystemTime;

use economics::Date;
use economics::goodput::{Recovery, Save};
use economics::objective::{self, Chosen, Objective};
use economics::price::{self, Commitment, Given};
use economics::run::{Ask, Ramp};
use plan::answer::Answer;
use serde_json::{Value, json};
use spec::{Catalog, Error, Result};

use crate::args::{Economy, Plan};
use crate::files;
use crate::planner::tokens;

/// Points of the curve of goodput over the interval between checkpoints.
const CURVE_POINTS: usize = 25;

/// The catalogue with the user's files, the price's among them where it is a file.
pub(crate) fn catalog(more: &[PathBuf], price: Option<&str>) -> Result<Catalog> {
    let mut all = more.to_vec();
    all.extend(price.filter(|p| is_file(p)).map(PathBuf::from));
    files::catalog(&all)
}

fn is_file(price: &str) -> bool {
    price.ends_with(".toml")
}

/// What to pay by.
pub(crate) fn price_ask(
    price: Option<&str>,
    commitment: Option<&str>,
    region: Option<&str>,
) -> Result<price::Ask> {
    let price = match price {
        Some(path) if is_file(path) => {
            let names = price::names_in(&files::read(path.as_ref())?);
            let [name] = names.as_slice() else {
                return Err(Error::user(format!("{path} has {} prices, expected one", names.len())).hint(
                    "write [price.NAME]; with several, give the file with --catalog and --price NAME",
                ));
            };
            Some(Given::Entry(name.clone()))
        }
        Some(text) => Some(Given::parse(text)?),
        None => None,
    };
    Ok(price::Ask {
        price,
        commitment: commitment.map(Commitment::parse).transpose()?,
        region: region.map(str::to_owned),
    })
}

/// The day on which prices are read.
pub(crate) fn today(given: Option<&str>) -> Result<Date> {
    const DAY_S: u64 = 86_400;
    let since_1970 =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() / DAY_S);
    given.map_or_else(|| Ok(Date::from_unix_days(since_1970 as i64)), Date::parse)
}

/// The first flag of a run that was given.
pub(crate) fn given_flag(args: &Economy) -> Option<&'static str> {
    let flags = [
        ("--price", args.price.is_some()),
        ("--commitment", args.commitment.is_some()),
        ("--for", objective_of(args) != Objective::Time),
        ("--within", args.within.is_some()),
        ("--own", args.own),
        ("--ramp", args.ramp.is_some()),
        ("--recovery", args.recovery.is_some()),
        ("--checkpoint", args.checkpoint.is_some()),
        ("--checkpoint-every", args.checkpoint_every.is_some()),
        ("--failures", args.failures.is_some()),
        ("--region", args.region.is_some()),
    ];
    flags.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
}

/// The run that a plan's flags ask for; none without tokens.
pub(crate) fn ask(args: &Economy, trained: Option<f64>, given: bool) -> Result<Option<Ask>> {
    let price = price_ask(args.price.as_deref(), args.commitment.as_deref(), args.region.as_deref())?;
    let today = today(args.today.as_deref())?;
    let Some(trained) = trained else {
        return match given_flag(args) {
            Some(flag) => Err(Error::user(format!("{flag} is of a run, and --tokens does not say how long"))
                .hint("give the tokens to train on: --tokens 2T")),
            None => Ok(None),
        };
    };
    if given && objective_of(args) != Objective::Time {
        return Err(Error::user(format!(
            "--for {} with a --layout given: there is nothing to choose",
            args.objective
        ))
        .hint("leave one of them out"));
    }
    if let Some(s) = args.checkpoint_every.filter(|s| *s > CHECKPOINT_EVERY_MAX_S) {
        return Err(Error::user(format!("--checkpoint-every {s}, expected at most {CHECKPOINT_EVERY_MAX_S} seconds"))
            .hint("leave it out for the best; a run that saves less than once a month ends in no time that can be told"));
    }
    Ok(Some(Ask {
        ramp: ramp(args.ramp.as_deref())?,
        recovery: Recovery::ALL.into_iter().find(|r| Some(r.name()) == args.recovery.as_deref()),
        save: Save::ALL.into_iter().find(|s| Some(s.name()) == args.checkpoint.as_deref()),
        interval_s: args.checkpoint_every,
        failure: args.failures.clone(),
        price,
        owned: args.own,
        ..Ask::new(trained, today)
    }))
}

fn objective_of(args: &Economy) -> Objective {
    Objective::ALL.into_iter().find(|o| o.name() == args.objective).unwrap_or_default()
}

fn ramp(text: Option<&str>) -> Result<Vec<Ramp>> {
    let parts = text.unwrap_or_default().split(',').filter(|p| !p.trim().is_empty());
    let stage = |part: &str| {
        let (batch, until) = part.split_once(':').ok_or_else(|| {
            Error::user(format!("--ramp {part}, expected BATCH:UNTIL")).hint("write it like 4M:252M,8M:2.87T")
        })?;
        Ok(Ramp { batch_tokens: tokens("--ramp", batch)?, until_tokens: tokens("--ramp", until)? })
    };
    parts.map(stage).collect()
}

/// The size and run that the flags ask for.
pub(crate) fn choose(catalog: &Catalog, answer: Answer, args: &Plan, ask: &Ask) -> Result<Chosen> {
    let calibration = files::calibration(args.calibration.as_deref())?;
    let cluster = args.cluster.clone();
    let resize = |n: usize| catalog.cluster(&cluster, Some(n));
    let objective = objective_of(&args.economy);
    if let Some(region) = &args.economy.region {
        known_region(catalog, region)?;
    }
    objective::choose(catalog, &calibration, answer, &resize, ask, objective, args.economy.within)
}

/// A grid of the catalogue, or a region that a price names.
pub(crate) fn known_region(catalog: &Catalog, region: &str) -> Result<()> {
    let named = |l: spec::catalog::Listed| {
        catalog.get(spec::EntryKind::Price, &l.name).is_ok_and(|e| e.text("region") == Some(region))
    };
    if catalog.list(Some(spec::EntryKind::Price)).into_iter().any(named) {
        return Ok(());
    }
    economics::energy::Grid::named(catalog, region).map(drop).map_err(|e| {
        Error::user(format!("unknown region \"{region}\""))
            .hint(e.hint_text().unwrap_or("`phalanx catalog list grid` shows all").to_owned())
    })
}

/// Puts the run into a plan's JSON.
pub(crate) fn add_json(json: &mut Value, chosen: &Chosen) {
    json["run"] = serde_json::to_value(&chosen.run).expect("numbers are JSON");
    if let Some(job) = chosen.run.job() {
        let curve = job.curve(chosen.run.recovery.recovery, CURVE_POINTS);
        json["run"]["goodput_by_interval"] = serde_json::to_value(curve).expect("numbers are JSON");
    }
    json["objective"] = json!({ "for": chosen.objective, "sizes": chosen.sizes });
}

/// A month: what is saved less often is saved never.
const CHECKPOINT_EVERY_MAX_S: f64 = 30.0 * 86_400.0;
