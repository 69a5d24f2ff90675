//! What a terminal shows of runs: pure, from what is known to lines.

use dash::curve::Series;
use dash::ranks::{Rank, stragglers};
use dash::run::{Run, State};
use dash::view::{eta_s, is_alive, ranks_alive};
use indicatif::HumanBytes;

/// Eighths of a row.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// A run in a line.
pub(super) fn line(run: &Run, now_us: u64) -> String {
    let mut parts = vec![run.name.clone(), state(run, now_us)];
    if let Some(l) = &run.latest {
        let of = run.steps_wanted.map(|n| format!("/{n}")).unwrap_or_default();
        let [loss, norm, lr, tokens_per_s, mfu, memory, step_s, ..] = l.values;
        parts.push(format!("step {}{of}", l.at.step));
        parts.push(format!("loss {loss:.4}"));
        parts.push(format!("norm {norm:.3}"));
        parts.push(format!("lr {lr:.2e}"));
        parts.push(format!("{tokens_per_s:.0} tokens/s"));
        if mfu.is_finite() {
            parts.push(format!("mfu {:.1} %", 100.0 * mfu));
        }
        parts.push(format!("step {:.3} s", step_s));
        parts.push(format!("memory {}", HumanBytes(memory as u64)));
    }
    if let Some((step, loss)) = run.evaluated {
        parts.push(format!("held out {loss:.4} at {step}"));
    }
    if let Some(eta) = eta_s(run) {
        parts.push(format!("eta {}", time(eta)));
    }
    parts.join("  ")
}

/// All runs on a screen of so many columns and rows.
pub(super) fn screen(runs: &[Run], now_us: u64, columns: usize, rows: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let share = rows.saturating_sub(1) / runs.len().max(1);
    for run in runs {
        lines.extend(block(run, now_us, columns, share));
    }
    lines.truncate(rows.saturating_sub(1));
    lines.push("Ctrl-C ends; phalanx dash shows more".to_owned());
    lines.iter().map(|l| cut(l, columns)).collect()
}

/// A run in at most `rows` lines.
fn block(run: &Run, now_us: u64, columns: usize, rows: usize) -> Vec<String> {
    let mut lines = vec![format!("{}  {}", run.name, state(run, now_us))];
    let all = line(run, now_us);
    // What the first line says already.
    let said = all.splitn(3, "  ").nth(2).unwrap_or_default();
    lines.extend(wrap(said, columns));
    let mut more = vec![];
    if let Some(wanted) = run.steps_wanted.filter(|n| *n > 0) {
        more.push(bar(run.latest.map_or(0, |l| l.at.step) as f64 / wanted as f64, columns.min(60)));
    }
    let curves = run.curves(columns.saturating_sub(24).clamp(8, 100));
    for name in ["loss", "tokens_per_s"] {
        if let Some(series) = curves.series.iter().find(|s| s.name == name) {
            more.push(spark(series));
        }
    }
    for s in stragglers(run.ranks.values()).iter().take(2) {
        more.push(format!("slow: rank {} {}", s.rank, s.why));
    }
    more.extend(
        run.notes
            .iter()
            .rev()
            .filter(|n| n.kind != "sample")
            .take(2)
            .map(|n| format!("step {} {}: {}", n.step, n.kind, n.text.replace('\n', " "))),
    );
    let left = rows.saturating_sub(lines.len());
    lines.extend(more.into_iter().take(left));
    let left = rows.saturating_sub(lines.len());
    if run.ranks.len() > 1 && left > 1 {
        lines.extend(ranks(run, now_us, left));
    }
    lines
}

fn state(run: &Run, now_us: u64) -> String {
    let ranks = run.ranks.len() + run.ranks_unread;
    let alive = ranks_alive(run, now_us);
    match run.state {
        State::Empty => "no record yet".to_owned(),
        State::Finished => "finished".to_owned(),
        State::Failed => "FAILED".to_owned(),
        State::Running => match run.ranks.get(&0) {
            Some(r) if !is_alive(r, now_us) => {
                format!("SILENT for {}", time(now_us.saturating_sub(r.time_us) as f64 / 1e6))
            }
            _ if ranks > 1 => format!("running, {alive} of {ranks} ranks"),
            _ => "running".to_owned(),
        },
    }
}

/// Ranks with what they do and wait for, those that wait least first.
fn ranks(run: &Run, now_us: u64, rows: usize) -> Vec<String> {
    let mut all: Vec<&Rank> = run.ranks.values().collect();
    all.sort_by(|a, b| b.busy_s().total_cmp(&a.busy_s()).then(a.rank.cmp(&b.rank)));
    let most = all.iter().map(|r| r.step_s).fold(1e-9, f64::max);
    let mut lines =
        vec![format!("{:>6} {:>9} {:>10} {:>10}  # computes, . waits", "rank", "step", "computes", "waits")];
    let room = rows.saturating_sub(1);
    let shown = if all.len() > room { room.saturating_sub(1) } else { all.len() };
    for r in all.iter().take(shown) {
        let width = |s: f64| (20.0 * s / most).round() as usize;
        let axes: String = r.waits_s.iter().map(|(a, s)| format!(" {a} {}", time(*s))).collect();
        let silent = if run.state == State::Running && !is_alive(r, now_us) { " SILENT" } else { "" };
        lines.push(format!(
            "{:>6} {:>9} {:>10} {:>10}  {}{}{axes}{silent}",
            r.rank,
            r.step,
            time(r.busy_s()),
            time(r.wait_s),
            "#".repeat(width(r.busy_s())),
            ".".repeat(width(r.wait_s)),
        ));
    }
    if shown < all.len() + run.ranks_unread {
        lines.push(format!("       {} more ranks", all.len() + run.ranks_unread - shown));
    }
    lines
}

