//! Serving as people meet it: answers, the price, tables of published figures, and input that makes no sense.

use crate::common::Lab;

const SERVE: &str = "inference --model llama2-7b --cluster dgx-h100 --tp 2 --input 200 --output 200";

/// Refused with one error that holds `what` and a hint.
fn refused(lab: &Lab, args: &str, what: &str) {
    let ran = lab.run(args);
    assert_eq!(ran.code, Some(2), "{args}\n{}{}", ran.out, ran.err);
    assert_eq!(ran.err.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{args}\n{}", ran.err);
    assert!(ran.err.contains(what), "{args}\n{}", ran.err);
    assert!(ran.err.contains("\nhint: ") || ran.err.contains("try '--help'"), "{args}\n{}", ran.err);
    assert!(ran.out.is_empty() && !ran.err.contains("panicked"), "{args}\n{}{}", ran.out, ran.err);
}

#[test]
fn an_answer_has_the_keys_that_scripts_read() {
    let lab = Lab::new();
    let json = lab.json(&format!("{SERVE} --concurrency 1,8,64 --price 2.5 --json"));
    let loads = json["loads"].as_array().expect("loads");
    assert_eq!(loads.iter().map(|l| l["concurrency"].as_u64()).collect::<Vec<_>>(), [1, 8, 64].map(Some));
    for load in loads {
        for key in ["ttft_ms", "itl_ms", "latency_s", "tokens_per_s", "usd_per_million_tokens"] {
            assert!(load[key].as_f64().is_some_and(|v| v > 0.0), "{key}: {load}");
        }
        let (usd, rate) = (&load["usd_per_million_tokens"], &load["tokens_per_s"]);
        let an_hour = usd.as_f64().unwrap() * rate.as_f64().unwrap() * 3600.0 / 1e6;
        assert!((an_hour / 5.0 - 1.0).abs() < 1e-9, "two accelerators at 2.5: {an_hour}");
    }
    let curve = json["curve"].as_array().expect("a curve");
    assert!(curve.iter().any(|l| l["concurrency"] == json["knee"]));
    assert!(json["assumptions"].as_array().is_some_and(|a| a.len() >= 3));
    let text = lab.ok(&format!("{SERVE} --concurrency 1,8,64"));
    for part in ["knee at", "first token", "tokens/s", "memory of each", "on demand of", "assumed"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn formats_and_stacks_change_the_answer_as_they_should() {
    let lab = Lab::new();
    let itl = |args: &str| {
        let json = lab.json(&format!("{SERVE} --concurrency 1 --json {args}"));
        json["loads"][0]["itl_ms"].as_f64().expect("a time")
    };
    let wide = itl("");
    assert!(itl("--weights fp8") < wide && itl("--weights int8") < wide && itl("--weights int4") < wide);
    assert!(itl("--stack vllm-2024") > wide);
}

#[test]
fn the_fewest_accelerators_are_found() {
    let lab = Lab::new();
    let check = |args: &str, tp: u64| {
        let json = lab.json(&format!("inference --cluster dgx-h100 --json {args}"));
        assert_eq!(json["tp"].as_u64(), Some(tp), "{args}");
    };
    check("--model meta-llama/Llama-3.1-8B-Instruct", 1);
    // 141 GB in 16 bit: two of 80 GB hold it, with room for a few requests.
    check("--model Llama-3.1-70B", 2);
    check("--model Llama-3.1-70B --weights int4", 1);
    check("--model mistralai/Mixtral-8x7B-Instruct-v0.1", 2);
}

#[test]
fn serving_that_makes_no_sense_is_refused() {
    let lab = Lab::new();
    let check = |args: &str, what: &str| refused(&lab, &format!("{SERVE} {args}"), what);
    check("--concurrency 100000", "requests fit at once");
    check("--concurrency 0", "--concurrency 0");
    check("--concurrency -1", "-1");
    check("--price 0", "--price 0");
    check("--price -2", "--price -2");
    check("--price nan", "--price NaN");
    check("--price inf", "--price inf");
    check("--weights fp7", "unknown format of weights \"fp7\"");
    check("--cache int2", "unknown format of cached");
    check("--stack vlm", "unknown serving stack \"vlm\"");
    check("--accelerators 3", "--tp 2 does not divide 3");
    check("--accelerators 0", "--accelerators 0");
    let check = |args: &str, what: &str| refused(&lab, &format!("inference {args}"), what);
    check("--model llama2-7b --cluster dgx-h100 --input 0", "--input 0");
    check("--model llama2-7b --cluster dgx-h100 --input 4000 --output 200", "takes 4096");
    check("--model llama2-70b --cluster dgx-h100 --tp 1", "do not fit");
    check("--model llama2-7b --cluster dgx-h100 --tp 3", "--tp 3 for the 32 heads");
    check("--model lama2-7b --cluster dgx-h100", "no model is called");
    check("--model llama2-7b --cluster dgx-h101", "unknown cluster");
}

const HEADER: &str = "id,source,model,accelerator,precision,tp,concurrency,input_tokens,output_tokens,latency_s,ttft_ms,itl_ms,tokens_per_s";

#[test]
fn tables_of_serving_figures_are_validated() {
    let lab = Lab::new();
    let rows = "a,NVIDIA Llama 2 latencies,Llama 2-7B,h100-sxm5,fp16,1,1,200,200,1.44,,,\n\
                b,x,Llama 9,h100,fp16,1,1,200,200,1,,,\n";
    lab.write("serving.csv", format!("{HEADER}\n{rows}"));
    let json = lab.json("validate serving.csv --json");
    let v = &json["inference"];
    assert_eq!(v["rows"].as_u64(), Some(1));
    for key in ["median_abs_error", "p90_abs_error", "mean_abs_error", "max_abs_error"] {
        assert!(v[key].as_f64().is_some_and(|e| e < 0.05), "{key}: {v}");
    }
    assert_eq!(v["not_priced"].as_array().map(Vec::len), Some(1));
    let text = lab.ok("validate serving.csv");
    assert!(text.contains("1 serving figures") && text.contains("no model is called `Llama 9`"), "{text}");
    refused(&lab, "validate serving.csv --held-out", "--held-out");
    lab.write("serving.csv", format!("{HEADER}\n"));
    refused(&lab, "validate serving.csv", "a header without rows");
}
