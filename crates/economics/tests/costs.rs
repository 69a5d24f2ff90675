//! Published costs from catalogue prices, the guide's break-even, and bills that add up.

use economics::decide::{Assumptions, Key, Way, decide, profile};
use economics::own::Ownership;
use economics::price::{self, Commitment, Given};
use economics::{Bill, Cost, Date, Spread, Usd};
use proptest::prelude::*;
use spec::{Catalog, Cluster};

const TODAY: Date = Date::day(2026, 11, 28);

fn catalog() -> Catalog {
    Catalog::builtin().unwrap()
}

fn cluster(name: &str, n: usize) -> Cluster {
    catalog().cluster(name, Some(n)).unwrap()
}

/// Dollars for an hour as published estimates count: hardware written off at full use, and power.
fn amortised_usd_per_h(name: &str, n: usize) -> f64 {
    let machine = Cluster { node_price_usd: None, ..cluster(name, n) };
    let own = Ownership::of(&catalog(), &machine, "hyperscale", "us").unwrap();
    let counted = ["servers", "network", "power and cooling"];
    let parts = own.yearly_parts(1.0).into_iter().filter(|p| counted.contains(&p.0));
    parts.map(|p| p.1.value).sum::<f64>() / (n as f64 * economics::HOURS_PER_YEAR)
}

fn rent_usd_per_h(entry: &str, commitment: Commitment) -> f64 {
    let catalog = catalog();
    let quotes = price::quotes(catalog.get(spec::EntryKind::Price, entry).unwrap()).unwrap();
    quotes.into_iter().find(|q| q.commitment == commitment).unwrap().usd_per_accelerator_h.value
}

#[test]
fn published_run_costs_are_within_a_factor_of_one_and_a_half() {
    // Accelerator-hours: 25,000 A100 for 95 days; the model card; 5e25 FLOP at 37.5 % of 275 TFLOP/s; the paper.
    let gpt4 = 25_000.0 * 95.0 * 24.0;
    let llama = 30.84e6;
    let ultra = 5e25 / (275e12 * 0.375) / 3600.0;
    let deepseek = 2.788e6;
    let three_years = Commitment::Reserved3y;
    let check = |what: &str, published_musd: f64, ours_usd: f64| {
        let ratio = ours_usd / 1e6 / published_musd;
        println!("{what}: ${published_musd}M published, {ratio:.2} times as much here");
        assert!((1.0 / 1.5..=1.5).contains(&ratio), "{what}: {ratio:.2}");
    };
    check("GPT-4, cloud", 79.0, gpt4 * rent_usd_per_h("aws-p4d", three_years));
    check("GPT-4, amortised", 41.0, gpt4 * amortised_usd_per_h("azure-nd-a100", 8192));
    check("Llama 3.1 405B, cloud", 170.0, llama * rent_usd_per_h("aws-p5-2024", three_years));
    check("Llama 3.1 405B, amortised", 51.0, llama * amortised_usd_per_h("meta-24k-roce", 16_384));
    check("Gemini Ultra, cloud", 199.0, ultra * rent_usd_per_h("gcp-tpu-v4", three_years));
    check("Gemini Ultra, amortised", 28.0, ultra * amortised_usd_per_h("tpu-v4-pod", 4096));
    check("DeepSeek-V3, at its paper's $2", 5.576, deepseek * amortised_usd_per_h("hgx-h800", 2048));
}

#[test]
fn published_purchases_are_within_a_factor_of_one_and_a_half() {
    for (name, n, published_musd) in
        [("azure-nd-a100", 8192, 778.0 * 8192.0 / 25_000.0), ("meta-24k-roce", 16_384, 896.0)]
    {
        let machine = Cluster { node_price_usd: None, ..cluster(name, n) };
        let own = Ownership::of(&catalog(), &machine, "hyperscale", "us").unwrap();
        let ratio = own.purchase().total.value.to_dollars() / 1e6 / published_musd;
        assert!((1.0 / 1.5..=1.5).contains(&ratio), "{name}: {ratio:.2}");
    }
}

#[test]
fn carbon_of_a_model_card_is_inside_the_interval() {
    // Llama 3.1: 39.3M hours of H100, 11,390 t by location.
    let site = economics::energy::Site::of(&catalog(), &cluster("meta-24k-roce", 16_384), "hyperscale", "us");
    let energy = site.unwrap().unwrap().energy(Spread::exact(39.3e6));
    assert!(energy.co2_t.holds(11_390.0), "{:?}", energy.co2_t);
}

