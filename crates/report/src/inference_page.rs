//! The page of an answer about serving.

use inference::answer::{Answer, Load};
use serde_json::json;
use spec::{Catalog, Cluster, EntryKind};

use crate::figures;
use crate::page::Page;
use crate::sources::{facts_table, list};
use crate::text::{bytes, count, digits, dollars, seconds};

/// The whole page. `cluster` is the machine that serves, `catalog` says where the facts about it come from, and `price` is
/// the name of the price taken, where the catalogue has it.
pub fn inference_page(a: &Answer, cluster: &Cluster, catalog: &Catalog, price: Option<&str>) -> String {
    let title = format!("Serving {} on {} of {}", a.model, count(a.accelerators as f64), a.accelerator);
    let knee = a.curve.iter().find(|l| l.concurrency == a.knee);
    let mut page = Page::new(&title, &knee.map_or_else(String::new, |l| sentence(a, l)));
    page.facts(&facts(a, knee));

    page.section("load", "Clients");
    page.figure(&figures::load_curve(a));
    if !a.loads.is_empty() {
        let table = figures::loads(&a.loads, a.knee).html("The loads asked for");
        page.html(&format!(
            "<figure id=\"loads\"><h3>The loads asked for</h3><div class=\"rows\" tabindex=\"0\" role=\"region\" aria-label=\"The loads asked for\">{table}</div></figure>"
        ));
    }
    page.section("money", "The money");
    match figures::token_cost(a) {
        Some(figure) => page.figure(&figure),
        None => page.html("<p class=\"says\" id=\"no-price\">Nobody quotes a price for this machine.</p>"),
    }
    page.section("pass", "A pass");
    figures::passes(a).iter().for_each(|f| page.figure(f));
    page.section("memory", "Memory");
    page.figure(&figures::serving_memory(a, cluster.accelerator.memory_bytes.value));

    page.section("assumed", "What was assumed, and from where");
    let mut assumed = a.assumptions.clone();
    if let Some(p) = &a.price {
        assumed.push(format!(
            "price: {} an accelerator and hour, {}",
            dollars(p.usd_per_accelerator_hour),
            p.source
        ));
    }
    page.html(&list(&assumed));
    let mut entries = vec![
        (EntryKind::Accelerator, cluster.accelerator.name.as_str()),
        (EntryKind::Fabric, cluster.scale_out.fabric.as_str()),
    ];
    entries.extend(price.map(|name| (EntryKind::Price, name)));
    page.html(&facts_table(catalog, &entries));
    page.finish(&json!(a))
}

/// The answer for those who read no further.
fn sentence(a: &Answer, knee: &Load) -> String {
    let paid = knee.usd_per_million_tokens.map_or_else(
        || " Nobody quotes a price for this machine.".to_owned(),
        |usd| format!(" A million generated tokens cost {}.", dollars(usd)),
    );
    format!(
        "{} in {} on {} {} serves {} clients at the knee of its curve: {} tokens a second, the first after {}, then one every \
         {}.{paid}",
        a.model,
        a.weights,
        count(a.accelerators as f64),
        a.accelerator,
        count(knee.concurrency as f64),
        count(knee.tokens_per_s),
        seconds(knee.ttft_ms / 1e3),
        seconds(knee.itl_ms / 1e3)
    )
}

fn facts(a: &Answer, knee: Option<&Load>) -> Vec<(String, String)> {
    let mut out = vec![(count(a.requests_max as f64), "requests fit at once".to_owned())];
    if let Some(l) = knee {
        out.push((seconds(l.latency_s), "a request at the knee".to_owned()));
        out.push((
            digits(l.tokens_per_s_per_accelerator, 3),
            "tokens a second of each accelerator".to_owned(),
        ));
    }
    if let Some(first) = a.curve.first() {
        out.push((seconds(first.itl_ms / 1e3), "between tokens for a client alone".to_owned()));
    }
    out.push((bytes(a.memory.weights_bytes), "of weights on each accelerator".to_owned()));
    out.push((a.stack.clone(), "serves".to_owned()));
    out
}
