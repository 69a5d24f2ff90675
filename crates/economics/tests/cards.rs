//! Accelerator-hours of model cards, from the planner's step and the failures around it.

use economics::Date;
use economics::run::{Ask, run};
use plan::answer::{Question, default_batch, plan as search};
use plan::calibration::Calibration;
use spec::{Catalog, NumberFormat};

fn hours(model: &str, cluster: &str, n: usize, tokens: f64) -> f64 {
    let catalog = Catalog::builtin().unwrap();
    let shape = plan::models::find(model).unwrap();
    let (sequences, sequence) = default_batch(&shape);
    let question = Question {
        cluster: catalog.cluster(cluster, Some(n)).unwrap(),
        shape,
        software: None,
        format: NumberFormat::Bf16,
        sequence,
        sequences,
        tokens: Some(tokens),
        keep: 1,
        trainable_only: true,
        strategy: None,
    };
    let answer = search(question, &Calibration::builtin().unwrap(), &|_, _| ()).unwrap();
    run(&catalog, &answer, &Ask::new(tokens, Date::day(2026, 11, 28))).unwrap().accelerator_hours
}

/// The cards of Llama 3 8B and 70B (1.3 and 6.4 million hours for 15T tokens) are not here: their hours count other stages
/// as well, and are 16 and 28 % of the H100's peak where the same cluster trained 405B at 38 to 43 %.
#[test]
fn hours_of_model_cards_are_within_fifteen_percent() {
    for (model, cluster, n, tokens, published) in [
        ("llama2-7b", "meta-rsc", 2048, 2e12, 184_320.0),
        ("llama2-13b", "meta-rsc", 2048, 2e12, 368_640.0),
        ("llama2-70b", "meta-rsc", 2048, 2e12, 1_720_320.0),
        ("llama3-405b", "meta-24k-roce", 16_384, 15.6e12, 30.84e6),
    ] {
        let ratio = hours(model, cluster, n, tokens) / published;
        println!("{model}: {ratio:.3} of {published} hours");
        assert!((0.85..=1.15).contains(&ratio), "{model}: {ratio:.3}");
    }
}
