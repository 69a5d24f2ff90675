//! Pages: what they show is what `--json` says, they need nothing from elsewhere, and a browser has nothing to complain of.

pub(crate) mod browser;

use std::fs;

use serde_json::Value;

use crate::common::Lab;
use crate::planner::refused;

/// A run on a machine that has a rent and a price to buy, searched in a fraction of a second.
const RUN: &str = "plan --model llama2-7b --cluster aws-p5-ultracluster --accelerators 64 --tokens 2T --sequences 256 --threads 2";

/// The numbers in a figure's table: rows of (name, values).
fn table(page: &str, figure: &str) -> Vec<(String, Vec<f64>)> {
    let from = page
        .split(&format!("<figure id=\"{figure}\""))
        .nth(1)
        .unwrap_or_else(|| panic!("no figure {figure}"));
    let from = from.split("</figure>").next().unwrap_or_default();
    let body = from.split("<tbody>").nth(1).unwrap_or_else(|| panic!("no table in {figure}"));
    let rows = body.split("<tr ").skip(1);
    rows.map(|row| {
        let name = row.split("</th>").next().unwrap_or_default().rsplit('>').next().unwrap_or_default();
        let values = row.split("data-value=\"").skip(1);
        let value = |v: &str| v.split('"').next().and_then(|v| v.parse().ok()).expect("a number");
        (name.to_owned(), values.map(value).collect())
    })
    .collect()
}

fn number(json: &Value, path: &str) -> f64 {
    json.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path}"))
}

fn same(what: &str, a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs(), "{what}: {a} in the page, {b} in the JSON");
}

/// Every figure's numbers against the answer as data.
fn shows(page: &str, json: &Value) {
    let best = &json["best"][0];
    for (name, values) in table(page, "parts") {
        if name == "in all" {
            same("step", values[0], number(best, "/step_s"));
            continue;
        }
        let key = match name.as_str() {
            "memory" => "stream".to_owned(),
            "tensor parallel" => "tensor".to_owned(),
            "context parallel" => "context".to_owned(),
            "expert parallel" => "expert".to_owned(),
            "data parallel" => "data".to_owned(),
            "stage messages" => "pipeline".to_owned(),
            "stragglers" => "straggler".to_owned(),
            other => other.to_owned(),
        };
        let found = match name.as_str() {
            "data loading" => number(best, "/loading_s"),
            _ => number(best, &format!("/breakdown/{key}_s")),
        };
        same(&name, values[0], found);
    }
    let memory = table(page, "memory");
    for (i, key) in ["params", "grads", "optimizer", "activations", "working", "framework"].iter().enumerate()
    {
        same(key, memory[i].1[0], number(best, &format!("/memory/{key}")));
    }
    let run = &json["run"];
    let bill = table(page, "cost");
    let parts = run["cost"]["parts"].as_array().expect("parts");
    assert_eq!(bill.len(), parts.len() + 1);
    for part in parts {
        let name = part["name"].as_str().expect("a name");
        let row = bill.iter().find(|r| r.0 == name).unwrap_or_else(|| panic!("no {name} in the bill"));
        same(name, row.1[0], number(part, "/value"));
    }
    let total = &bill[bill.len() - 1].1;
    for (i, key) in ["value", "low", "high"].iter().enumerate() {
        same(key, total[i], number(run, &format!("/cost_usd/{key}")));
    }
    same("the parts", bill[..bill.len() - 1].iter().map(|r| r.1[0]).sum(), total[0]);
    let goodput = table(page, "goodput");
    same("goodput", goodput[0].1[1], number(run, "/goodput"));
    assert!(goodput[1..].iter().all(|p| p.1[1] <= goodput[0].1[1] + 1e-6), "the interval taken is the best");
    let losses = table(page, "losses");
    same("wall time", losses.iter().map(|r| r.1[1]).sum(), number(run, "/wall_days") * 86_400.0);
    let timeline = table(page, "timeline");
    same("the step played", timeline[timeline.len() - 1].1[0], number(best, "/step_s"));
}

#[test]
fn figures_show_what_the_answer_says() {
    let lab = Lab::new();
    let json = lab.json(&format!("{RUN} --json --html plan.html"));
    let page = fs::read_to_string(lab.path("plan.html")).expect("a page");
    shows(&page, &json);
    let data = page.split("id=\"data\">").nth(1).and_then(|d| d.split("</script>").next()).expect("data");
    let data: Value = serde_json::from_str(data).expect("JSON");
    assert_eq!(data["best"], json["best"]);
    assert_eq!(data["run"], json["run"]);
    let utilisation = table(&page, "utilisation");
    same("break-even", utilisation[0].1[0], number(&data, "/break_even/value"));
    let sizes = table(&page, "scaling");
    assert_eq!(sizes.len(), data["sizes"].as_array().map_or(0, Vec::len));
    for id in ["layouts", "stages", "ranks", "sensitivity", "cost-sensitivity", "sources", "best"] {
        assert!(page.contains(&format!("<figure id=\"{id}\"")), "{id}");
    }
    let answer = page.split("id=\"answer\">").nth(1).and_then(|a| a.split("</p>").next()).expect("an answer");
    assert!(answer.starts_with("llama2-7b trains on 2.00T tokens in "), "{answer}");
    assert!(answer.contains("It costs $"), "{answer}");
}

