//! The run and its money as people meet them: what a plan adds with tokens, decisions, and input that makes no sense.

use std::fs;

use serde_json::Value;

use crate::common::Lab;

/// A model and a machine that are searched in a fraction of a second, with a run.
const RUN: &str =
    "plan --model gpt3-1.3b --cluster aws-p5-ultracluster --accelerators 64 --threads 1 --tokens 300B";

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Dollars in whole cents.
fn cents(value: &Value) -> i64 {
    (number(value) * 100.0).round() as i64
}

fn adds_up(bill: &Value) {
    for end in ["low", "value", "high"] {
        let sum: i64 = bill["parts"].as_array().expect("parts").iter().map(|p| cents(&p[end])).sum();
        assert_eq!(sum, cents(&bill["total"][end]), "{bill}");
    }
}

#[test]
fn a_plan_with_tokens_has_a_run_that_adds_up() {
    let lab = Lab::new();
    let json = lab.json(&format!("{RUN} --json --today 2026-11-28"));
    let run = &json["run"];
    let (wall, goodput) = (number(&run["wall_days"]), number(&run["goodput"]));
    assert!((number(&run["train_days"]) / goodput / wall - 1.0).abs() < 1e-9, "{run}");
    assert!((number(&json["best"][0]["train_days"]) / number(&run["train_days"]) - 1.0).abs() < 1e-9);
    assert!(goodput > 0.5 && goodput < 1.0 && number(&run["interruptions"]) > 0.0);
    let cost = &run["cost_usd"];
    assert!(cents(&cost["low"]) <= cents(&cost["value"]) && cents(&cost["value"]) <= cents(&cost["high"]));
    assert_eq!(*cost, run["cost"]["total"]);
    adds_up(&run["cost"]);
    let paid = number(&run["basis"]["usd_per_accelerator_h"]["value"]) * number(&run["accelerator_hours"]);
    assert!((paid / number(&cost["value"]) - 1.0).abs() < 1e-3, "{paid} {cost}");
    let shares: f64 =
        run["recovery"]["terms"].as_array().expect("terms").iter().map(|t| number(&t["share"])).sum();
    assert!((shares - 1.0).abs() < 1e-9, "{run}");
    assert!(run["assumptions"].to_string().contains("17 months old"), "{}", run["assumptions"]);
    let text = lab.ok(RUN);
    let first = text.lines().next().unwrap_or_default();
    assert!(first.contains(" days (") && first.contains("$"), "days and dollars come first: {first}");
    assert!(run["range_of"].as_array().is_some_and(|r| r.len() == 3), "{}", run["range_of"]);
    for part in [
        "the range: ",
        "the run: 0.3000T tokens in",
        "where the dollars go",
        "recovery after a failure",
        "energy:",
        "storage of",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(lab.json(&RUN.replace("--tokens 300B", "--json"))["run"].is_null());
}

#[test]
fn a_price_of_ones_own_is_what_is_paid() {
    let lab = Lab::new();
    let paid = |args: &str| {
        let run = lab.json(&format!("{RUN} --json {args}"))["run"].clone();
        (number(&run["basis"]["usd_per_accelerator_h"]["value"]), number(&run["cost_usd"]["value"]))
    };
    let (each, cost) = paid("--price 2.5");
    assert_eq!(each, 2.5);
    // Each part is rounded to a dollar.
    assert!((paid("--price 40/node").1 / cost - 2.0).abs() < 1e-3);
    lab.write(
        "mine.toml",
        "[price.mine]\naccelerator = \"h100-sxm5\"\nnode_accelerators = { value = 8, unit = \"accelerators\", source = \"our quote\", date = \"2026-11\" }\n\
         on_demand = { value = 20, unit = \"USD/node-h\", source = \"our quote\", date = \"2026-11\" }\n",
    );
    assert_eq!(paid("--price mine.toml"), (2.5, cost));
    assert_eq!(paid("--price mine --catalog mine.toml"), (2.5, cost));
    let spot = lab.json(&format!("{RUN} --json --commitment spot"));
    let fewer = lab.json(&format!("{RUN} --json"));
    assert!(number(&spot["run"]["interruptions"]) > number(&fewer["run"]["interruptions"]));
    assert!(number(&spot["run"]["goodput"]) < number(&fewer["run"]["goodput"]));
    let own = lab.json(&format!("{RUN} --json --own"))["run"].clone();
    assert_eq!(own["basis"]["kind"], "own");
    adds_up(&own["cost"]);
}

#[test]
fn the_cheapest_plan_is_not_the_fastest() {
    let lab = Lab::new();
    let of = |what: &str| lab.json(&format!("{RUN} --json --for {what}"));
    let (time, dollars, tokens) = (of("time"), of("dollars"), of("tokens-per-dollar"));
    let cost = |j: &Value| number(&j["run"]["cost_usd"]["value"]);
    let days = |j: &Value| number(&j["run"]["wall_days"]);
    assert_eq!(time["accelerators"], 64);
    assert!(cost(&dollars) < cost(&time) && days(&dollars) > days(&time));
    assert!(dollars["accelerators"].as_u64() < Some(64));
    assert_eq!(dollars["accelerators"], tokens["accelerators"]);
    assert_eq!(dollars["run"]["accelerators"], dollars["accelerators"]);
    let sizes = dollars["objective"]["sizes"].as_array().expect("sizes");
    assert!(sizes.windows(2).all(|s| cents(&s[0]["cost_usd"]["value"]) <= cents(&s[1]["cost_usd"]["value"])));
    let within = lab.json(&format!("{RUN} --json --for dollars --within {}", 1.5 * days(&time)));
    assert!(days(&within) <= 1.5 * days(&time) && cost(&within) >= cost(&dollars));
    // Every size is what a search of it alone finds.
    for size in sizes {
        let n = size["accelerators"].as_u64().expect("a size");
        let args = format!("{RUN} --json").replace("--accelerators 64", &format!("--accelerators {n}"));
        let alone = lab.json(&format!("{args} --sequences {}", time["sequences"]));
        assert_eq!(size["step_s"], alone["best"][0]["step_s"], "{n}");
        assert_eq!(size["cost_usd"], alone["run"]["cost_usd"], "{n}");
    }
    assert_eq!(dollars["best"].as_array().map(Vec::len), time["best"].as_array().map(Vec::len));
}

#[test]
fn a_ramp_takes_more_steps_and_recoveries_differ() {
    let lab = Lab::new();
    let of = |args: &str| lab.json(&format!("{RUN} --json --layout tp=1,zero=1 {args}"))["run"].clone();
    let (flat, ramp) = (of(""), of("--ramp 131072:1B,262144:10B"));
    assert!(number(&ramp["steps"]) > number(&flat["steps"]));
    assert!(number(&ramp["train_days"]) >= number(&flat["train_days"]));
    for (flag, found) in [("restart", "restart"), ("in-memory", "in-memory"), ("elastic", "elastic")] {
        assert_eq!(of(&format!("--recovery {flag}"))["recovery"]["recovery"], found);
    }
    let blocking = of("--checkpoint blocking --checkpoint-every 600");
    assert_eq!(
        (&blocking["recovery"]["save"], number(&blocking["recovery"]["interval_s"])),
        (&"blocking".into(), 600.0)
    );
    assert!(number(&blocking["goodput"]) <= number(&flat["goodput"]));
}

#[test]
fn a_ramp_in_round_tokens_is_rounded_to_what_the_replicas_divide() {
    let lab = Lab::new();
    let large = "plan --model llama3-405b --cluster dgx-superpod-h100-64su --tokens 15.6T --ramp 4M:252M,8M:2.87T --json";
    let run = lab.json(large)["run"].clone();
    let said = run["assumptions"].to_string();
    assert!(said.contains("batches of 4.000M tokens are taken as 512 sequences, 4.194M tokens"), "{said}");
    assert!(number(&run["steps"]) > 15.6e12 / (2048.0 * 8192.0), "{run}");
    assert_eq!(
        lab.json("plan --model llama3-405b --cluster dgx-superpod-h100-64su --batch 16M --json")["sequences"],
        2048
    );
}

#[test]
fn whole_nodes_and_spare_ones_are_billed_and_said() {
    let lab = Lab::new();
    let of = |args: &str| lab.json(&format!("{RUN} --json {args}"))["run"].clone();
    let part = |run: &Value, name: &str| {
        let parts = run["cost"]["parts"].as_array().expect("parts").clone();
        parts.into_iter().find(|p| p["name"] == name).map(|p| number(&p["value"]))
    };
    let hourly = of("");
    assert_eq!((part(&hourly, "spare nodes"), part(&hourly, "rest of whole nodes")), (None, None));
    assert!(hourly["assumptions"].to_string().contains("no spare nodes are billed"), "{hourly}");
    let bound = of("--price 3 --commitment reserved-1y");
    let spare = number(&bound["held"]["spare"]);
    let paid = part(&bound, "spare nodes").expect("spare nodes");
    assert!((paid / (3.0 * spare * 24.0 * number(&bound["wall_days"])) - 1.0).abs() < 1e-3, "{bound}");
    adds_up(&bound["cost"]);
    let rest =
        lab.json(&format!("{RUN} --json --layout tp=1,zero=1 --sequences 252").replace("64", "12"))["run"]
            .clone();
    assert_eq!(rest["held"]["rest_of_nodes"], 4, "{rest}");
    let all = number(&rest["cost_usd"]["value"]);
    assert!((part(&rest, "rest of whole nodes").expect("a rest") / all - 0.25).abs() < 1e-3, "{rest}");
}

#[test]
fn a_decision_has_a_page_with_its_figures() {
    let lab = Lab::new();
    let json = lab.json("decide --profile 6x64@0.3,42x512@0.8 --html decide.html --json --today 2026-11-28");
    let page = fs::read_to_string(lab.path("decide.html")).expect("a page");
    for id in ["ways", "use", "tornado", "sources"] {
        assert!(page.contains(&format!("<figure id=\"{id}\"")), "{id}");
    }
    for option in json["options"].as_array().expect("options") {
        let shown = format!("data-value=\"{}\"", number(&option["cost"]["total"]["value"]));
        assert!(page.contains(&shown), "{shown}");
    }
    assert!(!page.contains("NaN") && page.contains("months old"), "a price without its age");
    lab.ok("decide --private --html private.html");
}

#[test]
fn a_decision_is_written_edited_and_made_again() {
    let lab = Lab::new();
    let first = lab.json("decide --profile 6x64@0.3,42x512@0.8 --write mine.toml --json --today 2026-11-28");
    let again = lab.json("decide mine.toml --json");
    assert_eq!(first["options"], again["options"]);
    for option in first["options"].as_array().expect("options") {
        adds_up(&option["cost"]);
    }
    let text = fs::read_to_string(lab.path("mine.toml")).expect("written");
    lab.write("private.toml", text.replace("data_may_leave = true", "data_may_leave = false"));
    assert_eq!(lab.json("decide private.toml --json")["choice"], "build");
    let shown = lab.ok("decide --accelerators 256 --hours 1.2M --months 24");
    for part in ["break-even utilisation", "the guide says 70 %", "rejected", "what would change it"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
}

#[test]
fn money_that_makes_no_sense_is_refused() {
    let lab = Lab::new();
    let refused = |args: &str, what: &str| {
        let ran = lab.run(args);
        assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
        assert_eq!(ran.err.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{args}\n{}", ran.err);
        assert!(ran.err.contains(what) && ran.err.contains("hint: "), "{args}\n{}", ran.err);
        assert!(ran.out.is_empty() && !ran.err.contains("panicked"), "{args}\n{}", ran.out);
    };
    let price = |date: &str, unit: &str, value: &str| {
        format!(
            "[price.mine]\naccelerator = \"h100-sxm5\"\non_demand = {{ value = {value}, unit = \"{unit}\", source = \"our quote\", date = \"{date}\" }}\n"
        )
    };
    lab.write("late.toml", price("2027-01", "USD/h", "2"));
    lab.write("euros.toml", price("2026-01", "EUR/h", "2"));
    lab.write("node.toml", price("2026-01", "USD/node-h", "20"));
    lab.write("negative.toml", price("2026-01", "USD/h", "-2"));
    lab.write("none.toml", "");
    lab.write("empty-profile.toml", "currency = \"USD\"\nplatform = \"x\"\naccelerator = \"y\"\n[numbers]\n");
    lab.ok("decide --write mine.toml");
    let mine = fs::read_to_string(lab.path("mine.toml")).expect("written");
    lab.write("elsewhere.toml", mine.replace("\"dgx-superpod-h100\"", "\"no-such-machine\""));
    lab.write("other.toml", mine.replace("accelerator = \"h100-sxm5\"", "accelerator = \"tpu-v5p\""));
    let run = |args: &str| format!("{RUN} --today 2026-11-28 {args}");
    for (args, what) in [
        (run("--price -1"), "expected US dollars"),
        (run("--price nan"), "expected US dollars"),
        (run("--price inf"), "expected US dollars"),
        (run("--price 98.32"), "published rents"),
        (run("--price late.toml"), "lies after today"),
        (run("--price euros.toml"), "no unit of it"),
        (run("--price node.toml"), "does not say how large"),
        (run("--price negative.toml"), "above zero"),
        (run("--price none.toml"), "0 prices"),
        (run("--price absent.toml"), "absent.toml"),
        (run("--commitment forever"), "unknown commitment"),
        (run("--region atlantis"), "unknown region"),
        (run("--within 0"), "expected more than 0"),
        (run("--within nan"), "expected more than 0"),
        (run("--within 0.001"), "no size is done"),
        (run("--checkpoint-every -5"), "expected more than 0"),
        (run("--failures unheard-of"), "unknown failure"),
        (run("--ramp 4M"), "expected BATCH:UNTIL"),
        (run("--ramp 1B:2B"), "full batch"),
        (run("--price aws-p5 --region us-central"), "is of us-east"),
        (
            "decide --platform aws-p5-ultracluster --price 4 --commitment capacity-block".to_owned(),
            "capacity-block",
        ),
        ("decide elsewhere.toml".to_owned(), "elsewhere.toml: platform: "),
        ("decide other.toml".to_owned(), "has h100-sxm5"),
        ("decide --html nowhere/page.html".to_owned(), "nowhere/page.html"),
        (run("--layout tp=1 --for dollars"), "nothing to choose"),
        (RUN.replace("--tokens 300B", "--price 2.5"), "--tokens does not say"),
        ("decide --utilisation 1.2".to_owned(), "expected from 0 to 1"),
        ("decide --utilisation -0.1".to_owned(), "expected from 0 to 1"),
        ("decide --utilisation nan".to_owned(), "expected from 0 to 1"),
        ("decide --months 0".to_owned(), "0 months"),
        ("decide --profile ,".to_owned(), "empty"),
        ("decide --hours 1e12".to_owned(), "accelerators have"),
        ("decide --private --months 3".to_owned(), "nothing is possible"),
        ("decide --platform nowhere".to_owned(), "unknown cluster"),
        ("decide empty-profile.toml".to_owned(), "empty"),
        ("decide absent.toml".to_owned(), "absent.toml"),
        ("decide --today 2026-13-01".to_owned(), "expected YYYY"),
    ] {
        refused(&args, what);
    }
}
