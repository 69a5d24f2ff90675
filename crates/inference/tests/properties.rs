//! What holds of every answer: never faster than the bytes and the arithmetic allow, never worse on a better machine,
//! nothing that does not fit.

use inference::answer::{Answer, Price, Question, answer};
use inference::format::Weights;
use inference::models;
use inference::ops::Forward;
use inference::pass::{Batch, Engine};
use inference::serve::Traffic;
use inference::stack::Stack;
use proptest::prelude::*;
use spec::Catalog;
use spec::cluster::Knob;

const MODELS: [&str; 5] = ["llama2-7b", "llama3-70b", "mixtral-8x7b", "deepseek-v2", "gpt3-13b"];
const CLUSTERS: [&str; 5] = ["dgx-a100", "dgx-h100", "dgx-b200", "mi300x-node", "gb200-nvl72"];
const WEIGHTS: [Weights; 5] = [Weights::Bf16, Weights::Fp8, Weights::Int8, Weights::Int4, Weights::Fp4];

fn stacks() -> Vec<Stack> {
    Stack::all().unwrap()
}

fn question(model: usize, cluster: usize, tp: usize, weights: usize, stack: usize) -> Question {
    let stacks = stacks();
    Question {
        shape: models::find(MODELS[model % MODELS.len()]).unwrap(),
        cluster: Catalog::builtin().unwrap().cluster(CLUSTERS[cluster % CLUSTERS.len()], Some(tp)).unwrap(),
        tp,
        weights: WEIGHTS[weights % WEIGHTS.len()],
        cache: None,
        stack: stacks[stack % stacks.len()].clone(),
        traffic: Traffic { input: 512, output: 64 },
        concurrency: vec![1],
        queue: true,
        price: None,
    }
}

fn engine(q: &Question, a: &Answer) -> Engine {
    Engine::new(&q.shape, &q.cluster, q.tp, q.weights, a.cache, &q.stack).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_beats_the_hardware(
        (model, cluster, weights, stack) in (0usize..5, 0usize..5, 0usize..5, 0usize..5),
        tp in 0u32..4, clients in 1usize..300, input in 1usize..1500, output in prop_oneof![Just(1), 1usize..300],
    ) {
        let mut q = question(model, cluster, 1 << tp, weights, stack);
        q.traffic = Traffic { input, output };
        q.concurrency = vec![clients];
        let Ok(a) = answer(&q) else { return Ok(()) };
        let e = engine(&q, &a);
        let load = a.loads[0];
        let p = load.replica;
        prop_assert!(p.running <= clients && p.running <= a.requests_max);
        // Between tokens, the weights and every request's cache are read once, by each rank at the rated throughput.
        if output > 1 {
            let batch = Batch::decode(p.running as f64, input as f64);
            let least = e.bytes_read(&batch) / e.bytes_per_s;
            prop_assert!(p.itl_s >= least, "{} {}", p.itl_s, least);
        }
        let prompt = Batch::prefill(1.0, input as f64);
        prop_assert!(p.ttft_s >= e.flops(&prompt) / e.narrow.peak.max(e.wide.peak), "{}", p.ttft_s);
        prop_assert!(p.ttft_s >= e.bytes_read(&prompt) / e.bytes_per_s, "{}", p.ttft_s);
        // Parts add up: a request is its first token and the others, clients are requests times their time.
        let whole = p.ttft_s + (output - 1) as f64 * p.itl_s;
        prop_assert!((p.latency_s / whole - 1.0).abs() < 1e-9);
        let inside = p.requests_per_s * p.latency_s;
        prop_assert!((inside / clients as f64 - 1.0).abs() < 1e-9, "{inside} {clients}");
        prop_assert!((p.requests_per_s * output as f64 / load.tokens_per_s - 1.0).abs() < 1e-9);
        let values = [p.ttft_s, p.itl_s, p.latency_s, p.queue_s, load.tokens_per_s];
        prop_assert!(values.iter().all(|x| x.is_finite() && *x >= 0.0));
    }

    #[test]
    fn a_better_machine_is_never_slower(
        (model, cluster, weights, stack) in (0usize..5, 0usize..5, 0usize..5, 0usize..5),
        tp in 0u32..4, clients in 1usize..200,
        knob in prop::sample::select(vec![Knob::MemoryBandwidth, Knob::Flops, Knob::ScaleUp, Knob::MemoryCapacity]),
        by in 1.05f64..4.0,
    ) {
        let mut q = question(model, cluster, 1 << tp, weights, stack);
        q.concurrency = vec![1, clients];
        let Ok(before) = answer(&q) else { return Ok(()) };
        q.cluster = q.cluster.clone().scaled(knob, by);
        let after = answer(&q).unwrap();
        let slack = 1.0 + 1e-9;
        let (one, better) = (before.loads[0], after.loads[0]);
        prop_assert!(better.ttft_ms <= one.ttft_ms * slack && better.itl_ms <= one.itl_ms * slack);
        let (many, better) = (before.loads[1], after.loads[1]);
        if knob == Knob::MemoryCapacity {
            // More run at once: fewer wait.
            prop_assert!(better.replica.running >= many.replica.running);
            prop_assert!(after.requests_max >= before.requests_max);
        } else {
            prop_assert!(better.latency_s <= many.latency_s * slack, "{many:?} {better:?}");
            prop_assert!(better.tokens_per_s >= many.tokens_per_s / slack);
        }
    }

    #[test]
    fn more_in_a_pass_never_takes_less(
        (model, cluster, weights, stack) in (0usize..5, 0usize..5, 0usize..5, 0usize..5),
        tp in 0u32..4, n in 1.0f64..500.0, cached in 1.0f64..4000.0, more in 1.01f64..3.0,
    ) {
        let q = question(model, cluster, 1 << tp, weights, stack);
        let Ok(a) = answer(&q) else { return Ok(()) };
        let e = engine(&q, &a);
        let time = |b: Batch| e.time(&b).total_s();
        let base = time(Batch::decode(n, cached));
        prop_assert!(time(Batch::decode(n * more, cached)) >= base);
        prop_assert!(time(Batch::decode(n, cached * more)) >= base);
        let both = Batch { decoding: n, cached, ..Batch::prefill(1.0, cached) };
        prop_assert!(time(both) >= base);
        prop_assert!(time(Batch::prefill(1.0, cached * more)) >= time(Batch::prefill(1.0, cached)));
    }
}