const SERVE: &str = "inference --model llama2-7b --cluster dgx-h100 --tp 2 --accelerators 4 --input 200 --output 200 --concurrency 1,8,64";

#[test]
fn a_page_of_serving_shows_what_the_answer_says() {
    let lab = Lab::new();
    let json = lab.json(&format!("{SERVE} --json --html serving.html"));
    let page = fs::read_to_string(lab.path("serving.html")).expect("a page");
    let data: Value = serde_json::from_str(report::data_of(&page).expect("data")).expect("JSON");
    assert_eq!(data, json);
    let rows = |figure: &str, loads: &str| {
        let (rows, loads) = (table(&page, figure), json[loads].as_array().expect("loads"));
        assert_eq!(rows.len(), loads.len(), "{figure}");
        rows.into_iter().map(|r| r.1).zip(loads.clone()).collect::<Vec<_>>()
    };
    for (row, load) in rows("load-curve", "curve").into_iter().chain(rows("loads", "loads")) {
        let keys = ["/concurrency", "/ttft_ms", "/itl_ms", "/latency_s", "/tokens_per_s"];
        let more = ["/tokens_per_s_per_accelerator", "/usd_per_million_tokens"];
        for (i, key) in keys.into_iter().chain(more).enumerate() {
            let unit = if key.ends_with("_ms") { 1e-3 } else { 1.0 };
            same(key, row[i], number(&load, key) * unit);
        }
    }
    for (row, load) in rows("token-cost", "curve") {
        same("a million tokens", row[1], number(&load, "/usd_per_million_tokens"));
        same("a request", row[2], row[1] * 200.0 / 1e6);
    }
    let knee = json["curve"].as_array().and_then(|c| c.iter().find(|l| l["concurrency"] == json["knee"]));
    for (figure, pass) in
        [("decode", &knee.expect("a knee")["replica"]["decode"]), ("prefill", &json["prefill"])]
    {
        let parts = table(&page, figure);
        let all = pass.as_object().expect("parts").values().filter_map(Value::as_f64).sum();
        same(figure, parts[parts.len() - 1].1[0], all);
        same(figure, parts[..parts.len() - 1].iter().map(|p| p.1[0]).sum(), all);
    }
    let memory = table(&page, "serving-memory");
    same("weights", memory[0].1[0], number(&json, "/memory/weights_bytes"));
    same("memory", memory.iter().map(|r| r.1[0]).sum(), 80e9);
    let clients = format!("serves {} clients at the knee", json["knee"]);
    assert!(page.contains(&clients), "{clients}");
    assert!(page.contains("<figure id=\"sources\"") && page.contains("on demand of"), "sources");
}

/// 126 layers and the two ends make 128 chunks.
#[test]
fn memory_by_stage_is_drawn_where_ends_hold_no_layer() {
    let lab = Lab::new();
    let plan = "plan --model llama3-405b --cluster dgx-superpod-h100-64su --accelerators 16384";
    lab.ok(&format!("{plan} --layout tp=8,pp=16,chunks=8,zero=1,recompute=full --html plan.html"));
    let page = fs::read_to_string(lab.path("plan.html")).expect("a page");
    let stages = table(&page, "ranks");
    assert_eq!(stages.len(), 16);
    // Values of a row: the stage, five parts, and their sum.
    for (_, row) in &stages {
        same("a stage", row[1..6].iter().sum(), row[6]);
    }
    let (first, second) = (stages[0].1[1], stages[1].1[1]);
    assert!(first < second, "an embedding and seven layers, {first}, against eight layers, {second}");
}

#[test]
fn a_page_needs_nothing_from_elsewhere() {
    let lab = Lab::new();
    lab.ok(&format!("{SERVE} --html serving.html"));
    lab.ok(&format!("{RUN} --html plan.html"));
    lab.ok("guide --html guide.html");
    for name in ["plan.html", "guide.html", "serving.html"] {
        let page = fs::read_to_string(lab.path(name)).expect("a page");
        for loads in ["<link", "<img", "<iframe", "@import", "url(", " src=", "fetch(", "XMLHttpRequest"] {
            assert!(!page.contains(loads), "{name} has {loads}");
        }
        let links = page.split("href=\"").skip(1);
        assert!(links.into_iter().all(|l| l.starts_with('#')), "{name} links elsewhere");
        assert!(page.contains("default-src 'none'") && page.contains("prefers-color-scheme:dark"), "{name}");
        assert!(page.contains("@media print") && page.contains("<html lang=\"en\">"), "{name}");
        for svg in page.split("<svg ").skip(1) {
            assert!(
                svg.starts_with("viewBox=") && svg.contains("role=\"img\"") && svg.contains("<desc"),
                "{name}"
            );
        }
    }
}

