//! Answers as text: a table over concurrency, the knee, memory and what was assumed.

use std::fmt::Write as _;

use inference::answer::{Answer, Load};

pub(super) fn answer(a: &Answer) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = head(&mut out, a);
    let _ = table(&mut out, a);
    let _ = memory(&mut out, a);
    let _ = writeln!(out, "\nassumed");
    for assumption in &a.assumptions {
        let _ = writeln!(out, "  {assumption}");
    }
    out
}

fn head(out: &mut String, a: &Answer) -> std::fmt::Result {
    writeln!(
        out,
        "{}: {:.1}B parameters in {} on {} x {}, {} of tp={}, {}",
        a.model,
        a.params / 1e9,
        a.weights,
        a.accelerators,
        a.accelerator,
        if a.replicas == 1 { "one replica".to_owned() } else { format!("{} replicas", a.replicas) },
        a.tp,
        a.stack
    )?;
    let knee = a.curve.iter().find(|l| l.concurrency == a.knee);
    let knee = knee.map_or_else(String::new, |l| {
        let usd = l.usd_per_million_tokens.map_or_else(String::new, |usd| format!(", ${usd:.2} a million"));
        format!(
            "knee at {} clients: {:.0} tokens/s, {:.1} ms between tokens{usd}",
            l.concurrency, l.tokens_per_s, l.itl_ms
        )
    });
    writeln!(out, "requests of {} + {} tokens; {knee}", a.traffic.input, a.traffic.output)
}

fn table(out: &mut String, a: &Answer) -> std::fmt::Result {
    let loads: &[Load] = if a.loads.is_empty() { &a.curve } else { &a.loads };
    writeln!(
        out,
        "\n  {:>8} {:>12} {:>10} {:>11} {:>11} {:>11} {:>9}  most of a pass",
        "clients", "first token", "between", "request", "tokens/s", "each", "$/M"
    )?;
    for l in loads {
        let usd = l.usd_per_million_tokens.map_or_else(|| "-".to_owned(), |usd| format!("{usd:.2}"));
        writeln!(
            out,
            "  {:>8} {:>12} {:>10} {:>11} {:>11.0} {:>11.1} {:>9}  {}",
            l.concurrency,
            time(l.ttft_ms),
            time(l.itl_ms),
            time(l.latency_s * 1e3),
            l.tokens_per_s,
            l.tokens_per_s_per_accelerator,
            usd,
            l.bound
        )?;
    }
    match &a.price {
        Some(p) => writeln!(
            out,
            "  $ for a million generated tokens at {} an accelerator and hour ({})",
            p.usd_per_accelerator_hour, p.source
        ),
        None => writeln!(out, "  no price of {} is known: give --price", a.accelerator),
    }
}

fn memory(out: &mut String, a: &Answer) -> std::fmt::Result {
    let gb = |bytes: f64| format!("{:.1} GB", bytes / 1e9);
    let m = &a.memory;
    writeln!(
        out,
        "\nmemory of each: {} of weights, {} of working space, {} for the cache of {} requests ({} tokens, {:.1} KB each, {})",
        gb(m.weights_bytes),
        gb(m.working_bytes),
        gb(m.room_bytes - m.weights_bytes - m.working_bytes),
        a.requests_max / a.replicas,
        a.traffic.input + a.traffic.output,
        m.cache_token_bytes / 1e3,
        a.cache
    )
}

fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms if ms < 1e5 => format!("{:.2} s", ms / 1e3),
        ms => format!("{:.0} s", ms / 1e3),
    }
}