#[test]
fn what_does_not_fit_is_refused_with_what_does() {
    let mut q = question(0, 1, 1, 0, 1);
    q.queue = false;
    q.traffic = Traffic { input: 2000, output: 96 };
    q.concurrency = vec![100_000];
    let refused = answer(&q).unwrap_err();
    let hint = refused.hint_text().unwrap();
    let most: usize =
        hint.split("--concurrency ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(refused.to_string().contains("requests fit at once"), "{refused}");
    q.concurrency = vec![most];
    let fits = answer(&q).unwrap();
    let m = fits.memory;
    let used = m.weights_bytes + m.working_bytes + most as f64 * m.cache_request_bytes;
    assert!(used <= m.room_bytes && used + m.cache_request_bytes > m.room_bytes);
    q.concurrency = vec![most + 1];
    assert!(answer(&q).is_err());
    // What waits is counted: Little's law with as many in the server as fit.
    q.queue = true;
    q.concurrency = vec![2 * most];
    let queued = answer(&q).unwrap().loads[0];
    assert_eq!(queued.replica.running, most);
    assert!((queued.tokens_per_s / fits.loads[0].tokens_per_s - 1.0).abs() < 1e-9);
    assert!(queued.replica.queue_s > 0.9 * fits.loads[0].latency_s);
}

#[test]
fn nonsense_is_refused() {
    let check = |change: &dyn Fn(&mut Question), part: &str| {
        let mut q = question(1, 1, 8, 0, 1);
        change(&mut q);
        let e = answer(&q).expect_err(part);
        assert!(e.to_string().contains(part) && e.hint_text().is_some() && e.exit_code() == 2, "{e}");
    };
    check(&|q| q.traffic.input = 0, "--input 0");
    check(&|q| q.traffic.output = 0, "--output 0");
    check(&|q| q.concurrency = vec![0], "--concurrency 0");
    check(&|q| q.tp = 0, "--tp 0");
    check(&|q| q.tp = 3, "--tp 3 does not divide 8");
    check(&|q| q.tp = 16, "--tp 16, expected 1 to 8");
    check(&|q| q.tp = 1, "do not fit");
    check(&|q| q.traffic.input = 1 << 20, "takes 8192");
    for price in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let price = Price { usd_per_accelerator_hour: price, source: "test".to_owned() };
        check(&|q| q.price = Some(price.clone()), "--price");
    }
}

#[test]
fn money_is_accelerators_times_hours() {
    let mut q = question(0, 1, 2, 0, 1);
    q.cluster = Catalog::builtin().unwrap().cluster("dgx-h100", Some(8)).unwrap();
    q.concurrency = vec![1, 4, 7, 8];
    q.price = Some(Price { usd_per_accelerator_hour: 2.5, source: "test".to_owned() });
    let a = answer(&q).unwrap();
    assert_eq!((a.replicas, a.accelerators), (4, 8));
    for l in &a.loads {
        let hour = l.tokens_per_s * 3600.0 / 1e6 * l.usd_per_million_tokens.unwrap();
        assert!((hour / 20.0 - 1.0).abs() < 1e-12);
    }
    // Replicas do not help one client, and four clients have one each.
    let [one, four, seven, eight] = [0, 1, 2, 3].map(|i| a.loads[i]);
    assert!((four.tokens_per_s / one.tokens_per_s - 4.0).abs() < 1e-9);
    assert_eq!(four.itl_ms, one.itl_ms);
    assert!(seven.tokens_per_s < eight.tokens_per_s && seven.itl_ms == eight.itl_ms);
    assert!(a.curve.iter().any(|l| l.concurrency == a.knee));
}

/// Rules of thumb of the field, from shapes alone.
#[test]
fn caches_and_experts_show() {
    let at = |model: &str, tp: usize| Forward::of(&models::find(model).unwrap(), tp).unwrap();
    // Grouped queries: an eighth of what full heads would cache.
    let grouped = at("llama3-70b", 1).cache_elements;
    assert_eq!(grouped * 8.0, 80.0 * 2.0 * 8192.0);
    // Half a batch of Mixtral meets nearly all experts, one token a quarter of them.
    let mut q = question(2, 1, 2, 0, 1);
    q.concurrency = vec![1, 32];
    let a = answer(&q).unwrap();
    let e = engine(&q, &a);
    let read = |n: f64| e.bytes_read(&Batch::decode(n, 1.0));
    assert!(read(1.0) < 0.32 * read(64.0) && read(32.0) > 0.98 * read(64.0));
}
