//! Serving: what clients see against what the machine gives, and what a pass and the memory go to.

use inference::answer::{Answer, Load};
use inference::pass::PassTime;

use super::Figure;
use super::bars::{FREE, bars, held};
use super::frontier::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, axes, ends};
use crate::svg::{Anchor, Scale, Svg};
use crate::table::{Cell, Table};
use crate::text::{bytes, count, digits, dollars, percent, seconds};

/// An axis of a chart over the curve's loads: what it shows of one, and how its ticks read.
struct Axis<'a> {
    scale: Scale,
    name: &'a str,
    of: &'a dyn Fn(&Load) -> f64,
    shown: &'a dyn Fn(f64) -> String,
}

/// A dot with its clients for each load of the curve; the knee's is filled.
fn curve(a: &Answer, x: &Axis<'_>, y: &Axis<'_>) -> Svg {
    let mut svg = Svg::new(HEIGHT);
    axes(&mut svg, (&x.scale, x.name, x.shown), (&y.scale, y.name, y.shown));
    let at = |l: &Load| (x.scale.at((x.of)(l)), y.scale.at((y.of)(l)));
    svg.curve(&a.curve.iter().map(at).collect::<Vec<_>>(), "front");
    for (i, l) in a.curve.iter().enumerate() {
        let class = if l.concurrency == a.knee { "dot chosen" } else { "dot" };
        let clients = count(l.concurrency as f64);
        let (cx, cy) = at(l);
        svg.circle(cx, cy, 6.0, class, Some(i), &format!("{clients} clients: {}", (y.shown)((y.of)(l))));
        svg.text(cx + 10.0, cy - 6.0, Anchor::Start, "value", &clients);
    }
    svg
}

/// Time of a request against tokens per second, from one client to as many as fit.
pub(crate) fn load_curve(a: &Answer) -> Figure {
    let (x_low, x_high) = ends(a.curve.iter().map(|l| l.tokens_per_s), 1.15);
    let (y_low, y_high) = ends(a.curve.iter().map(|l| l.latency_s), 1.25);
    let x = Scale::log(x_low, x_high, LEFT, RIGHT);
    let y = Scale::log(y_low, y_high, BOTTOM, TOP);
    let svg = curve(
        a,
        &Axis {
            scale: x,
            name: "tokens generated a second, all clients together",
            of: &|l| l.tokens_per_s,
            shown: &count,
        },
        &Axis { scale: y, name: "time of a request", of: &|l| l.latency_s, shown: &seconds },
    );
    let says = match (a.curve.iter().find(|l| l.concurrency == a.knee), a.curve.last()) {
        (Some(knee), Some(full)) => format!(
            "The knee is at {} clients: {} tokens a second, a request in {}. Full, with {} clients, the machine gives {} times \
             as much and a request takes {} times as long.",
            count(knee.concurrency as f64),
            count(knee.tokens_per_s),
            seconds(knee.latency_s),
            count(full.concurrency as f64),
            digits(full.tokens_per_s / knee.tokens_per_s, 3),
            digits(full.latency_s / knee.latency_s, 3)
        ),
        _ => String::new(),
    };
    let title = "Latency against throughput, by clients at once";
    let drawing = svg.finish("load-curve", title, &says);
    Figure { id: "load-curve", title: title.to_owned(), says, drawing, table: loads(&a.curve, a.knee) }
}

/// Loads as rows.
pub(crate) fn loads(of: &[Load], knee: usize) -> Table {
    let mut table = Table::new(&[
        "clients",
        "first token",
        "between tokens",
        "request",
        "tokens/s",
        "each accelerator",
        "a million tokens",
        "most of a pass",
    ]);
    for l in of {
        let which = if l.concurrency == knee { format!("{}, the knee", l.bound) } else { l.bound.to_owned() };
        table.row(vec![
            Cell::number(l.concurrency as f64, count),
            Cell::number(l.ttft_ms / 1e3, seconds),
            Cell::number(l.itl_ms / 1e3, seconds),
            Cell::number(l.latency_s, seconds),
            Cell::number(l.tokens_per_s, count),
            Cell::number(l.tokens_per_s_per_accelerator, |x| digits(x, 3)),
            l.usd_per_million_tokens.map_or(Cell::words("-"), |usd| Cell::number(usd, dollars)),
            Cell::words(which),
        ]);
    }
    table
}