fn bill_adds_up(bill: &Bill) {
    assert_eq!(bill.total, bill.parts.iter().map(|p| p.cost).sum::<Cost>());
    assert!(bill.parts.iter().all(|p| p.cost.low <= p.cost.value && p.cost.value <= p.cost.high), "{bill:?}");
    // As a reader of the JSON adds them, in whole cents.
    let json = serde_json::to_value(bill).unwrap();
    let cents = |v: &serde_json::Value| (v.as_f64().unwrap() * 100.0).round() as i64;
    let sum: i64 = json["parts"].as_array().unwrap().iter().map(|p| cents(&p["value"])).sum();
    assert_eq!(sum, cents(&json["total"]["value"]));
}

proptest! {
    #[test]
    fn bills_add_up_whatever_their_parts(parts in prop::collection::vec(0.0f64..1e9, 1..12), scale in 1e-6f64..1e3) {
        let bill = Bill::of(parts.iter().enumerate().map(|(i, usd)| {
            (format!("part {i}"), Spread::new(usd * scale * 0.7, usd * scale, usd * scale * 1.9))
        }));
        bill_adds_up(&bill);
        let exact: f64 = parts.iter().sum::<f64>() * scale;
        let off = (bill.total.value.to_dollars() - exact).abs();
        prop_assert!(off <= parts.len() as f64 * 0.5, "{off}");
    }

    #[test]
    fn money_is_shown_as_it_is_counted(cents in -10_000_000_000_000i64..10_000_000_000_000) {
        let usd = Usd::dollars(cents as f64 / 100.0);
        prop_assert_eq!(usd.to_cents(), cents);
        let digits: String = usd.to_string().chars().filter(|c| !"$,".contains(*c)).collect();
        prop_assert!((digits.parse::<f64>().unwrap() - usd.to_dollars()).abs() < 1e-6);
    }
}

#[test]
fn nodes_are_rented_whole_and_prices_say_how_old_they_are() {
    let ask = price::Ask::default();
    let quote = price::quote(&catalog(), &cluster("aws-p5-ultracluster", 12), &ask, TODAY).unwrap();
    assert_eq!((quote.billed_in, quote.billed(12), quote.commitment), (8, 16, Commitment::OnDemand));
    assert!((quote.usd_per_accelerator_h.value - 6.88).abs() < 1e-9);
    assert_eq!(quote.usd(12, Spread::exact(1.0)).value, 2.0 * 55.04);
    assert!(quote.age_note(TODAY).unwrap().unwrap().contains("17 months old"));
    assert!(quote.age_note(Date::day(2025, 5, 31)).is_err());
}

#[test]
fn every_platform_has_a_price_or_says_why_not() {
    let catalog = catalog();
    for listed in catalog.list(Some(spec::EntryKind::Platform)) {
        let cluster = catalog.cluster(&listed.name, None).unwrap();
        let rent = price::quote(&catalog, &cluster, &price::Ask::default(), TODAY);
        let own = Ownership::of(&catalog, &cluster, "typical", "us");
        let why = |e: &spec::Error| e.hint_text().is_some();
        assert!(rent.is_ok() || own.is_ok() || rent.as_ref().is_err_and(why), "{}", listed.name);
    }
    // The six of the guide, and its rentals.
    for name in ["superpod-h100", "azure-nd-h100", "google-tpu-v5p", "rsc", "colossus", "coreweave", "lambda"]
    {
        let cluster = catalog.cluster(name, None).unwrap();
        let rent = price::quote(&catalog, &cluster, &price::Ask::default(), TODAY);
        assert!(rent.is_ok() || Ownership::of(&catalog, &cluster, "typical", "us").is_ok(), "{name}");
    }
}

#[test]
fn prices_that_cannot_be_meant_are_refused() {
    let catalog = catalog();
    let h100 = cluster("aws-p5-ultracluster", 64);
    let check = |given: &str, what: &str| {
        let asked = Given::parse(given).map(|price| price::Ask { price: Some(price), ..Default::default() });
        let error = asked.and_then(|ask| price::quote(&catalog, &h100, &ask, TODAY)).unwrap_err();
        assert!(error.to_string().contains(what), "{given}: {error}");
        assert!(error.hint_text().is_some() && error.exit_code() == 2, "{given}");
    };
    check("-1", "expected US dollars");
    check("0", "expected US dollars");
    check("nan", "expected US dollars");
    check("inf", "expected US dollars");
    check("1e400", "expected US dollars");
    check("", "expected US dollars");
    check("2.5 EUR", "not eur");
    check("2.5/month", "unknown unit");
    check("98.32", "published rents are");
    check("2.5/node", "published rents are");
    check("gcp-tpu-v5p", "is for tpu-v5p");
    check("no-such-price", "unknown price");
    check("buy-h100", "has no on-demand rate");
}

