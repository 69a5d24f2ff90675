use super::*;

fn key() -> Key {
    Key::alone(2048)
}

fn flops(tasks: &[Task]) -> f64 {
    let one = |t: &Task| match *t {
        Task::Gemm { m, n, k, batch, .. } => 2.0 * m * n * k * batch,
        Task::Attention { flops, .. } => flops,
        _ => 0.0,
    };
    tasks.iter().map(one).sum()
}

/// Forward, input and weight gradients of all sections hold the model's FLOPs (flash attention's backward computes
/// scores again: half a forward more).
#[test]
fn sections_hold_the_models_flops() {
    for name in ["gpt3-175b", "llama1-65b", "deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b"] {
        let shape = Shape::find(name).unwrap().unwrap();
        let key = key();
        let t = Template::build(&shape, &key).unwrap();
        let with = shape.expert_layers() as f64;
        let without = shape.model.layers as f64 - with;
        let of = |s: &Section| flops(&s.forward) + flops(&s.input) + flops(&s.weight);
        let layers = of(&t.layer) * without + t.expert_layer.as_ref().map_or(0.0, of) * with;
        // The scores, over the causal half.
        let keys = shape.model.heads * shape.latent.map_or(shape.model.head_dim, |l| l.key_dim());
        let again = 2048.0f64.powi(2) * keys as f64 * shape.model.layers as f64;
        let found = layers + of(&t.head) - again;
        let expected = shape.flops_per_token(2048.0, true) * 2048.0;
        assert!((found / expected - 1.0).abs() < 0.01, "{name}: {found:e} against {expected:e}");
    }
}

#[test]
fn parameters_of_sections_add_up_to_the_model() {
    for name in ["gpt3-175b", "llama1-65b", "deepseek-v3", "qwen3-235b-a22b"] {
        let shape = Shape::find(name).unwrap().unwrap();
        let t = Template::build(&shape, &key()).unwrap();
        let with = shape.expert_layers() as f64;
        let without = shape.model.layers as f64 - with;
        let expert = t.expert_layer.as_ref().map_or(0.0, |s| s.params + s.expert_params);
        let found = t.layer.params * without + expert * with + t.embed.params + t.head.params;
        assert!((found / shape.params() - 1.0).abs() < 0.01, "{name}: {found:e}");
    }
}

#[test]
fn tensor_parallelism_splits_work_and_adds_messages() {
    let shape = Shape::find("llama1-65b").unwrap().unwrap();
    let one = Template::build(&shape, &key()).unwrap();
    for sequence_parallel in [false, true] {
        let eight = Template::build(&shape, &Key { tp: 8, sequence_parallel, ..key() }).unwrap();
        assert!((flops(&eight.layer.forward) * 8.0 / flops(&one.layer.forward) - 1.0).abs() < 1e-9);
        let wire = |s: &Section| -> f64 {
            let one = |t: &Task| match t {
                Task::Talk { what: Collective::AllReduce, bytes, .. } => 2.0 * bytes,
                Task::Talk { bytes, .. } => *bytes,
                _ => 0.0,
            };
            s.forward.iter().map(one).sum()
        };
        // Two all-reduces of the residual stream, or the same bytes as gather and scatter.
        assert_eq!(wire(&eight.layer), 2.0 * 2.0 * 2.0 * 2048.0 * 8192.0);
        assert!(eight.layer.kept_bytes < one.layer.kept_bytes);
    }
}

/// The program takes the head's rows in leaves, frameworks at once: as many products, bytes and messages, in few kernels.
#[test]
fn frameworks_take_all_rows_of_the_head_at_once() {
    let shape = Shape::find("gpt3-175b").unwrap().unwrap();
    let build = |whole_layers| {
        let key = Key { tp: 8, sequence_parallel: true, micro_batch: 8, whole_layers, ..key() };
        Template::build(&shape, &key).unwrap().head.input
    };
    let (leaves, whole) = (build(false), build(true));
    let said = |tasks: &[Task]| -> f64 {
        tasks.iter().map(|t| if let Task::Talk { bytes, .. } = t { *bytes } else { 0.0 }).sum()
    };
    assert!((flops(&leaves) / flops(&whole) - 1.0).abs() < 1e-12);
    assert!((said(&leaves) / said(&whole) - 1.0).abs() < 1e-12);
    assert!(leaves.len() > 2 * whole.len(), "{} and {}", leaves.len(), whole.len());
    let rows =
        whole.iter().filter(|t| matches!(t, Task::Gemm { m, k, .. } if *m == 16384.0 || *k == 16384.0));
    assert_eq!(rows.count(), 3);
}

#[test]
fn recompute_trades_memory_for_work() {
    let shape = Shape::find("llama1-65b").unwrap().unwrap();
    let build =
        |recompute, whole_layers| Template::build(&shape, &Key { recompute, whole_layers, ..key() }).unwrap();
    let none = build(Recompute::None, true);
    let full = build(Recompute::Full, true);
    assert_eq!(flops(&full.layer.input), flops(&none.layer.input) + flops(&none.layer.forward));
    assert!(full.layer.kept_bytes < 0.2 * none.layer.kept_bytes);
    // The program itself leaves out what backward does not need.
    let own = build(Recompute::Full, false);
    assert!(flops(&own.layer.input) < flops(&full.layer.input));
    assert!(own.layer.kept_bytes < 0.2 * none.layer.kept_bytes);
}
