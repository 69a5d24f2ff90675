//! Pages of many plans: every one can be drawn, and draws numbers.

use economics::Date;
use economics::own::{Ownership, TYPICAL};
use economics::run::Ask;
use economics::{energy, price};
use plan::answer::{Answer, Question, default_batch, estimate_given, plan, sequences_for};
use plan::calibration::Calibration;
use report::{Report, data_of, plan_page, scales};
use spec::{Catalog, NumberFormat};

fn question(
    catalog: &Catalog,
    model: &str,
    cluster: &str,
    accelerators: usize,
    tokens: Option<f64>,
) -> Question {
    let shape = plan::models::find(model).expect("a model");
    let cluster = catalog.cluster(cluster, Some(accelerators)).expect("a machine");
    let (sequences, sequence) = default_batch(&shape);
    let sequences = sequences_for(sequences, accelerators);
    Question {
        shape,
        cluster,
        software: None,
        format: NumberFormat::Bf16,
        sequence,
        sequences,
        tokens,
        keep: 5,
        trainable_only: false,
        strategy: None,
        optimizer: Default::default(),
    }
}

/// The page of an answer, as the binary makes it.
fn page(catalog: &Catalog, calibration: &Calibration, answer: &Answer) -> String {
    let today = Date::parse("2026-11-28").expect("a day");
    let ask = answer.question.tokens.map(|tokens| Ask::new(tokens, today));
    let run = ask.as_ref().map(|ask| economics::run::run(catalog, answer, ask).expect("a run"));
    let sizes =
        if answer.given { Vec::new() } else { scales(catalog, &answer.question, calibration, ask.as_ref()) };
    let cluster = &answer.question.cluster;
    let own = Ownership::of(catalog, cluster, TYPICAL, energy::GRID_USUAL).ok();
    let rent = price::quote(catalog, cluster, &price::Ask::default(), today).ok();
    let owned = own.as_ref().zip(rent.as_ref());
    let json = answer.to_json(1.0, 1);
    let report = Report { answer, json: &json, run: run.as_ref(), sizes: &sizes, owned, catalog, today };
    plan_page(&report).expect("a page")
}

/// Figures with drawings and tables that hold numbers, and the answer inside.
fn check(what: &str, answer: &Answer, page: &str) {
    for part in page.split("<figure ").skip(1) {
        let id = part.split('"').nth(1).unwrap_or_default();
        assert!(part.contains("<tbody><tr"), "{what}: {id} has no numbers");
        for nothing in ["NaN", "inf\"", "inf<", "\"-inf"] {
            assert!(!part.contains(nothing), "{what}: {id} holds {nothing}");
        }
    }
    let data = data_of(page).unwrap_or_else(|| panic!("{what}: no data"));
    assert!(data.contains(&format!("\"model\":\"{}\"", answer.question.shape.model.name)), "{what}: {data}");
    assert!(report::compare::Side::parse(what, page).is_ok(), "{what}: the page is no answer");
}

#[test]
fn every_kind_of_plan_has_a_page() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let calibration = Calibration::builtin().expect("the calibration");
    for (model, cluster, accelerators, tokens) in [
        ("llama3-405b", "dgx-superpod-h100-64su", 16_384, Some(15.6e12)),
        ("llama2-7b", "aws-p5-ultracluster", 64, Some(2e12)),
        ("llama2-70b", "meta-rsc", 512, None),
        ("llama3-70b", "tpu-v5p-pod", 1024, Some(1e12)),
        ("mixtral-8x7b", "lambda-h100", 128, Some(1e12)),
        ("gpt3-1.3b", "frontier", 8, None),
        ("gpt2", "dgx-h100", 1, Some(1e9)),
    ] {
        let answer = plan(question(&catalog, model, cluster, accelerators, tokens), &calibration, &|_, _| ());
        let answer = answer.unwrap_or_else(|e| panic!("{model} on {cluster}: {e}"));
        let page = page(&catalog, &calibration, &answer);
        check(&format!("{model} on {cluster}"), &answer, &page);
        assert!(page.len() < 4 << 20, "{model} on {cluster}: {} bytes", page.len());
    }
}

#[test]
fn every_schedule_has_a_timeline_that_ends_before_its_step() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let calibration = Calibration::builtin().expect("the calibration");
    for layout in [
        "tp=4,pp=4,dp=4,micro_batch=1,zero=1",
        "tp=4,pp=4,dp=4,chunks=4,micro_batch=1,zero=1",
        "tp=4,pp=4,dp=4,schedule=zero-bubble,micro_batch=1,zero=1",
        "tp=4,pp=4,dp=4,schedule=gpipe,micro_batch=1,zero=1",
        "tp=8,pp=1,dp=8,micro_batch=1,zero=3",
    ] {
        let question = question(&catalog, "llama2-13b", "dgx-superpod-h100", 64, None);
        let answer =
            estimate_given(question, layout, &calibration).unwrap_or_else(|e| panic!("{layout}: {e}"));
        let page = page(&catalog, &calibration, &answer);
        check(layout, &answer, &page);
        let rows =
            page.split("id=\"timeline\"").nth(1).and_then(|f| f.split("</figure>").next()).expect("a figure");
        let values: Vec<f64> = rows
            .split("data-value=\"")
            .skip(1)
            .map(|v| v.split('"').next().and_then(|v| v.parse().ok()).expect("a number"))
            .collect();
        let [end_s, step_s] = values[values.len() - 2..] else { panic!("{values:?}") };
        assert!(end_s > 0.4 * step_s && end_s <= step_s, "{layout}: passes end at {end_s} of {step_s}");
        let estimated = answer.best[0].step_s;
        assert!((step_s - estimated).abs() < 1e-9 * estimated, "{layout}");
    }
}

#[test]
fn names_cannot_break_out_of_a_page() {
    let catalog = Catalog::builtin().expect("the catalogue");
    let calibration = Calibration::builtin().expect("the calibration");
    let mut question = question(&catalog, "gpt2", "dgx-h100", 1, None);
    question.shape.model.name = "</script><script>alert(1)</script>\"'".to_owned();
    let answer = plan(question, &calibration, &|_, _| ()).expect("an answer");
    let page = page(&catalog, &calibration, &answer);
    assert!(!page.contains("<script>alert") && !page.contains("</script><script>alert"));
    assert!(data_of(&page).is_some_and(|d| d.ends_with('}')));
}
