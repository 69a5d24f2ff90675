//! `phalanx inference`.

mod text;

use std::path::Path;

use economics::price::{Ask, quote};
use inference::answer::{Price, Question, answer, usual_cache};
use inference::format::{Cache, Weights};
use inference::memory::Memory;
use inference::pass::Engine;
use inference::serve::Traffic;
use inference::stack::Stack;
use plan::shape::Shape;
use report::inference_page::inference_page;
use spec::{Catalog, Cluster, Error, Result};

use crate::args::Inference;
use crate::economy::today;
use crate::{files, output, planner};

pub(crate) fn run(args: &Inference) -> Result<u8> {
    let page = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let catalog = files::catalog(&args.catalog)?;
    let (question, priced) = question(args, &catalog)?;
    let answer = answer(&question)?;
    if let Some(page) = page {
        page.commit(&inference_page(&answer, &question.cluster, &catalog, priced.as_deref()))?;
    }
    output::print(&if args.json {
        serde_json::to_string_pretty(&answer).expect("numbers are JSON")
    } else {
        text::answer(&answer)
    });
    Ok(0)
}

/// What is asked, and the name of the price in the catalogue where one was taken.
fn question(args: &Inference, catalog: &Catalog) -> Result<(Question, Option<String>)> {
    let shape = model(&args.model)?;
    let weights = Weights::parse(&args.weights)?;
    let cache = args.cache.as_deref().map(Cache::parse).transpose()?;
    let stack = Stack::named(&args.stack)?;
    let traffic = Traffic { input: args.input, output: args.output };
    for (flag, n) in [
        ("accelerators", args.accelerators),
        ("tp", args.tp),
        ("input", Some(args.input)),
        ("output", Some(args.output)),
    ] {
        if n == Some(0) {
            return Err(Error::user(format!("--{flag} 0, expected at least 1"))
                .hint(format!("give --{flag} a number from 1")));
        }
    }
    let tp = match args.tp {
        Some(tp) => tp,
        None => smallest(args, catalog, &shape, weights, cache, &stack, traffic)?,
    };
    let cluster = catalog.cluster(&args.cluster, Some(args.accelerators.unwrap_or(tp)))?;
    let (price, priced) = match args.price {
        Some(usd) => (Some(Price { usd_per_accelerator_hour: usd, source: "--price".to_owned() }), None),
        None => price(catalog, &cluster)?.unzip(),
    };
    let question = Question {
        shape,
        cluster,
        tp,
        weights,
        cache,
        stack,
        traffic,
        concurrency: args.concurrency.clone(),
        queue: args.queue,
        price,
    };
    Ok((question, priced))
}

/// A file, or a name of the catalogue with the endings that serving's tables give it.
fn model(name: &str) -> Result<Shape> {
    let file = Path::new(name).extension().is_some_and(|e| e == "json" || e == "toml");
    if file { planner::model(name) } else { planner::model(name).or_else(|_| inference::models::find(name)) }
}

/// The fewest accelerators whose memory takes the weights and a request.
fn smallest(
    args: &Inference,
    catalog: &Catalog,
    shape: &Shape,
    weights: Weights,
    cache: Option<Cache>,
    stack: &Stack,
    traffic: Traffic,
) -> Result<usize> {
    let cluster = catalog.cluster(&args.cluster, args.accelerators)?;
    let cache = cache.unwrap_or(usual_cache(weights, stack));
    let most = args.accelerators.unwrap_or(cluster.accelerators).min(shape.heads);
    let mut last = None;
    let sizes = std::iter::successors(Some(1usize), |n| n.checked_mul(2)).take_while(|n| *n <= most);
    let allowed = |n: &usize| {
        shape.heads.is_multiple_of(*n) && args.accelerators.is_none_or(|all| all.is_multiple_of(*n))
    };
    for tp in sizes.filter(allowed) {
        let engine = Engine::new(shape, &cluster, tp, weights, cache, stack)?;
        let (input, output) = (traffic.input as f64, traffic.output as f64);
        match Memory::of(&engine, &cluster.accelerator, shape.tied_embeddings, input, output) {
            Ok(_) => {
                output::say(&format!("--tp {tp}: the fewest accelerators that hold {}", shape.model.name));
                return Ok(tp);
            }
            Err(e) => last = Some(e),
        }
    }
    Err(last.unwrap_or_else(|| Error::failure("no accelerators to serve on")))
}

/// What the platform asks for an accelerator and hour on demand, or what stands in for it, as a plan's run is priced, with its
/// name; `None` where nobody publishes one.
fn price(catalog: &Catalog, cluster: &Cluster) -> Result<Option<(Price, String)>> {
    let Ok(quote) = quote(catalog, cluster, &Ask::default(), today(None)?) else { return Ok(None) };
    let usd = quote.usd_per_accelerator_h;
    let price = Price {
        usd_per_accelerator_hour: usd.value,
        source: format!("{} on demand of {}, {} to {}", quote.name, quote.date, usd.low, usd.high),
    };
    Ok(Some((price, quote.name)))
}