#[test]
fn an_unwritable_page_leaves_nothing_behind() {
    let lab = Lab::new();
    let small = "plan --model gpt3-1.3b --cluster dgx-h100 --threads 1";
    refused(&lab, &format!("{small} --html nowhere/plan.html"), 2, "nowhere/plan.html");
    refused(&lab, &format!("{small} --html ."), 2, "there is something that is no file");
    refused(&lab, "guide --html nowhere/guide.html", 2, "nowhere/guide.html");
    refused(&lab, &format!("{SERVE} --html nowhere/serving.html"), 2, "nowhere/serving.html");
    refused(&lab, "plan --model gpt3-1.3b --cluster this --html plan.html", 2, "its plan has no page");
    // A plan that fails leaves the page of the last one.
    lab.write("plan.html", "the last one");
    refused(&lab, "plan --model gpt3-13bb --cluster dgx-h100 --html plan.html", 2, "gpt3-13bb");
    assert_eq!(fs::read_to_string(lab.path("plan.html")).expect("a page"), "the last one");
    let left: Vec<_> =
        fs::read_dir(lab.path("")).expect("the folder").map(|e| e.expect("an entry").file_name()).collect();
    assert!(left.iter().all(|n| !n.to_string_lossy().starts_with('.')), "{left:?}");
}

#[test]
fn what_does_not_fit_is_shown_and_written_nowhere() {
    let lab = Lab::new();
    let large = "plan --model llama3-70b --cluster dgx-h100 --layout tp=1,zero=1 --threads 1";
    for more in ["--html page.html", "--rank-map ranks.csv", "--emit megatron"] {
        let ran = lab.run(&format!("{large} {more}"));
        assert_eq!(ran.code, Some(2), "{more}: {}", ran.err);
        assert!(
            ran.err.contains("does not fit") && !ran.out.contains("--tensor-model-parallel"),
            "{}",
            ran.out
        );
    }
    for file in ["page.html", "ranks.csv"] {
        assert!(!lab.path(file).exists(), "{file}");
    }
}

#[test]
fn the_guide_is_recomputed_claim_by_claim() {
    let lab = Lab::new();
    let json = lab.json("guide --json");
    let claims = json["claims"].as_array().expect("claims");
    assert_eq!(claims.len(), 57);
    for (i, claim) in claims.iter().enumerate() {
        assert_eq!(claim["number"], i + 1);
        for key in ["claim", "ours", "source", "verdict"] {
            assert!(claim[key].as_str().is_some_and(|t| !t.is_empty()), "{key}: {claim}");
        }
    }
    let of =
        |n: usize| (claims[n - 1]["ours"].as_str().unwrap_or_default(), claims[n - 1]["verdict"].as_str());
    assert!(of(50).0.contains("1,620 GPU-days") && of(50).1 == Some("wrong"), "{:?}", of(50));
    assert!(of(48).0.contains("$230,400") && of(48).1 == Some("confirmed"), "{:?}", of(48));
    let text = lab.ok("guide");
    assert!(text.contains("16. wrong       they form a 2D torus"), "{text}");
    assert!(text.trim_end().lines().last().is_some_and(|l| l.starts_with("57 claims: ")), "{text}");
}

#[test]
fn two_plans_stand_side_by_side() {
    let lab = Lab::new();
    let a = lab.ok(&format!("{RUN} --json --html a.html"));
    lab.write("a.json", &a);
    let b = "--model llama2-13b --cluster dgx-superpod-h100 --accelerators 64 --tokens 2T --sequences 256";
    let compare = |first: &str, more: &[&str]| {
        let output =
            lab.command("plan compare").args([first, b]).args(more).output().expect("start the program");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let json: Value =
        serde_json::from_str(&compare("a.json", &["--json", "--html", "both.html"])).expect("JSON");
    let page: Value = serde_json::from_str(&compare("a.html", &["--json"])).expect("JSON");
    assert_eq!(json["a"], page["a"], "a page is an answer too");
    assert_eq!(json["differs"], serde_json::json!(["model", "platform"]));
    let step = json["lines"].as_array().and_then(|l| l.iter().find(|l| l["name"] == "step")).expect("a step");
    let first: Value = serde_json::from_str(&a).expect("JSON");
    assert_eq!(step["a"], first["best"][0]["step_s"]);
    let text = compare("a.json", &[]);
    assert!(text.contains("they differ in model, platform") && text.contains("A trains tokens "), "{text}");
    let both = fs::read_to_string(lab.path("both.html")).expect("a page");
    let row = table(&both, "ratios").into_iter().find(|r| r.0 == "step").expect("a step");
    same("step", row.1[0], number(step, "/a"));
    lab.write("no.json", "{\"best\": 1}");
    refused(&lab, "plan compare no.json a.json", 2, "no.json: no answer of the planner");
    refused(&lab, "plan compare gone.json a.json", 2, "gone.json");
    refused(&lab, "plan compare a.json --model=gpt3-1.3b", 2, "--model=gpt3-1.3b");
    for flag in ["--json", "--html x.html"] {
        let mut command = lab.command("plan compare");
        let ran = command.args(["a.json", &format!("{b} {flag}")]).output().expect("start the program");
        assert_eq!(ran.status.code(), Some(2), "{flag}");
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(said.contains("is of one plan, not of a side") && !lab.path("x.html").exists(), "{said}");
    }
}
