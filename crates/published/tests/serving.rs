//! Published serving figures, a table for each source: constants were fitted on the rows marked `fit`; what the others
//! miss by is what an answer may be off.
//!
//! The bounds are ratchets: a change that makes a table worse fails here.

#![allow(clippy::disallowed_methods, reason = "the published rows lie in files")]

use published::inference::{Figure, Rows, Use, is_table, validate};
use spec::Catalog;

fn table(name: &str) -> String {
    let path = format!("{}/tests/serving/{name}.csv", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(path).unwrap()
}

/// Mean and largest error of the rows of one use.
fn errors(name: &str, used: Use) -> (usize, f64, f64) {
    let catalog = Catalog::builtin().unwrap();
    let text = table(name);
    let rows = Rows::parse(name, &text, &catalog).unwrap();
    let v = validate(name, &text, &catalog).unwrap();
    assert!(v.not_priced.is_empty() && rows.not_priced.is_empty(), "{:?}", v.not_priced);
    let of = rows.rows.iter().zip(&v.details).filter(|(row, _)| row.used == used);
    let errors: Vec<f64> = of.map(|(_, detail)| detail.error).collect();
    let mean = errors.iter().sum::<f64>() / errors.len().max(1) as f64;
    (errors.len(), mean, errors.iter().fold(0.0, |a, e| a.max(*e)))
}

#[test]
fn tables_stay_within_their_bounds() {
    let check = |name: &str, used: Use, rows: usize, mean: f64, max: f64| {
        let found = errors(name, used);
        assert_eq!(found.0, rows, "{name}");
        assert!(found.1 <= mean && found.2 <= max, "{name} {used:?}: {found:?}, allowed {mean} and {max}");
    };
    check("nvidia-llama2", Use::Fit, 14, 0.025, 0.06);
    check("nvidia-llama2", Use::Check, 8, 0.035, 0.08);
    check("trt-llm-2023", Use::Fit, 19, 0.055, 0.115);
    check("trt-llm-2023", Use::Check, 19, 0.125, 0.45);
    check("nemo-llama2", Use::Check, 32, 0.16, 0.30);
    check("trt-llm-1.0", Use::Fit, 23, 0.025, 0.06);
    check("trt-llm-1.0", Use::Check, 47, 0.09, 0.27);
    check("vllm", Use::Fit, 7, 0.02, 0.03);
    check("vllm", Use::Check, 7, 0.05, 0.10);
    check("gpt-fast", Use::Fit, 6, 0.01, 0.02);
    check("gpt-fast", Use::Check, 7, 0.06, 0.15);
}

/// What the planner's users are promised of Llama 2 end to end.
#[test]
fn llama_2_end_to_end_is_within_a_tenth() {
    let v = validate("nvidia-llama2", &table("nvidia-llama2"), &Catalog::builtin().unwrap()).unwrap();
    assert_eq!(v.rows, 22);
    assert!(v.mean_abs_error <= 0.10 && v.max_abs_error <= 0.25, "{} {}", v.mean_abs_error, v.max_abs_error);
    assert!(v.median_abs_error <= v.p90_abs_error && v.p90_abs_error <= v.max_abs_error);
    assert_eq!(v.figures.len(), 1);
    assert_eq!(v.figures[0].figure, Figure::LatencyS);
}

const HEADER: &str = "id,source,model,accelerator,precision,tp,concurrency,input_tokens,output_tokens,latency_s,\
                      ttft_ms,itl_ms,tokens_per_s\n";

#[test]
fn a_row_is_as_wrong_as_its_worst_figure() {
    let row = "a,vLLM,mistralai/Mixtral-8x7B-Instruct-v0.1,H100,bf16,2,16,1000,100,,50,10,1000\n";
    let v = validate("t.csv", &format!("{HEADER}{row}"), &Catalog::builtin().unwrap()).unwrap();
    let detail = &v.details[0];
    assert_eq!((v.rows, detail.figures.len(), detail.stack.as_str()), (1, 3, "vllm"));
    let worst = detail.figures.iter().map(|f| f.error.abs()).fold(0.0, f64::max);
    assert_eq!(detail.error, worst);
    assert_eq!(v.max_abs_error, worst);
}

#[test]
fn rows_that_cannot_be_estimated_say_why() {
    let catalog = Catalog::builtin().unwrap();
    let check = |row: &str, part: &str| {
        let v = validate("t.csv", &format!("{HEADER}{row}\n"), &catalog).unwrap();
        assert_eq!((v.rows, v.not_priced.len()), (0, 1), "{row}");
        assert!(v.not_priced[0].reason.contains(part), "{}", v.not_priced[0].reason);
    };
    check("a,s,Llama 9,h100,fp16,1,1,10,10,1,,,", "no model is called `Llama 9`");
    check("a,s,Llama 2-7B,z80,fp16,1,1,10,10,1,,,", "\"z80\" is not in the catalogue");
    check("a,s,Llama 2-7B,h100,fp7,1,1,10,10,1,,,", "unknown format");
    check("a,s,Llama 2-7B,h100,fp16,,1,10,10,1,,,", "tp not published");
    check("a,s,Llama 2-7B,h100,fp16,1,1,10,10,,,,", "no latency");
    check("a,s,Llama 2-70B,h100,fp16,1,1,10,10,1,,,", "do not fit");
    let bad = |row: &str, part: &str| {
        let error = validate("t.csv", &format!("{HEADER}{row}\n"), &catalog).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    bad("a,s,Llama 2-7B,h100,fp16,1,1,10,10,-1,,,", "t.csv:2: latency_s = \"-1\"");
    bad("a,s,Llama 2-7B,h100,fp16,1,1,10,10,nan,,,", "t.csv:2: latency_s");
    bad("a,s,Llama 2-7B,h100,fp16,0,1,10,10,1,,,", "t.csv:2: tp");
    bad("a,s,Llama 2-7B,h100,fp16,1.5,1,10,10,1,,,", "whole number");
    bad(",s,Llama 2-7B,h100,fp16,1,1,10,10,1,,,", "the row has no id");
    assert!(is_table(HEADER) && !is_table("id,source\n1,2\n"));
}