fn spark(series: &Series) -> String {
    let values: Vec<f32> = series.mean.iter().flatten().copied().collect();
    let (least, most) =
        values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    let height = |v: f32| if most > least { (v - least) / (most - least) } else { 0.5 };
    let drawn: String = values.iter().map(|v| BLOCKS[((height(*v) * 7.0).round() as usize).min(7)]).collect();
    let name = series.name.replace('_', " ").replace(" per s", "/s");
    format!("{name:<9} {drawn} {}", short(f64::from(*values.last().unwrap_or(&0.0))))
}

fn short(v: f64) -> String {
    if v.abs() >= 1000.0 { format!("{v:.0}") } else { format!("{v:.4}") }
}

fn bar(share: f64, columns: usize) -> String {
    let width = columns.saturating_sub(10);
    let done = ((share.clamp(0.0, 1.0) * width as f64) as usize).min(width);
    format!("[{}{}] {:.1} %", "=".repeat(done), " ".repeat(width - done), 100.0 * share)
}

fn time(s: f64) -> String {
    match s {
        s if s >= 3600.0 => format!("{}:{:02} h", s as u64 / 3600, s as u64 / 60 % 60),
        s if s >= 60.0 => format!("{}:{:02} min", s as u64 / 60, s as u64 % 60),
        s if s >= 1.0 || s == 0.0 => format!("{s:.2} s"),
        s => format!("{:.2} ms", 1e3 * s),
    }
}

/// Parts that are two blanks apart, as many on a line as fit.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for part in text.split("  ").filter(|p| !p.is_empty()) {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 2 + part.chars().count() <= columns => {
                line.push_str("  ");
                line.push_str(part);
            }
            _ => lines.push(part.to_owned()),
        }
    }
    lines
}

fn cut(line: &str, columns: usize) -> String {
    line.chars().filter(|c| !c.is_control()).take(columns).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use journal::Record;
    use journal::line::Line;
    use journal::tail::Found;

    use super::*;

    fn step(n: u64, wait_s: f64) -> Record {
        Record::Step(journal::Step {
            time_us: 1_000_000 * n,
            step: n,
            loss: 3.0 / n as f64,
            grad_norm: 1.0,
            lr: 0.1,
            tokens: 10 * n,
            valid_tokens: 10,
            tokens_per_s: 1234.5,
            mfu: Some(0.5),
            step_s: 1.0,
            memory_bytes: 1 << 20,
            exposed_comm_s: Some(wait_s),
            waits_s: BTreeMap::from([("tp".to_owned(), wait_s)]),
            ..journal::Step::default()
        })
    }

    fn run(ranks: usize) -> Run {
        let mut run = Run::new("demo".into(), "demo".into());
        run.steps_wanted = Some(40);
        run.state = State::Running;
        for n in 1..=20 {
            let found = |record| Found { offset: 100 * n, len: 100, line: Line::Record(record) };
            run.observe(&found(step(n, 0.5)));
            (1..ranks).for_each(|r| run.observe_rank(r, &found(step(n, if r == 2 { 0.0 } else { 0.5 }))));
        }
        run
    }

    #[test]
    fn every_screen_fits_its_terminal() {
        let runs = [run(5), run(1), Run::new("empty".into(), "e".into())];
        for (columns, rows) in [(80, 24), (20, 5), (200, 60), (1, 1), (40, 0)] {
            for n in 0..=runs.len() {
                let lines = screen(&runs[..n], 20_000_000, columns, rows);
                assert!(lines.len() <= rows.max(1), "{columns}x{rows}: {lines:#?}");
                assert!(lines.iter().all(|l| l.chars().count() <= columns), "{columns}x{rows}: {lines:#?}");
            }
        }
    }

    #[test]
    fn a_screen_says_what_the_journal_says() {
        let text = screen(&[run(5)], 20_000_000, 100, 40).join("\n");
        for said in [
            "demo  running, 5 of 5 ranks",
            "step 20/40",
            "loss 0.1500",
            "50.0 %",
            "slow: rank 2",
            "eta 20.00 s",
        ] {
            assert!(text.contains(said), "{said} in\n{text}");
        }
        let first = text.lines().skip_while(|l| !l.contains("computes, . waits")).nth(1).unwrap_or_default();
        assert!(first.trim_start().starts_with("2 "), "who keeps others waiting comes first: {first}");
        let later = screen(&[run(1)], 200_000_000, 100, 40).join("\n");
        assert!(later.contains("SILENT for 3:00 min"), "{later}");
    }

    #[test]
    fn a_line_holds_all() {
        assert_eq!(
            line(&run(1), 20_000_000),
            "demo  running  step 20/40  loss 0.1500  norm 1.000  lr 1.00e-1  1234 tokens/s  mfu 50.0 %  step 1.000 s  \
             memory 1.00 MiB  eta 20.00 s"
        );
        assert_eq!(line(&Run::new("e".into(), "e".into()), 0), "e  no record yet");
    }
}
