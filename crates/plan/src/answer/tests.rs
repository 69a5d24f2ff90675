use super::*;
use crate::estimate::Pace;
use spec::Catalog;

fn question(model: &str, cluster: &str, n: usize) -> Question {
    let shape = Shape::find(model).unwrap().unwrap();
    let (sequences, sequence) = default_batch(&shape);
    Question {
        cluster: Catalog::builtin().unwrap().cluster(cluster, Some(n)).unwrap(),
        shape,
        software: None,
        format: NumberFormat::Bf16,
        sequence,
        sequences,
        tokens: Some(300e9),
        keep: 3,
        trainable_only: true,
        strategy: None,
        optimizer: Default::default(),
    }
}

fn ask(q: Question) -> Answer {
    plan(q, &Calibration::builtin().unwrap(), &|_, _| ()).unwrap()
}

#[test]
fn an_answer_has_an_interval_its_evidence_and_its_parts() {
    let answer = ask(question("gpt3-13b", "dgx-h100", 64));
    let best = &answer.best[0];
    assert!(best.step_low_s < best.step_s && best.step_s < best.step_high_s);
    assert!(best.mfu > 0.2 && best.mfu < 0.7, "{}", best.mfu);
    let parts: f64 = best.breakdown.parts().iter().map(|p| p.1).sum();
    assert!((parts / best.step_s - 1.0).abs() < 1e-9);
    assert_eq!(answer.grade.evidence, Evidence::Validated);
    assert!(answer.best[1].loses_s.iter().map(|l| l.1).sum::<f64>() >= 0.0);
    let json = answer.to_json(1.0, 1);
    assert!(json["search"]["layouts_priced"].as_u64().unwrap() > 100);
    assert!(json["best"][0]["layout"]["tp"].is_u64() && json["best"][0]["memory_bytes"].is_f64());
}

#[test]
fn a_given_layout_costs_what_the_search_says_it_does() {
    let calibration = Calibration::builtin().unwrap();
    let searched = ask(question("gpt3-13b", "dgx-h100", 64));
    for choice in &searched.best {
        let text = choice.placement().to_string();
        let given = estimate_given(question("gpt3-13b", "dgx-h100", 64), &text, &calibration).unwrap();
        assert_eq!(given.best[0].placement(), choice.placement(), "{text}");
        assert_eq!(given.best[0].step_s, choice.step_s, "{text}");
        assert!(given.given && given.best[0].fits && given.assumptions[0].starts_with("training stack"));
    }
    let short = estimate_given(question("gpt3-13b", "dgx-h100", 64), "tp=8", &calibration).unwrap();
    assert!(short.assumptions[0].contains("dp=8") && short.searched.layouts_estimated == 1);
    let tight = estimate_given(question("gpt3-175b", "dgx-h100", 64), "tp=8,zero=0", &calibration).unwrap();
    assert!(!tight.best[0].fits);
    for s in short.explain().unwrap() {
        assert!(s.step_s_with_quarter_more <= short.best[0].step_s, "{s:?}");
    }
}

#[test]
fn a_step_that_waits_for_tokens_says_so() {
    let mut q = question("gpt3-13b", "dgx-h100", 64);
    let free = ask(q.clone());
    assert_eq!(free.best[0].loading_s, 0.0);
    let storage = q.cluster.storage.as_mut().unwrap();
    storage.read_bytes_per_s = spec::Measure::exact(1e5);
    let bound = ask(q);
    let best = &bound.best[0];
    let load = bound.storage.as_ref().unwrap().load.value;
    assert!((best.step_s / load - 1.0).abs() < 1e-9 && best.bound == "data loading");
    assert!((best.parts().iter().map(|p| p.1).sum::<f64>() / best.step_s - 1.0).abs() < 1e-9);
    assert!((best.mfu * best.step_s / (free.best[0].mfu * free.best[0].step_s) - 1.0).abs() < 1e-9);
    assert!(bound.assumptions.iter().any(|a| a.contains("storage is slower")));
}

#[test]
fn a_format_that_the_accelerator_lacks_is_refused() {
    let q = Question { format: NumberFormat::Fp8, ..question("gpt3-13b", "dgx-a100", 64) };
    let error = plan(q, &Calibration::builtin().unwrap(), &|_, _| ()).unwrap_err();
    assert!(error.to_string().contains("a100-80-sxm has no fp8"), "{error}");
    assert!(error.hint_text().unwrap().contains("bf16"));
}

#[test]
fn far_from_what_was_validated_says_so() {
    let answer = ask(question("gpt3-13b", "gaudi3-node", 64));
    assert_eq!(answer.grade.evidence, Evidence::Software);
    // The same stack where it was validated, and there with a pace that no run had.
    let (calibration, stack) = (Calibration::builtin().unwrap(), answer.problem.software.name);
    let grade = |family, pace| calibration.spread(family, stack, pace, 64);
    let near = grade("blackwell", Pace::Compute);
    assert_eq!(near.evidence, Evidence::Validated);
    assert!(grade("gaudi", Pace::Compute).factor > near.factor);
    let hopper = |pace| calibration.spread("hopper", "megatron-core-2024", pace, 64);
    let (near, other) = (hopper(Pace::Compute), hopper(Pace::Host));
    assert_eq!((near.evidence, other.evidence), (Evidence::Validated, Evidence::OtherPace));
    assert!(other.factor > near.factor);
}

#[test]
fn more_of_anything_never_hurts() {
    let answer = ask(question("gpt3-13b", "dgx-a100", 32));
    for s in answer.explain().unwrap() {
        assert!(s.elasticity <= 1e-9, "{s:?}");
        assert!(s.step_s_with_quarter_more <= answer.best[0].step_s * (1.0 + 1e-9), "{s:?}");
    }
}