fn assumptions(text: &str) -> Assumptions {
    let ask = price::Ask::default();
    let demand = profile(text).unwrap();
    Assumptions::of(&catalog(), &cluster("dgx-superpod-h100", 1016), &ask, demand, TODAY).unwrap()
}

#[test]
fn a_decision_has_reasons_and_its_bills_add_up() {
    let d = decide(assumptions("6x64@0.3,42x512@0.9")).unwrap();
    assert_eq!(d.choice, d.options[0].way);
    assert!(d.options.windows(2).all(|p| p[0].cost.total.value <= p[1].cost.total.value));
    assert_eq!((d.rejected.len(), d.options.len() <= 6), (5, true));
    assert!(!d.options.iter().any(|o| d.rejected.iter().any(|r| r.way == o.way && r.way == d.choice)));
    d.options.iter().for_each(|o| bill_adds_up(&o.cost));
    assert!(d.reasons.len() >= 2 && d.tornado.len() > 10 && d.guide_break_even == 0.7);
    assert!(d.tornado.windows(2).all(|b| b[0].swing() >= b[1].swing()));
    for b in &d.break_even {
        assert!(
            b.utilisation.low <= b.utilisation.value && b.utilisation.value <= b.utilisation.high,
            "{b:?}"
        );
    }
}

#[test]
fn little_use_is_rented_much_is_owned_and_private_data_stays() {
    assert!(!matches!(decide(assumptions("48x512@0.05")).unwrap().choice, Way::Build | Way::CloudFirst));
    let mut busy = assumptions("60x1016@0.95");
    // Against the hyperscaler's rate alone.
    for key in [Key::Reserved1yUsdPerH, Key::Reserved3yUsdPerH, Key::SpotUsdPerH] {
        busy.numbers.remove(&key);
    }
    busy.numbers.get_mut(&Key::OnDemandUsdPerH).unwrap().spread = Spread::exact(6.88);
    busy.numbers.get_mut(&Key::RentChangePerYear).unwrap().spread = Spread::exact(0.0);
    let d = decide(busy.clone()).unwrap();
    assert_eq!(d.choice, Way::Build, "{:?}", d.reasons);
    let used = d.options[0].utilisation.unwrap();
    assert!(used > d.break_even[0].utilisation.value, "{used} {:?}", d.break_even);
    let private = decide(Assumptions { data_may_leave: false, ..assumptions("48x512@0.05") }).unwrap();
    assert_eq!((private.choice, private.options.len(), private.rejected.len()), (Way::Build, 1, 5));
    let late = decide(Assumptions { data_may_leave: false, ..assumptions("3x512@0.5") }).unwrap_err();
    assert!(late.to_string().contains("nothing is possible"), "{late}");
    // Growing use: rent first.
    let mut grows = busy;
    grows.demand = profile("12x64@0.1,48x1016@0.95").unwrap();
    let d = decide(grows).unwrap();
    assert_eq!(d.choice, Way::CloudFirst, "{:?}", d.reasons);
    assert!((6..=24).contains(&d.move_month.unwrap()), "{:?}", d.move_month);
}

#[test]
fn regions_choose_among_prices_and_never_change_the_provider_in_passing() {
    let catalog = catalog();
    let p5 = cluster("aws-p5-ultracluster", 64);
    let quote = |price: Option<&str>, region: &str| {
        let price = price.map(|p| Given::parse(p).unwrap());
        price::quote(
            &catalog,
            &p5,
            &price::Ask { price, commitment: None, region: Some(region.to_owned()) },
            TODAY,
        )
    };
    let check = |price: Option<&str>, region: &str, name: &str, noted: bool| {
        let q = quote(price, region).unwrap();
        assert_eq!(q.name, name, "{price:?} {region}");
        assert_eq!(q.notes.iter().any(|n| n.contains("of the electricity")), noted, "{:?}", q.notes);
    };
    check(None, "us-east", "aws-p5", false);
    check(None, "germany", "aws-p5", true);
    check(Some("aws-p5"), "germany", "aws-p5", true);
    check(Some("lambda-h100"), "us-east", "lambda-h100", true);
    check(Some("2.5"), "nordic", "given", false);
    let wrong = quote(Some("aws-p5"), "us-central").unwrap_err();
    assert!(wrong.to_string().contains("is of us-east, not of us-central"), "{wrong}");
}

