//! `phalanx decide`.

use std::fmt::Write as _;

use economics::decide::{Assumptions, Decision, Key, Phase, decide, profile};
use economics::{HOURS_PER_MONTH, Spread};
use spec::{Error, Result};

use crate::args::Decide;
use crate::{economy, files, output};

/// Bars shown of the tornado.
const BARS: usize = 10;

pub(crate) fn run(args: &Decide) -> Result<u8> {
    if let Some(path) = args.write.as_deref().filter(|path| path.is_file() && !args.force) {
        return Err(Error::user(format!(
            "--write {}: there is a file, perhaps an edited one",
            path.display()
        ))
        .hint("name another, or replace it with --force"));
    }
    let page = args.html.as_deref().map(|path| files::Pending::create("--html", path)).transpose()?;
    let mut assumptions = match &args.file {
        Some(path) => {
            let name = path.display().to_string();
            let read = Assumptions::parse(&name, &files::read(path)?)?;
            read.check_machine(&files::catalog(&args.catalog)?).map_err(|e| e.context(&name))?;
            read
        }
        None => of_catalogue(args)?,
    };
    assumptions.data_may_leave &= !args.private;
    let text = assumptions.to_toml();
    let decision = decide(assumptions)?;
    if let Some(page) = page {
        page.commit(&report::decide_page::decide_page(&decision))?;
    }
    if let Some(path) = &args.write {
        files::write("--write", path, &text)?;
        output::say(&format!("assumptions in {}; edit them and run: phalanx decide {0}", path.display()));
    }
    if args.json {
        output::print(&serde_json::to_string_pretty(&decision).expect("numbers are JSON"));
    } else {
        output::print(&shown(&decision));
    }
    Ok(0)
}

fn of_catalogue(args: &Decide) -> Result<Assumptions> {
    let catalog = economy::catalog(&args.catalog, args.price.as_deref())?;
    let ask = economy::price_ask(args.price.as_deref(), args.commitment.as_deref(), args.region.as_deref())?;
    if let Some(region) = &args.region {
        economy::known_region(&catalog, region)?;
    }
    let demand = demand(args)?;
    let cluster = catalog.cluster(&args.platform, None)?;
    Assumptions::of(&catalog, &cluster, &ask, demand, economy::today(args.today.as_deref())?)
}

/// Share of the time where nothing is said: what large clusters reach (RSC-1 and RSC-2: 83 and 85 %).
const UTILISATION_USUAL: f64 = 0.84;

fn demand(args: &Decide) -> Result<Vec<Phase>> {
    if let Some(text) = &args.profile {
        return profile(text);
    }
    let (months, accelerators) = (args.months, args.accelerators);
    let utilisation = match &args.hours {
        None => args.utilisation.unwrap_or(UTILISATION_USUAL),
        Some(text) => {
            let hours = spec::units::tokens(text).filter(|h| *h > 0.0).ok_or_else(|| {
                Error::user(format!("--hours {text}, expected a number of accelerator-hours"))
                    .hint("write it like 2.5M; `phalanx plan --tokens` says run.accelerator_hours")
            })?;
            let there = accelerators as f64 * months as f64 * HOURS_PER_MONTH;
            if hours > there {
                let what =
                    format!("--hours {text}: {accelerators} accelerators have {there:.0} in {months} months");
                return Err(Error::user(what).hint("give more --accelerators or --months"));
            }
            hours / there
        }
    };
    let demand = vec![Phase { months, accelerators, utilisation }];
    economics::decide::check_demand(&demand)?;
    Ok(demand)
}

fn shown(d: &Decision) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut out, d);
    out
}

/// Share of the time; above 1 nothing pays.
fn percent(x: f64) -> String {
    if x <= 1.0 { format!("{:.0} %", 100.0 * x) } else { "never".to_owned() }
}

fn percents(s: Spread) -> String {
    format!("{} ({} to {})", percent(s.value), percent(s.low), percent(s.high))
}