/// Dollars for a million tokens over clients, where a price is known.
pub(crate) fn token_cost(a: &Answer) -> Option<Figure> {
    let usd = |l: &Load| l.usd_per_million_tokens.unwrap_or(f64::NAN);
    let price = a.price.as_ref()?;
    let (x_low, x_high) = ends(a.curve.iter().map(|l| l.concurrency as f64), 1.15);
    let (y_low, y_high) = ends(a.curve.iter().map(usd), 1.25);
    let x = Scale::log(x_low, x_high, LEFT, RIGHT);
    let y = Scale::log(y_low, y_high, BOTTOM, TOP);
    let svg = curve(
        a,
        &Axis { scale: x, name: "clients at once", of: &|l| l.concurrency as f64, shown: &count },
        &Axis { scale: y, name: "dollars for a million generated tokens", of: &usd, shown: &dollars },
    );
    let mut table = Table::new(&["clients", "a million tokens", "a request"]);
    for l in &a.curve {
        let request = usd(l) * a.traffic.output as f64 / 1e6;
        table.row(vec![
            Cell::number(l.concurrency as f64, count),
            Cell::number(usd(l), dollars),
            Cell::number(request, |x| format!("${}", digits(x, 3))),
        ]);
    }
    let knee = a.curve.iter().find(|l| l.concurrency == a.knee)?;
    let full = a.curve.last()?;
    let says = format!(
        "At {} an accelerator and hour a million generated tokens cost {} at the knee and {} when full; prompts are in the price.",
        dollars(price.usd_per_accelerator_hour),
        dollars(usd(knee)),
        dollars(usd(full))
    );
    let title = "What a million tokens cost, by clients at once";
    let drawing = svg.finish("token-cost", title, &says);
    Some(Figure { id: "token-cost", title: title.to_owned(), says, drawing, table })
}

/// Where the time of a decoding pass goes at the knee, and of the pass of a prompt alone.
pub(crate) fn passes(a: &Answer) -> Vec<Figure> {
    let knee = a.curve.iter().find(|l| l.concurrency == a.knee);
    let decode = knee.map(|l| {
        let title = "Where a decoding pass goes, at the knee";
        pass(
            "decode",
            title,
            &l.replica.decode,
            &format!("A token for each of {} requests", l.replica.running),
        )
    });
    let prompt = format!("A prompt of {} tokens alone", count(a.traffic.input as f64));
    decode.into_iter().chain([pass("prefill", "Where a prompt's pass goes", &a.prefill, &prompt)]).collect()
}

fn pass(id: &'static str, title: &str, time: &PassTime, what: &str) -> Figure {
    let total = time.total_s();
    let mut parts = time.parts().to_vec();
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut table = Table::new(&["part of the pass", "time", "share"]);
    let mut rows = Vec::new();
    for (name, s) in parts.into_iter().filter(|p| p.1 > 0.0) {
        rows.push((name.to_owned(), s, format!("{} ({})", seconds(s), percent(s / total))));
        table.row(vec![Cell::words(name), Cell::number(s, seconds), Cell::number(s / total, percent)]);
    }
    table.row(vec![Cell::words("in all"), Cell::number(total, seconds), Cell::number(1.0, percent)]);
    let says = format!("{what}: {}, most of it in {}.", seconds(total), time.bound());
    let drawing = bars(&rows, 0).finish(id, title, &says);
    Figure { id, title: title.to_owned(), says, drawing, table }
}

/// What an accelerator holds when as many requests run as fit. `there` are the bytes that it has.
pub(crate) fn serving_memory(a: &Answer, there: f64) -> Figure {
    let m = &a.memory;
    let requests = a.requests_max / a.replicas;
    let cache = requests as f64 * m.cache_request_bytes;
    let parts = [
        ("weights", m.weights_bytes),
        ("working space", m.working_bytes),
        ("cache", cache),
        ("kept by the stack", (there - m.room_bytes).max(0.0)),
        (FREE, (m.room_bytes - m.weights_bytes - m.working_bytes - cache).max(0.0)),
    ];
    let (svg, table) = held(&parts, there);
    let says = format!(
        "Beside the weights, {} of cache take {} requests of {} tokens at once, {} a token on each accelerator in {}.",
        bytes(cache),
        count(requests as f64),
        count((a.traffic.input + a.traffic.output) as f64),
        bytes(m.cache_token_bytes),
        a.cache
    );
    let drawing = svg.finish("serving-memory", "Memory of each accelerator", &says);
    Figure { id: "serving-memory", title: "What each accelerator holds".to_owned(), says, drawing, table }
}