fn assumptions_of(platform: &str, demand: &str, ask: &price::Ask) -> spec::Result<Assumptions> {
    let machine = catalog().cluster(platform, None).unwrap();
    Assumptions::of(&catalog(), &machine, ask, profile(demand).unwrap(), TODAY)
}

#[test]
fn a_decision_takes_rents_of_the_platforms_own_provider() {
    let of = |platform: &str| assumptions_of(platform, "48x512@0.8", &price::Ask::default()).unwrap();
    let aws = of("aws-p5-ultracluster");
    let source = |a: &Assumptions, key: Key| a.numbers.get(&key).map(|n| n.source.clone());
    for (key, entry) in [
        (Key::OnDemandUsdPerH, "aws-p5 of AWS"),
        (Key::Reserved3yUsdPerH, "aws-p5-2024 of AWS"),
        (Key::SpotUsdPerH, "aws-p5 of AWS"),
    ] {
        let said = source(&aws, key).unwrap();
        assert!(said.starts_with(entry) && said.contains("months old"), "{said}");
    }
    assert!((aws.number(Key::OnDemandUsdPerH).value - 6.88).abs() < 1e-9);
    let coreweave = of("coreweave-h100");
    assert!(
        source(&coreweave, Key::SpotUsdPerH).is_none()
            && source(&coreweave, Key::Reserved1yUsdPerH).is_none()
    );
    // Nobody rents out a SuperPOD: what the accelerator costs elsewhere stands in, and says so.
    assert!(source(&of("dgx-superpod-h100"), Key::OnDemandUsdPerH).unwrap().contains("standing in"));
    let block = price::Ask {
        price: Some(Given::parse("4").unwrap()),
        commitment: Some(Commitment::CapacityBlock),
        region: None,
    };
    let refused = assumptions_of("aws-p5-ultracluster", "48x512@0.8", &block).unwrap_err();
    assert!(refused.to_string().contains("capacity-block") && refused.exit_code() == 2, "{refused}");
}

/// Ends that can hold together, and reasons that do not contradict the choice.
#[test]
fn decisions_are_consistent_with_themselves() {
    for platform in ["dgx-superpod-h100", "aws-p5-ultracluster", "coreweave-h100", "lambda-b200"] {
        for demand in [
            "48x512@0.8",
            "6x64@0.3,42x512@0.8",
            "24x256@0.2",
            "60x1000@0.98",
            "12x64@0.1,48x1016@0.95",
            "3x8@1",
        ] {
            let d = decide(assumptions_of(platform, demand, &price::Ask::default()).unwrap()).unwrap();
            let what = format!("{platform} {demand}");
            let of = |way: Way| d.options.iter().find(|o| o.way == way);
            for o in &d.options {
                let t = o.cost.total;
                assert!(
                    t.low.to_dollars() > 0.0 && t.low <= t.value && t.value <= t.high,
                    "{what} {:?}",
                    o.way
                );
                bill_adds_up(&o.cost);
            }
            let reserved = [Way::Reserved1y, Way::Reserved3y].into_iter().filter_map(of);
            assert!(reserved.into_iter().all(|o| o.cost.part("reserved").is_some()), "{what}");
            if let (Some(first), Some(on)) = (of(Way::CloudFirst), of(Way::OnDemand)) {
                assert!(first.cost.total.value < on.cost.total.value, "{what}");
            }
            let Some(build) = of(Way::Build) else { continue };
            for b in &d.break_even {
                let Some(rent) = of(b.against) else { continue };
                let pays = build.utilisation.unwrap() > b.over_profile.unwrap().value;
                let cheaper = build.cost.total.value < rent.cost.total.value;
                assert_eq!(pays, cheaper, "{what} against {:?}: {:?}", b.against, b.over_profile);
            }
        }
    }
}

#[test]
fn ends_are_nearer_than_all_assumptions_at_theirs() {
    let a = assumptions("48x512@0.8");
    let d = decide(a.clone()).unwrap();
    let build = d.options.iter().find(|o| o.way == Way::Build).unwrap();
    // Everything at its cheaper end at once.
    let mut lucky = a;
    for (key, n) in &mut lucky.numbers {
        let s = n.spread;
        let more_is_cheaper = matches!(key, Key::LifetimeYears | Key::Resale | Key::LeadMonths);
        let x = if more_is_cheaper { s.high } else { s.low };
        n.spread = Spread::exact(if *key == Key::CapitalCostPerYear { s.value } else { x });
    }
    let all = decide(lucky).unwrap();
    let all = all.options.iter().find(|o| o.way == Way::Build).unwrap();
    assert!(build.cost.total.low > all.cost.total.value, "{:?} {:?}", build.cost.total, all.cost.total);
}