fn write(out: &mut String, d: &Decision) -> std::fmt::Result {
    let a = &d.assumptions;
    writeln!(
        out,
        "{}: {} of {} for {:.0} accelerator-hours over {} months",
        d.choice.name(),
        a.accelerator,
        a.platform,
        d.accelerator_hours,
        a.months()
    )?;
    for reason in &d.reasons {
        writeln!(out, "  {reason}")?;
    }
    writeln!(out, "\nwhat it costs, in money of today")?;
    for o in &d.options {
        writeln!(out, "  {:<12} {}", o.way.name(), o.cost.total)?;
        if let (Some(n), Some(month), Some(u), Some(bought), Some(left)) =
            (o.accelerators, o.move_month, o.utilisation, o.bought_usd, o.left_usd)
        {
            writeln!(
                out,
                "               {n} accelerators from month {month}, {} in use; bought for {bought}, {left} left at the end",
                percent(u)
            )?;
        }
    }
    if let Some(best) = d.options.first() {
        writeln!(out, "\nwhere {} goes", best.way.name())?;
        economy::text::bill(out, &best.cost)?;
    }
    writeln!(out, "\nrejected")?;
    for r in &d.rejected {
        writeln!(out, "  {:<12} {}", r.way.name(), r.why)?;
    }
    break_evens(out, d)?;
    prices(out, d)?;
    tornado(out, d)
}

fn break_evens(out: &mut String, d: &Decision) -> std::fmt::Result {
    writeln!(
        out,
        "\nbreak-even utilisation, from which owning is cheaper (the guide says {} of all)",
        percent(d.guide_break_even)
    )?;
    writeln!(
        out,
        "  {:<20} {:>12}   machines that run for good    bought now, over these months",
        "against", "an hour"
    )?;
    for b in &d.break_even {
        writeln!(
            out,
            "  {:<20} {:>12}   {:<28}  {}",
            b.against.name(),
            format!("${:.2}", b.usd_per_h.value),
            percents(b.utilisation),
            b.over_profile.map_or("they would come too late".to_owned(), percents)
        )?;
    }
    Ok(())
}

/// What the answer rests on most, with source and age; --write gives all of it.
fn prices(out: &mut String, d: &Decision) -> std::fmt::Result {
    const SHOWN: [Key; 6] = [
        Key::OnDemandUsdPerH,
        Key::Reserved1yUsdPerH,
        Key::Reserved3yUsdPerH,
        Key::SpotUsdPerH,
        Key::ServerUsd,
        Key::ElectricityUsdPerKwh,
    ];
    writeln!(out, "\nprices (--write FILE.toml has all assumptions)")?;
    for key in SHOWN {
        if let Some(n) = d.assumptions.numbers.get(&key) {
            let s = n.spread;
            let range = if s.low < s.high {
                format!(" ({} to {})", short(s.low), short(s.high))
            } else {
                String::new()
            };
            writeln!(out, "  {:<24} {}{range}: {}", key.name(), short(s.value), n.source)?;
        }
    }
    Ok(())
}

fn tornado(out: &mut String, d: &Decision) -> std::fmt::Result {
    writeln!(
        out,
        "\nwhat would change it: owning less renting, millions of dollars, at the low and the high end"
    )?;
    for bar in d.tornado.iter().take(BARS) {
        let flips = if bar.choice_at_low == bar.choice_at_high && bar.choice_at_low == d.choice {
            String::new()
        } else {
            format!("  {} / {}", bar.choice_at_low.name(), bar.choice_at_high.name())
        };
        writeln!(
            out,
            "  {:<24} {:>10} {:>10}  {:>+10.2} {:>+10.2}{flips}",
            bar.assumption,
            short(bar.low),
            short(bar.high),
            bar.own_less_rent_at_low / 1e6,
            bar.own_less_rent_at_high / 1e6
        )?;
    }
    Ok(())
}

/// Three digits that say something.
fn short(x: f64) -> String {
    if x.abs() >= 100.0 { format!("{x:.0}") } else { format!("{x:.3}") }
}