#[test]
fn a_machine_that_a_file_names_is_in_the_catalogue() {
    let a = assumptions("48x512@0.8");
    assert!(a.check_machine(&catalog()).is_ok());
    let check = |platform: &str, accelerator: &str, what: &str| {
        let named =
            Assumptions { platform: platform.to_owned(), accelerator: accelerator.to_owned(), ..a.clone() };
        let error = named.check_machine(&catalog()).unwrap_err();
        assert!(error.to_string().contains(what) && error.hint_text().is_some(), "{error}");
    };
    check("no-such", "h100-sxm5", "no-such");
    check("dgx-superpod-h100", "h1000", "h1000");
    check("dgx-superpod-h100", "tpu-v5p", "has h100-sxm5");
}

#[test]
fn the_break_even_of_plain_inputs_is_the_published_one() {
    // $46M for 1,000 over four years and $5M a year, nothing else: 94, 75, 47 and 27 % against 2, 2.5, 4 and 6.88.
    let mut a = assumptions("48x1000@0.8");
    let mut put = |key: Key, x: f64| a.numbers.get_mut(&key).unwrap().spread = Spread::exact(x);
    for key in [Key::Spares, Key::Resale, Key::CapitalCostPerYear, Key::StaffPerYear, Key::SpaceUsdPerKwYear]
    {
        put(key, 0.0);
    }
    for key in [Key::Load, Key::IdleLoad, Key::StorageShare] {
        put(key, 0.0);
    }
    put(Key::ServerUsd, 46_000.0 * 0.81);
    put(Key::NetworkShare, 0.19);
    put(Key::LifetimeYears, 4.0);
    put(Key::MaintenancePerYear, 5.0 / 46.0);
    for (rent, percent) in [(2.0, 94.0), (2.5, 75.0), (4.0, 47.0), (6.88, 27.0)] {
        a.numbers.get_mut(&Key::OnDemandUsdPerH).unwrap().spread = Spread::exact(rent);
        let found = decide(a.clone()).unwrap().break_even[0].utilisation.value;
        assert_eq!((100.0 * found).round(), percent, "against ${rent}");
    }
}

#[test]
fn assumptions_come_back_from_their_file_and_bad_ones_are_refused() {
    let a = assumptions("6x64@0.3,42x512@0.8");
    let text = a.to_toml();
    let read = Assumptions::parse("mine.toml", &text).unwrap();
    assert_eq!(read.demand, a.demand);
    for (key, number) in &a.numbers {
        assert_eq!(read.numbers[key].spread, number.spread, "{key:?}");
    }
    assert_eq!(decide(read).unwrap().options, decide(a).unwrap().options);
    let check = |from: &str, to: &str, what: &str| {
        let changed =
            text.lines().map(|l| if l.starts_with(from) { to } else { l }).collect::<Vec<_>>().join("\n");
        assert_ne!(changed, text.trim_end(), "{from}");
        let error = Assumptions::parse("mine.toml", &changed).unwrap_err();
        assert!(error.to_string().contains(what) && error.to_string().starts_with("mine.toml"), "{error}");
        assert!(error.hint_text().is_some() && error.exit_code() == 2, "{error}");
    };
    check("on_demand_usd_per_h", "on_demand_usd_per_h = -2", "expected more than 0");
    check("on_demand_usd_per_h", "", "on_demand_usd_per_h is missing");
    check("on_demand_usd_per_h", "on_demand_usd_per_h = nan", "NaN");
    check("on_demand_usd_per_h", "on_demand_usd_per_h = inf", "inf");
    check("on_demand_usd_per_h", "on_demand_usd_per_h = \"2 EUR\"", "is no number");
    check("lifetime_years", "lifetime_years = 0", "expected more than 0");
    check("utilisation", "utilisation = 1.2", "expected from 0 to 1");
    check("currency", "currency = \"EUR\"", "only USD");
    check("pue", "pue = 0.9", "expected 1 or more");
    check("pue", "pue = { value = 1.2, low = 1.3 }", "not in order");
    check("network_share", "network_share = 0.99", "of the purchase");
    check("months", "months = 0", "0 months");
    check("accelerators", "accelerators = 0", "0 accelerators");
    check("resale", "resale_value = 0.1", "unknown key");
    check("[numbers]", "[numbers", "not TOML");
    let (before, after) = (text.find("[[demand]]").unwrap(), text.find("[numbers]").unwrap());
    let none = [&text[..before], &text[after..]].concat();
    assert!(Assumptions::parse("x", &none).unwrap_err().to_string().contains("empty"));
}
